"""SSDD's training losses (arXiv 2510.04961): flow matching, perceptual, REPA. Imports torch and its siblings; networks
are handed in. All are float32 means over batch and elements; KL is the batch mean of each latent's sum.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssdd_models.flow import interpolate, predict_clean
from ssdd_models.layers import Discriminator
from ssdd_models.ssdd import SSDD

REPA_BLOCK = 4  # output of the fifth transformer block
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DINO_PATCH = 14
DINO_DIM = 768  # of facebook/dinov2-base


@dataclass(frozen=True)
class LossWeights:
    """Defaults are those seen in public forks; the paper's numbers are not known to us."""

    flow: float = 1.0
    l1: float = 0.0  # of the clean image; with share_at_one=1 and flow=0 plain regression
    perceptual: float = 0.5
    repa: float = 0.25
    kl: float = 1e-6  # while the encoder trains
    gan: float = 0.0  # 0.5 where a fork has one; the paper's main model has none
    latent_noise: float = 0.0  # no loss: the most noise on the latents that the decoder sees, in their own deviations


class Repa(nn.Module):
    """Aligns transformer tokens with those of a frozen DINOv2 (REPA, arXiv 2410.06940): 1 - mean cosine.

    `features` maps ImageNet-normalised float [B, 3, 14 g, 14 g'] to tokens [B, g g', 768] without the class token.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, dim: int, features: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, DINO_DIM))
        self._features = (features,)  # in a tuple: no part of this module's state
        for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight)
                nn.init.zeros_(layer.bias)

    @torch.no_grad()
    def target(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1], resized so that a DINO patch is a token of the decoder -> [B, HW / 64, 768]"""
        size = [side // 8 * DINO_PATCH for side in images.shape[2:]]
        normalised = ((images + 1) / 2 - self.mean) / self.std
        return self._features[0](F.interpolate(normalised, size=size, mode="bicubic", antialias=False)).float()

    def forward(self, tokens: Tensor, images: Tensor) -> Tensor:
        """tokens [B, N, dim] of the decoder and the real images behind them -> a number"""
        cosine = F.cosine_similarity(self.mlp(tokens).float(), self.target(images), dim=-1, eps=1e-5)
        return 1 - cosine.mean()


def training_times(normals: Tensor, share_at_one: float) -> Tensor:
    """Logit-normal times from standard normals [B, 2]; by the second one, a share of the samples is put at t = 1.

    Logit-normal times almost never reach 1 (P(t > 0.95) is 0.16 %), where one-step decoding happens: the share is ours.
    """
    at_one = normals[:, 1] < math.sqrt(2) * torch.erfinv(torch.tensor(2.0 * share_at_one - 1.0))
    return torch.where(at_one, 1.0, torch.sigmoid(normals[:, 0]))


def flow_losses(
    model: SSDD,
    z: Tensor,
    target: Tensor,
    noise: Tensor,
    t: Tensor,
    *,
    real: Tensor,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    repa: Repa | None = None,
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Losses by name, the predicted clean image [B, 3, H, W], and x_t.

    `target` is the real image, or the teacher's sample when distilling; REPA always looks at the `real` one.
    """
    tokens: list[Tensor] = []

    def tap(block: int, output: Tensor) -> None:
        if block == min(REPA_BLOCK, model.decoder.config.layers // 2):
            tokens.append(output)

    x_t = interpolate(target, noise, t)
    v = model(x_t, t, z, tap if repa is not None else None).float()
    clean = predict_clean(x_t, v, t)
    losses = {"flow": F.mse_loss(v, target - noise), "l1": F.l1_loss(clean, target)}
    if perceptual is not None:
        losses["perceptual"] = perceptual(target, clean).mean()
    if repa is not None:
        losses["repa"] = repa(tokens[0], real)
    return losses, clean, x_t


def critic_loss(critic: Discriminator, real: Tensor, fake: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """What the discriminator learns: binary cross-entropy on the real image and the predicted one, behind one x_t."""
    judged = [critic(image, x_t, t) for image in (real, fake.detach())]
    truth = [torch.ones_like(judged[0]), torch.zeros_like(judged[1])]
    return F.binary_cross_entropy_with_logits(torch.cat(judged), torch.cat(truth))


def generator_loss(critic: Discriminator, fake: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """What the decoder gains by being taken for real; the discriminator's own weights get no gradient."""
    critic.requires_grad_(False)
    judged = critic(fake, x_t, t)
    critic.requires_grad_(True)
    return F.binary_cross_entropy_with_logits(judged, torch.ones_like(judged))
