"""What ends a verb in one line, without a traceback."""


class UserError(Exception):
    """Bad input: one line that names the key, its value and what would be right.

    Every verb turns it into that line on standard error and exit code 2; nothing is written before it.
    """


class CheckFailed(Exception):
    """A verb's own result failed its check, though no input is wrong: one line that says what, exit code 1."""
