"""Loading against torchvision's ImageFolder with the same crop, a tar against its folder, growth with the set, and
photographs of mixed sizes against the loader as it was before small ones were enlarged.

    python -m tests.bench_data

Photographs of ImageNet's usual size (500x375 JPEG), made from the bundled ones; 2 workers. Loaders take turns, so that
a busy machine slows all alike; the printed ratio is the median over turns.
"""

import os
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from tests import ROOT
from tokbench.data import training_crops
from tokbench.data.crops import crop
from tokbench.data.loader import CropCache, Loader
from tokbench.data.open import SAMPLES, open_source
from tokbench.protocols import PROTOCOLS

ADM = PROTOCOLS["adm"]
BEFORE = "78679d6~1"  # the last commit that refused images below the resolution
SIZES = ((500, 375), (375, 500), (640, 427), (300, 260), (1600, 1200), (2400, 1600))  # pixels, as ImageNet mixes them
SMALL = ((200, 150), (75, 56), (1, 200), (2000, 3))
TURNS, NUM_IMAGES, WORKERS, BATCH = 3, 256, 2, 32


def make_photos(root: Path, num_images: int, size: tuple[int, int]) -> Path:
    """`num_images` JPEGs in ten class folders; every 29th is the same picture."""
    root.mkdir()
    pictures = []
    for path in sorted(SAMPLES.glob("*.jpg")):
        Image.open(path).resize(size).save(root / "one.jpg", quality=90)
        pictures.append((root / "one.jpg").read_bytes())
    (root / "one.jpg").unlink()
    for i in range(num_images):
        folder = root / f"class{i % 10}"
        folder.mkdir(exist_ok=True)
        (folder / f"{i:05d}.jpg").write_bytes(pictures[i % len(pictures)])
    return root


def rate(batches: Iterable[tuple[object, torch.Tensor]]) -> float:
    """Images a second, workers' start included."""
    start, count = time.perf_counter(), 0
    for item in batches:
        count += max(len(part) for part in item if isinstance(part, torch.Tensor))
    return count / (time.perf_counter() - start)


def plain_loader(root: Path) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    def transform(image: Image.Image) -> torch.Tensor:  # uint8, as light as it can be
        return torch.from_numpy(crop(image, 256, ADM).copy()).permute(2, 0, 1)

    dataset = ImageFolder(str(root), transform)
    return DataLoader(dataset, batch_size=BATCH, num_workers=WORKERS)


def compare(root: Path) -> None:
    with tarfile.open(root.parent / "photos.tar", "w") as tar:
        tar.add(root, arcname=".")
    folder, packed = open_source(root), open_source(root.parent / "photos.tar")
    cache = CropCache(root.parent / "crops", folder, 256, ADM)
    ours = partial(Loader, resolution=256, protocol=ADM, batch_size=BATCH, workers=WORKERS)
    contenders: dict[str, Callable[[], Iterable[tuple[object, torch.Tensor]]]] = {
        "torchvision ImageFolder": lambda: plain_loader(root),
        "tokbench folder": lambda: ours(folder),
        "tokbench tar": lambda: ours(packed),
        "tokbench cached crops": lambda: ours(folder, cache=cache),
    }
    for _ in ours(folder, cache=cache):
        pass  # fills the cache, and the system's cache of files
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(TURNS):
        for name, make in reversed(contenders.items()) if turn % 2 else contenders.items():
            rates[name].append(rate(make()))
    for name, values in rates.items():
        ratios = [mine / plain for mine, plain in zip(values, rates["torchvision ImageFolder"], strict=True)]
        print(f"{name:<26}{statistics.median(values):7.0f} images/s  {statistics.median(ratios):5.2f}x of ImageFolder")
    turns = zip(rates["tokbench tar"], rates["tokbench folder"], strict=True)
    print(f"tar against folder        {statistics.median(tar / plain for tar, plain in turns):23.2f}x")


def measure_run(root: str, num_images: str) -> None:
    """In a process of its own: time and memory of a whole evaluation of the cheapest model."""
    from tokbench.evaluation.evaluate import evaluate

    torch.set_num_threads(1)
    evaluate("identity", root, 64, ["psnr"], limit=2, workers=0)  # imports
    source = open_source(root, limit=int(num_images))
    source.fingerprint()
    start = time.perf_counter()
    evaluate("identity", source, 64, ["psnr"], workers=WORKERS, batch_size=16)
    seconds = time.perf_counter() - start
    memory = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(seconds / int(num_images) * 1000, memory / 1024)


def growth(root: Path) -> None:
    figures = {}
    for count in (250, 500, 1000, 4000):
        command = [sys.executable, "-m", "tests.bench_data", str(root), str(count)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        figures[count] = [float(word) for word in output.split()]
        print(f"run of {count:4} images         {figures[count][0]:5.2f} ms/image  {figures[count][1]:6.0f} MiB")
    print(f"memory of 4000 against 1000 images: {figures[4000][1] / figures[1000][1] - 1:+.1%}")


# Both versions run it, each in a process of its own.
MIXED = f"""
import sys, time, torch
from tokbench.data.loader import Loader
from tokbench.data.open import open_source
from tokbench.protocols import PROTOCOLS
torch.set_num_threads(1)
source = open_source(sys.argv[1])
for index in range(len(source)):
    source.read_bytes(index)  # into the system's cache
start = time.perf_counter()
count = sum(len(ids) for ids, _ in Loader(source, 256, PROTOCOLS["adm"], batch_size={BATCH}, workers={WORKERS}))
print(count / (time.perf_counter() - start))
"""


def mixed_rate(tree: Path, root: Path) -> float:
    """Images a second of the version that lies in a folder."""
    command = [sys.executable, "-c", MIXED, str(root)]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    return float(subprocess.run(command, cwd=tree, env=environment, stdout=subprocess.PIPE, check=True).stdout)


def mixed_sizes(root: Path) -> None:
    """Both versions take turns on what both can read; then ours with small, long and narrow ones."""
    root.mkdir()
    for size in SIZES:
        make_photos(root / "{}x{}".format(*size), 96, size)
    before = root.parent / "before"
    before.mkdir()
    packed = subprocess.run(["git", "archive", BEFORE, "tokbench"], cwd=ROOT, stdout=subprocess.PIPE, check=False)
    if packed.returncode:
        print(f"mixed sizes: no commit {BEFORE} here to compare with")
    else:
        subprocess.run(["tar", "-x", "-C", str(before)], input=packed.stdout, check=True)
        shutil.copy(ROOT / "pyproject.toml", before)
        rates: dict[Path, list[float]] = {before: [], ROOT: []}
        for turn in range(2 * TURNS):
            for tree in sorted(rates, reverse=turn % 2 == 0):
                rates[tree].append(mixed_rate(tree, root))
        then, now = (statistics.median(values) for values in rates.values())
        ratio = statistics.median(new / old for old, new in zip(*rates.values(), strict=True))
        print(f"mixed sizes               {now:7.0f} images/s  {ratio:5.2f}x of {BEFORE}, {then:.0f} images/s")
    for size in SMALL:
        make_photos(root / "{}x{}".format(*size), 32, size)
    print(f"with small and narrow     {mixed_rate(ROOT, root):7.0f} images/s")


def draft(root: Path) -> None:
    """Training crops of large photographs, decoded small and whole."""
    source, rates = open_source(root), []
    crops = training_crops.PhotoCrops(source, range(len(source)), training_crops.CropConfig(), seed=0)
    crops.kept.clear()
    for sides in (crops.sides, 0):
        crops.sides = sides
        start = time.perf_counter()
        for number in range(len(source)):
            crops[number, 128]
        rates.append(len(source) / (time.perf_counter() - start))
    ratio = rates[0] / rates[1]
    print(f"training crops of 12 MP   {rates[0]:7.0f} images/s  {ratio:5.2f}x of decoding whole")


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        compare(make_photos(Path(folder) / "photos", NUM_IMAGES, (500, 375)))
        mixed_sizes(Path(folder) / "mixed")
        draft(make_photos(Path(folder) / "large", 24, (4000, 3000)))
        growth(make_photos(Path(folder) / "small", 4000, (96, 80)))


if __name__ == "__main__":
    measure_run(*sys.argv[1:]) if len(sys.argv) > 1 else main()
