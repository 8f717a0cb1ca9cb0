"""Where a number comes from: commit, date, command, versions, device."""

import hashlib
import importlib.metadata
import importlib.util
import json
import platform
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tokbench
from tokbench.records.result import Provenance

STANDARD = sysconfig.get_path("stdlib")
PACKAGES = ("torch", "torchvision", "numpy", "pillow", "diffusers", "transformers", "timm", "torch-fidelity")


def collect(device: str, device_type: str, world_size: int = 1, **more: Any) -> Provenance:
    """What a result says about its making; `more` are other fields of `Provenance`."""
    commit, dirty = git_state()
    return Provenance(
        tokbench=tokbench.__version__,
        commit=commit,
        dirty=dirty,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command(),
        versions={"python": platform.python_version(), **versions(PACKAGES), **_cuda()},
        device=device,
        device_type=device_type,
        world_size=world_size,
        **more,
    )


def command() -> str:
    """What was typed, without the folder of the program; `python -m tokbench` is tokbench."""
    program = Path(sys.argv[0]).name
    return shlex.join(["tokbench" if program == "__main__.py" else program, *sys.argv[1:]]) if program else ""


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of those of these packages that are installed or at least tell theirs."""
    found = {}
    for package in filter(None, packages):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            if text := getattr(sys.modules.get(package), "__version__", None):
                found[package] = str(text)
    return found


def _cuda() -> dict[str, str]:
    torch = sys.modules.get("torch")  # nothing computes without it
    return {"cuda": torch.version.cuda} if torch is not None and torch.version.cuda else {}


def git_state() -> tuple[str | None, bool | None]:
    """(commit, has uncommitted changes) of the checkout that tokbench runs from; (None, None) for an installed one."""
    source = Path(tokbench.__file__).resolve().parent
    if _git(source, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None, None
    commit = _git(source, "rev-parse", "HEAD")
    return commit, bool(_git(source, "status", "--porcelain", "--untracked-files=no", "--", ".."))


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def key(*parts: Any) -> str:
    """sha256, 64 hex digits, of values that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def source_hash(modules: Iterable[str]) -> str | None:
    """sha256 over the Python files and tables (.csv) of these modules' packages, tokbench's always among them.

    A single-file module counts as its own package: `file.py:factory` is its file. None if one has no source file (a
    notebook): then nobody can tell whether the code is still the same.
    """
    digest = hashlib.sha256()
    for package in sorted({"tokbench", *(module.partition(".")[0] for module in modules)}):
        sources = _sources(package)
        if not sources:
            return None
        for path in sources:
            digest.update(f"{package}/{path.name}\n".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def installed(module: str) -> bool:
    """Whether a module's package lies where Python or pip put it, so that only its version says what it is."""
    path = Path(getattr(sys.modules.get(module.partition(".")[0]), "__file__", None) or ".")
    return not {"site-packages", "dist-packages"}.isdisjoint(path.parts) or path.is_relative_to(STANDARD)


def _sources(package: str) -> list[Path]:
    module = sys.modules.get(package) or importlib.util.find_spec(package)
    file = getattr(module, "__file__", None) or getattr(module, "origin", None)
    if file is None or not Path(file).is_file():  # a folder without __init__.py, or a notebook
        return _below(*getattr(module, "__path__", ()))
    path = Path(file)
    return _below(path.parent) if path.name == "__init__.py" else [path]


def _below(*folders: str | Path) -> list[Path]:
    return sorted(path for folder in folders for path in Path(folder).rglob("*") if path.suffix in (".py", ".csv"))
