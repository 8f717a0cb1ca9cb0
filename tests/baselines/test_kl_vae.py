"""The KL-VAE and its normalised latents."""

import torch

from baselines.kl_vae import KLVAE, ConvDecoderConfig, KLVAEConfig, PatchGAN
from ssdd_models.encoder import EncoderConfig

TINY = KLVAEConfig(EncoderConfig(downsample=4, width=32, groups=4), ConvDecoderConfig(16, (1, 2, 2), 1, 4))


def test_shapes_for_non_square_images() -> None:
    model = KLVAE(TINY)
    z = model.encode(torch.zeros(2, 3, 16, 24)).mode()
    assert z.shape == (2, 4, 4, 6)
    assert model.decode(z).shape == (2, 3, 16, 24)


def test_normalised_latents_reconstruct_the_same_image() -> None:
    model = KLVAE(TINY)
    with torch.no_grad():
        model.encoder.out_proj.bias.normal_()
        x = torch.rand(2, 3, 16, 16) * 2 - 1
        before = model.encode(x)
        image = model.decode(before.mode())
        mean, std = before.mode().mean((0, 2, 3)), before.mode().std((0, 2, 3))
        model.normalise_latents(mean, std)
        after = model.encode(x)
    torch.testing.assert_close(model.decode(after.mode()), image, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after.std, before.std / std[:, None, None], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(after.mode().mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(after.mode().std((0, 2, 3)), torch.ones(4), atol=1e-5, rtol=1e-5)


def test_patch_discriminator_judges_patches() -> None:
    assert PatchGAN(width=8)(torch.zeros(1, 3, 64, 64)).shape == (1, 1, 6, 6)
