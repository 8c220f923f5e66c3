"""Constants that several packages share. Imports no PyTorch."""

import signal

BLOCK = 128
"""Tokens per block: the unit of FlexAttention's block masks, and of the tokens that context-parallel ranks hold and
exchange."""

IGNORED_LABEL = -100
"""The label of a token that is not trained on: ignore_index of PyTorch's cross_entropy."""

CUT_AT = {"cut_4k": 4096, "cut_128k": 131072}
"""data.strategy -> tokens of the longest piece of a document."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""What asks a run to stop; Slurm sends SIGUSR1 as a warning."""

RANK_VARIABLES = (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"))
"""The environment variables in which torchrun and our launcher tell a process its place; their values without one."""
