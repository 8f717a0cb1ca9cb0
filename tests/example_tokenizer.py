import torch

from tokbench import TokenizerInfo


class Mine:
    info = TokenizerInfo(name="mine", family="mine", downsample=8, channels=3, size_multiple=8)
    networks = {"encoder": torch.nn.AvgPool2d(8), "decoder": torch.nn.Upsample(scale_factor=8)}  # noqa: RUF012

    def encode(self, images, *, sample, seeds):  # uint8 [B, 3, H, W] -> latents of any shape
        return self.networks["encoder"](images / 127.5 - 1)

    def decode(self, latents, *, seeds, size):  # latents -> float [B, 3, H, W], nominally from -1 to 1
        return self.networks["decoder"](latents)
