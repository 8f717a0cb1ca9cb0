"""The tutorial's example of guarding a model's quality, run as a user's repository would."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT, TESTS

TUTORIAL = ROOT / "docs" / "tutorials" / "guard.md"
EXAMPLE = TESTS / "example_tokenizer.py"


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """my_model.py and the tutorial's test of it."""
    block = next(part for part in TUTORIAL.read_text().split("```python\n") if part.startswith("# test_quality.py"))
    (tmp_path / "test_quality.py").write_text(block.split("```")[0])
    (tmp_path / "my_model.py").write_text(EXAMPLE.read_text() + "\n\ndef load():\n    return Mine()\n")
    return tmp_path


def test_the_readmes_example_guards_a_model(repository):
    missing = run(repository)
    assert missing.returncode == 1
    assert "no such baseline" in missing.stdout
    assert "--tokbench-update" in missing.stdout
    updated = run(repository, "--tokbench-update", "-s")
    assert updated.returncode == 0, updated.stdout
    assert "mine at 64 px: new" in updated.stdout
    passed = run(repository)
    assert passed.returncode == 0, passed.stdout
    worse = (repository / "my_model.py").read_text().replace("scale_factor=8)}", "scale_factor=8, mode='bilinear')}")
    (repository / "my_model.py").write_text(worse.replace("AvgPool2d(8)", "MaxPool2d(8)"))
    failed = run(repository)
    assert failed.returncode == 1
    assert "worse" in failed.stdout
