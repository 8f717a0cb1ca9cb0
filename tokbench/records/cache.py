"""What can be made again, kept in the user's cache folder between runs. Never imports torch."""

import hashlib
import json
import logging
import os
import re
from pathlib import Path
from typing import Any

from tokbench.errors import InputError
from tokbench.records.files import write_whole

log = logging.getLogger("tokbench")
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def cache_folder() -> Path:
    """The user's cache: $XDG_CACHE_HOME/tokbench or ~/.cache/tokbench."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tokbench"


def stamp_of(path: Path) -> str:
    """Changes when a file does, without reading it. Raises OSError.

    Size and time are not enough: `cp -p` and `rsync -t` set the time. They cannot set ctime.
    """
    status = os.stat(path)
    return f"{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}:{status.st_ino}"


def printable(name: str) -> str:
    """A file name as one line of text: bytes that are not UTF-8 and characters of control become \\xNN."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def load_cached(key: str) -> Any:
    """What `save_cached` kept under this key, or None; a damaged file is named, and made again by the caller."""
    path = _cache_path(key)
    try:
        return json.loads(path.read_bytes())
    except OSError:
        return None
    except ValueError:
        log.warning("%s: damaged, made again", path)
        return None


def save_cached(key: str, value: Any) -> None:
    """Keep a JSON value in the user's cache; where that cannot be written, it only costs time."""
    try:
        write_whole(_cache_path(key), json.dumps(value))
    except InputError as error:
        log.warning("%s", error)


def _cache_path(key: str) -> Path:
    return cache_folder() / "data" / f"{hashlib.sha256(printable(key).encode()).hexdigest()[:24]}.json"
