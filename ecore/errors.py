"""The one exception a user's mistake may raise."""


class InputError(ValueError):
    """A user's input cannot be used.

    The message is one line that says what is wrong, where (file and line when there is one) and what was
    expected. The command line prints it without a traceback and exits with code 2.
    """
