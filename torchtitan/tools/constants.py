"""The two numbers that several rooms share."""

BLOCK = 128
"""Tokens in a block: the unit of FlexAttention's block masks and of what context-parallel ranks hold and exchange."""

IGNORED_LABEL = -100
"""Label of a token that is not trained on: ignore_index of PyTorch's cross_entropy."""
