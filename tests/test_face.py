"""What other people's code imports: lazily, typed, and as the README says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import baselines
import ssdd_models
import tokbench
from tests import ROOT


@pytest.mark.parametrize("package", [tokbench, baselines, ssdd_models])
def test_every_name_of_the_face_is_there_and_no_other(package: object) -> None:
    for name in package.__all__:  # type: ignore[attr-defined]
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        package.nothing  # type: ignore[attr-defined] # noqa: B018


def test_importing_the_packages_does_not_import_torch() -> None:
    code = "import sys, tokbench, baselines, ssdd_models; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_readmes_python_runs(photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(import tokbench as tb\n.*?)```", (ROOT / "README.md").read_text(), re.S)
    (block,) = [block for block in blocks if "tb.evaluate(" in block]
    monkeypatch.chdir(tmp_path)
    code = block.replace("path/to/images", str(photographs)).replace("resolution=64", "resolution=32")
    scope: dict[str, object] = {}
    exec(code, scope)
    assert scope["result"].metrics["psnr"].value > 10  # type: ignore[attr-defined]
