"""An SSDD behind the interface of the harness."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ssdd_models.ssdd import SSDD
from tokbench.data.pixels import to_float
from tokbench.errors import CellError, InputError
from tokbench.records.result import TokenizerInfo
from tokbench.runtime.seeding import normal

SD_SCALE = 0.18215  # what sd-vae-ft-mse multiplies its latents by; the decoder trained on them wants them unscaled
NOISE_STREAM = 0x55D0  # the decoder's noise is another than the posterior's, which starts from the same seed


class SSDDTokenizer:
    """An SSDD behind the harness's interface; `info` is what its file says of it.

    A decoder without an encoder takes the latents of sd-vae-ft-mse: `sd-vae-ft-mse+ssdd:FILE`.
    """

    def __init__(
        self,
        model: SSDD,
        steps: int | None = None,
        time_shift: float | None = None,
        info: Mapping[str, Any] | None = None,
    ) -> None:
        facts = {"latent_space": "sd" if model.encoder is None else "", **(info or {})}
        self.model, self.config = model, model.config
        self.steps = self.config.steps if steps is None else steps
        self.time_shift = self.config.time_shift if time_shift is None else time_shift
        if self.steps < 1 or self.time_shift <= 0:
            raise InputError(f"ssdd: steps={self.steps}, time_shift={self.time_shift}: both must be positive")
        self.scale = SD_SCALE if model.encoder is None else 1.0
        encoder = {} if model.encoder is None else {"encoder": model.encoder}
        self.networks: Mapping[str, nn.Module] = encoder | {"decoder": model.decoder}
        self.info = TokenizerInfo(
            name="ssdd",
            family="ssdd",
            downsample=self.config.encoder.downsample,
            channels=self.config.encoder.channels,
            size_multiple=model.size_multiple,
            decode_steps=self.steps,
            deterministic=False,
            losses=tuple(facts.pop("losses", ())),
            paper="arXiv 2510.04961",
            **facts,
        )

    def encode(self, images: Tensor, *, sample: bool, seeds: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> float32 [B, c, H / f, W / f], normalised."""
        if self.model.encoder is None:
            raise CellError(f"{self.info.name}: only a decoder; write sd-vae-ft-mse+{self.info.name} for both")
        posterior = self.model.encode(to_float(images))
        mean = posterior.mode()
        z = posterior.sample(normal(seeds, mean.shape[1:], device=mean.device)) if sample else mean
        return self.model.normalise(z)

    def decode(self, latents: Tensor, *, seeds: Tensor, size: tuple[int, int]) -> Tensor:
        """float32 [B, c, h, w], normalised -> float32 [B, 3, H, W]; the noise of each image comes from its seed."""
        noise = normal(seeds ^ NOISE_STREAM, (3, *size), device=latents.device)
        return self.model.sample(latents / self.scale, noise, self.steps, self.time_shift)
