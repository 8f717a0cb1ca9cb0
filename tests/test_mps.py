"""A Mac's GPU where there is none: the meta device stands for it, which computes nothing but knows shapes and types.

Float64 on it is refused, as MPS refuses it. No hardware was met.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from baselines.kl_vae import KLVAE, SMALL, KLVAETokenizer
from ssdd_models.ssdd import SSDD
from ssdd_models.tokenizer import SSDDTokenizer
from tokbench.data.pixels import quantise
from tokbench.errors import InputError
from tokbench.evaluation.reconstruct import latent_columns
from tokbench.metrics import pixel
from tokbench.metrics.perceptual import LPIPS
from tokbench.runtime import device
from tokbench.runtime.device import precision, select_device, warn_of_emulation
from tokbench.tokenizer import Tokenizer
from tokbench.training.optimisation import RunConfig

MPS, META, CPU = (torch.device(name) for name in ("mps", "meta", "cpu"))
TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "klvae": lambda: KLVAETokenizer(KLVAE(SMALL), {}),
    "ssdd": lambda: SSDDTokenizer(SSDD("f8c4", "XS"), 2),
}


class NoFloat64(TorchDispatchMode):
    """Refuses float64 on the meta device, and gives values that leave it, zeros."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if given.get("device") == CPU and isinstance(args[0], Tensor) and args[0].device == META:
            return torch.zeros(args[0].shape, dtype=given.get("dtype") or args[0].dtype)
        out = func(*args, **given)
        for tensor in out if isinstance(out, list | tuple) else [out]:
            if isinstance(tensor, Tensor) and tensor.device == META:
                assert tensor.dtype != torch.float64, f"{func}: MPS has no float64"
        return out


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_cell_is_measured_in_what_mps_has(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "WITHOUT_FLOAT64", ("meta",))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it does not know meta
    with META:
        tokenizer, lpips = TOKENIZERS[name](), LPIPS("alex")
        images = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    seeds = torch.zeros(2, dtype=torch.int64)
    with NoFloat64(), precision(META, torch.float32):
        latents = tokenizer.encode(images, sample=True, seeds=seeds)
        decoded = tokenizer.decode(latents, seeds=seeds, size=(64, 64))
        fake = quantise(decoded, "nearest")
        scores = [pixel.psnr(pixel.squared_error(images, fake)), pixel.ssim(images, fake)]
        scores += [lpips(decoded, decoded), *latent_columns(tokenizer, latents, (64, 64)).values()]
    assert {tensor.device for tensor in (latents, decoded, fake)} == {META}
    assert all(score.shape == (2,) for score in scores)


def test_mps_is_float32_eager_and_only_there_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (RunConfig().on(MPS).dtype, RunConfig().on(MPS).compile) == ("float32", False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert select_device("mps") == MPS
    assert select_device("auto").type != "mps"
    warn_of_emulation(torch.float32, MPS)
    with pytest.raises(InputError, match="bfloat16 on mps: only float32"):
        warn_of_emulation(torch.bfloat16, MPS)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(InputError, match="torch finds no Apple GPU"):
        select_device("mps")
