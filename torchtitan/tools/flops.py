"""Model FLOPs of a micro-batch, counting only the attention that the mask allows."""

from __future__ import annotations


def training_flops(matmul_parameters: int, tokens: int, attention_width: int, attended_pairs: float) -> float:
    """FLOPs of forward and backward without recomputation.

    Each parameter that multiplies activations costs 6 a token (PaLM, arXiv 2204.02311, appendix B). Each allowed
    (query, key) pair costs, for each unit of attention_width = layers * heads * head_dim, 2 for the logit and 2 for
    the value, three times over for forward and backward.
    """
    return 6.0 * matmul_parameters * tokens + 12.0 * attention_width * attended_pairs
