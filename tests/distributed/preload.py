"""What the server that all ranks of the tests are forked from imports, so that no rank spends seconds on it.

gc.freeze keeps these objects out of every collection: each trainer collects at its start, and in a fork a collection
over a million objects copies their pages first.
"""

import gc

import datasets  # noqa: F401
import pandas  # noqa: F401
import tokenizers  # noqa: F401
import torch.profiler  # noqa: F401

import torchtitan.extensions.wiring  # noqa: F401
import torchtitan.trainer  # noqa: F401
from torchtitan.config import load_config

load_config([])  # imports the parser of the command line
gc.collect()
gc.freeze()
