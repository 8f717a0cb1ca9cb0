"""A published DiT through diffusers, on a tiny pipeline with random weights."""

import shutil
from pathlib import Path

import pytest
import torch

from tokbench.errors import CellError, InputError
from tokbench.generation.compatibility import check_fits
from tokbench.generation.generate import open_generator
from tokbench.generation.sample import Sampling
from tokbench.registry import create
from tokbench.runtime.seeding import normal

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DiT pipeline of 8 classes on latents of 4 x 8 x 8, f2, saved as the hub has them."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=8, norm_num_groups=4, activation_fn="gelu-approximate",
        norm_type="ada_norm_zero", norm_elementwise_affine=False,
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1,
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=16, scaling_factor=0.5,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("hub") / "tiny-dit"
    DiTPipeline(transformer, vae, DDIMScheduler(clip_sample=False)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_ddim_samples_are_the_pipelines_own(
    pipeline_folder: Path, guidance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import DiTPipeline
    from diffusers.pipelines.dit import pipeline_dit

    generator = open_generator(f"hf:{pipeline_folder}", CPU)
    seeds, labels = torch.tensor([3, 4]), torch.tensor([1, 7])
    how = Sampling(guidance, steps=5, sampler="ddim")
    latents = generator.sample(seeds, labels, how)
    vae = create(str(pipeline_folder / "vae"))
    ours = vae.decode(latents, seeds=seeds, size=(16, 16)).clamp(-1, 1)

    pipeline = DiTPipeline.from_pretrained(pipeline_folder)
    pipeline.set_progress_bar_config(disable=True)
    monkeypatch.setattr(pipeline_dit, "randn_tensor", lambda **_: normal(seeds, (4, 8, 8), device="cpu"))
    if guidance > 1:  # the pipeline's null class is 1000 whatever the model
        monkeypatch.setattr(pipeline_dit.torch, "tensor", null_class_is_8(torch.tensor))
    images = pipeline(labels.tolist(), guidance, num_inference_steps=5, output_type="np").images  # [2, H, W, 3], 0 to 1
    torch.testing.assert_close(ours, torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1, atol=1e-5, rtol=1e-4)


def null_class_is_8(tensor: object) -> object:
    return lambda values, **k: tensor([8] * len(values) if values == [1000] * len(values) else values, **k)  # type: ignore[operator]


def test_ddpm_noise_is_by_image_whatever_the_batch(pipeline_folder: Path) -> None:
    generator = open_generator(f"hf:{pipeline_folder}", CPU)
    seeds, labels, how = torch.arange(3), torch.tensor([0, 1, 2]), Sampling(2.0, steps=4, sampler="ddpm")
    together = generator.sample(seeds, labels, how)
    torch.testing.assert_close(together[1:2], generator.sample(seeds[1:2], labels[1:2], how), atol=1e-5, rtol=1e-4)
    assert together.isfinite().all()


def test_the_pipelines_vae_fits_and_the_same_with_another_scale_does_not(pipeline_folder: Path, tmp_path: Path) -> None:
    generator = open_generator(f"hf:{pipeline_folder}", CPU)
    assert generator.space.shape == (4, 8, 8)
    check_fits(generator.space, create(str(pipeline_folder / "vae")), CPU)
    shutil.copytree(pipeline_folder / "vae", tmp_path / "vae")
    config = tmp_path / "vae" / "config.json"
    config.write_text(config.read_text().replace('"scaling_factor": 0.5', '"scaling_factor": 0.2'))
    with pytest.raises(InputError, match="another latent space or normalisation"):
        check_fits(generator.space, create(str(tmp_path / "vae")), CPU)


def test_a_repository_that_is_no_dit_is_named(pipeline_folder: Path) -> None:
    with pytest.raises(CellError, match="does not load as a DiT pipeline"):
        open_generator(f"hf:{pipeline_folder / 'vae'}", CPU)
