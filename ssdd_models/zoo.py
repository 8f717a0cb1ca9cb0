"""SSDD models for the registry: the bundled demo weights, the released ones, any file. Cheap to import."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokbench.errors import CellError, InputError
from tokbench.registry import register as add
from tokbench.trainers import Trainer, TrainOptions, register_trainer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from ssdd_models.ssdd import SSDD

BUNDLED = Path(__file__).parent / "weights" / "ssdd.safetensors"
RELEASED = "facebook/SSDD"  # folders F8C4, ..., SDVAE; files *_{S,B,M,L,XL}_256
SIZES = {
    "F8C4": "S B M L XL",
    "F16C4": "S B M L XL",
    "F16C16": "S B M L XL",
    "F32C64": "S B M L XL",
    "SDVAE": "S B M L",
}
PAPER = "arXiv 2510.04961"
SD_SCALE = 0.18215  # what sd-vae-ft-mse multiplies its latents by; the decoder trained on them wants them unscaled


def register() -> None:
    """Entry point of the group `tokbench.plugins`."""
    add("ssdd", ssdd, summary="SSDD trained with tokbench; the bundled demo weights, or ssdd:FILE", accepts=is_ssdd)
    add(
        "ssdd-{size}-{latent}",
        released,
        summary="SSDD as released, S B M L XL x f8c4 f16c4 f16c16 f32c64 or sdvae (for sd-vae-ft-mse+); CC-BY-NC 4.0",
    )
    register_trainer("ssdd", Trainer(_train, _settings, "SSDD: stages joint, pretrain, finetune, distill"))


def _train(options: TrainOptions) -> Path:
    from ssdd_models.train import run_command

    return run_command(options)


def _settings(stage: str | None, preset: str | None) -> list[str]:
    from ssdd_models.train import settings

    return settings(stage, preset)


def ssdd(
    file: Path | None = None, steps: int | None = None, time_shift: float | None = None, random_weights: bool = False
) -> Any:
    """The bundled weights, or those of a file: ours, or a released one, whose sizes are read from its tensors.

    `steps` of the sampler (a file's own default otherwise: 1 for distilled ones of ours, 8 for released ones).
    """
    from ssdd_models.ssdd import SSDD, SSDDConfig, read_checkpoint

    path = BUNDLED if file is None else Path(file)
    if random_weights and not path.exists():
        from ssdd_models.stages import SMALL_STAGES

        small = SMALL_STAGES["pretrain"]
        model = SSDD(small.encoder, small.decoder, steps=1)
        return SSDDTokenizer(model, steps, time_shift, {"note": "random weights: for speed only"})
    if not path.exists():
        raise CellError(f"no demo weights at {path.name}; train some with `tokbench train ssdd`, or name a file")
    path = path / "model.safetensors" if path.is_dir() else path
    state, metadata = read_checkpoint(path)
    if metadata.get("model", "ssdd") != "ssdd":
        raise InputError(f"{path}: holds {metadata['model']}, not ssdd")
    if random_weights:
        config = (
            SSDDConfig.from_json(metadata["config"]) if "config" in metadata else SSDDConfig.from_shapes(shapes(state))
        )
        return SSDDTokenizer(SSDD.from_config(config), steps, time_shift, {"note": "random weights: for speed only"})
    return SSDDTokenizer(SSDD.from_pretrained(path), steps, time_shift, metadata.get("info", {}))


def released(
    size: str, latent: str, steps: int | None = None, time_shift: float | None = None, random_weights: bool = False
) -> Any:
    """Weights of the paper's authors from the hub, or any size XS ... G of any shape with random weights."""
    from ssdd_models.ssdd import SSDD

    facts = {"licence": "CC-BY-NC 4.0", "latent_space": f"ssdd-{latent.lower()}", "trained_on": "ImageNet"}
    external = latent.upper() == "SDVAE"
    if random_weights:
        try:
            model = SSDD("f8c4" if external else latent.lower(), size.upper(), external_encoder=external)
        except ValueError as error:
            raise InputError(f"ssdd-{size}-{latent}: {error}") from error
        return SSDDTokenizer(model, steps, time_shift, {"note": "random weights: for speed only"})
    if size.upper() not in SIZES.get(latent.upper(), "").split():
        known = "; ".join(f"{name.lower()}: {sizes.lower()}" for name, sizes in SIZES.items())
        raise InputError(f"ssdd-{size}-{latent}: not among the released weights ({known})")
    path = fetch_released(latent.upper(), size.upper())
    return SSDDTokenizer(SSDD.from_pretrained(path), steps, time_shift, {} if external else facts)


def fetch_released(folder: str, size: str) -> Path:
    """The file of a released model, downloaded once to the hub's cache. CellError if it cannot be had."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    from tokbench.weights import offline

    pattern = f"{folder}/*_{size}_256*"
    try:
        found = snapshot_download(RELEASED, allow_patterns=[pattern], local_files_only=offline())
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CellError(f"{RELEASED}: {pattern} cannot be fetched ({reason}); or give a file: ssdd:FILE") from error
    files = sorted(path for path in Path(found, folder).rglob("*.safetensors") if f"_{size}_256" in str(path))
    if not files:
        raise CellError(f"{RELEASED}: no file {pattern}.safetensors; give one as ssdd:FILE")
    return files[0]


def shapes(state: Any) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


def is_ssdd(path: Path) -> bool:
    """Whether a safetensors file has the tensors of an SSDD decoder; reads its header alone."""
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    with path.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return "decoder.ada_ctx_proj.0.weight" in header


class SSDDTokenizer:
    """An SSDD behind the harness's interface; `facts` are the `info` of its file.

    A decoder without an encoder takes the latents of sd-vae-ft-mse: `sd-vae-ft-mse+ssdd:FILE`.
    """

    def __init__(
        self, model: "SSDD", steps: int | None = None, time_shift: float | None = None, facts: Any = None
    ) -> None:
        from tokbench.result import TokenizerInfo

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
        from tokbench.seeding import normal

        (model,) = self._model
        if model.encoder is None:
            raise CellError(f"{self.info.name}: only a decoder; write sd-vae-ft-mse+{self.info.name} for both")
        posterior = model.encode(images.float() / 127.5 - 1)
        mean = posterior.mode()
        z = posterior.sample(normal(seeds, mean.shape[1:], device=mean.device)) if sample else mean
        return model.normalise(z)

    def decode(self, latents: Any, *, seeds: Any, size: tuple[int, int]) -> Any:
        """float32 [B, c, h, w], normalised -> float32 [B, 3, H, W]; the noise of each image comes from its seed."""
        from tokbench.seeding import normal

        (model,) = self._model
        # Another stream than the posterior's sample, which starts from the same seed.
        noise = normal(seeds ^ 0x55D0, (3, *size), device=latents.device)
        z = model.denormalise(latents / self.scale)
        return model.decode(z, self.steps, noise, time_shift=self.time_shift)
