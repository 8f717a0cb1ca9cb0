"""What was measured, per sample: rows of scores and features, in files that a kill or a full disk cannot spoil."""

import hashlib
import json
import os
import secrets
import tempfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from tokbench.records.files import log, writable

if TYPE_CHECKING:
    pass


SYNC_EVERY = 16  # appends between two fsyncs: what a power cut can cost; a killed process loses at most one append


MAGIC = b"tokbench-feature"


CHUNK = 1024  # feature rows moved at a time


class SampleStore:
    """What was measured, per sample: rows {column: float64} and features {(side, extractor): float32 [D]}.

    A store sees what lay in the folder when it was opened and what it appended itself: open a new one after a barrier
    to read what all ranks wrote. `real` names, by extractor, other stores that hold the features of the real images,
    which all models share; those are then written to and read from there.

    Rows are text lines, "crc32 [id, {column: value}]". Features are records of fixed size: 16 bytes of the id's
    hash, D floats, crc32. An id may have several rows: later ones add columns.
    """

    def __init__(self, folder: Path, *, rank: int = 0, real: "Mapping[str, SampleStore] | None" = None) -> None:
        self.folder, self.real = folder, real or {}
        self._part = f"{rank:03d}-{secrets.token_hex(4)}"
        self._rows: dict[str, dict[str, float]] = {}
        self._found: dict[tuple[str, str], dict[bytes, tuple[Path, int]]] = {}  # id's hash -> file and byte offset
        self._files: dict[str, BinaryIO] = {}
        self._appends = 0
        for path in sorted(folder.glob("rows-*.txt")):
            self._read_rows(path)

    def __enter__(self) -> "SampleStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Bring everything to the disk."""
        with writable(self.folder):
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())
                file.close()
        self._files.clear()

    @property
    def ids(self) -> list[str]:
        """Ids of all samples that have a row, sorted."""
        return sorted(self._rows)

    @property
    def columns(self) -> list[str]:
        """Names of all columns, sorted."""
        return sorted({name for row in self._rows.values() for name in row})

    def done(self, columns: Iterable[str], features: Iterable[tuple[str, str]]) -> set[str]:
        """Ids for which every one of these columns and features is there."""
        wanted = set(columns)
        ids = {sample for sample, row in self._rows.items() if wanted <= row.keys()}
        for side, extractor in features:
            found = self._holder(side, extractor)._index(side, extractor)
            ids = {sample for sample in ids if _key(sample) in found}
        return ids

    def append(
        self,
        ids: Sequence[str],
        columns: Mapping[str, np.ndarray],
        features: Mapping[tuple[str, str], np.ndarray] | None = None,
    ) -> None:
        """Add samples: a float array [B] per column and [B, D] per feature. InputError if the disk refuses."""
        for (side, extractor), values in (features or {}).items():
            holder = self._holder(side, extractor)
            holder._append_features(ids, side, extractor, np.ascontiguousarray(values, dtype="<f4"))
            if holder is not self:
                holder._append_rows(ids, {})
        self._append_rows(ids, {name: np.asarray(values, dtype=np.float64) for name, values in columns.items()})

    def column(self, name: str) -> np.ndarray:
        """float64 [N] in the order of `ids`; KeyError if a sample lacks it."""
        return np.array([self._rows[sample][name] for sample in self.ids], dtype=np.float64)

    def features(self, side: str, extractor: str) -> np.ndarray:
        """float32 [N, D] in the order of `ids`, backed by a file; KeyError naming a sample that lacks it."""
        found = self._holder(side, extractor)._index(side, extractor)
        ids = self.ids
        missing = [sample for sample in ids if _key(sample) not in found]
        if missing or not ids:
            raise KeyError(f"{side} {extractor}: no features of {missing[:1] or 'any sample'}")
        paths = {path: np.memmap(path, dtype=np.uint8, mode="r") for path in {path for path, _ in found.values()}}
        dim = _dim(next(iter(paths)))
        assert dim is not None
        assert {_dim(path) for path in paths} == {dim}, f"{extractor}: features of different length"
        with writable(self.folder), tempfile.TemporaryFile(dir=self.folder) as file:
            for start in range(0, len(ids), CHUNK):
                for sample in ids[start : start + CHUNK]:
                    path, offset = found[_key(sample)]
                    file.write(paths[path][offset + 16 : offset + 16 + 4 * dim].tobytes())
            file.flush()
            return np.memmap(file, dtype="<f4", mode="r", shape=(len(ids), dim))

    def _holder(self, side: str, extractor: str) -> "SampleStore":
        return self.real.get(extractor, self) if side == "real" else self

    def _append_rows(self, ids: Sequence[str], columns: Mapping[str, np.ndarray]) -> None:
        lines = []
        for index, sample in enumerate(ids):
            row = {name: float(values[index]) for name, values in columns.items()}
            text = json.dumps([sample, row])
            lines.append(f"{zlib.crc32(text.encode()):08x} {text}\n".encode())
            self._rows.setdefault(sample, {}).update(row)
        self._write(f"rows-{self._part}.txt", b"".join(lines), b"")
        self._appends += 1
        if self._appends % SYNC_EVERY == 0:
            with writable(self.folder):
                for file in self._files.values():
                    os.fsync(file.fileno())

    def _append_features(self, ids: Sequence[str], side: str, extractor: str, values: np.ndarray) -> None:
        index = self._index(side, extractor)
        name = f"{side}-{extractor}-{self._part}.bin"
        bodies = [_key(sample) + row.tobytes() for sample, row in zip(ids, values, strict=True)]
        records = [body + zlib.crc32(body).to_bytes(4, "little") for body in bodies]
        start = self._write(name, b"".join(records), MAGIC + values.shape[1].to_bytes(8, "little"))
        for position, sample in enumerate(ids):
            index[_key(sample)] = (self.folder / name, start + position * len(records[0]))

    def _write(self, name: str, data: bytes, header: bytes) -> int:
        """Append to a file of this process, begun with `header`; returns where the data starts."""
        with writable(self.folder / name):
            if name not in self._files:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._files[name] = open(self.folder / name, "ab", buffering=0)  # noqa: SIM115
                self._files[name].write(header)
            file = self._files[name]
            start = file.seek(0, os.SEEK_END)
            written = file.write(data)
            if written != len(data):  # unbuffered: a nearly full disk takes a part and says so only at the next write
                file.truncate(start)
                raise OSError(28, "No space left on device")
        return start

    def _read_rows(self, path: Path) -> None:
        bad = 0
        for line in path.read_bytes().splitlines():
            checksum, _, text = line.partition(b" ")
            if checksum != b"%08x" % zlib.crc32(text):
                bad += 1
                continue
            sample, row = json.loads(text)
            self._rows.setdefault(sample, {}).update(row)
        if bad:
            log.warning("%s: %d damaged rows set aside; these samples are measured again", path, bad)

    def _index(self, side: str, extractor: str) -> dict[bytes, tuple[Path, int]]:
        """Where each sample's feature lies, checked once per store."""
        if (side, extractor) not in self._found:
            found: dict[bytes, tuple[Path, int]] = {}
            for path in sorted(self.folder.glob(f"{side}-{extractor}-[0-9][0-9][0-9]-????????.bin")):
                found.update(_scan_features(path))
            self._found[side, extractor] = found
        return self._found[side, extractor]


def _key(sample: str) -> bytes:
    return hashlib.sha256(sample.encode()).digest()[:16]


def _dim(path: Path) -> int | None:
    with open(path, "rb") as file:
        header = file.read(len(MAGIC) + 8)
    intact = len(header) == len(MAGIC) + 8 and header.startswith(MAGIC)
    return int.from_bytes(header[len(MAGIC) :], "little") if intact else None


def _scan_features(path: Path) -> dict[bytes, tuple[Path, int]]:
    """The intact records of a file; damaged ones are counted in a warning."""
    found, bad = {}, 0
    dim = _dim(path)
    if dim is None:
        log.warning("%s: damaged, set aside; these features are computed again", path)
        return {}
    size, start = 16 + 4 * dim + 4, len(MAGIC) + 8
    data = path.read_bytes() if path.stat().st_size < 1 << 20 else np.memmap(path, dtype=np.uint8, mode="r")
    for offset in range(start, len(data), size):
        record = bytes(data[offset : offset + size])
        if len(record) == size and zlib.crc32(record[:-4]) == int.from_bytes(record[-4:], "little"):
            found[record[:16]] = (path, offset)
        else:
            bad += 1
    if bad:
        log.warning("%s: %d damaged features set aside; they are computed again", path, bad)
    return found
