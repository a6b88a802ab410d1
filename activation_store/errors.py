"""The one error that means: what was given is wrong, and here is what to change."""


class InputError(ValueError):
    """Bad input: a field, file or server, the value given, and the mend, in one line.

    The command line prints the message and exits with code 2; everything else that escapes is a fault of ours.
    """


def first_line(error: BaseException) -> str:
    """Return the first non-empty line of an exception's message, to be quoted inside one of ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
