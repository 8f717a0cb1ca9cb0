"""From an address to a file: what weights and data sets are fetched by."""

import shutil
import sys
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from tokbench.weights.files import WeightsError, check_file


def megabytes(size: int) -> str:
    """A number of bytes for people."""
    if not size:
        return "size not stated"
    return f"{size / 1e6:,.0f} MB" if size >= 1e6 else f"{size / 1e3:,.0f} kB"


def download(url: str, part: Path, sha256: str, what: str) -> Path:
    """Download to `part`, going on where an earlier attempt stopped, and return it.

    `sha256`: leading digits of what it must be; "" where the publisher states none. A bar with rate and time left when
    stderr is a terminal, else one line with the size. Raises WeightsError if it fails or is not it; what is wrong is
    removed, so that the next attempt starts anew.
    """
    from rich.console import Console
    from rich.progress import wrap_file

    have = part.stat().st_size if part.is_file() else 0
    try:
        request = Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        with urlopen(request, timeout=30) as answer, open(part, "ab") as file:
            if answer.status != 206:  # the server sends all of it
                file.truncate(0)
            size, title = answer.length or 0, f"fetching {what}"
            if not sys.stderr.isatty():
                print(f"tokbench: {title} ({megabytes(size)})", file=sys.stderr)
            console = Console(stderr=True)
            with wrap_file(answer, size, description=title, console=console, disable=not console.is_terminal) as body:
                shutil.copyfileobj(body, file, 1 << 20)
            if answer.length:  # what the server has announced and not sent
                raise OSError(f"the connection ended {answer.length} bytes early")
    except HTTPError as error:
        if error.code == 416 and have:  # asked for more than there is
            part.unlink()
            return download(url, part, sha256, what)
        raise WeightsError(f"{what}: cannot download {url} ({error.reason})") from None
    except (OSError, ValueError, HTTPException) as error:
        raise WeightsError(f"{what}: cannot download {url} ({getattr(error, 'reason', error)})") from None
    try:
        return check_file(part, sha256, what)
    except WeightsError:
        part.unlink()
        raise
