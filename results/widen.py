"""Begin a model of f16c16 with what one of f8c4 knows: every tensor of equal name and shape.

    python -m results.widen klvae KLVAE OUT              encoder and decoder of a KL-VAE
    python -m results.widen ssdd SSDD ENCODER OUT        SSDD's decoder, behind the encoder of a KL-VAE of f16c16

What is left, the coarsest level and what touches the latents, has fresh weights (seed 0). OUT is for `tokbench train
--from`; so the demo weights of f16c16 began (baselines/weights/klvae.md).
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from baselines import kl_vae
from ssdd_models.ssdd import SSDD
from tokbench.checkpoints import write_checkpoint


def take(new: nn.Module, old: nn.Module) -> None:
    """Copy into `new` what fits."""
    mine = new.state_dict()
    known = {name: tensor for name, tensor in old.state_dict().items() if name in mine}
    fits = {name: tensor for name, tensor in known.items() if tensor.shape == mine[name].shape}
    new.load_state_dict(mine | fits)


def widen(kind: str, source: str, *rest: str) -> None:
    """Write the last of `rest`."""
    torch.manual_seed(0)
    if kind == "klvae":
        old, _ = kl_vae.load(Path(source))
        encoder = replace(old.config.encoder, downsample=16, channels=16)
        levels = old.config.decoder.channel_mult
        decoder = replace(old.config.decoder, channel_mult=(*levels, levels[-1]))
        new: nn.Module = kl_vae.KLVAE(kl_vae.KLVAEConfig(encoder, decoder))
        take(new, old)
    else:
        behind, _ = kl_vae.load(Path(rest[0]))
        known = SSDD.from_pretrained(source)
        new = SSDD(behind.config.encoder, known.config.decoder, init="fan-in", steps=1)
        take(new.decoder, known.decoder)
        take(new.encoder, behind.encoder)
    write_checkpoint(Path(rest[-1]), kind, new, {}, {})


if __name__ == "__main__":
    widen(*sys.argv[1:])
