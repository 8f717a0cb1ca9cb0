"""`tokbench results add`: a record of somebody else, examined, then copied beside ours. Never imports torch."""

import math
import tempfile
from pathlib import Path

import numpy as np

from tokbench.errors import InputError
from tokbench.metrics import METRICS
from tokbench.protocols import NATIVE
from tokbench.records.files import per_image_path, read_per_image, read_results, result_path, write_whole
from tokbench.records.measurement import Measurement
from tokbench.records.result import EvalResult, Value, read_result
from tokbench.weights.transfer import download


def add(where: str, into: Path, replace: bool = False) -> Path:
    """Copy the record in a file or at an address, with its per-image table, below `into`; where it lies now.

    InputError, with nothing written, for a record that does not say what it claims: of another protocol of the same
    name, of other images under the name of a data set that `into` holds, values outside of their range or unlike
    their own table, or a row that is there already (`replace` takes the new one).
    """
    if not where.startswith(("https://", "http://")):
        return _copy(Path(where), into, replace)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "record.json"
        download(where, path, "", where)
        table = f"{where.removesuffix('.json')}.per_image.csv.gz"
        download(table, per_image_path(path), "", table)
        return _copy(path, into, replace)


def _copy(path: Path, into: Path, replace: bool) -> Path:
    result = read_result(path)
    examine(result, path, [known for _, known in read_results(into)[0]] if into.exists() else [])
    target = result_path(into, result)
    if target.exists() and not replace:
        raise InputError(f"{target}: there already; --replace takes the new one")
    write_whole(per_image_path(target), per_image_path(path).read_bytes())  # first: the record vouches for it
    write_whole(target, path.read_bytes())
    return target


def examine(result: EvalResult, path: Path, known: list[EvalResult]) -> None:
    """InputError for what cannot be right in a record; `known` are those that it is to stand beside."""
    _examine_protocol(result, path)
    data = result.dataset
    for other in known:
        same = (other.dataset.name, other.dataset.split, other.dataset.num_images)
        if same == (data.name, data.split, data.num_images) and other.dataset.fingerprint != data.fingerprint:
            raise InputError(f"{path}: other images than ours under the name {data.name} (fingerprints differ)")
    if not (result.provenance.command and result.provenance.date):
        raise InputError(f"{path}: no command or date in it; a number without its command is no result")
    ids, columns = read_per_image(per_image_path(path))
    if len(ids) != data.num_images:
        raise InputError(f"{path}: {data.num_images} images, but {len(ids)} rows in its per-image table")
    for name, value in result.metrics.items():
        _examine_value(name, value, columns.get(name), path)


def _examine_protocol(result: EvalResult, path: Path) -> None:
    named = Measurement(resolution=result.dataset.resolution, protocol=result.protocol.removesuffix(f"-{NATIVE}"))
    rules = (result.measurement or named).rules
    if (rules.name, rules.fingerprint()) != (result.protocol, result.protocol_fingerprint):
        raise InputError(f"{path}: protocol {result.protocol} is another one here (fingerprints differ)")


def _examine_value(name: str, value: Value, column: np.ndarray | None, path: Path) -> None:
    metric = METRICS.get(name)
    if metric is None:
        raise InputError(f"{path}: {name} is no metric of this version")
    if value.value is None:
        return
    low, high = (
        metric.low if metric.low is not None else -math.inf,
        metric.high if metric.high is not None else math.inf,
    )
    if not low - 1e-6 <= value.value <= high + 1e-6:
        raise InputError(f"{path}: {name} {value.value:g} lies outside of {low:g} to {high:g}")
    if column is not None and not math.isclose(column.mean(), value.value, rel_tol=1e-6, abs_tol=1e-9):
        raise InputError(f"{path}: {name} {value.value:g}, but its images have a mean of {column.mean():g}")
