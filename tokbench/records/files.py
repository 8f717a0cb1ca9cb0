"""Files of a run: whole writes, locks, names, per-image tables, folders of results. No torch here."""

import contextlib
import csv
import gzip
import hashlib
import io
import json
import logging
import os
import re
import secrets
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np

from tokbench.errors import InputError, unreadable
from tokbench.protocols import Resolution
from tokbench.records.result import EvalResult, read_result

if TYPE_CHECKING:
    import pandas as pd

try:
    import fcntl
except ImportError:  # Windows: runs are not kept apart
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("tokbench")

TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}")  # the names of files that are being written


@contextlib.contextmanager
def writable(path: Path) -> Iterator[None]:
    """Turn an OSError of writing below this path into one clear line."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{path}: cannot be written ({reason}); free space or choose another --out") from error


def write_whole(path: Path, data: bytes | str) -> None:
    """Write a file so that readers see the old one or the new one, never a part; InputError if it cannot be written."""
    raw = data.encode("utf-8") if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with writable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(raw)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log.jsonl, less a line that a power cut or a full disk has left torn; [] without a file."""
    records = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


@contextlib.contextmanager
def hold(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Keep other runs out of a working folder; InputError if one is in it. Ends with the process, however it dies.

    `shared`: only those that want it for themselves. Else what a killed `write_whole` has left there is removed. A
    folder that nothing was written into is removed.
    """
    with writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "lock", "ab")  # noqa: SIM115
    with file:
        if fcntl is not None:
            try:
                fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(f"{folder}: another run is at work in it; wait for it or use another --out") from error
            except OSError as error:  # a file system without locks
                log.warning("%s: cannot be locked (%s); do not start the same run twice", folder, error.strerror)
            else:
                for path in [] if shared else folder.glob(".*"):
                    if TEMPORARY.fullmatch(path.name) and path.is_file():
                        path.unlink(missing_ok=True)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if [path.name for path in folder.iterdir()] == ["lock"]:
                    (folder / "lock").unlink()
                    folder.rmdir()


@contextlib.contextmanager
def in_turn(folder: Path) -> Iterator[None]:
    """Wait until no other process is in here with this folder: of what is then looked up nothing changes until it is
    written. InputError if the folder cannot be made."""
    with writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def slug(text: str) -> str:
    """A text as a name of files and rows: only a-z 0-9 . _ and -."""
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-.") or "unnamed"


def cell_path(out: Path, protocol: str, dataset: str, resolution: Resolution, name: str) -> Path:
    """<out>/<protocol>/<dataset>-<resolution>/<name>.json"""
    return out / protocol / f"{dataset}-{resolution}" / f"{name}.json"


def result_path(out: Path, result: EvalResult) -> Path:
    """Where a result lies below `out`."""
    return cell_path(out, result.protocol, result.dataset.name, result.dataset.resolution, result.tokenizer.name)


def per_image_path(path: Path) -> Path:
    """The per-image table that belongs to a result file."""
    return path.with_name(path.name.removesuffix(".json") + ".per_image.csv.gz")


def image_folders(path: Path) -> tuple[Path, Path]:
    """Where saved images of a result file lie, ID.png each: real crops, which its neighbours share, and its own."""
    stem = path.name.removesuffix(".json")
    return path.with_name("+real.images"), path.with_name(f"{stem}.images")  # no row can be called "+real"


def image_name(sample: str) -> str:
    """The file name of a sample's image; `urllib.parse.unquote` of its stem gives an id back that is not overlong."""
    name = quote(sample, safe="")
    if len(name) > 200:  # a file system takes 255 bytes, the temporary name included
        name = f"{name[:180]}-{hashlib.sha256(sample.encode()).hexdigest()[:16]}"
    return name + ".png"


GROUP = "group:"  # before the name of a column of texts


def write_per_image(
    path: Path, ids: Sequence[str], columns: Mapping[str, np.ndarray], groups: Mapping[str, Sequence[str]] | None = None
) -> None:
    """A gzipped CSV: column `id`, then one per name, then the data's groups; equal data gives equal bytes."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    named = groups or {}
    writer.writerow(["id", *columns, *(GROUP + name for name in named)])
    numbers = ([repr(float(value)) for value in values] for values in columns.values())
    writer.writerows(zip(ids, *numbers, *named.values(), strict=True))
    write_whole(path, gzip.compress(text.getvalue().encode(), mtime=0))


def read_per_image(path: Path) -> tuple[list[str], dict[str, np.ndarray]]:
    """Ids and float64 columns of `write_per_image`'s file; InputError if it is missing or damaged."""
    rows = _cells(path)
    names = [name for name in rows[0][1:] if not name.startswith(GROUP)]
    try:
        table = np.array([row[1 : 1 + len(names)] for row in rows[1:]], dtype=np.float64)
    except ValueError as error:
        raise InputError(unreadable(path, "per-image table", error)) from error
    table = table.reshape(len(rows) - 1, len(names))
    return [row[0] for row in rows[1:]], {name: table[:, index] for index, name in enumerate(names)}


def read_groups(path: Path) -> dict[str, list[str]]:
    """The columns of groups in `write_per_image`'s file, by name; InputError if it is missing or damaged."""
    rows = _cells(path)
    places = {name.removeprefix(GROUP): i for i, name in enumerate(rows[0]) if name.startswith(GROUP)}
    return {name: [row[i] for row in rows[1:]] for name, i in places.items()}


def _cells(path: Path) -> list[list[str]]:
    try:
        rows = list(csv.reader(io.StringIO(gzip.decompress(path.read_bytes()).decode())))
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise InputError(unreadable(path, "per-image table", error)) from error
    if not rows or any(len(row) != len(rows[0]) for row in rows):
        raise InputError(f"{path}: not a readable per-image table (rows of unequal length)")
    return rows


def read_results(folder: Path) -> tuple[list[tuple[Path, EvalResult]], list[str]]:
    """All results in a folder as `result_path` lays them out, or in one file, by path; one warning per unreadable file.

    Those of generated images may lie below `generation/`. Deeper folders are other experiments' own: name them.
    """
    if not folder.exists():
        raise InputError(f"{folder}: no such folder of results")
    paths = [folder] if folder.is_file() else [*folder.glob("*/*/*.json"), *folder.glob("generation/*/*/*.json")]
    results, warnings = [], []
    for path in sorted(paths or [*folder.glob("*/*.json"), *folder.glob("*.json")]):  # of one protocol, of one cell
        parts = path.relative_to(folder).parts
        if parts[:1] == ("speed",) or any(part.startswith(".") for part in parts):
            continue  # speed records are another kind (report.speed)
        try:
            results.append((path, read_result(path)))
        except InputError as error:
            warnings.append(str(error))
    return results, warnings


def results_frame(results: Iterable[EvalResult]) -> "pd.DataFrame":
    """One row per cell: what was measured, on what, and `<metric>`, `<metric>.stderr` (missing: NaN)."""
    import pandas as pd  # half a second that other readers of this module need not wait

    return pd.DataFrame([result.row() for result in results])


def results(folder: str | Path = "runs") -> "pd.DataFrame":
    """The results below a folder as a table, one row per cell (`results_frame`). InputError if there is no folder."""
    return results_frame(result for _, result in read_results(Path(folder))[0])
