"""What was measured, per sample: rows of scores and features, in shards that numpy alone opens. No torch here.

A shard is an .npz file: `ids`, `columns/NAME` float64 [N] and `SIDE/EXTRACTOR` float32 [N, D]. It is written aside and
renamed, by one process, every second or so: a kill costs what was measured since, a full disk costs nothing that was
there, and a file that a disk has damaged fails the archive's checksum, is named in a warning, and its samples count as
not yet measured. Names are drawn, so any number of ranks and of runs may share a folder.
"""

import io
import logging
import secrets
import tempfile
import time
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tokbench.errors import ARRAY_ERRORS, InputError, first_line
from tokbench.records.files import writable, write_whole

log = logging.getLogger("tokbench")

FLUSH_SECONDS = 1.0  # what a kill can cost
FLUSH_BYTES = 64 << 20  # held in memory at most
COLUMNS = "columns"


@dataclass(frozen=True)
class _Shard:
    """A file on the disk: its columns are kept, its features are read when they are asked for."""

    path: Path
    ids: list[str]
    columns: Mapping[str, np.ndarray]
    features: frozenset[tuple[str, str]]


class SampleStore:
    """Rows {column: float64} and features {(side, extractor): float32 [D]} by sample id.

    A store sees what lay in the folder when it was opened and what it appended itself: open a new one after a barrier
    to read what all ranks wrote. `real` names, by extractor, other stores that hold the features of the real images,
    which all models share; those are then written to and read from there. An id may be appended several times: later
    rows add columns.
    """

    def __init__(self, folder: Path, *, rank: int = 0, real: "Mapping[str, SampleStore] | None" = None) -> None:
        self.folder, self.real, self.rank = folder, real or {}, rank
        self._shards = [shard for path in sorted(folder.glob("*.npz")) if (shard := _open(path)) is not None]
        self._waiting: list[tuple[list[str], dict[str, np.ndarray]]] = []
        self._bytes, self._flushed = 0, time.monotonic()
        self._assembled: dict[tuple[str, str], np.ndarray] = {}

    def __enter__(self) -> "SampleStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()

    @property
    def ids(self) -> list[str]:
        """Ids of all samples that have a row, sorted."""
        return sorted({sample for shard in self._all() for sample in shard.ids})

    @property
    def columns(self) -> list[str]:
        """Names of the columns that every sample has, sorted."""
        names = {name for shard in self._all() for name in shard.columns}
        return sorted(name for name in names if self.done([name], []) == set(self.ids))

    def done(self, columns: Iterable[str], features: Iterable[tuple[str, str]]) -> set[str]:
        """Ids for which every one of these columns and features is there."""
        having = [{i for shard in self._all() if name in shard.columns for i in shard.ids} for name in columns]
        for key in features:
            shards = self._holder(*key)._all()
            having.append({sample for shard in shards if key in shard.features for sample in shard.ids})
        return set(self.ids).intersection(*having)

    def append(
        self,
        ids: Sequence[str],
        columns: Mapping[str, np.ndarray],
        features: Mapping[tuple[str, str], np.ndarray] | None = None,
    ) -> None:
        """Add samples: a float array [B] per column and [B, D] per feature. InputError if the disk refuses."""
        arrays = {f"{COLUMNS}/{name}": np.asarray(values, np.float64) for name, values in columns.items()}
        for (side, extractor), values in (features or {}).items():
            array = {f"{side}/{extractor}": np.ascontiguousarray(values, "<f4")}
            if (holder := self._holder(side, extractor)) is self:
                arrays |= array
            else:
                holder._add(list(ids), array)
        self._add(list(ids), arrays)

    def column(self, name: str) -> np.ndarray:
        """float64 [N] in the order of `ids`; KeyError if a sample lacks it."""
        position = {sample: index for index, sample in enumerate(self.ids)}
        values, found = np.empty(len(position)), np.zeros(len(position), dtype=bool)
        for shard in self._all():
            if name in shard.columns:
                rows = [position[sample] for sample in shard.ids]
                values[rows], found[rows] = shard.columns[name], True
        if not found.all():
            raise KeyError(f"{name}: no value of {self.ids[int(np.argmin(found))]}")
        return values

    def features(self, side: str, extractor: str) -> np.ndarray:
        """float32 [N, D] in the order of `ids`, backed by a file; KeyError naming a sample that lacks it."""
        holder, ids = self._holder(side, extractor), self.ids
        kept = self._assembled.get((side, extractor))
        if kept is None or len(kept) != len(ids):
            kept = self._assembled[side, extractor] = holder._assemble(side, extractor, ids)
        return kept

    def flush(self) -> None:
        """Bring everything to the disk. InputError if it refuses; what was waiting then stays in memory."""
        while self._waiting:  # appends of one batch share their columns: neighbours with the same go into one file
            names = self._waiting[0][1].keys()
            count = next((i for i, (_, a) in enumerate(self._waiting) if a.keys() != names), len(self._waiting))
            part = self._waiting[:count]
            ids = [sample for samples, _ in part for sample in samples]
            arrays = {name: np.concatenate([a[name] for _, a in part]) for name in names}
            path = self.folder / f"{self.rank:03d}-{secrets.token_hex(6)}.npz"
            buffer = io.BytesIO()
            np.savez(buffer, ids=np.array(ids), **arrays)  # type: ignore[arg-type]
            write_whole(path, buffer.getvalue())
            self._shards.append(_described(path, ids, arrays))
            del self._waiting[:count]
        self._bytes, self._flushed = 0, time.monotonic()
        for store in self.real.values():
            store.flush()

    def _add(self, ids: list[str], arrays: dict[str, np.ndarray]) -> None:
        self._waiting.append((ids, arrays))
        self._bytes += sum(array.nbytes for array in arrays.values())
        if self._bytes > FLUSH_BYTES or time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def _all(self) -> list[_Shard]:
        """All shards, what was waiting among them."""
        if self._waiting:
            self.flush()
        return self._shards

    def _holder(self, side: str, extractor: str) -> "SampleStore":
        return self.real.get(extractor, self) if side == "real" else self

    def _assemble(self, side: str, extractor: str, ids: Sequence[str]) -> np.ndarray:
        """The rows of these ids in a file without a name, which ends with the array."""
        position = {sample: index for index, sample in enumerate(ids)}
        found = np.zeros(len(ids), dtype=bool)
        rows: np.ndarray | None = None
        for shard in self._all():
            if (side, extractor) not in shard.features:
                continue
            try:
                with np.load(shard.path) as file:
                    values = np.asarray(file[f"{side}/{extractor}"], "<f4").reshape(len(shard.ids), -1)
            except ARRAY_ERRORS as error:
                raise InputError(f"{shard.path}: damaged ({first_line(error)}); remove it") from error
            if rows is None:
                with writable(self.folder), tempfile.TemporaryFile(dir=self.folder) as scratch:
                    empty = np.zeros((1, values.shape[1]), "<f4").tobytes()
                    for _ in ids:  # written, not left sparse: a full disk is an error here, and would kill below
                        scratch.write(empty)
                    scratch.flush()
                    rows = np.memmap(scratch, "<f4", "r+", shape=(len(ids), values.shape[1]))
            wanted = [(at, position[sample]) for at, sample in enumerate(shard.ids) if sample in position]
            if wanted:
                source, target = map(list, zip(*wanted, strict=True))
                rows[target], found[target] = values[source], True
        if rows is None or not found.all():
            missing = ids[int(np.argmin(found))] if len(ids) else "any sample"
            raise KeyError(f"{side} {extractor}: no features of {missing}")
        return rows


def _described(path: Path, ids: list[str], arrays: Mapping[str, np.ndarray]) -> _Shard:
    columns = {name.removeprefix(f"{COLUMNS}/"): a for name, a in arrays.items() if name.startswith(f"{COLUMNS}/")}
    features = [name.partition("/") for name in arrays if not name.startswith(f"{COLUMNS}/")]
    return _Shard(path, ids, columns, frozenset((side, extractor) for side, _, extractor in features))


def _open(path: Path) -> _Shard | None:
    """The shard in a file, all of it checked; None, with a warning, for a damaged one."""
    try:
        with zipfile.ZipFile(path) as archive:
            if (bad := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"checksum of {bad}")
            names = [name.removesuffix(".npy") for name in archive.namelist()]
        with np.load(path) as file:
            kept = {name: file[name] for name in names if name == "ids" or name.startswith(f"{COLUMNS}/")}
        ids = [str(sample) for sample in kept.pop("ids")]
        if any(array.shape != (len(ids),) or array.dtype != np.float64 for array in kept.values()):
            raise ValueError("columns of other lengths or types")
    except ARRAY_ERRORS as error:
        log.warning("%s: damaged (%s), set aside; its samples are measured again", path, first_line(error))
        return None
    return _described(path, ids, kept | {name: np.empty(0) for name in names if name not in kept and name != "ids"})
