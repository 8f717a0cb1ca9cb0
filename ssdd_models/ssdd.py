"""SSDD: a single-step diffusion decoder behind a VAE encoder (arXiv 2510.04961).

    model = SSDD.from_pretrained("ssdd.safetensors")        # or SSDD(encoder="f8c4", decoder="M")
    z = model.encode(images).mode()                         # images float [B, 3, H, W] in [-1, 1]
    again = model.decode(z, steps=1)

Imports torch and its siblings; safetensors and huggingface_hub only inside the methods that load and save.
"""

import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssdd_models import flow
from ssdd_models.encoder import Encoder, EncoderConfig, Posterior
from ssdd_models.layers import Init
from ssdd_models.uvit import DecoderConfig, Tap, UViT

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
    def from_json(cls, record: Mapping[str, Any]) -> "SSDDConfig":
        """The inverse of `dataclasses.asdict`; ValueError for anything else."""
        try:
            rest = {k: v for k, v in record.items() if k not in ("encoder", "decoder")}
            return cls(EncoderConfig(**record["encoder"]), DecoderConfig(**record["decoder"]), **rest)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a configuration of an SSDD: {error}") from error

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
        self.decoder = UViT(decoder, shape.channels, init)
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
        return self.encoder(x)

    def _scale(self, like: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config
        mean, std = (torch.tensor(v, device=like.device).view(1, -1, 1, 1) for v in (config.z_mean, config.z_std))
        return mean, std

    def normalise(self, z: Tensor) -> Tensor:
        """Encoder latents -> the scale the decoder was trained on; the identity for released weights."""
        mean, std = self._scale(z)
        return (z - mean) / std

    def denormalise(self, z: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        mean, std = self._scale(z)
        return z * std + mean

    def forward(self, x_t: Tensor, t: Tensor, z: Tensor, tap: Tap | None = None) -> Tensor:
        """Velocity [B, 3, H, W] at x_t [B, 3, H, W], t [B] in [0, 1], for encoder latents z [B, c, h, w]."""
        return self.decoder(x_t, t, self.normalise(z), tap)

    @torch.no_grad()
    def decode(
        self,
        z: Tensor,
        steps: int | None = None,
        noise: Tensor | None = None,
        *,
        time_shift: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Encoder latents [B, c, h, w] -> images float32 [B, 3, h f, w f], nominal [-1, 1], unclamped.

        `noise` is standard normal, of the images' shape; drawn if it is not given. One step is x = noise + v(noise, 1).
        """
        size = (z.shape[2] * self.config.encoder.downsample, z.shape[3] * self.config.encoder.downsample)
        if noise is None:
            noise = torch.randn(len(z), 3, *size, device=z.device, generator=generator)
        if noise.shape != (len(z), 3, *size):
            raise ValueError(f"noise {tuple(noise.shape)}: latents {tuple(z.shape)} need {(len(z), 3, *size)}")
        steps = self.config.steps if steps is None else steps
        z = self.normalise(z)
        given = z if steps == 1 else self.decoder.condition(z, size)  # one call may be compiled as a whole
        return flow.euler(
            lambda x, t: self.decoder(x, t, given),
            noise.float().contiguous(memory_format=torch.channels_last),
            steps,
            self.config.time_shift if time_shift is None else time_shift,
        )

    @classmethod
    def from_pretrained(cls, source: str | Path, *, filename: str = WEIGHTS, revision: str | None = None) -> "SSDD":
        """A file, a folder holding `filename`, or a Hugging Face repository. float32, on the CPU, in eval mode.

        Raises FileNotFoundError, ValueError (not an SSDD; lists missing and unexpected keys) or the hub's own errors.
        """
        path = Path(source) / filename if Path(source).is_dir() else Path(source)
        if not path.is_file():
            if Path(source).exists() or not str(source).count("/") == 1 or str(source).startswith((".", "/")):
                raise FileNotFoundError(f"no SSDD weights at {path}")
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(str(source), filename, revision=revision))
        state, metadata = read_checkpoint(path)
        if "config" in metadata:
            config = SSDDConfig.from_json(metadata["config"])
        else:
            config = SSDDConfig.from_shapes({key: tuple(value.shape) for key, value in state.items()})
        return cls.from_state(config, state)

    @classmethod
    def from_config(cls, config: SSDDConfig) -> "SSDD":
        """A freshly initialised model."""
        return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(config)})

    @classmethod
    def from_state(cls, config: SSDDConfig, state: Mapping[str, Tensor]) -> "SSDD":
        """A model around given tensors, which exactly its own. ValueError lists what is missing or left over."""
        with torch.device("meta"):
            model = cls.from_config(config)
        check_keys(model.state_dict(), state)
        model.load_state_dict({key: value.float() for key, value in state.items()}, assign=True)
        return model.requires_grad_().eval()

    def save_pretrained(
        self,
        path: str | Path,
        *,
        info: Mapping[str, Any] | None = None,
        training: Mapping[str, Any] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Path:
        """Write a `.safetensors` file, or `model.safetensors` in a folder: whole, or not at all. Returns the file."""
        from safetensors.torch import save_file

        path = Path(path) if Path(path).suffix == ".safetensors" else Path(path) / WEIGHTS
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {"model": "ssdd", "config": dataclasses.asdict(self.config), "info": dict(info or {})}
        record["training"] = dict(training or {})
        state = {key: value.detach().to("cpu", dtype).contiguous() for key, value in self.state_dict().items()}
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            save_file(state, Path(folder) / WEIGHTS, metadata={"tokbench": json.dumps(record)})
            os.replace(Path(folder) / WEIGHTS, path)
        return path

    def push_to_hub(self, repository: str, *, private: bool = False, token: str | None = None, **saved: Any) -> str:
        """Upload what `save_pretrained` writes; `saved` are its keywords. Returns the commit's address."""
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        api.create_repo(repository, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **saved)
            return str(api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload SSDD"))


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of a safetensors file and our record in its header ({} for others' files). ValueError if unreadable."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (no iterator of its own)
            metadata = json.loads((file.metadata() or {}).get("tokbench", "{}"))
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error
    return state, metadata


def check_keys(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raise ValueError listing missing and unexpected keys, and shapes that differ: 20 of each at most."""
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    shapes = [
        f"{key} {tuple(found[key].shape)}, not {tuple(expected[key].shape)}"
        for key in expected
        if key in found and found[key].shape != expected[key].shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    lines = [
        f"{len(keys)} {what}: {', '.join(keys[:20])}{' and more' * (len(keys) > 20)}"
        for what, keys in problems.items()
        if keys
    ]
    if lines:
        raise ValueError("not the tensors of this model; " + "; ".join(lines))
