"""The fixture `tokbench_check`: a model's own tests say that its reconstruction is not worse than a baseline."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tokbench.comparison.check import CheckResult
    from tokbench.protocols import Resolution
    from tokbench.tokenizer import Tokenizer


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--tokbench-update", action="store_true", help="make what tokbench_check measures the baseline, where not worse"
    )


@pytest.fixture
def tokbench_check(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[..., "CheckResult | None"]:
    """tokbench_check(model, baseline="...") measures a Tokenizer or a spec and fails the test if it got worse.

    `baseline` is a folder of results; `pytest --tokbench-update` writes it. Other keywords: data, resolution, metrics
    (of `tokbench.evaluate`), tolerances, exact, two_sided, strict (of `comparison.differences.Rules`). Returns the
    result, None when updating.
    """

    def run(
        model: "Tokenizer | str",
        *,
        baseline: str | Path,
        data: str | Path = "samples",
        resolution: "Resolution" = 256,
        metrics: Sequence[str] = ("psnr", "ssim"),
        **rules: Any,
    ) -> "CheckResult | None":
        from tokbench.comparison.check import check, update
        from tokbench.comparison.differences import Rules, difference_table
        from tokbench.comparison.verdicts import WIDTH, summary
        from tokbench.errors import InputError
        from tokbench.evaluation.evaluate import evaluate
        from tokbench.report.tables import laid_out

        evaluate(model, data, resolution, metrics, out=tmp_path)
        if request.config.getoption("--tokbench-update"):
            print("\n".join(update(tmp_path, Path(baseline))))
            return None
        try:
            result = check(tmp_path, Path(baseline), Rules(**rules))
        except InputError as error:
            pytest.fail(f"{error} (`pytest --tokbench-update` takes what was measured)", pytrace=False)
        if result.failures:
            pytest.fail(laid_out([difference_table(summary(result), result.differences)], WIDTH), pytrace=False)
        return result

    return run
