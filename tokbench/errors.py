"""The ways things go wrong that a user can do something about."""

import os
import re
import struct
import sysconfig
import tokenize
import traceback
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from pickle import PickleError

# What a model's own code may raise: its cell fails and the run goes on.
MODEL_ERRORS = (
    RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, MemoryError,
    AssertionError, NameError, ImportError, OSError,
)  # fmt: skip

# What readers of weights and of arrays may raise: they run into whatever damage has left.
FILE_ERRORS = (*MODEL_ERRORS, EOFError, struct.error, PickleError)
ARRAY_ERRORS = (*FILE_ERRORS, SyntaxError, SystemError, tokenize.TokenError, zipfile.BadZipFile, zlib.error)


class InputError(Exception):
    """Wrong use or bad input: the message is one line that names the offending thing and what to do. Exit status 2."""


class CellError(Exception):
    """One model could not be measured (NaN, out of memory, unloadable weights) while others can. Exit status 1."""


class LostPeerError(Exception):
    """Another process of this run has died: nothing more can be measured here. Exit status 1."""


PREVIEWED = 5  # names in a message


def preview(names: Sequence[str], between: str = ", ") -> str:
    """A few names for a message."""
    more = f" and {len(names) - PREVIEWED} more" if len(names) > PREVIEWED else ""
    return between.join(names[:PREVIEWED]) + more


def first_line(error: BaseException) -> str:
    """What an error says, in one line: the first of its text, less the system's number, or its type without one."""
    text = re.sub(r"^\[Errno -?\d+\] ", "", str(error).strip())
    return (text or type(error).__name__).splitlines()[0]


def unreadable(path: Path, what: str, error: BaseException) -> str:
    """Why a file cannot be read as `what`, in one line: it is not there, may not be read, or is something else."""
    if isinstance(error, FileNotFoundError):
        return f"{path}: no such file; check the path"
    if isinstance(error, OSError) and error.strerror:
        return f"{path}: cannot be read ({error.strerror})"
    return f"{path}: not a readable {what} ({first_line(error)})"


def place(error: BaseException) -> str:
    """Where in a user's own code an error came up, as " (model.py:12)"; "" if nowhere."""
    ours = (str(Path(__file__).parent), *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")))
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith(ours) and Path(f.filename).is_file()]
    return f" ({own[-1].filename}:{own[-1].lineno})" if own else ""


def trace(error: BaseException) -> None:
    """Print an error's traceback if --debug or TOKBENCH_DEBUG=1 asks for it."""
    if os.environ.get("TOKBENCH_DEBUG", "0") != "0":
        traceback.print_exception(error)
