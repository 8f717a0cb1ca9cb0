"""What tests share: one thread, caches of their own, tiny real photographs, the command line in this process."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from tokbench import cli, weights
from tokbench.metrics import suite
from tokbench.weights import weights_dir

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a script's background jobs ignore, and their children

SAMPLES = Path(cli.__file__).parent / "samples"
TINY = f"{Path(__file__).with_name('tiny.py')}:tiny"


@pytest.fixture(autouse=True, scope="session")
def own_caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Weights are found where they are; everything else that is kept between runs goes to a folder of the tests."""
    places = {"TOKBENCH_WEIGHTS": weights_dir(), "TORCH_HOME": torch.hub._get_torch_home(),
              "HF_HOME": Path.home() / ".cache" / "huggingface", "MPLCONFIGDIR": matplotlib.get_cachedir()}  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, place in places.items():
            if name not in os.environ:
                patch.setenv(name, str(place))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("PYTHONWARNINGS", "ignore")
        yield


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of twelve bundled photographs, 40 pixels at their shorter side. Copy it before changing it."""
    folder = tmp_path_factory.mktemp("data") / "photographs"
    folder.mkdir()
    for path in sorted(SAMPLES.glob("*.jpg"))[:12]:
        with Image.open(path) as image:
            scale = 40 / min(image.size)
            image.resize((round(image.width * scale), round(image.height * scale))).save(folder / f"{path.stem}.png")
    return folder


@dataclass
class Ran:
    """How a command ended: exit status, stdout, stderr."""

    status: int
    out: str
    err: str

    @property
    def reason(self) -> str:
        """The last line of stderr that is no report of progress."""
        return self.err.strip().splitlines()[-1]


@pytest.fixture
def tokbench(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """Run the command line in this process."""

    def call(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["tokbench", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        output = capsys.readouterr()
        assert "Traceback" not in output.err
        return Ran(int(ended.value.code or 0), output.out, output.err)

    return call


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Give metrics extractors of the test's own, {name: uint8 images -> features}, instead of networks with weights."""

    def use(**extractors: Any) -> None:
        found = {name.replace("_", "-"): extractor for name, extractor in extractors.items()}
        monkeypatch.setattr(suite, "_extractors", lambda *_: found)
        monkeypatch.setattr(weights, "fetch", Path)
        monkeypatch.setattr(weights, "digest", lambda name: "0" * 64)
        monkeypatch.setattr(weights, "locate", lambda name: None)

    return use


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images of two classes, in folders."""
    folder = tmp_path_factory.mktemp("photographs")
    for label in range(2):
        (folder / f"class{label}").mkdir()
        for number in range(6):
            pixels = np.random.default_rng((label, number)).integers(label * 100, label * 100 + 100, (20, 24, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"class{label}" / f"i{number}.png")
    return folder


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of torch-fidelity's Inception, scaled so that activations neither vanish nor explode."""
    from torch_fidelity import feature_extractor_inceptionv3 as fidelity

    torch.manual_seed(0)
    network = fidelity.FeatureExtractorInceptionV3.__new__(fidelity.FeatureExtractorInceptionV3)
    loader = fidelity.FeatureExtractorInceptionV3.load_state_dict
    state: dict[str, torch.Tensor] = {}

    def keep(self: torch.nn.Module, _: Any) -> None:
        for layer in self.modules():
            if isinstance(layer, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(layer.weight)
            if isinstance(layer, torch.nn.BatchNorm2d):
                torch.nn.init.uniform_(layer.weight, 0.5, 1.5)
                torch.nn.init.normal_(layer.bias, std=0.2)
                torch.nn.init.normal_(layer.running_mean, std=0.2)  # type: ignore[arg-type]
                torch.nn.init.uniform_(layer.running_var, 0.5, 1.5)  # type: ignore[arg-type]
        state.update(self.state_dict())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", keep)
        patch.setattr(fidelity.torch, "load", lambda *_, **__: {})
        network.__init__("inception", ["2048"], feature_extractor_weights_path="unused")  # type: ignore[misc]
    assert fidelity.FeatureExtractorInceptionV3.load_state_dict is loader
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(state, path)
    return path
