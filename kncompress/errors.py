"""The one exception that is the user's to fix."""


class UserError(Exception):
    """Bad input: one line that names the key, its value and what would be right.

    Every verb turns it into that line on standard error and exit code 2; nothing is written before it.
    """
