"""Published autoencoders: small instances of the real diffusers classes, saved, and loaded as users load them."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import tokbench
from baselines.families.quantisers import code_bits, nearest_codes
from baselines.pretrained import latent_shape
from baselines.published import PUBLISHED
from tokbench.errors import CellError, InputError
from tokbench.registry import create
from tokbench.runtime.device import hash_state
from tokbench.runtime.seeding import normal

diffusers = pytest.importorskip("diffusers", reason="a machine may have torch and no diffusers")

TWO = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
FOUR = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
KL = {**TWO, "block_out_channels": (8, 16), "norm_num_groups": 4, "latent_channels": 4}
SD = {**FOUR, "block_out_channels": (8, 8, 8, 16), "norm_num_groups": 4, "latent_channels": 4}
WAN = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [False]}
STATISTICS = {"latents_mean": [0.1, -0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0]}
DC = {
    **{f"{side}_block_types": ("ResBlock", "EfficientViTBlock") for side in ("encoder", "decoder")},
    **{f"{side}_block_out_channels": (8, 16) for side in ("encoder", "decoder")},
    **{f"{side}_layers_per_block": (1, 1) for side in ("encoder", "decoder")},
    **{f"{side}_qkv_multiscales": ((), ()) for side in ("encoder", "decoder")},
    "latent_channels": 8,
    "attention_head_dim": 8,
    "scaling_factor": 0.4,
}
CONSISTENCY = {
    "encoder_block_out_channels": (8, 8, 8, 16),
    "decoder_block_out_channels": (8, 8, 8, 16),
    **{f"{side}_norm_num_groups": 4 for side in ("encoder", "decoder")},
    **{f"{side}_layers_per_block": 1 for side in ("encoder", "decoder")},
}
RAE = {
    "encoder_hidden_size": 64,
    "encoder_num_hidden_layers": 1,
    "decoder_hidden_size": 16,
    "patch_size": 8,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 16,
    "encoder_input_size": 28,
    "latents_mean": [[[0.1]]] * 64,
    "latents_std": [[[2.0]]] * 64,
}
TAESD = {f"{side}_block_out_channels": (8,) * 4 for side in ("encoder", "decoder")}
TAESD |= {"num_encoder_blocks": (1,) * 4, "num_decoder_blocks": (1,) * 4}  # type: ignore[dict-item]
# class -> (config, pixels a position, channels of the latent)
CLASSES: dict[str, tuple[dict[str, Any], int, int | None]] = {
    "AutoencoderKL": ({**KL, "scaling_factor": 0.3, "shift_factor": 0.1}, 2, 4),
    "AutoencoderKLFlux2": (KL, 4, 16),
    "AutoencoderDC": (DC, 2, 8),
    "AutoencoderTiny": (TAESD, 8, 4),
    "ConsistencyDecoderVAE": (CONSISTENCY, 8, 4),
    "AutoencoderKLQwenImage": ({**WAN, **STATISTICS}, 2, 4),
    "AutoencoderKLWan": ({**WAN, **STATISTICS}, 2, 4),
    "AutoencoderRAE": (RAE, 8, 64),
    "VQModel": ({**KL, "num_vq_embeddings": 32, "vq_embed_dim": 4}, 2, None),
    "AsymmetricAutoencoderKL": (
        {**TWO, "down_block_out_channels": (8, 16), "up_block_out_channels": (8, 16), "norm_num_groups": 4},
        2,
        4,
    ),
    "AutoencoderKLKVAE": (
        {"channels": 32, "num_enc_blocks": 1, "num_dec_blocks": 1, "z_channels": 4, "ch_mult": (1, 2)},
        2,
        4,
    ),
    "AutoencoderKLHunyuanImage": (
        {
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": 4,
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "spatial_compression_ratio": 2,
            "sample_size": 32,
            "scaling_factor": 0.7,
        },
        2,
        4,
    ),
}
SEEDS = torch.tensor([11, 12, 13])


def save(kind: str, config: dict[str, Any], folder: Path) -> Path:
    torch.manual_seed(0)
    model = getattr(diffusers, kind)(**config)
    if kind == "AutoencoderKLFlux2":
        model.bn.running_mean.uniform_(-1, 1)
        model.bn.running_var.uniform_(0.5, 2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with a small random instance of a class, made once."""
    root = tmp_path_factory.mktemp("models")

    def folder(kind: str) -> Path:
        return root / kind if (root / kind).exists() else save(kind, CLASSES[kind][0], root / kind)

    return folder


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 3, 16, 16), dtype=np.uint8))


@torch.no_grad()
def both_ways(tokenizer: Any, images: Tensor, seeds: Tensor = SEEDS, sample: bool = False) -> tuple[Tensor, Tensor]:
    latents = tokenizer.encode(images, sample=sample, seeds=seeds)
    return latents, tokenizer.decode(latents, seeds=seeds, size=(images.shape[2], images.shape[3]))


@pytest.mark.parametrize("kind", CLASSES)
def test_any_class_loads_from_its_folder_and_keeps_the_contract(
    kind: str, saved: Callable[[str], Path], images: Tensor
) -> None:
    tokenizer = create(str(saved(kind)))
    _, downsample, channels = CLASSES[kind]
    info = tokenizer.info
    assert (info.downsample, info.channels, info.size_multiple) == (downsample, channels, downsample)
    latents, decoded = both_ways(tokenizer, images)
    assert latents.shape == (3, *([channels] if channels else []), 16 // downsample, 16 // downsample)
    assert latents.dtype == (torch.float32 if channels else torch.int64)
    assert decoded.shape == images.shape
    assert decoded.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(both_ways(tokenizer, images), (latents, decoded), strict=True))
    alone = both_ways(tokenizer, images[1:2], SEEDS[1:2])
    torch.testing.assert_close(alone[0], latents[1:2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(alone[1], decoded[1:2], rtol=1e-3, atol=1e-3)
    other = tokenizer.decode(latents, seeds=SEEDS + 1, size=(16, 16))
    assert torch.equal(other, decoded) == info.deterministic


@pytest.mark.parametrize("kind", CLASSES)
def test_every_parameter_belongs_to_one_direction(kind: str, saved: Callable[[str], Path]) -> None:
    networks = create(str(saved(kind))).networks
    counts = [sum(parameter.numel() for parameter in network.parameters()) for network in networks.values()]
    model = getattr(diffusers, kind).from_pretrained(saved(kind))
    assert list(networks) == ["encoder", "decoder"]
    assert sum(counts) == sum(parameter.numel() for parameter in model.parameters())
    assert all(counts)
    assert hash_state(create(str(saved(kind)))) is not None  # else nothing of it would be cached or resumed


@torch.no_grad()
@pytest.mark.parametrize(
    "kind", ["AutoencoderKL", "AutoencoderDC", "AutoencoderTiny", "AutoencoderKLWan", "AutoencoderKLHunyuanImage"]
)
def test_latents_are_the_classs_own_shifted_and_scaled_and_decode_undoes_it(
    kind: str, saved: Callable[[str], Path], images: Tensor
) -> None:
    model = getattr(diffusers, kind).from_pretrained(saved(kind)).eval()
    video = kind == "AutoencoderKLWan"
    x = images.float() / 127.5 - 1
    raw = model.encode(x[:, :, None] if video else x, return_dict=False)[0]
    raw = raw if isinstance(raw, Tensor) else raw.mode()
    expected = model.decode(raw, return_dict=False)[0]
    raw, expected = (raw[:, :, 0], expected[:, :, 0]) if video else (raw, expected)
    config = CLASSES[kind][0]
    shift, scale = config.get("shift_factor", 0.0), config.get("scaling_factor", 1.0)
    if video:
        shift = torch.tensor(config["latents_mean"]).reshape(-1, 1, 1)
        scale = 1 / torch.tensor(config["latents_std"]).reshape(-1, 1, 1)
    latents, decoded = both_ways(create(str(saved(kind))), images)
    torch.testing.assert_close(latents, (raw - shift) * scale)
    torch.testing.assert_close(decoded, expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_flux2_latents_are_those_of_its_pipeline(saved: Callable[[str], Path], images: Tensor) -> None:
    model = diffusers.AutoencoderKLFlux2.from_pretrained(saved("AutoencoderKLFlux2")).eval()
    z = model.encode(images.float() / 127.5 - 1).latent_dist.mode()
    patches = diffusers.Flux2Pipeline._patchify_latents(z)
    mean, variance = (value.reshape(1, -1, 1, 1) for value in (model.bn.running_mean, model.bn.running_var))
    latents, decoded = both_ways(create(str(saved("AutoencoderKLFlux2"))), images)
    torch.testing.assert_close(latents, (patches - mean) / (variance + 1e-4).sqrt())
    torch.testing.assert_close(decoded, model.decode(z).sample, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_a_posterior_sample_is_the_mode_plus_noise_of_each_images_seed(
    saved: Callable[[str], Path], images: Tensor
) -> None:
    tokenizer = create(str(saved("AutoencoderKL")))
    model = diffusers.AutoencoderKL.from_pretrained(saved("AutoencoderKL")).eval()
    posterior = model.encode(images.float() / 127.5 - 1).latent_dist
    z = posterior.mean + posterior.std * normal(SEEDS, posterior.mean.shape[1:], device="cpu")
    torch.testing.assert_close(both_ways(tokenizer, images, sample=True)[0], (z - 0.1) * 0.3)


@torch.no_grad()
def test_codes_are_those_of_the_quantiser_and_cost_log2_of_the_codebook(
    saved: Callable[[str], Path], images: Tensor
) -> None:
    model = diffusers.VQModel.from_pretrained(saved("VQModel")).eval()
    h = model.encode(images.float() / 127.5 - 1).latents
    codes = model.quantize(h)[2][2].reshape(3, 8, 8)
    tokenizer: Any = create(str(saved("VQModel")))
    latents, decoded = both_ways(tokenizer, images)
    assert torch.equal(latents, codes)
    assert tokenizer.info.codebook_size == 32
    assert tokenizer.bits(latents).tolist() == [64 * 5.0] * 3
    torch.testing.assert_close(decoded, model.decode(h).sample, rtol=1e-3, atol=1e-4)


def test_nearest_codes_minimise_the_distance() -> None:
    generator = torch.Generator().manual_seed(0)
    z, codebook = torch.randn(2, 5, 3, 3, generator=generator), torch.randn(17, 5, generator=generator)
    distances = torch.cdist(z.permute(0, 2, 3, 1).reshape(-1, 5), codebook)
    assert torch.equal(nearest_codes(z, codebook), distances.argmin(1).reshape(2, 3, 3))
    assert code_bits(torch.zeros(2, 3, 3), 16).tolist() == [36.0, 36.0]


def test_rae_refuses_another_resolution_than_its_own(saved: Callable[[str], Path]) -> None:
    tokenizer = create(str(saved("AutoencoderRAE")))
    with pytest.raises(CellError, match="works at 16 px only, not at 32 x 32"):
        both_ways(tokenizer, torch.zeros(3, 3, 32, 32, dtype=torch.uint8))


def test_decoders_of_one_latent_space_are_swapped_and_unlike_ones_refused(tmp_path: Path, images: Tensor) -> None:
    sd = f"sd-vae-ft-mse:{save('AutoencoderKL', {**SD, 'scaling_factor': 0.18215}, tmp_path / 'sd')}"
    sdxl = f"sdxl-vae:{save('AutoencoderKL', {**SD, 'scaling_factor': 0.13025}, tmp_path / 'sdxl')}"
    for name, kind, config in (
        ("taesd", "AutoencoderTiny", TAESD),
        ("consistency-decoder", "ConsistencyDecoderVAE", CONSISTENCY),
    ):
        other = f"{name}:{save(kind, config, tmp_path / name)}"
        joined = create(f"{sd}+{other}")
        latents, decoded = both_ways(joined, images)
        assert torch.equal(latents, both_ways(create(sd), images)[0])
        assert torch.equal(decoded, create(other).decode(latents, seeds=SEEDS, size=(16, 16)))
        assert (joined.info.deterministic, joined.info.decode_steps) == (
            name == "taesd",
            None if name == "taesd" else 2,
        )
    with pytest.raises(InputError, match=r"f8, 4 channels, latent space sd;.*f8, 4 channels, latent space sdxl"):
        create(f"{sd}+{sdxl}")
    with pytest.raises(InputError, match=r"latent space sd;.*latent space unnamed"):
        create(f"{sd}+hf:{tmp_path / 'sdxl'}")
    create(f"{sd}+hf:{tmp_path / 'sdxl'}@latent_space=sd")


def test_a_config_that_contradicts_the_table_is_told(tmp_path: Path) -> None:
    folder = save("AutoencoderKL", {**SD, "scaling_factor": 0.5}, tmp_path / "model")
    info = create(f"sd-vae-ft-mse:{folder}").info
    assert not info.verified
    assert "scale 0.18215 used, the checkpoint says 0.0 and 0.5" in info.note
    assert not create(f"eq-vae:{folder}").info.note


@pytest.mark.parametrize("name", [row.name for row in PUBLISHED.values() if row.kind[0].isupper()])
def test_the_tables_architecture_has_the_tables_latents(name: str) -> None:
    row = PUBLISHED[name]
    downsample, channels = latent_shape(row.kind, row.config or {}, name)
    assert (downsample, row.channels or channels) == (row.downsample, channels)
    assert row.licence
    assert row.paper


def damage(folder: Path, fault: str) -> None:
    weights = folder / "diffusion_pytorch_model.safetensors"
    if fault == "half":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif fault == "gone":
        weights.unlink()
    elif fault == "pickled":
        weights.unlink()
        objects = pickle.dumps({"encoder.conv_in.weight": Path("x")}, protocol=2)
        (folder / "diffusion_pytorch_model.bin").write_bytes(objects)
    elif fault == "config":
        (folder / "config.json").write_text("{")
    elif fault == "class":
        (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    elif fault == "keys":
        from safetensors.torch import load_file, save_file

        tensors = load_file(weights)
        del tensors["decoder.conv_out.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("half", "does not load"),
        ("gone", "does not load"),
        ("pickled", "holds more than tensors: refused"),
        ("config", "config.json is not readable"),
        ("class", "holds UNet2DModel, expected AutoencoderKL"),
        ("keys", "lacks 1 tensors of AutoencoderKL, the first is decoder.conv_out.weight"),
        ("channels", "has f2 and 4 channels, expected f8 and 4"),
    ],
)
def test_a_bad_checkpoint_costs_its_row_with_one_line(fault: str, said: str, tmp_path: Path) -> None:
    folder = save("AutoencoderKL", KL if fault == "channels" else SD, tmp_path / "model")
    damage(folder, fault)
    with pytest.raises(CellError) as caught:
        create(f"sd-vae-ft-mse:{folder}")
    assert said in str(caught.value)
    assert str(caught.value).startswith("sd-vae-ft-mse: ")
    assert "\n" not in str(caught.value)


def test_pickled_tensors_are_read_without_running_them(tmp_path: Path, images: Tensor) -> None:
    safe = save("AutoencoderKL", SD, tmp_path / "safe")
    pickled = tmp_path / "pickled"
    shutil.copytree(safe, pickled)
    (pickled / "diffusion_pytorch_model.safetensors").unlink()
    state = diffusers.AutoencoderKL.from_pretrained(safe).state_dict()
    torch.save(state, pickled / "diffusion_pytorch_model.bin")
    assert torch.equal(*(both_ways(create(f"sd-vae-ft-mse:{folder}"), images)[1] for folder in (safe, pickled)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", CLASSES)
def test_a_class_gives_on_a_gpu_what_it_gives_on_a_cpu(kind: str, saved: Callable[[str], Path], images: Tensor) -> None:
    tokenizer = create(str(saved(kind)))
    latents, decoded = both_ways(tokenizer, images)
    for network in tokenizer.networks.values():
        network.to("cuda")
    again = tokenizer.encode(images.cuda(), sample=False, seeds=SEEDS)
    assert again.device.type == "cuda"
    if latents.is_floating_point():
        torch.testing.assert_close(again.cpu(), latents, rtol=1e-2, atol=1e-2)
    other = tokenizer.decode(latents.cuda(), seeds=SEEDS, size=(16, 16))
    torch.testing.assert_close(other.cpu(), decoded, rtol=1e-2, atol=1e-2)


def test_tiles_of_diffusers_are_an_option_and_said(tmp_path: Path) -> None:
    folder = save("AutoencoderKL", {**CLASSES["AutoencoderKL"][0], "sample_size": 16}, tmp_path / "kl")
    whole, tiled, ours = (create(f"{folder}{how}") for how in ("", "@tiling=diffusers", "@tile=16@overlap=4"))
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 3, 28, 40), dtype=np.uint8))
    found = [both_ways(one, images) for one in (whole, tiled, ours)]
    assert len({(latents.shape, decoded.shape) for latents, decoded in found}) == 1
    assert not any(torch.allclose(found[i][1], found[j][1], atol=1e-2) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert (str(tiled.tiling), tiled.tiling.borders(40)) == ("16 px, overlap 4 px, by diffusers", [14, 26, 38])
    with pytest.raises(InputError, match="in tiles already"):
        create(f"{folder}@tiling=diffusers@tile=16")


def test_diffusers_tiles_that_are_no_choice_are_refused(saved: Callable[[str], Path]) -> None:
    with pytest.raises(InputError, match="diffusers has no tiling of VQModel; write @tile=512"):
        create(f"{saved('VQModel')}@tiling=diffusers")


def test_a_fault_of_diffusers_tiles_costs_its_row_only(tmp_path: Path, images: Tensor) -> None:
    folder = save("AutoencoderTiny", {**TAESD, "latent_channels": 16}, tmp_path / "tiny")
    Image.fromarray(np.zeros((520, 520, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(CellError, match="must match the size"):  # it takes every latent to have 4 channels
        tokbench.evaluate(f"{folder}@tiling=diffusers", tmp_path, 520, ["psnr"])


@pytest.mark.parametrize(
    ("how", "note"),
    [({"variant": "fp16"}, "; weights are its fp16 files"), ({"safe_serialization": False}, ""),
     ({"variant": "fp16", "max_shard_size": "10KB"}, "; weights are its fp16 files"), ({"max_shard_size": "10KB"}, "")],
)  # fmt: skip
def test_weights_are_found_by_listing_in_silence(
    how: dict[str, Any], note: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(**KL)
    (model.half() if "variant" in how else model).save_pretrained(tmp_path / "model" / "part", **how)
    tokenizer = create(f"{tmp_path}/model:part")
    assert tokenizer.info.note == f"AutoencoderKL; scale and shift from its config{note}"
    for found, saved in zip(tokenizer.networks["encoder"].parameters(), model.encoder.parameters(), strict=False):
        assert torch.equal(found, saved.float())
    assert capfd.readouterr().err == ""
