"""The two numbers that several packages share."""

BLOCK = 128
"""Tokens per block: the unit of FlexAttention's block masks, and of the tokens that context-parallel ranks hold and
exchange."""

IGNORED_LABEL = -100
"""The label of a token that is not trained on: ignore_index of PyTorch's cross_entropy."""
