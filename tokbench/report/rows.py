"""The per-image rows beside a result: NAME.per_image.csv.gz."""

import csv
import gzip
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tokbench.errors import InputError


def read_columns(result: Path) -> tuple[list[str], dict[str, NDArray[np.float64]]]:
    """Sample ids and {column: float64 [N]} of the rows beside a result, in order of id; empty where there are none.

    Raises InputError for a file that is not such a table.
    """
    path = result.with_name(result.name.removesuffix(".json") + ".per_image.csv.gz")
    if not path.exists():
        return [], {}
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
            header, *rows = csv.reader(file)
        place = header.index("id")
        rows.sort(key=lambda row: row[place])
        transposed = list(zip(*rows, strict=True)) or [()] * len(header)
        columns = {
            name: np.array([float(x) if x else np.nan for x in cells])
            for name, cells in zip(header, transposed, strict=True)
            if name != "id"
        }
    except (OSError, EOFError, ValueError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a table of per-image rows ({error})") from error
    return list(transposed[place]), columns


def paired_interval(a: NDArray[np.float64], b: NDArray[np.float64]) -> tuple[float, float]:
    """95 % interval of mean(a - b) over the same images [N], normal approximation."""
    difference = a - b
    error = 1.96 * float(difference.std(ddof=1)) / len(difference) ** 0.5
    return float(difference.mean()) - error, float(difference.mean()) + error
