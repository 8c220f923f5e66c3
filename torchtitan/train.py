"""main(): configuration -> Trainer -> loop."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import time

from torchtitan.config import dump_toml, load_config
from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import init_logger, logger


def main(args: list[str]) -> int:
    """Train the stage that args describe; the exit code. Ranks are told apart by torchrun's variables."""
    rank, local_rank, world_size = (int(os.environ.get(k, d)) for k, d in RANK_VARIABLES)
    init_logger(rank, world_size)
    faulthandler.enable()
    try:
        config = load_config(args)
        if config.job.print_config:
            print(dump_toml(config), end="")
            return 0
        # the imports of PyTorch take seconds: a mistake in the TOML should not
        from torchtitan.config.checks import check_config

        check_config(config, world_size)
        from torchtitan.trainer import NotFiniteError, Trainer, prepare_inputs

        trainer = Trainer(config, prepare_inputs(config, world_size), rank, local_rank, world_size)
        for stop_signal in (signal.SIGTERM, signal.SIGINT):
            signal.signal(stop_signal, lambda *_: setattr(trainer, "stop_requested", True))
        try:
            trainer.train()
        except NotFiniteError as e:
            if rank == 0:
                logger.error(f"Stopped, nothing saved: {e}")
            return 1
        finally:
            trainer.close()
        return 0
    except UserError as e:
        # every rank finds the same mistake: rank 0 explains it, and the launcher ends the others meanwhile
        if rank > 0:
            time.sleep(3)
        logger.error(str(e))
        return 1


RANK_VARIABLES = (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
