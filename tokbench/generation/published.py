"""Published DiTs (Peebles and Xie, arXiv 2212.09748) through diffusers: their latents, to be decoded by any tokenizer.

The pipeline decodes by its own VAE; here only its transformer and its noise schedule are used, in a loop of our own
with noise by image. The latents that come out are normalised as they were in training, z * scaling_factor: what a
tokenizer's decode takes here.
"""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from tokbench.data.pixels import to_float
from tokbench.errors import CellError, InputError, first_line
from tokbench.generation.compatibility import LatentSpace, measure, probe_images
from tokbench.generation.sample import Sampling
from tokbench.runtime.device import hash_state
from tokbench.runtime.seeding import normal
from tokbench.tokenizer import Tokenizer


class PublishedDiT:
    """facebook/DiT-XL-2-256 and its like. Raises InputError if the repository is no DiT, CellError if it does not load.

    ddim follows the pipeline (the learned variance unused); ddpm is the paper's sampler (250 steps), learned variance
    and all.
    """

    samplers: Sequence[str] = ("ddim", "ddpm")
    default_steps = 250
    steps_trained: int | None = None
    training: Mapping[str, Any] = {}

    def __init__(self, repository: str, device: torch.device) -> None:
        from diffusers import DiTPipeline

        try:
            pipeline = DiTPipeline.from_pretrained(repository)
        except (OSError, ValueError, TypeError, KeyError) as error:
            reason = first_line(error)
            raise CellError(f"hf:{repository}: does not load as a DiT pipeline: {reason}") from error
        self._use(pipeline, repository, device)

    def _use(self, pipeline: Any, repository: str, device: torch.device) -> None:
        self.name = repository.rpartition("/")[2].lower()
        self.device, self.schedule = device, dict(pipeline.scheduler.config)
        self.transformer: nn.Module = pipeline.transformer.to(device).eval().requires_grad_(False)
        config = pipeline.transformer.config
        if config.in_channels != pipeline.vae.config.latent_channels:
            raise InputError(
                f"hf:{repository}: the transformer has {config.in_channels} channels, its VAE "
                f"{pipeline.vae.config.latent_channels}"
            )
        self.null = config.num_embeds_ada_norm
        self.learned_variance = config.out_channels == 2 * config.in_channels
        names = {number: name for name, number in (getattr(pipeline, "labels", None) or {}).items()}
        self.classes: Sequence[str] = [names.get(number, str(number)) for number in range(self.null)]
        self.space = self._space(pipeline.vae.to(device), config.sample_size, repository)
        parts = cast(Tokenizer, SimpleNamespace(networks={"transformer": self.transformer}))
        self.weights = hash_state(parts) or ""
        self.note = f"hf:{repository}, {self.schedule.get('num_train_timesteps')} noise levels"

    def _space(self, vae: Any, sample_size: int, repository: str) -> LatentSpace:
        """What the pipeline's own VAE makes of the probe images, scaled as in training."""
        resolution = sample_size * 2 ** (len(vae.config.block_out_channels) - 1)
        images = to_float(probe_images(resolution).to(self.device))

        def encode() -> Tensor:
            mode: Tensor = vae.encode(images).latent_dist.mode()
            return mode * float(vae.config.scaling_factor)

        return measure(encode, f"the VAE of {repository}", None, resolution, self.device)

    def scheduler(self, sampler: str) -> Any:
        from diffusers import DDIMScheduler, DDPMScheduler

        if sampler == "ddim":
            return DDIMScheduler.from_config(self.schedule)
        variance = {"variance_type": "learned_range"} if self.learned_variance else {}
        return DDPMScheduler.from_config(self.schedule, **variance)

    def sample(self, seeds: Tensor, labels: Tensor, how: Sampling) -> Tensor:
        """Latents float32 [B, C, H, W] for seeds int64 and labels [B]; the interval counts steps, from 0 to 1."""
        scheduler = self.scheduler(how.sampler)
        scheduler.set_timesteps(how.steps, device=self.device)
        labels, null = labels.to(self.device), torch.full_like(labels, self.null).to(self.device)
        x: Tensor = normal(seeds, self.space.shape, device=self.device) * scheduler.init_noise_sigma
        noise = [torch.Generator().manual_seed(int(seed)) for seed in seeds.tolist()]
        channels = x.shape[1]
        for step, t in enumerate(scheduler.timesteps):
            inside = how.interval[0] <= step / len(scheduler.timesteps) <= how.interval[1]
            if how.guidance == 1 or not inside:
                out = self._predict(x, t, labels)
            else:
                both = self._predict(torch.cat((x, x)), t, torch.cat((labels, null)))
                out, without = both.chunk(2)
                guided = without[:, :channels] + how.guidance * (out[:, :channels] - without[:, :channels])
                out = torch.cat((guided, out[:, channels:]), dim=1)
            if how.sampler == "ddim":
                x = scheduler.step(out[:, :channels], t, x).prev_sample
            else:
                x = scheduler.step(out, t, x, generator=noise).prev_sample
        return x

    def _predict(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        out: Tensor = self.transformer(x, timestep=t.expand(len(x)), class_labels=labels).sample
        return out.float()
