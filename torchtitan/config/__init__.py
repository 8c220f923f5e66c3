"""The configuration of a stage: its schema, how it is read, and the checks that need only arithmetic.

Importing this package does not import torch: `--help` and a misspelt key are answered at once.
"""

from torchtitan.config.manager import as_tables, dump_toml, load_config
from torchtitan.config.schema import JobConfig

__all__ = ["JobConfig", "as_tables", "dump_toml", "load_config"]
