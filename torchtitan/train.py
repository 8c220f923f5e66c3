"""The entry: main() reads the command line, has extensions/wiring.py build the Trainer, trains, and returns an exit
code."""

from __future__ import annotations

import errno
import faulthandler
import os
import signal
import sys
import time
import traceback

from torchtitan.config import dump_toml, load_config
from torchtitan.extensions import wiring
from torchtitan.tools.constants import RANK_VARIABLES, STOP_SIGNALS
from torchtitan.tools.errors import FAILED, GATE_NOT_HELD, LOST_A_RANK, STOPPED, GateError, UserError
from torchtitan.tools.logging import init_logger, logger


def main(args: list[str]) -> int:
    """Train the stage that args describe; the exit code. RANK, LOCAL_RANK and WORLD_SIZE are torchrun's variables.

    0: the stage has ended. STOPPED: asked to stop, and saved. GATE_NOT_HELD: the stage has ended, but a gate does not
    hold. LOST_A_RANK: another rank has ended or hangs. 130: interrupted before the first step. FAILED: anything else. 0
    also after --job.print_config.
    """
    rank, local_rank, world_size = (int(os.environ.get(k, d)) for k, d in RANK_VARIABLES)
    init_logger(rank, world_size)
    faulthandler.enable()
    # Slurm sends its warning to every process of a job step: it must not kill a process that is still starting
    early: list[int] = []
    signal.signal(signal.SIGUSR1, lambda signum, _: early.append(signum))
    try:
        config = load_config(args)
        if config.job.print_config:
            print(dump_toml(config), end="")
            return 0
        if config.stage.run_chain:
            raise UserError(
                "stage.run_chain is for ./run_train.sh, which starts one stage after the other; these processes train "
                "a single stage. Leave it out to train this stage."
            )
        wiring.check(config, world_size)  # before PyTorch, which takes seconds to import
        from torchtitan.components.bad_loss import BadLossError

        trainer = wiring.build_trainer(config, rank, local_rank, world_size)
        for stop_signal in STOP_SIGNALS:
            if stop_signal != signal.SIGHUP or signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
                signal.signal(stop_signal, lambda *_: setattr(trainer, "stop_requested", True))
        trainer.stop_requested |= bool(early)
        try:
            trainer.train()
        except BadLossError as e:
            if rank == 0:
                logger.error(f"Stopped, nothing saved: {e}")
            return FAILED
        except RuntimeError as e:
            if not any(words in str(e) for words in LOST_CONNECTION):
                raise
            why = f"Another rank has ended (and says why) or cannot be reached: {str(e).splitlines()[0]}"
            return _give_up(f"{why}; {wiring.who_answers(trainer)}", rank, LOST_A_RANK)
        finally:
            trainer.close()
        return 0 if trainer.step >= config.training.steps else STOPPED
    except KeyboardInterrupt:
        logger.info("interrupted before the first step: there is nothing to save")
        return 130
    except GateError as e:
        return _give_up(str(e), rank, GATE_NOT_HELD)
    except UserError as e:
        return _give_up(str(e), rank)
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return _give_up(f"A disk is full, most likely that of job.dump_folder: {e}. {AFTER_MAKING_ROOM}", rank)
    except RuntimeError as e:
        if type(e).__name__ in ("DistBackendError", "DistNetworkError"):  # NCCL's, or the store's
            traceback.print_exc()
            return LOST_A_RANK
        if type(e).__name__ == "DistStoreError":
            waited = config.comm.init_timeout_seconds
            why = f"Not all ranks have connected in comm.init_timeout_seconds = {waited}: {str(e).splitlines()[0]}"
            return _give_up(why, rank, LOST_A_RANK)
        if not any(words in str(e) for words in LOST_CONNECTION):
            raise
        why = f"Another rank has ended (and says why), hangs or cannot be reached: {str(e).splitlines()[0]}"
        return _give_up(why, rank, LOST_A_RANK)


def _give_up(message: str, rank: int, code: int = FAILED) -> int:
    """Log the message; the exit code. Rank 0 speaks for all, since every rank finds most mistakes.

    The other ranks wait, so that the launcher ends them before they log; they log only if rank 0 has not failed.
    """
    if rank > 0:
        for stop_signal in (signal.SIGTERM, signal.SIGINT):
            signal.signal(stop_signal, signal.SIG_DFL)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        time.sleep(SECONDS_FOR_RANK_0)
    logger.error(message)
    return code


SECONDS_FOR_RANK_0 = 10
AFTER_MAKING_ROOM = "Make room and start again: training goes on from the newest complete checkpoint."
LOST_CONNECTION = (  # parts of gloo's messages
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "timeout caused pair closure",
)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    # Not sys.exit: on a busy machine finished processes have aborted ("terminate called without an active exception"),
    # most likely because a thread of gloo needs the interpreter while it shuts down.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
