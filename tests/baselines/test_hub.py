"""What the hub answers, asked through the public path: a server of ours in its place, and its cache."""

import http.server
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.baselines.test_pretrained import CLASSES, save
from tokbench.errors import CellError, InputError
from tokbench.registry import create


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the hub answers for a gated and a missing repository, and for a missing file."""

    def do_HEAD(self) -> None:
        gated = "/some/gated/" in self.path
        missing = "/some/missing/" in self.path
        self.send_response(403 if gated else 404)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound" if missing else "EntryNotFound")
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """The hub's address points to a server of ours, and its cache to an empty folder."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.delenv("TOKBENCH_OFFLINE", raising=False)
    yield address
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("repo", "said"),
    [
        ("some/gated", "is gated; accept its licence at https://huggingface.co/some/gated, then run: hf auth login"),
        ("some/missing", "the hub has no repository some/missing"),
        ("some/model:vqe", "has no vqe/config.json; give another folder: hf:some/model:FOLDER"),
        ("some/-bad-", "some/-bad- is no repository name"),
    ],
)
def test_what_the_hub_refuses_is_said_with_what_to_do(repo: str, said: str, hub: str) -> None:
    with pytest.raises(CellError, match=said):
        create(f"hf:{repo}")


def test_offline_nothing_is_fetched(monkeypatch: pytest.MonkeyPatch, hub: str) -> None:
    monkeypatch.setenv("TOKBENCH_OFFLINE", "1")
    with pytest.raises(CellError, match="some/model is not on this machine and cannot be fetched"):
        create("hf:some/model")


def test_a_cached_repository_loads_without_network(monkeypatch: pytest.MonkeyPatch, hub: str, tmp_path: Path) -> None:
    repository = tmp_path / "models--some--pipeline"
    save("AutoencoderKL", CLASSES["AutoencoderKL"][0], repository / "snapshots" / ("a" * 40) / "vae")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setenv("TOKBENCH_OFFLINE", "1")
    tokenizer = create("hf:some/pipeline:vae")
    images = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    assert tokenizer.encode(images, sample=False, seeds=torch.zeros(1)).shape == (1, 4, 8, 8)


@pytest.mark.parametrize("address", ["hf:name", "hf:a/b/c"])
def test_a_malformed_address_is_wrong_use(address: str) -> None:
    with pytest.raises(InputError, match="write hf:OWNER/NAME or hf:OWNER/NAME:FOLDER"):
        create(address)


def test_without_a_network_a_model_fails_at_once(monkeypatch: pytest.MonkeyPatch, hub: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://hub.invalid")
    start = time.monotonic()
    with pytest.raises(CellError, match="some/model is not on this machine and cannot be fetched"):
        create("hf:some/model")
    assert time.monotonic() - start < 5
