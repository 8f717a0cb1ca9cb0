"""The ways things go wrong that a user can do something about."""

from collections.abc import Sequence

# What a model's own code may raise: its cell fails and the run goes on.
MODEL_ERRORS = (
    RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, MemoryError,
    AssertionError, NameError, ImportError, OSError,
)  # fmt: skip


class InputError(Exception):
    """Wrong use or bad input: the message is one line that names the offending thing and what to do. Exit status 2."""


class CellError(Exception):
    """One model could not be measured (NaN, out of memory, unloadable weights) while others can. Exit status 1."""


class LostPeerError(Exception):
    """Another process of this run has died: nothing more can be measured here. Exit status 1."""


PREVIEWED = 5  # names in a message


def preview(names: Sequence[str]) -> str:
    """A few names for a message."""
    more = f" and {len(names) - PREVIEWED} more" if len(names) > PREVIEWED else ""
    return ", ".join(names[:PREVIEWED]) + more


def first_line(error: BaseException) -> str:
    """What an error says, in one line: the first of its text, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
