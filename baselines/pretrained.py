"""Published autoencoders through diffusers: one adapter for continuous latents, variants for the others."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.families.quantisers import code_bits, nearest_codes
from baselines.hub import checkpoint, file_hash, load_model, load_weights, model_class, weights_of
from baselines.published import PUBLISHED, VERIFIED, Published
from tokbench.data.pixels import to_float
from tokbench.errors import CellError, InputError
from tokbench.records.result import TokenizerInfo
from tokbench.runtime.seeding import normal
from tokbench.runtime.tiling import Tiling

FRAME_CLASSES = ("AutoencoderKLWan", "AutoencoderKLQwenImage", "AutoencoderKLCosmos", "AutoencoderKLHunyuanVideo")
ANY = "diffusers"  # family of a model that states its own facts


class Half(nn.Module):
    """One direction of a diffusers model: the modules it uses, and the bound method that runs them."""

    def __init__(self, modules: Iterable[nn.Module], run: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(x.to(next(self.parameters()).dtype) if x.is_floating_point() else x)


def halves(model: Any) -> dict[str, Half]:
    """A diffusers autoencoder as {"encoder", "decoder"}: quant_conv is the encoder's, the rest the decoder's."""
    front = [child for name, child in model.named_children() if name.startswith(("encoder", "quant_conv"))]
    back = [child for name, child in model.named_children() if not name.startswith(("encoder", "quant_conv"))]
    encoder = Half(front, lambda x: model.encode(x, return_dict=False)[0])
    return {"encoder": encoder, "decoder": Half(back, lambda z: model.decode(z, return_dict=False)[0])}


class Continuous:
    """Any diffusers autoencoder of images with continuous latents.

    `shift` and `scale` are numbers or one value a channel; the latents that travel are (z - shift) * scale.
    """

    resolution: int | None = None  # the only one it works at
    files: tuple[Path, ...] = ()  # of its weights
    tiling: Tiling | None = None  # diffusers' own

    def __init__(self, model: Any, info: TokenizerInfo, shift: Any = 0.0, scale: Any = 1.0) -> None:
        self.info = info
        self.networks = halves(model)
        self.shift, self.scale = (
            torch.as_tensor(value, dtype=torch.float32).reshape(-1, 1, 1) for value in (shift, scale)
        )

    def encode(self, images: Tensor, *, sample: bool, seeds: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> float32 [B, c, H / f, W / f], normalised."""
        posterior = self.run_encoder(to_float(images))
        if isinstance(posterior, Tensor):  # no posterior: DC-AE, TAESD, RAE
            return self.normalise(posterior.float())
        mean = posterior.mean.float()
        if sample:
            mean = mean + posterior.std.float() * self.noise(seeds, mean)
        return self.normalise(mean)

    def decode(self, latents: Tensor, *, seeds: Tensor, size: tuple[int, int]) -> Tensor:
        """float32 [B, c, h, w], normalised -> float32 [B, 3, H, W]."""
        return self.run_decoder(self.denormalise(latents)).float()

    def run_encoder(self, x: Tensor) -> Any:
        if self.resolution and x.shape[-2:] != (self.resolution, self.resolution):
            raise CellError(
                f"{self.info.name}: works at {self.resolution} px only, not at {x.shape[-2]} x {x.shape[-1]}"
            )
        return self.networks["encoder"](x)

    def run_decoder(self, z: Tensor) -> Tensor:
        return self.networks["decoder"](z)

    def noise(self, seeds: Tensor, like: Tensor) -> Tensor:
        return normal(seeds, like.shape[1:], device=like.device)

    def normalise(self, z: Tensor) -> Tensor:
        shift, scale = (value.to(z, non_blocking=z.is_cuda) for value in (self.shift, self.scale))
        return (z - shift) * scale

    def denormalise(self, latents: Tensor) -> Tensor:
        shift, scale = (value.to(latents, non_blocking=latents.is_cuda) for value in (self.shift, self.scale))
        return latents / scale + shift


class Sequence(Continuous):
    """Latents [B, c, N] without a grid: nothing is shifted or scaled."""

    def normalise(self, z: Tensor) -> Tensor:
        return z

    def denormalise(self, latents: Tensor) -> Tensor:
        return latents


class Frame(Continuous):
    """A video autoencoder on one frame, whose time axis does not travel."""

    def run_encoder(self, x: Tensor) -> Any:
        return super().run_encoder(x[:, :, None])

    def normalise(self, z: Tensor) -> Tensor:
        return super().normalise(z[:, :, 0])

    def run_decoder(self, z: Tensor) -> Tensor:
        return super().run_decoder(z[:, :, None])[:, :, 0]


class Patched(Continuous):
    """FLUX.2: latents in 2 x 2 patches, normalised by the running statistics of the model's batch norm (eps 1e-4)."""

    def __init__(self, model: Any, info: TokenizerInfo, shift: Any = 0.0, scale: Any = 1.0) -> None:
        self.patch = model.config.patch_size[0]
        deviation = (model.bn.running_var + model.config.batch_norm_eps).sqrt()
        super().__init__(model, info, model.bn.running_mean.clone(), 1 / deviation)

    def normalise(self, z: Tensor) -> Tensor:
        return super().normalise(F.pixel_unshuffle(z, self.patch))

    def denormalise(self, latents: Tensor) -> Tensor:
        return F.pixel_shuffle(super().denormalise(latents), self.patch)


class Representation(Continuous):
    """RAE: resizes to its encoder's input, works on [0, 1], and decodes to one resolution only."""

    def __init__(self, model: Any, info: TokenizerInfo, shift: Any = 0.0, scale: Any = 1.0) -> None:
        super().__init__(model, info)  # the model normalises its latents itself
        self.resolution = model.decoder_image_size

    def run_encoder(self, x: Tensor) -> Any:
        return super().run_encoder((x + 1) / 2)

    def run_decoder(self, z: Tensor) -> Tensor:
        return super().run_decoder(z) * 2 - 1


class Consistency(Continuous):
    """OpenAI's consistency decoder: two network evaluations, a generator per image (the scheduler adds noise twice)."""

    def __init__(self, model: Any, info: TokenizerInfo, shift: Any = 0.0, scale: Any = 1.0) -> None:
        super().__init__(model, info, shift, scale)
        self.model = model

    def decode(self, latents: Tensor, *, seeds: Tensor, size: tuple[int, int]) -> Tensor:
        """float32 [B, 4, h, w], normalised -> float32 [B, 3, H, W]; `seeds` give the noise."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]
        z = self.denormalise(latents).to(next(self.networks["decoder"].parameters()).dtype)
        for name in ("means", "stds"):  # buffers of the model itself, which no part of it carries along
            setattr(self.model, name, getattr(self.model, name).to(z))
        return self.model.decode(z, generator=generators, return_dict=False)[0].float()


class Codes(Continuous):
    """A network that makes codes and takes them; the rate is that of a fixed-length code."""

    def encode(self, images: Tensor, *, sample: bool, seeds: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> codes int64 [B, ...]."""
        return self.run_encoder(to_float(images))

    def decode(self, latents: Tensor, *, seeds: Tensor, size: tuple[int, int]) -> Tensor:
        """codes int64 [B, ...] -> float32 [B, 3, H, W]."""
        return self.run_decoder(latents).float()

    def bits(self, latents: Tensor) -> Tensor:
        """float64 [B]: codes times log2 of the codebook's size."""
        assert self.info.codebook_size is not None
        return code_bits(latents, self.info.codebook_size)


class Codebook(Continuous):
    """VQModel: codes int64 [B, h, w] travel; the rate is that of a fixed-length code."""

    def __init__(self, model: Any, info: TokenizerInfo, shift: Any = 0.0, scale: Any = 1.0) -> None:
        super().__init__(model, info)
        self.quantize = model.quantize
        back = self.networks["decoder"].parts
        self.networks["decoder"] = Half(back, lambda z: model.decode(z, force_not_quantize=True, return_dict=False)[0])

    def encode(self, images: Tensor, *, sample: bool, seeds: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> codes int64 [B, H / f, W / f]."""
        z = self.networks["encoder"](to_float(images)).float()
        return nearest_codes(z, self.quantize.embedding.weight.float())

    def decode(self, latents: Tensor, *, seeds: Tensor, size: tuple[int, int]) -> Tensor:
        """codes int64 [B, h, w] -> float32 [B, 3, H, W]."""
        return self.networks["decoder"](self.quantize.embedding(latents).permute(0, 3, 1, 2)).float()

    def bits(self, latents: Tensor) -> Tensor:
        """float64 [B]: codes times log2 of the codebook's size."""
        return code_bits(latents, self.quantize.embedding.num_embeddings)


ADAPTERS: dict[str, type[Continuous]] = {
    "AutoencoderKLFlux2": Patched,
    "AutoencoderRAE": Representation,
    "ConsistencyDecoderVAE": Consistency,
    **dict.fromkeys(FRAME_CLASSES, Frame),
}


def published(name: str, file: Path | None, random_weights: bool, weights: str | None, tiled: bool) -> Any:
    """A row of the table, from the hub, from a diffusers folder or one file of weights, or with random weights.

    `tiled` switches diffusers' own tiling on. Raises CellError if it cannot be fetched or does not fit the row.
    """
    row = PUBLISHED[name]
    if random_weights or (file is not None and file.is_file()):
        config: dict[str, Any] = dict(row.config or {})
        if row.scale is not None and not random_weights:  # a file of weights states neither
            config |= {"scaling_factor": row.scale, "shift_factor": row.shift}
        model = model_class(name, row.kind)(**config).eval()
        if file is not None and not random_weights:
            row = load_weights(model, file, row, weights, partial(diffusers_names, config=model.config))
    else:
        model, files = load_model(str(file) if file else row.repo, "" if file else row.subfolder, row.kind, name)
        row = with_files(row, files)
        downsample, channels = latent_shape(row.kind, model.config, name)
        if (downsample, channels) != (row.downsample, row.channels or channels):
            raise CellError(
                f"{name}: {file or row.repo} has f{downsample} and {channels} channels, expected f{row.downsample} and "
                f"{row.channels}; load it as hf:{file or row.repo}"
            )
    tokenizer = wrap(model, row, random_weights)
    tokenizer.tiling = own_tiling(model, name) if tiled else None
    return tokenizer


def with_files(row: Published, files: tuple[Path, ...]) -> Published:
    """The row with the files that its weights came from, and a note if they are a variant."""
    variant, _ = weights_of(file.name for file in files)
    note = "; ".join(filter(None, (row.note, variant and f"weights are its {variant} files")))
    return replace(row, files=files, note=note)


def own_tiling(model: Any, name: str) -> Tiling:
    """Switch a diffusers model's tiling on; how it cuts images. InputError if it has none for both directions."""
    if not hasattr(model, "use_tiling") or not (hasattr(model, "tiled_decode") or hasattr(model, "_tiled_decode")):
        raise InputError(f"{name}: diffusers has no tiling of {type(model).__name__}; write @tile=512@overlap=64")
    model.enable_tiling()
    if hasattr(model, "tile_sample_stride_height"):
        tile = model.tile_sample_min_height
        return Tiling(tile, tile - model.tile_sample_stride_height, cut_short=True)
    tile = model.tile_sample_min_size
    return Tiling(tile, int(tile * model.tile_overlap_factor), cut_short=True)


def diffusers_names(held: dict[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """An AutoencoderKL's tensors from the names of latent diffusion; others as they are."""
    if "encoder.down.0.block.0.conv1.weight" not in held:
        return held
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    converted: dict[str, Tensor] = convert_ldm_vae_checkpoint(dict(held), config)
    return converted


def any_autoencoder(source: str, latent_space: str = "", tiled: bool = False) -> Any:
    """`OWNER/NAME[:SUBFOLDER]` on the hub or a local folder: any diffusers autoencoder, by its config.

    `latent_space` ("sd", ...) says which other models' latents it shares, for A+B; `tiled` is as for `published`.

    Raises InputError for a malformed address, CellError if it cannot be fetched or is something else.
    """
    repo, _, subfolder = (source, "", "") if Path(source).exists() else source.partition(":")
    if not Path(repo).exists() and repo.count("/") != 1:
        raise InputError(f'"{source}": write hf:OWNER/NAME or hf:OWNER/NAME:FOLDER')
    if not subfolder and Path(repo, "vae", "config.json").is_file() and not Path(repo, "config.json").is_file():
        subfolder = "vae"  # a whole pipeline
    model, files = load_model(repo, subfolder, None, source)
    kind = type(model).__name__
    downsample, channels = latent_shape(kind, model.config, source)
    note = f"{kind}; scale and shift from its config"
    row = Published(source, ANY, kind, downsample, repo, channels, latent_space=latent_space, note=note)
    if kind == "VQModel":
        row = replace(row, channels=None, codebook_size=model.config.num_vq_embeddings)
    tokenizer = wrap(model, with_files(row, files), random_weights=False)
    tokenizer.tiling = own_tiling(model, source) if tiled else None
    return tokenizer


def from_file(
    row: Published,
    file: Path | None,
    random_weights: bool,
    weights: str | None,
    build: Callable[[], nn.Module],
    own_names: Callable[[dict[str, Tensor]], Mapping[str, Tensor]] = dict,
    adapter: type[Continuous] | None = None,
) -> Continuous:
    """A family's row from its one file, or with random weights: what `build` makes, filled as by `load_weights`."""
    path = None if random_weights else checkpoint(row, file)  # before a large network is built
    model = build()
    if path is not None:
        row = load_weights(model, path, row, weights, own_names)
    return wrap(model.eval(), row, random_weights, adapter)


def wrap(model: Any, row: Published, random_weights: bool, adapter: type[Continuous] | None = None) -> Continuous:
    """The tokenizer around a model, with the row's scale and shift or, where it has none, those of the config.

    `adapter` is the one of the model's class if not given.
    """
    shift, scale = config_scale(model)
    facts = [row.note]
    verified = not random_weights and (row.family == ANY or is_verified(row))
    if row.scale is not None:
        if not random_weights and (shift, scale) != (row.shift, row.scale):
            found = "states neither" if row.kind == "ldm" else f"says {shift} and {scale}"
            facts.append(f"shift {row.shift:g} and scale {row.scale:g} used, the checkpoint {found}")
            verified = False
        shift, scale = row.shift, row.scale
    info = TokenizerInfo(
        name=row.name,
        family=row.family,
        downsample=row.downsample,
        channels=row.channels,
        codebook_size=row.codebook_size,
        tokens_per_image=row.tokens_per_image,
        size_multiple=row.downsample or 1,
        decode_steps=row.decode_steps,
        deterministic=not row.decode_steps and row.kind != "ConsistencyDecoderVAE",
        trained_on=row.trained_on,
        losses=row.losses,
        licence=row.licence,
        paper=row.paper,
        latent_space=row.latent_space,
        verified=verified,
        note="; ".join(filter(None, facts)) if not random_weights else "random weights: for speed only",
    )
    adapter = adapter or (Codebook if row.codebook_size else ADAPTERS.get(row.kind, Continuous))
    tokenizer = adapter(model, info, shift, scale)
    tokenizer.resolution, tokenizer.files = tokenizer.resolution or row.resolution, row.files
    return tokenizer


def is_verified(row: Published) -> bool:
    """The files that were read are those of the table."""
    known = VERIFIED.get(row.name)
    return known is not None and " ".join(map(file_hash, row.files)) == known["files"]


def config_scale(model: Any) -> tuple[Any, Any]:
    """(shift, scale) that a model's config states: numbers, or one value a channel."""
    config = model.config
    if type(model).__name__ == "AutoencoderRAE":  # applies what its config states by itself
        return 0.0, 1.0
    scale = getattr(config, "scaling_factor", None) or 1.0
    mean, deviation = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is not None and deviation is not None:
        return list(mean), [scale / value for value in deviation]
    return getattr(config, "shift_factor", None) or 0.0, scale


def latent_shape(kind: str, config: Mapping[str, Any], name: str) -> tuple[int, int]:
    """(pixels per position, channels) of an architecture, by running it without memory on the meta device."""
    size = config.get("encoder_input_size") or 256
    build = model_class(name, kind)
    known = inspect.signature(build.__init__).parameters  # some classes put more into their config than they take
    with torch.device("meta"), torch.no_grad():
        model = build(**{key: value for key, value in config.items() if key in known}).eval()
        image = torch.empty(1, 3, *([1] if kind in FRAME_CLASSES else []), size, size)
        encoded = model.encode(image, return_dict=False)[0]
    shape = (encoded if isinstance(encoded, Tensor) else encoded.mean).shape
    patch = model.config.patch_size[0] if kind == "AutoencoderKLFlux2" else 1
    side = getattr(model, "decoder_image_size", size)
    return side // shape[-1] * patch, shape[1] * patch**2
