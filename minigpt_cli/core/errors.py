"""What can go wrong in a way that a user can act on. Owns the exceptions and the exit codes they stand for.

A message is one or two plain lines: what is wrong, where, and what to do.
"""


class MinigptError(Exception):
    """The work failed while running: a damaged file, a full disk, a loss that is not finite. Exit code 1."""

    exit_code = 1


class UserError(MinigptError, ValueError):
    """The input, the config or the arguments are wrong, and the user can mend them. Exit code 2."""

    exit_code = 2


class CheckpointError(MinigptError):
    """A checkpoint that is damaged, not ours, or made by a newer minigpt. Exit code 1."""


class Stopped(MinigptError):
    """A signal asked a run to stop, and the run saved itself first. Exit code 130 (Ctrl-C) or 143."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class ToldElsewhere(MinigptError):
    """Another process of the same run has the same trouble and tells of it; this one ends without a word."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("")
        self.exit_code = exit_code
