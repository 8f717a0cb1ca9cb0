"""Time and memory of a report over 2,000 results with 100,000 per-image rows, and of the page's first view.

Run by `make bench`. Bars: 10 s and 1 GB for each format, 1 s for the first view of 20 models x 200 images.
"""

import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from tests.made_records import record, rows, write
from tokbench.records.files import image_folders
from tokbench.report.build import build

NUM_RESULTS, ROWS_EACH, MODELS, IMAGES = 2000, 50, 20, 200
SECONDS, BYTES, FIRST_VIEW = 10.0, 1e9, 1.0


def make_results(folder: Path) -> None:
    for i in range(NUM_RESULTS):
        shift = 0.01 * (i % 7)  # close together, so that ties have to be looked for
        result = record(f"model-{i % 40}", seed=i, n=ROWS_EACH, shift=shift, res=64 + i // 40, channels=4 + 4 * (i % 3))
        write(folder, result, rows(i, ROWS_EACH, shift))


def measure(folder: Path, format: str) -> None:
    """Run one format in this process (a fresh one) and print its seconds and peak bytes."""
    start = time.perf_counter()
    out = folder / ("site" if format == "html" else f"report.{format}")
    build([folder / "results"], format=format, out=out)
    print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def first_view(folder: Path) -> float | None:
    """Seconds from opening the page of 20 models x 200 images to its complete first view; None without chromium."""
    chromium = shutil.which("chromium")
    if chromium is None:
        return None
    from playwright.sync_api import sync_playwright

    results = folder / "pictures"
    for i in range(MODELS):
        path = write(results, record(f"model-{i}", seed=i, n=IMAGES), rows(i, IMAGES, 0.0))
        for name in image_folders(path)[0 if i == 0 else 1 :]:
            name.mkdir()
            pixels = np.random.default_rng(i).integers(0, 256, (256, 256, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(name / "img00000.png", compress_level=1)
            for k in range(1, IMAGES):
                shutil.copyfile(name / "img00000.png", name / f"img{k:05}.png")
    build([results], format="html", out=folder / "view")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto("about:blank")
        times = []
        for _ in range(3):
            start = time.perf_counter()
            page.goto((folder / "view" / "index.html").as_uri(), wait_until="commit")
            page.wait_for_selector("#scatter .point")
            page.wait_for_selector("#table tbody tr")
            times.append(time.perf_counter() - start)
        browser.close()
    return min(times)


def main() -> int:
    failed = False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_results(folder / "results")
        for format in ("table", "markdown", "csv", "html"):
            command = [sys.executable, "-m", "tests.bench_report", str(folder), format]
            seconds, peak = map(
                float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
            )
            failed |= seconds > SECONDS or peak > BYTES
            print(f"{format:9} {seconds:6.2f} s  {peak / 1e6:6.0f} MB   (bars {SECONDS:.0f} s, {BYTES / 1e6:.0f} MB)")
        view = first_view(folder)
        failed |= view is not None and view > FIRST_VIEW
        print(
            "first view: chromium is not installed"
            if view is None
            else f"first view {view:.2f} s (bar {FIRST_VIEW:.0f} s)"
        )
    return int(failed)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        measure(Path(sys.argv[1]), sys.argv[2])
    else:
        sys.exit(main())
