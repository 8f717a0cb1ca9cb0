"""What noise on the latents does: a generator's latents are never quite those of an image.

The protocol is RAC's (arXiv 2603.05925): z + sigma * std(z) * noise, the same noise for every sigma.
"""

from collections.abc import Mapping

import torch

from tokbench import registry
from tokbench.evaluation.probes.look import Base, Found, Look
from tokbench.metrics import NOISED, metrics_of
from tokbench.metrics.conditions import SIGMAS
from tokbench.records.result import TokenizerInfo
from tokbench.runtime.seeding import image_seeds, normal


def robustness(look: Look, base: Base) -> Found:
    """std(z) is over an image's own latent. The decoder's seeds are those of the undisturbed reconstruction."""
    latents = base.latents
    with torch.inference_mode():
        seeds = image_seeds(base.real.cpu(), look.seed + 1)  # the decoder's own noise has the seeds themselves
        noise = normal(seeds, latents.shape[1:], device=latents.device).to(latents.dtype)
        deviation = latents.float().flatten(1).std(1).view(-1, *[1] * (latents.ndim - 1)).to(latents.dtype)
        noise = noise * deviation
    found: Found = {}
    for sigma in SIGMAS[1:]:
        fake = look.decode(base.ids, latents + sigma * noise, base.seeds, base.real.shape[2:])
        found |= look.under(sigma, NOISED, base.real, fake)
    return found


def refuses(info: TokenizerInfo) -> Mapping[str, str]:
    """Codes and codecs have no latents that noise can be added to."""
    reason = "" if info.channels is not None else "has no continuous latents to add noise to"
    return {metric.name: reason for metric in metrics_of("robustness") if reason}


registry.register_probe(
    "robustness", robustness, summary="quality with noise of 0.1 to 0.5 deviations on the latents",
    decodings=len(SIGMAS) - 1, refuses=refuses,
)  # fmt: skip
