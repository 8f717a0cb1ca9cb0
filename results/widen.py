"""Begin a model of f16c16 with what one of f8c4 knows: every tensor of equal name and shape.

    python -m results.widen KLVAE OUT                    encoder and decoder of a KL-VAE
    python -m results.widen SSDD OUT --encoder KLVAE16   SSDD's decoder, behind the encoder of a KL-VAE of f16c16

What is left, the coarsest level and what touches the latents, has fresh weights (seed 0). OUT is for `tokbench train
--from`; so the demo weights of f16c16 began (baselines/weights/klvae.md).
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from baselines import kl_vae
from ssdd_models.ssdd import SSDD
from tokbench.checkpoints import write_checkpoint
from tokbench.errors import InputError


def take(new: nn.Module, old: nn.Module) -> None:
    """Copy into `new` what fits."""
    mine = new.state_dict()
    known = {name: tensor for name, tensor in old.state_dict().items() if name in mine}
    fits = {name: tensor for name, tensor in known.items() if tensor.shape == mine[name].shape}
    new.load_state_dict(mine | fits)


def widen(source: Path, encoder: Path | None, out: Path) -> None:
    """Write the beginning of a KL-VAE, or behind an `encoder` of f16c16 that of an SSDD."""
    torch.manual_seed(0)
    if encoder is None:
        old, _ = kl_vae.load(source)
        finer, levels = old.config.decoder, old.config.decoder.channel_mult
        sizes = kl_vae.KLVAEConfig(
            replace(old.config.encoder, downsample=16, channels=16), replace(finer, channel_mult=(*levels, levels[-1]))
        )
        klvae = kl_vae.KLVAE(sizes)
        take(klvae, old)
        write_checkpoint(out, "klvae", klvae, {}, {})
    else:
        behind, _ = kl_vae.load(encoder)
        known = SSDD.from_pretrained(source)
        ssdd = SSDD(behind.config.encoder, known.config.decoder, init="fan-in", steps=1)
        take(ssdd.decoder, known.decoder)
        take(ssdd.encoder, behind.encoder)
        ssdd.save_pretrained(out)


def main() -> None:
    """Status 2 and one line for files that are not what they should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the KL-VAE or SSDD of f8c4")
    parser.add_argument("out", type=Path, help="the file to write, .safetensors")
    parser.add_argument("--encoder", type=Path, help="a KL-VAE of f16c16: SOURCE is an SSDD")
    arguments = parser.parse_args()
    try:
        widen(arguments.source, arguments.encoder, arguments.out)
    except (InputError, ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
