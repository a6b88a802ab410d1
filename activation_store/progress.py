"""How long work tells how far it is."""

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with (done, total), in whatever unit the work counts; a front end may show it, and the default ignores it."""
