"""FLOPs of a step, counting only the attention that the mask allows: what MFU and HFU are made of.

MFU counts what the model needs, forward and backward; HFU what the hardware is made to do, recomputation included
(PaLM, arXiv 2204.02311, appendix B; Korthikanti et al., arXiv 2205.05198). In neither are the logits that a flash
kernel computes again inside its backward, nor padding.
"""

from __future__ import annotations


def training_flops(matmul_parameters: float, tokens: float, attention_width: float, attended_pairs: float) -> float:
    """FLOPs of forward and backward without recomputation.

    Each parameter that multiplies activations costs 6 a token (PaLM, appendix B). Each allowed (query, key) pair costs,
    for each unit of attention_width = layers * heads * head_dim, 2 for the logit and 2 for the value, three times over
    for forward and backward.
    """
    return 3 * forward_flops(matmul_parameters, tokens, attention_width, attended_pairs)


def forward_flops(matmul_parameters: float, tokens: float, attention_width: float, attended_pairs: float) -> float:
    """FLOPs of forward alone, or of its recomputation."""
    return 2.0 * matmul_parameters * tokens + 4.0 * attention_width * attended_pairs
