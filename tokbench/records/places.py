"""Where a record lies: beside one that was measured otherwise, never over it. No torch here."""

import itertools
import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokbench.errors import InputError
from tokbench.records.files import result_path, slug
from tokbench.records.result import EvalResult, read_result


def placed(out: Path, result: EvalResult) -> EvalResult:
    """The result under a name whose file below `out` is free, or holds an earlier measurement of the very same.

    The same is measured anew in its place when code or weights have changed. Whatever else would be overwritten keeps
    its name, and the new one's says how it differs: tiny-bfloat16, tiny-seeds-0-1-2.
    """
    taken = _record(result_path(out, result))
    if taken is None or _same(taken, result):
        return result
    for name in _names(taken, result):
        named = replace(result, tokenizer=replace(result.tokenizer, name=name))
        other = _record(result_path(out, named))
        if other is None or _same(other, named):
            return named
    raise AssertionError("names do not end")


def _record(path: Path) -> EvalResult | None:
    """What lies there; None for nothing, and for what nobody can read."""
    try:
        return read_result(path) if path.exists() else None
    except InputError:
        return None


def _manner(result: EvalResult) -> dict[str, Any]:
    """What was chosen and can change a number, as JSON keeps it; other images mostly have a name of their own."""
    settings, generation = result.settings, dict(result.settings.generation)
    chosen = {
        "dtype": settings.dtype,
        "seeds": settings.seeds,
        "device": result.provenance.device_type,
        "protocol": result.protocol_fingerprint,
        "scored": settings.scored.get("fake_fingerprint"),
        "images": result.dataset.num_images if generation else None,  # else some may have been left out
        "data": None if generation else result.dataset.fingerprint,
        **{key: value for key, value in generation.items() if key not in ("generator", "reference")},
    }
    manner: dict[str, Any] = json.loads(json.dumps(chosen))
    return manner


def _same(a: EvalResult, b: EvalResult) -> bool:
    """Whether two records differ in nothing but code, weights and metrics."""
    return _manner(a) == _manner(b) and spelled(a.settings.spec) == spelled(b.settings.spec)


def spelled(spec: str) -> str:
    """A model's spec with its paths as from here: ./vae.py:load and /here/vae.py:load are vae.py:load."""
    return re.sub(r"[^@:+=]+", lambda part: os.path.relpath(part[0]) if Path(part[0]).exists() else part[0], spec)


def _names(taken: EvalResult, result: EvalResult) -> Iterator[str]:
    """Names that say how a result differs from the one that has its name, then the same with numbers."""
    theirs, words = _manner(taken), []
    for key, value in _manner(result).items():
        if theirs.get(key) == value:
            continue
        if key in ("dtype", "device"):
            words.append(value)
        elif key == "protocol" and result.measurement is not None and not result.settings.generation:
            rules = result.measurement.rules
            small = taken.measurement is None or taken.measurement.rules.small != rules.small
            words.append(f"small-{rules.small}" if small else f"v{rules.version}")
        elif key not in ("protocol", "scored", "data"):
            words.append(f"{key}-{'-'.join(map(str, value)) if isinstance(value, list) else value}")
    name = "-".join([result.tokenizer.name, *(slug(word) for word in words)])
    if words:
        yield name
    yield from (f"{name}-{number}" for number in itertools.count(2))
