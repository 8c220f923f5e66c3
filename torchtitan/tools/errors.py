"""The one exception for mistakes that a user can mend.

Its message is a paragraph for people: the TOML key or file, the value, what would work, with the arithmetic.
main() prints it without a traceback and exits 1; anything else that is raised is a bug and keeps its traceback.
"""

# Exit codes of train.py, the launcher and multinode/train.sbatch, beside 0: the stage has ended, and well.
FAILED = 1
GATE_NOT_HELD = 3
NOT_ENDED = 4  # only where it is asked whether a stage has ended
LOST_A_RANK = 76  # another rank has ended or hangs; this one has nothing to say about why
STOPPED = 75  # asked to stop; it has saved, and goes on when started again (EX_TEMPFAIL of sysexits.h)


class UserError(Exception):
    """Wrong configuration, data, weights or checkpoint."""


class GateError(UserError):
    """A stage has ended and its checkpoint is kept, but a gate of [[stage.gates]] does not hold."""
