"""Our metrics beside the usual way, in turns in one run: `python -m tests.bench_metrics [--images N]`.

Ratios are what counts. The Inception network has random weights: its arithmetic is the same.
"""

import argparse
import contextlib
import io
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from tokbench import weights
from tokbench.evaluation.score import score
from tokbench.metrics import frechet
from tokbench.metrics.extractors import Extractor, Inception, Shared
from tokbench.records.measurement import Measurement

ROUNDS = 3


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def in_turns(ours: Callable[[], object], usual: Callable[[], object], rounds: int = ROUNDS) -> tuple[float, float]:
    """Median seconds of both, measured alternately so that a busy machine hurts both alike."""
    times = [(timed(ours), timed(usual)) for _ in range(rounds)]
    return float(np.median([t[0] for t in times])), float(np.median([t[1] for t in times]))


def line(what: str, ours: float, usual: float, unit: str, bar: float | None = None) -> None:
    """Seconds of both, their ratio and the ratio that is asked for."""
    ratio = usual / ours
    verdict = "" if bar is None else f"  ({bar:g}x {'reached' if ratio >= bar else 'missed'})"
    print(f"{what:<46} ours {ours:7.3f} {unit}   usual {usual:7.3f} {unit}   {ratio:6.2f}x{verdict}", flush=True)


def pngs(folder: Path, count: int) -> tuple[Path, Path]:
    """Smooth random pictures of 256 pixels and noisier copies, as PNG."""
    generator = np.random.default_rng(0)
    for index in range(count):
        small = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        real = np.asarray(Image.fromarray(small).resize((256, 256), Image.Resampling.BICUBIC))
        fake = np.clip(real + generator.normal(0, 8, real.shape), 0, 255).astype(np.uint8)
        for side, pixels in (("real", real), ("fake", fake)):
            (folder / side).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(folder / side / f"{index:04d}.png")
    return folder / "real", folder / "fake"


def inception_file(path: Path) -> Path:
    """torch-fidelity's Inception as it is initialised."""
    from torch_fidelity import feature_extractor_inceptionv3 as fidelity

    class Fresh(fidelity.FeatureExtractorInceptionV3):  # type: ignore[misc, name-defined]
        def load_state_dict(self, *_: object, **__: object) -> None:
            torch.save(self.state_dict(), path)

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    Fresh("inception", ["2048"], feature_extractor_weights_path=empty)
    return path


def bench_inception(file: Path, count: int) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    usual = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(file))
    ours = Extractor("inception", 2048, "", "", Shared(Inception(file).eval().requires_grad_(False)))
    batches = torch.randint(256, (max(1, count // 16), 16, 3, 256, 256), dtype=torch.uint8)
    with torch.inference_mode():
        ours(batches[0])
        usual(batches[0])
        seconds = in_turns(lambda: [ours(b.clone()) for b in batches], lambda: [usual(b) for b in batches])
    images = batches.shape[0] * 16
    line("Inception features, s an image", *(s / images for s in seconds), "s", 1.25)


def bench_frechet(dim: int, num: int) -> None:
    from scipy.linalg import sqrtm

    generator = np.random.default_rng(0)
    # Variances that fall off by a million, as Inception's do; with equal ones sqrtm has an easier, real problem.
    mixing = np.geomspace(1, 1e-3, dim)[:, None] * generator.standard_normal((dim, dim)) / dim**0.5
    a, b = (frechet.moments(generator.standard_normal((num, dim)) @ mixing + 0.1 * k) for k in range(2))
    ours = [timed(lambda: frechet.distance(a, b)) for _ in range(2)]
    usual = timed(lambda: np.trace(sqrtm(a.cov @ b.cov)))
    ours.append(timed(lambda: frechet.distance(a, b)))  # sqrtm once, in the middle: it takes a minute
    seconds = float(np.median(ours)), usual
    line(f"Fréchet term, {dim}-d, N = {num}", *seconds, "s", 20)


def usual_way(real: Path, fake: Path, networks: dict[str, nn.Module], inception: Path) -> None:
    """scikit-image per image, lpips per image, then torch-fidelity on the folders."""
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity
    from torch_fidelity import calculate_metrics

    def read(path: Path) -> np.ndarray:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))

    for path in sorted(real.iterdir()):
        x, y = read(path), read(fake / path.name)
        peak_signal_noise_ratio(x, y)
        structural_similarity(x, y, channel_axis=2)
        structural_similarity(x, y, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    for network in networks.values():
        for path in sorted(real.iterdir()):
            pair = [torch.from_numpy(read(p)).permute(2, 0, 1)[None] / 127.5 - 1 for p in (path, fake / path.name)]
            with torch.no_grad():
                network(*pair)
    with contextlib.redirect_stderr(io.StringIO()):
        calculate_metrics(
            input1=str(fake), input2=str(real), fid=True, cuda=False, verbose=False, cache=False,
            feature_extractor_weights_path=str(inception),
        )  # fmt: skip


def bench_default_set(folder: Path, inception: Path, count: int) -> None:
    import lpips

    real, fake = pngs(folder, count)
    networks = {}
    for net in ("alex", "vgg"):
        path = weights.fetch(f"lpips-{net}")
        tensors = weights.load(path)
        networks[net] = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        layers = [layer for layer in networks[net].net.modules() if isinstance(layer, nn.Conv2d)]
        with torch.no_grad():
            for index, layer in enumerate(layers):
                layer.weight.copy_(tensors[f"convs.{index}.weight"])
                layer.bias.copy_(tensors[f"convs.{index}.bias"])

    def ours() -> None:  # into a new folder: what is measured is not measured again
        score(str(real), str(fake), Measurement(device="cpu"), out=Path(tempfile.mkdtemp(dir=folder)))

    seconds = in_turns(ours, lambda: usual_way(real, fake, networks, inception), 1)
    line("Default set from PNG folders, s an image", *(s / count for s in seconds), "s", 2)
    # Ours leaves rfid null at so few images; with Inception on both sides it would do the same work as the usual way.
    extract = Extractor("inception", 2048, "", "", Shared(Inception(inception).eval().requires_grad_(False)))
    images = torch.randint(256, (8, 3, 256, 256), dtype=torch.uint8)
    more = timed(lambda: [extract(images), extract(images.clone())]) / 8
    line("  the same with Inception features on our side", seconds[0] / count + more, seconds[1] / count, "s")


def main() -> None:
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=256, help="of the default set")
    parser.add_argument("--dim", type=int, default=2048, help="of the Fréchet term")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads", file=sys.stderr)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        os.environ.setdefault("TOKBENCH_WEIGHTS", str(weights.weights_dir()))
        os.environ["XDG_CACHE_HOME"] = scratch  # features of the real images would be kept for the next time
        inception = inception_file(folder / "inception.pth")
        bench_inception(inception, 32)
        bench_default_set(folder, inception, options.images)
    bench_frechet(options.dim, 5000)


if __name__ == "__main__":
    main()
