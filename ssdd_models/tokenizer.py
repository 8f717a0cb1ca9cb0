"""An SSDD behind the interface of the harness."""

from typing import TYPE_CHECKING, Any

from tokbench.errors import CellError, InputError

if TYPE_CHECKING:
    pass

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from ssdd_models.ssdd import SSDD


class SSDDTokenizer:
    """An SSDD behind the harness's interface; `facts` are the `info` of its file.

    A decoder without an encoder takes the latents of sd-vae-ft-mse: `sd-vae-ft-mse+ssdd:FILE`.
    """

    def __init__(
        self, model: "SSDD", steps: int | None = None, time_shift: float | None = None, facts: Any = None
    ) -> None:
        from tokbench.records.result import TokenizerInfo

        facts = facts or {}
        config = model.config
        self.steps = config.steps if steps is None else steps
        self.time_shift = config.time_shift if time_shift is None else time_shift
        if self.steps < 1 or self.time_shift <= 0:
            raise InputError(f"ssdd: steps={self.steps}, time_shift={self.time_shift}: both must be positive")
        self.scale = SD_SCALE if model.encoder is None else 1.0
        encoder = {} if model.encoder is None else {"encoder": model.encoder}
        self.networks: Mapping[str, nn.Module] = encoder | {"decoder": model.decoder}
        self._model = (model,)  # it holds no state besides its networks; in a tuple, so that none is suspected
        self.info = TokenizerInfo(
            name="ssdd",
            family="ssdd",
            downsample=config.encoder.downsample,
            channels=config.encoder.channels,
            latent_space=facts.get("latent_space", "sd" if model.encoder is None else ""),
            size_multiple=model.size_multiple,
            decode_steps=self.steps,
            deterministic=False,
            trained_on=facts.get("trained_on", ""),
            losses=tuple(facts.get("losses", ())),
            licence=facts.get("licence", ""),
            paper=PAPER,
            note=facts.get("note", ""),
        )

    def encode(self, images: Any, *, sample: bool, seeds: Any) -> Any:
        """uint8 [B, 3, H, W] -> float32 [B, c, H / f, W / f], normalised."""
        from tokbench.data.pixels import to_float
        from tokbench.runtime.seeding import normal

        (model,) = self._model
        if model.encoder is None:
            raise CellError(f"{self.info.name}: only a decoder; write sd-vae-ft-mse+{self.info.name} for both")
        posterior = model.encode(to_float(images))
        mean = posterior.mode()
        z = posterior.sample(normal(seeds, mean.shape[1:], device=mean.device)) if sample else mean
        return model.normalise(z)

    def decode(self, latents: Any, *, seeds: Any, size: tuple[int, int]) -> Any:
        """float32 [B, c, h, w], normalised -> float32 [B, 3, H, W]; the noise of each image comes from its seed."""
        from tokbench.runtime.seeding import normal

        (model,) = self._model
        # Another stream than the posterior's sample, which starts from the same seed.
        noise = normal(seeds ^ 0x55D0, (3, *size), device=latents.device)
        z = model.denormalise(latents / self.scale)
        return model.decode(z, self.steps, noise, time_shift=self.time_shift)


PAPER = "arXiv 2510.04961"


SD_SCALE = 0.18215  # what sd-vae-ft-mse multiplies its latents by; the decoder trained on them wants them unscaled
