"""SSDD: a single-step diffusion decoder behind a VAE encoder (arXiv 2510.04961).

    model = SSDD.from_pretrained("ssdd.safetensors")        # or SSDD(encoder="f8c4", decoder="M")
    z = model.encode(images).mode()                         # images float [B, 3, H, W] in [-1, 1]
    again = model.decode(z, steps=1)

Imports torch, its siblings and the reader of checkpoints.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssdd_models import flow
from ssdd_models.encoder import Encoder, EncoderConfig, Posterior
from ssdd_models.layers import Init
from ssdd_models.uvit import SIZES, DecoderConfig, Tap, UViT
from tokbench.checkpoints import load_strictly, read_checkpoint, write_checkpoint
from tokbench.config import from_dict

WEIGHTS = "model.safetensors"  # in a folder or a hub repository


@dataclass(frozen=True)
class SSDDConfig:
    """Everything that rebuilds a model around its tensors."""

    encoder: EncoderConfig
    decoder: DecoderConfig
    external_encoder: bool = False  # a decoder alone, for the latents of an encoder kept elsewhere
    z_mean: tuple[float, ...] = (0.0,)  # the decoder sees (z - mean) / std: one number, or one per channel
    z_std: tuple[float, ...] = (1.0,)
    steps: int = 8  # of the sampler, unless decode is told otherwise
    time_shift: float = 2.0  # sampler times are linspace(1, 0) ** time_shift

    def __post_init__(self) -> None:
        for name in ("z_mean", "z_std"):
            values = tuple(float(v) for v in getattr(self, name))
            object.__setattr__(self, name, values)
            if len(values) not in (1, self.encoder.channels):
                raise ValueError(f"{name}: {len(values)} values for {self.encoder.channels} channels")

    @classmethod
    def of_file(cls, shapes: Mapping[str, Sequence[int]], metadata: Mapping[str, Any]) -> "SSDDConfig":
        """From our metadata (TypeError if it lacks something), or from the shapes of a file of others."""
        return from_dict(cls, metadata["config"]) if "config" in metadata else cls.from_shapes(shapes)

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> "SSDDConfig":
        """Read the sizes from the tensors' shapes: a released file has no configuration beside it.

        Without `encoder.` keys it is a decoder for frozen f8 latents (the SD-VAE variant). ValueError if it is no SSDD.
        """
        try:
            widths = [shapes[f"decoder.down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(4)]
            heads = shapes["decoder.mid_block.transformer_blocks.0.relative_position_bias.relative_bias_table"][2]
            channels = shapes["decoder.conv_in.weight"][1] - 3
            external = not any(key.startswith("encoder.") for key in shapes)
            width = 128 if external else shapes["encoder.conv_in.weight"][0]
        except (KeyError, IndexError) as error:
            raise ValueError(f"not an SSDD checkpoint: no tensor {error}") from error
        layers = len({key.split(".")[3] for key in shapes if key.startswith("decoder.mid_block.transformer_blocks.")})
        levels = len({key.split(".")[2] for key in shapes if key.startswith("encoder.down.")})
        encoder = EncoderConfig(8 if external else 2 ** (levels - 1), channels, width)
        return cls(encoder, DecoderConfig((widths[0], widths[1], widths[2], widths[3]), layers, heads), external)


class SSDD(nn.Module):
    """Encoder, decoder and sampler. Its state_dict has the keys of the released weights.

    `encoder` is a name (`f8c4`) or an EncoderConfig, `decoder` a size (XS S B M L XL H XH G) or a DecoderConfig.
    Latents are those of the encoder, unscaled; z_mean and z_std are applied inside, where the decoder reads them.
    """

    def __init__(
        self,
        encoder: str | EncoderConfig = "f8c4",
        decoder: str | DecoderConfig = "M",
        *,
        external_encoder: bool = False,
        z_mean: float | Sequence[float] = 0.0,
        z_std: float | Sequence[float] = 1.0,
        steps: int = 8,
        time_shift: float = 2.0,
        init: Init = "normal",
    ) -> None:
        super().__init__()
        shape = EncoderConfig.parse(encoder) if isinstance(encoder, str) else encoder
        self.encoder: Any = None if external_encoder else Encoder(shape, init)  # None only for a decoder alone
        if isinstance(decoder, str) and decoder not in SIZES:
            raise ValueError(f"decoder size {decoder!r}: one of {', '.join(SIZES)}")
        self.decoder = UViT(SIZES[decoder] if isinstance(decoder, str) else decoder, shape.channels, init)
        mean, std = ((v,) if isinstance(v, int | float) else tuple(v) for v in (z_mean, z_std))
        self.config = SSDDConfig(shape, self.decoder.config, external_encoder, mean, std, steps, time_shift)

    @property
    def size_multiple(self) -> int:
        """Height and width of images must be divisible by this."""
        return max(self.config.encoder.downsample, 8)

    def encode(self, x: Tensor) -> Posterior:
        """[B, 3, H, W] in [-1, 1] -> the posterior over [B, c, H / f, W / f]"""
        if self.encoder is None:
            raise ValueError("this SSDD decodes the latents of an external encoder and has none of its own")
        return Posterior(self.encoder(x))

    def normalise(self, z: Tensor) -> Tensor:
        """Encoder latents -> the scale the decoder was trained on; the identity for released weights."""
        if self.config.z_mean == (0.0,) and self.config.z_std == (1.0,):
            return z.float()
        mean, std = (
            torch.tensor(v).to(z.device, non_blocking=z.is_cuda).view(1, -1, 1, 1)
            for v in (self.config.z_mean, self.config.z_std)
        )
        return (z - mean) / std

    def forward(self, x_t: Tensor, t: Tensor, z: Tensor, tap: Tap | None = None) -> Tensor:
        """Velocity [B, 3, H, W] at x_t [B, 3, H, W], t [B] in [0, 1], for encoder latents z [B, c, h, w]."""
        return self.decoder(x_t, t, self.normalise(z), tap)

    def decode(self, z: Tensor, steps: int | None = None, noise: Tensor | None = None) -> Tensor:
        """Encoder latents [B, c, h, w] -> images float32 [B, 3, h f, w f], nominal [-1, 1], unclamped.

        `noise` is standard normal, of the images' shape; drawn if it is not given. One step is x = noise + v(noise, 1).
        """
        if noise is None:
            noise = torch.randn(len(z), 3, *self.image_size(z), device=z.device)
        return self.sample(self.normalise(z), noise, steps)

    @torch.no_grad()
    def sample(self, z: Tensor, noise: Tensor, steps: int | None = None, time_shift: float | None = None) -> Tensor:
        """As `decode`, of latents that are normalised already."""
        size = self.image_size(z)
        if noise.shape != (len(z), 3, *size):
            raise ValueError(f"noise {tuple(noise.shape)}: latents {tuple(z.shape)} need {(len(z), 3, *size)}")
        steps = self.config.steps if steps is None else steps
        given = z if steps == 1 else self.decoder.condition(z, size)  # one call may be compiled as a whole
        return flow.euler(
            lambda x, t: self.decoder(x, t, given),
            noise.float().contiguous(memory_format=torch.channels_last),
            steps,
            self.config.time_shift if time_shift is None else time_shift,
        )

    def image_size(self, z: Tensor) -> tuple[int, int]:
        """Height and width of what latents [B, c, h, w] decode to."""
        downsample = self.config.encoder.downsample
        return z.shape[2] * downsample, z.shape[3] * downsample

    @classmethod
    def from_pretrained(cls, source: str | Path, *, filename: str = WEIGHTS, revision: str | None = None) -> "SSDD":
        """A file, a folder holding `filename`, or a Hugging Face repository. float32, on the CPU, in eval mode.

        Raises FileNotFoundError, InputError (damaged, or of other tensors), ValueError (no SSDD) or the hub's errors.
        """
        path = Path(source) / filename if Path(source).is_dir() else Path(source)
        if not path.is_file():
            if Path(source).exists() or not str(source).count("/") == 1 or str(source).startswith((".", "/")):
                raise FileNotFoundError(f"no SSDD weights at {path}")
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(str(source), filename, revision=revision))
        state, metadata = read_checkpoint(path)
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        return cls.from_state(SSDDConfig.of_file(shapes, metadata), state)

    @classmethod
    def from_config(cls, config: SSDDConfig) -> "SSDD":
        """A freshly initialised model."""
        return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(config)})

    @classmethod
    def from_state(cls, config: SSDDConfig, state: Mapping[str, Tensor]) -> "SSDD":
        """A model of given tensors, which must be exactly its own. InputError lists what is missing or left over."""
        with torch.device("meta"):
            model = cls.from_config(config)
        load_strictly(model, state, "SSDD", assign=True)
        return model.requires_grad_().eval()

    def save_pretrained(
        self, path: str | Path, *, info: Mapping[str, Any] | None = None, training: Mapping[str, Any] | None = None
    ) -> Path:
        """Write a `.safetensors` file, or `model.safetensors` in a folder: whole, or not at all. Returns the file."""
        path = Path(path) if Path(path).suffix == ".safetensors" else Path(path) / WEIGHTS
        write_checkpoint(path, "ssdd", self, info or {}, training or {})
        return path
