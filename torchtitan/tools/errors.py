"""The exception for mistakes that a user can mend, and exit codes.

Its message is a paragraph for people: the TOML key or file, its value, and what would work, with the arithmetic. main()
prints it without a traceback and exits with 1. Any other exception is a bug and keeps its traceback.
"""

# Exit codes of train.py, the launcher and multinode/train.sbatch, beside 0: the stage has ended, and well.
FAILED = 1
GATE_NOT_HELD = 3
NOT_ENDED = 4  # only of a command that asks whether a stage has ended
LOST_A_RANK = 76  # another rank has ended or hangs; this rank does not know why
STOPPED = 75  # asked to stop, and saved; started again, it goes on (EX_TEMPFAIL of sysexits.h)


class UserError(Exception):
    """Wrong configuration, data, weights or checkpoint."""


class GateError(UserError):
    """A stage has ended and its checkpoint is kept, but a gate of [[stage.gates]] does not hold."""
