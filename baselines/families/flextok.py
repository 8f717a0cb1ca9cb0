"""FlexTok (Bachmann et al., arXiv 2502.13967): 256 ordered codes of a VAE's latents, and a flow decoder into them.

Facts from github.com/apple/ml-flextok: images in [-1, 1] at 256 px, patches of 2 x 2 latents, registers that see the
patches and the registers before them, finite scalar quantisation with 64,000 codes; Euler steps with guidance of 7.5
along what is orthogonal to the prediction (Sadat et al., arXiv 2410.02416), its change kept and bounded. The order of a
model's parts is in its config.json. The VAE's mean is taken, where its authors may draw a sample.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.families.quantisers import before_codes
from baselines.families.transformers import to_patches, to_pixels
from baselines.hub import fetch, load_weights, part, read_config
from baselines.pretrained import Codes, Continuous, wrap
from baselines.published import PUBLISHED
from tokbench.errors import CellError
from tokbench.records.result import TokenizerInfo
from tokbench.runtime.device import in_float64
from tokbench.runtime.seeding import normal

LEVELS = (8, 8, 8, 5, 5, 5)  # of the six values of a code
SIDE, PATCH, CHANNELS, TOKENS, HEAD = 16, 2, 16, 256, 64
GUIDANCE, MOMENTUM, LONGEST = 7.5, -0.5, 2.5
VAE: Mapping[str, Any] = PUBLISHED["flextok-vae-c16"].config or {}


@dataclass(frozen=True)
class FlexTokConfig:
    encoder_depth: int
    decoder_depth: int  # a transformer is 64 wide for each of its blocks
    kinds: int = 2  # of tokens that a block modulates apart: patches and registers
    modulated_head: bool = True
    last_time: float = 1000.0  # that the embedding of times is made for, while times go from 1 to 0
    single_null: bool = False  # one token in place of all for "no codes"
    scale: float = 1.0  # of the VAE's latents


CONFIGS = {
    "flextok-d12-d12": FlexTokConfig(12, 12),
    "flextok-d18-d18": FlexTokConfig(18, 18),
    "flextok-d18-d28": FlexTokConfig(18, 28),
    "flextok-d18-d28-dfn": FlexTokConfig(18, 28),
}


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.wq, self.wk, self.wv, self.proj = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (one(x).unflatten(2, (-1, HEAD)).transpose(1, 2) for one in (self.wq, self.wk, self.wv))
        return self.proj(F.scaled_dot_product_attention(norm(q), norm(k), v, mask).transpose(1, 2).flatten(2))


class GatedMLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = 8 * width // 3
        self.fc1, self.fc3 = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(x)) * self.fc3(x))


class Block(nn.Module):
    def __init__(self, width: int, kinds: int) -> None:
        super().__init__()
        self.attn, self.mlp, self.kinds = Attention(width), GatedMLP(width), kinds
        if kinds:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * kinds * width))

    def forward(self, x: Tensor, mask: Tensor | None, time: Tensor | None, counts: tuple[int, ...]) -> Tensor:
        """[B, N, width]; without a time nothing is modulated; `counts` of tokens have a modulation each."""
        if time is None:
            x = x + self.attn(norm(x), mask)
            return x + self.mlp(norm(x))
        each = self.adaLN_modulation(time).unflatten(1, (self.kinds, -1))
        repeats = torch.tensor(counts if self.kinds > 1 else (sum(counts),), device=x.device)
        gate, last_gate, shift, scale, last_shift, last_scale = each.repeat_interleave(repeats, dim=1).chunk(6, dim=2)
        x = x + gate * self.attn(norm(x) * (1 + scale) + shift, mask)
        return x + last_gate * self.mlp(norm(x) * (1 + last_scale) + last_shift)


def norm(x: Tensor) -> Tensor:
    return F.layer_norm(x.float(), x.shape[-1:]).to(x.dtype)


def blocks(depth: int, kinds: int) -> nn.ModuleDict:
    return nn.ModuleDict({"blocks": nn.ModuleList(Block(HEAD * depth, kinds) for _ in range(depth))})


class Held(nn.Module):
    """A part that is a parameter alone, under the name that the files give it."""

    def __init__(self, name: str, *shape: int) -> None:
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.randn(shape) * 0.02))


class Encoder(nn.Module):
    """Latents [B, 16, 32, 32] -> [B, 256, 6]"""

    def __init__(self, config: FlexTokConfig) -> None:
        super().__init__()
        width = HEAD * config.encoder_depth
        self.module_dict: Any = nn.ModuleDict(
            {
                "enc_patch_emb": nn.ModuleDict({"patch_proj": nn.Linear(CHANNELS * PATCH**2, width)}),
                "enc_posemb_module": Held("posembs", 1, width, SIDE, SIDE),
                "enc_register_module": Held("registers", TOKENS, width),
                "enc_transformer": blocks(config.encoder_depth, kinds=0),
                "enc_to_latents": nn.ModuleDict({"proj": nn.Linear(width, len(LEVELS))}),
            }
        )

    def forward(self, z: Tensor) -> Tensor:
        parts = self.module_dict
        grid = (
            parts["enc_patch_emb"]["patch_proj"](to_patches(z, PATCH))
            + parts["enc_posemb_module"].posembs.flatten(2).mT
        )
        registers = parts["enc_register_module"].registers.expand(len(z), -1, -1)
        x = torch.cat([grid, registers], dim=1)
        index = torch.arange(x.shape[1], device=x.device)
        mask = (index <= index[:, None]) | (index < grid.shape[1])  # queries in rows
        for block in parts["enc_transformer"]["blocks"]:
            x = block(x, mask, None, ())
        return parts["enc_to_latents"]["proj"](norm(x[:, grid.shape[1] :]))


class Decoder(nn.Module):
    """Noisy latents [B, 16, 32, 32], codes' values [B, 256, 6] or None, times [B] -> the velocity."""

    def __init__(self, config: FlexTokConfig) -> None:
        super().__init__()
        width, patch = HEAD * config.decoder_depth, CHANNELS * PATCH**2
        self.last_time, self.single_null = config.last_time, config.single_null
        time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        head: dict[str, nn.Module] = {"proj": nn.Linear(width, patch)}
        if config.modulated_head:
            head["adaLN_modulation"] = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.module_dict: Any = nn.ModuleDict(
            {
                "dec_from_latents": nn.ModuleDict({"proj": nn.Linear(len(LEVELS), width)}),
                "dec_registers_posemb_module": Held("posembs", 1, 1, width, TOKENS),
                "dec_latent_dropout": Held("nullcond", width),
                "dec_noise_patch_emb": nn.ModuleDict({"patch_proj": nn.Linear(patch, width)}),
                "dec_patches_posemb_module": Held("posembs", 1, width, SIDE, SIDE),
                "dec_time_embedder": nn.ModuleDict({"mlp": time}),
                "dec_transformer": blocks(config.decoder_depth, config.kinds),
                "dec_to_patches": nn.ModuleDict(head),
            }
        )

    def forward(self, z: Tensor, values: Tensor | None, t: Tensor) -> Tensor:
        parts = self.module_dict
        if values is None:
            count = 1 if self.single_null else TOKENS
            registers = parts["dec_latent_dropout"].nullcond.expand(len(z), count, -1)
        else:
            places = parts["dec_registers_posemb_module"].posembs[0].mT
            registers = parts["dec_from_latents"]["proj"](values) + places
        grid = parts["dec_noise_patch_emb"]["patch_proj"](to_patches(z, PATCH))
        grid = grid + parts["dec_patches_posemb_module"].posembs.flatten(2).mT
        counts = (grid.shape[1], registers.shape[1])
        time = parts["dec_time_embedder"]["mlp"](self.embedded(t).to(z.dtype))
        x = torch.cat([grid, registers], dim=1)
        for block in parts["dec_transformer"]["blocks"]:
            x = block(x, None, time, counts)
        x, head = norm(x[:, : counts[0]]), parts["dec_to_patches"]
        if "adaLN_modulation" in head:
            shift, scale = head["adaLN_modulation"](time)[:, None].chunk(2, dim=2)
            x = x * (1 + scale) + shift
        return to_pixels(head["proj"](x), PATCH, SIDE)

    def embedded(self, t: Tensor) -> Tensor:
        """[B] -> [B, 256]: cosines and sines of frequencies that fall to 1 / 256."""
        frequencies = 1000 / self.last_time * 256.0 ** -(torch.arange(128, device=t.device) / 128)
        angles = t[:, None] * frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=1)


def to_codes(z: Tensor) -> Tensor:
    """[B, N, 6] -> int64 [B, N]: each value bounded and rounded to its levels, the first changing fastest."""
    levels = torch.tensor(LEVELS, device=z.device)
    half, offset = (levels - 1) * (1 + 1e-3) / 2, (levels % 2 == 0) / 2
    bounded = (before_codes(z).float() + (offset / half).atanh()).tanh() * half - offset
    return ((bounded.round().long() + levels // 2) * bases(levels)).sum(-1)


def to_values(codes: Tensor) -> Tensor:
    """int64 [B, N] -> [B, N, 6] from -1 to 1"""
    levels = torch.tensor(LEVELS, device=codes.device)
    return (codes[..., None] // bases(levels) % levels - levels // 2) / (levels // 2)


def bases(levels: Tensor) -> Tensor:
    return torch.cat([levels.new_ones(1), levels.cumprod(0)[:-1]])


class FlexTok(nn.Module):
    """Codes int64 [B, 256]. What encodes and what decodes are a side each, with its half of the VAE."""

    def __init__(self, config: FlexTokConfig) -> None:
        super().__init__()
        from diffusers import AutoencoderKL

        self.config, self.scale = None, config.scale
        vae: Any = AutoencoderKL(**VAE)
        self.encoder = nn.ModuleDict({"tokens": Encoder(config), "vae": vae.encoder, "quant": vae.quant_conv})
        self.decoder = nn.ModuleDict({"flow": Decoder(config), "vae": vae.decoder, "quant": vae.post_quant_conv})

    def encode(self, x: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """[B, 3, 256, 256] in [-1, 1] -> (codes,)"""
        mean = self.encoder["quant"](self.encoder["vae"](x)).chunk(2, dim=1)[0]
        return (to_codes(self.encoder["tokens"](mean * self.scale)),)

    def sample(self, noise: Tensor, codes: Tensor, steps: int) -> Tensor:
        """Euler's method from noise [B, 16, 32, 32] at time 1, then the VAE: [B, 3, 256, 256]."""
        flow, dtype = self.decoder["flow"], next(self.decoder.parameters()).dtype
        x, values, kept = noise.float(), to_values(codes).to(dtype), torch.zeros_like(noise)
        for step in range(steps, 0, -1):
            now = torch.full((len(x),), step / steps, device=x.device)
            velocity, free = (flow(x.to(dtype), given, now).float() for given in (values, None))
            kept = velocity - free + MOMENTUM * kept
            x = x - (velocity + (GUIDANCE - 1) * orthogonal(shortened(kept), velocity)) / steps
        return self.decoder["vae"](self.decoder["quant"](x.to(dtype) / self.scale))


def shortened(x: Tensor) -> Tensor:
    """[B, ...], no image's longer than LONGEST."""
    lengths = x.flatten(1).norm(dim=1)[:, None, None, None]
    return x * (LONGEST / lengths).clamp(max=1)


def orthogonal(x: Tensor, to: Tensor) -> Tensor:
    """Each image's `x` without what is parallel to its `to`."""
    unit, exact = F.normalize(in_float64(to).flatten(1), dim=1).view_as(to), in_float64(x)
    return (exact - (exact * unit).flatten(1).sum(1)[:, None, None, None] * unit).to(x)


class FromNoise(Codes):
    """Decodes from noise that belongs to each image's seed."""

    steps: int

    def __init__(self, model: FlexTok, info: TokenizerInfo, shift: Any = 0.0, scale: Any = 1.0) -> None:
        super().__init__(model, info)
        self.model = model

    def decode(self, latents: Tensor, *, seeds: Tensor, size: tuple[int, int]) -> Tensor:
        """codes int64 [B, 256] -> float32 [B, 3, 256, 256]; `seeds` give the noise."""
        noise = normal(seeds, (CHANNELS, SIDE * PATCH, SIDE * PATCH), device=latents.device)
        return self.model.sample(noise, latents, self.steps).float()


def stated(held: Mapping[str, Any], default: FlexTokConfig, name: str) -> FlexTokConfig:
    """The default with what a config.json says of the parts. Raises CellError for parts that are not read here."""
    try:
        encoder, decoder = (held[side]["module_dict"] for side in ("encoder", "decoder"))
        transformer, null = decoder["dec_transformer"], decoder["dec_latent_dropout"]
        config = replace(
            default,
            kinds=transformer.get("adaLN_expansion", 1),
            modulated_head=decoder["dec_to_patches"].get("adaLN_emb_read_key") is not None,
            last_time=decoder["dec_time_embedder"].get("max_timestep", 1000.0),
            single_null=null.get("replace_with_single_token", False),
            scale=held["vae"].get("scaling_factor") or of_vae(held["vae"]["hf_hub_path"], name),
        )
        found = [encoder["enc_transformer"]["depth"], transformer["depth"], tuple(held["regularizer"]["levels"])]
    except (KeyError, TypeError, AttributeError) as error:
        raise CellError(f"{name}: its config.json does not describe FlexTok's parts ({error!r})") from error
    if found != [default.encoder_depth, default.decoder_depth, LEVELS]:
        raise CellError(f"{name}: its config.json has depths {found[0]} and {found[1]} and levels {found[2]}")
    return config


def of_vae(repo: str, name: str) -> float:
    """The scale that the config.json of a VAE states."""
    return float(read_config(fetch(repo, "config.json", name), name).get("scaling_factor", 1.0))


def encoder_names(held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return renamed(held, {"encoder.": "tokens.", "vae.vae.encoder.": "vae.", "vae.vae.quant_conv.": "quant."})


def decoder_names(held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the token of shorter codes."""
    places = {"decoder.": "flow.", "vae.vae.decoder.": "vae.", "vae.vae.post_quant_conv.": "quant."}
    own = renamed(held, places)
    return {key: value for key, value in own.items() if not key.endswith("dropout_mask_token")}


def renamed(held: Mapping[str, Tensor], places: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors below each old prefix, under the new one."""
    return {
        new + key.removeprefix(old): value
        for old, new in places.items()
        for key, value in held.items()
        if key.startswith(old)
    }


def published(name: str, file: Path | None, random_weights: bool, weights: str | None, steps: int) -> Continuous:
    """A row of CONFIGS from the folder `file` with config.json and model.safetensors, from the hub, or random.

    Raises CellError if a file is missing, damaged or does not fit.
    """
    row, config = replace(PUBLISHED[name], decode_steps=2 * steps), CONFIGS[name]
    if not random_weights:
        config = stated(read_config(part(row, file, "config.json"), name), config, name)
    model = FlexTok(config)
    if not random_weights:
        path = part(row, file, "model.safetensors")
        row = load_weights(model.encoder, path, row, weights, encoder_names)
        row = load_weights(model.decoder, path, row, weights, decoder_names)
    tokenizer = wrap(model.eval(), row, random_weights, FromNoise)
    assert isinstance(tokenizer, FromNoise)
    tokenizer.steps = steps
    return tokenizer
