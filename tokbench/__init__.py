"""Measure image tokenizers: reconstruction, generation quality and speed, under one written protocol.

    import tokbench as tb

    result = tb.evaluate("ssdd", "photos/", resolution=256)   # an EvalResult; its table is tb.results("runs")
    tokenizer = tb.load("klvae")

Every name of the face is imported when it is first used, so `import tokbench` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tokbench.data.sources import Source
    from tokbench.errors import CellError, InputError
    from tokbench.evaluation.evaluate import evaluate
    from tokbench.metrics import Metric, register_extractor, register_metric
    from tokbench.records.files import results
    from tokbench.records.result import EvalResult, TokenizerInfo, Value
    from tokbench.registry import create as load
    from tokbench.registry import register, register_probe, register_source, register_trainer
    from tokbench.tokenizer import Tokenizer

_HOMES = {
    "CellError": "tokbench.errors:CellError",
    "EvalResult": "tokbench.records.result:EvalResult",
    "InputError": "tokbench.errors:InputError",
    "Metric": "tokbench.metrics:Metric",
    "Source": "tokbench.data.sources:Source",
    "Tokenizer": "tokbench.tokenizer:Tokenizer",
    "TokenizerInfo": "tokbench.records.result:TokenizerInfo",
    "Value": "tokbench.records.result:Value",
    "evaluate": "tokbench.evaluation.evaluate:evaluate",
    "load": "tokbench.registry:create",
    "register": "tokbench.registry:register",
    "register_extractor": "tokbench.metrics:register_extractor",
    "register_metric": "tokbench.metrics:register_metric",
    "register_probe": "tokbench.registry:register_probe",
    "register_source": "tokbench.registry:register_source",
    "register_trainer": "tokbench.registry:register_trainer",
    "results": "tokbench.records.files:results",
}

__all__ = [
    "CellError", "EvalResult", "InputError", "Metric", "Source", "Tokenizer", "TokenizerInfo", "Value", "evaluate",
    "load", "register", "register_extractor", "register_metric", "register_probe", "register_source",
    "register_trainer", "results",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tokbench' has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
