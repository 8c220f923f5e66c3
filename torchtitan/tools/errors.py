"""The one exception for mistakes that a user can mend.

Its message is a paragraph for people: the TOML key or file, the value, what would work, with the arithmetic.
main() prints it without a traceback and exits 1; anything else that is raised is a bug and keeps its traceback.
"""


class UserError(Exception):
    """Wrong configuration, data, weights or checkpoint."""
