import io
from pathlib import Path

from PIL import Image

import tokbench as tb


def mean_absolute_error(real, fake):  # uint8 [B, 3, H, W] twice -> a number an image, [B]
    return (real.float() - fake.float()).abs().flatten(1).mean(1)


def share_below_30_db(samples):  # what is stored of all images, in the order of their ids: columns [N], features [N, D]
    return tb.Value(float((samples.column("psnr") < 30).mean()), n=len(samples.ids))


class Grays(tb.Source):  # ids, and the bytes of a sample
    def read_bytes(self, index):
        file = io.BytesIO()
        Image.new("L", (64, 64), self.entries[index]).save(file, "PNG")
        return file.getvalue()


def open_grays(rest, split):  # --data grays, --data grays:5
    levels = list(range(int(rest or 3)))
    return Grays("grays", split, Path("grays"), [f"gray{level}" for level in levels], levels)


def register():
    tb.register_metric(tb.Metric("mae", "lower", "mean absolute error in levels of 255", score=mean_absolute_error))
    tb.register_metric(
        tb.Metric("below-30-db", "lower", "share below 30 dB", compute=share_below_30_db, reads=("psnr",))
    )
    tb.register_source("grays", open_grays, summary="images of one gray level")
