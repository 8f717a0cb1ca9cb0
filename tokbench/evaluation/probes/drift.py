"""What is left after several round trips, each saved with 8 bits: an image that is edited again and again."""

from tokbench import registry
from tokbench.evaluation.probes.look import Base, Found, Look
from tokbench.metrics import DRIFTING
from tokbench.metrics.conditions import ROUND_TRIPS
from tokbench.runtime.seeding import image_seeds


def drift(look: Look, base: Base) -> Found:
    """Every trip is as `run` would do it with the saved image of the trip before, noise included."""
    found: Found = {}
    fake = base.fake
    for trip in range(2, max(ROUND_TRIPS) + 1):
        fake = look.reconstruct(base.ids, fake, image_seeds(fake.cpu(), look.seed)).fake
        if trip in ROUND_TRIPS:
            found |= look.under(f"x{trip}", DRIFTING, base.real, fake)
    return found


registry.register_probe(
    "drift", drift, summary="psnr, lpips-alex and colour after 1, 2, 5 and 10 round trips of 8 bits",
    encodings=max(ROUND_TRIPS) - 1, decodings=max(ROUND_TRIPS) - 1,
)  # fmt: skip
