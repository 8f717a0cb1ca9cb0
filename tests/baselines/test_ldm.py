"""The KL-VAE and checkpoints in the formats of latent diffusion and LlamaGen, held against diffusers' own network."""

import pickle
import re
import zipfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from baselines import pretrained
from baselines.families import ldm
from baselines.families.ldm import CONFIGS, LDMAutoencoder, LDMConfig, ldm_name, own_names
from baselines.hub import SETS, read_tensors
from baselines.kl_vae import ARCHITECTURES, KLVAE, ConvDecoderConfig, KLVAEConfig, PatchGAN
from baselines.published import PUBLISHED
from ssdd_models.encoder import EncoderConfig
from tests.baselines.test_pretrained import SD, save
from tokbench.errors import CellError, InputError
from tokbench.registry import create
from tokbench.runtime.device import hash_state

diffusers = pytest.importorskip("diffusers", reason="a machine may have torch and no diffusers")

SMALL = LDMConfig((1, 2), 4, 4, width=32, blocks=1)
IMAGES = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
SEEDS = torch.tensor([1, 2])


def autoencoder(config: LDMConfig) -> LDMAutoencoder:
    torch.manual_seed(0)
    return LDMAutoencoder(config).eval()


def small(name: str) -> LDMConfig:
    config = CONFIGS[name]
    return replace(
        config, width=32, blocks=1, z_channels=min(8, config.z_channels), codebook_size=config.codebook_size and 64
    )


@pytest.fixture
def shrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every configuration with narrow levels, so that the public path runs on small files."""
    monkeypatch.setattr(ldm, "CONFIGS", {name: small(name) for name in CONFIGS})


def diffusers_name(key: str, levels: int) -> str:
    """The parameter's name in diffusers.AutoencoderKL."""
    up = re.match(r"decoder\.up\.(\d+)\.", key)
    if up:
        key = key.replace(up[0], f"decoder.up_blocks.{levels - 1 - int(up[1])}.")
    key = re.sub(r"^encoder\.down\.", "encoder.down_blocks.", key)
    for old, new in (
        (".mid.block_1.", ".mid_block.resnets.0."), (".mid.block_2.", ".mid_block.resnets.1."),
        (".mid.attn_1.", ".mid_block.attentions.0."), (".block.", ".resnets."), (".attn.", ".attentions."),
        (".downsample.", ".downsamplers.0."), (".upsample.", ".upsamplers.0."), ("nin_shortcut", "conv_shortcut"),
        ("norm_out", "conv_norm_out"), (".proj_out.", ".to_out.0."), ("decoder.in_proj", "post_quant_conv"),
        ("encoder.out_proj", "quant_conv"),
        (".q.", ".to_q."), (".k.", ".to_k."), (".v.", ".to_v."),
    ):  # fmt: skip
        key = key.replace(old, new)
    return re.sub(r"(attentions\.\d\.)norm\.", r"\1group_norm.", key)


@torch.no_grad()
@pytest.mark.parametrize("decoder_attention", [False, True])
def test_the_network_is_that_of_diffusers_with_the_same_weights(decoder_attention: bool) -> None:
    model = autoencoder(replace(SMALL, decoder_attention=decoder_attention))
    other = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D" if decoder_attention else "UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(32, 64),
        latent_channels=4,
    ).eval()
    state = {diffusers_name(key, 2): value for key, value in model.state_dict().items()}
    own = other.state_dict()
    other.load_state_dict({key: value.reshape(own[key].shape) for key, value in state.items()})
    x = IMAGES.float() / 127.5 - 1
    posterior, expected = model.encode(x)[0], other.encode(x).latent_dist
    torch.testing.assert_close(posterior.mean, expected.mean, rtol=1e-4, atol=1e-5)  # type: ignore[union-attr]
    torch.testing.assert_close(posterior.std, expected.std, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.decode(expected.mean)[0], other.decode(expected.mean).sample, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_every_row_loads_from_its_file_and_keeps_the_contract(name: str, shrunk: None, tmp_path: Path) -> None:
    config, row = small(name), PUBLISHED[name]
    state = autoencoder(config).state_dict()
    torch.save({"model": state | {"loss.discriminator.main.0.weight": torch.zeros(1)}}, tmp_path / "model.pt")
    statistics = {
        "mean": torch.rand(1, config.latent_channels, 1, 1),
        "std": 1 + torch.rand(1, config.latent_channels, 1, 1),
    }
    torch.save(statistics, tmp_path / ldm.STATISTICS.get(name, "none.pt"))
    tokenizer: Any = create(f"{name}:{tmp_path / 'model.pt'}")
    latents = tokenizer.encode(IMAGES, sample=False, seeds=SEEDS)
    decoded = tokenizer.decode(latents, seeds=SEEDS, size=(32, 32))
    grid = 32 // row.downsample
    assert tokenizer.info.downsample == row.downsample == 2 ** (len(config.channel_mult) - 1)
    assert decoded.shape == IMAGES.shape
    if row.codebook_size:
        assert latents.shape == (2, grid, grid)
        assert latents.dtype == torch.int64
        assert tokenizer.bits(latents).tolist() == [grid * grid * 6.0] * 2
        return
    assert latents.shape == (2, row.channels, grid, grid)
    raw: Any = autoencoder(config).encode(IMAGES.float() / 127.5 - 1)[0]
    scaled = raw.mean * row.scale if row.scale else (raw.mean - statistics["mean"]) / statistics["std"]
    torch.testing.assert_close(latents, scaled, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(decoded, autoencoder(config).decode(raw.mean)[0], rtol=1e-3, atol=1e-4)


def llamagen_names(state: dict[str, Tensor], levels: int) -> dict[str, Tensor]:
    renamed = {}
    for key, value in state.items():
        for number, middle in enumerate(("block_1", "attn_1", "block_2")):
            key = key.replace(f".mid.{middle}.", f".mid.{number}.")
        if found := re.match(r"(encoder\.down|decoder\.up)\.(\d+)\.", key):
            level = int(found[2]) if found[1] == "encoder.down" else levels - 1 - int(found[2])
            key = key.replace(found[0], f"{found[1].split('.')[0]}.conv_blocks.{level}.").replace(".block.", ".res.")
        renamed[key] = value
    return renamed


def test_llamagens_names_are_read_as_the_same_network(tmp_path: Path) -> None:
    config = replace(small("llamagen-vq8"), width=32)
    model = autoencoder(config)
    names = llamagen_names(model.state_dict(), 4)
    assert {
        "encoder.conv_blocks.3.attn.0.q.weight",
        "decoder.conv_blocks.0.attn.1.q.weight",
        "encoder.mid.1.k.bias",
    } < set(names)
    assert "decoder.conv_blocks.0.upsample.conv.weight" in names
    torch.save({"model": {key: value.clone() for key, value in names.items()}}, tmp_path / "vq.pt")
    again = own_names(read_tensors(tmp_path / "vq.pt", "vq")[0], 4)
    assert all(torch.equal(value, again[key]) for key, value in model.state_dict().items())
    assert all(ldm_name(key, 4) == key for key in again)


def before(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def averaged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Trained weights, here zeros, and what latent diffusion calls their averages."""
    average = {f"model_ema.{key.replace('.', '')}": value for key, value in state.items()}
    return {key: torch.zeros_like(value) for key, value in state.items()} | average


WRAPPED: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "bare": dict,
    **{key: lambda state, key=key: {key: state, "epoch": 3, "optimizer": {}} for key in SETS},
    **{prefix: partial(before, prefix) for prefix in ("module.", "_orig_mod.", "module._orig_mod.", "module.module.")},
    "compiled part": lambda state: {re.sub("^encoder", "encoder._orig_mod", key): one for key, one in state.items()},
    "first stage": lambda state: {
        "state_dict": before("first_stage_model.", state) | before("model.diffusion_model.", state)
        | {"model_ema.diffusion_modelencoderconv_inweight": torch.zeros(1), "encoder.of_text": torch.zeros(1)}
    },
    "averages by name": averaged,
    "of a module": lambda state: {"model": before("module.", averaged(state))},
    "empty average": lambda state: {"ema": {}, "model": state},
}  # fmt: skip


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_whatever_is_around_the_tensors_the_same_weights_load(wrapped: str, shrunk: None, tmp_path: Path) -> None:
    state = autoencoder(small("mar-kl16")).state_dict()
    torch.save(WRAPPED[wrapped](state), tmp_path / "kl.ckpt")
    tensors, note = read_tensors(tmp_path / "kl.ckpt", "kl")
    found = own_names(tensors, 5)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], value) for key, value in state.items())
    assert bool(note) == ("averages" in wrapped or wrapped == "of a module")


def test_a_row_of_diffusers_loads_from_one_file_in_either_spelling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(pretrained.PUBLISHED, "sd-vae-ft-mse", replace(PUBLISHED["sd-vae-ft-mse"], config=SD))
    state = diffusers.AutoencoderKL.from_pretrained(save("AutoencoderKL", SD, tmp_path / "folder")).state_dict()
    spelling = {
        diffusers_name(key, 4): key for key in autoencoder(LDMConfig((1, 1, 1, 2), 4, 4, width=32)).state_dict()
    }
    ldm_state = {}
    for key, value in state.items():
        is_convolution = re.search(r"\.to_(q|k|v|out\.0)\.weight", key)
        ldm_state[spelling[key]] = value[..., None, None] if is_convolution else value
    torch.save({"state_dict": before("first_stage_model.", ldm_state)}, tmp_path / "ldm.ckpt")
    save_file(state, tmp_path / "own.safetensors")
    folder, *files = (create(f"sd-vae-ft-mse:{tmp_path / one}") for one in ("folder", "ldm.ckpt", "own.safetensors"))
    for tokenizer in files:
        assert hash_state(tokenizer) == hash_state(folder)
        assert (tokenizer.scale, tokenizer.info.note) == (folder.scale, folder.info.note)
    torch.save({"state_dict": before("vae.", ldm_state)}, tmp_path / "odd.ckpt")
    with pytest.raises(CellError, match=r"odd.ckpt: .* unexpected: vae.decoder.conv_in.bias"):
        create(f"sd-vae-ft-mse:{tmp_path / 'odd.ckpt'}")
    with pytest.raises(CellError, match=r"ldm.ckpt is a file; give a folder of diffusers, or write NAME:"):
        create(f"hf:{tmp_path / 'ldm.ckpt'}")


@torch.no_grad()
def test_of_several_sets_the_average_is_taken_and_said_and_another_can_be_chosen(shrunk: None, tmp_path: Path) -> None:
    state = autoencoder(small("llamagen-vq8")).state_dict()
    trained = {key: torch.zeros_like(value) for key, value in state.items()}
    file = tmp_path / "vq.pt"
    torch.save({"model": trained, "ema": state, "optimizer": {}, "steps": 4}, file)
    average, chosen = create(f"llamagen-vq8:{file}"), create(f"llamagen-vq8:{file}@weights=model")
    assert average.info.note == "weights ema of a file that also holds model (@weights=model)"
    assert chosen.info.note == "weights model of a file that also holds ema (@weights=ema)"
    assert average.networks["decoder"].parts[0].conv_in.weight.any()
    assert not chosen.networks["decoder"].parts[0].conv_in.weight.any()
    with pytest.raises(CellError, match=r"vq.pt holds the weights ema, model; not params"):
        create(f"llamagen-vq8:{file}@weights=params")


@torch.no_grad()
def test_unit_codes_are_chosen_by_direction(shrunk: None, tmp_path: Path) -> None:
    model = autoencoder(small("llamagen-vq8"))
    save_file(model.state_dict(), tmp_path / "vq.safetensors")
    tokenizer = create(f"llamagen-vq8:{tmp_path / 'vq.safetensors'}")
    z: Any = torch.nn.functional.normalize(model.encode(IMAGES.float() / 127.5 - 1)[0], dim=1)  # type: ignore[arg-type]
    codes = torch.nn.functional.normalize(model.quantize.embedding.weight, dim=1)
    expected = torch.einsum("bdhw,kd->bhwk", z, codes).argmax(-1)
    assert torch.equal(tokenizer.encode(IMAGES, sample=False, seeds=SEEDS), expected)


def test_the_published_sizes_are_those_of_the_papers() -> None:
    millions = {"llamagen-vq8": 70, "llamagen-vq16": 72, "mar-kl16": 66, "va-vae-f16d32": 70}
    for name, expected in millions.items():
        with torch.device("meta"):
            model = LDMAutoencoder(CONFIGS[name])
        assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6) == expected, name


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("objects", "holds more than tensors: refused"),
        ("half", "is damaged or half downloaded"),
        ("memo", "is damaged or half downloaded"),
        ("keys", "missing: decoder.conv_in.bias"),
        ("shape", "shape: post_quant_conv.weight"),
        ("number", "holds a float, not named tensors"),
        ("others", "holds epoch, optimizer: no named tensors"),
        ("names", "unexpected: vae.decoder.conv_in.bias"),
        ("statistics", "does not hold mean and std of 32 channels"),
    ],
)
def test_a_bad_file_costs_its_row_with_one_line(fault: str, said: str, shrunk: None, tmp_path: Path) -> None:
    file, state = tmp_path / "model.pt", dict(autoencoder(small("va-vae-f16d32")).state_dict())
    if fault == "keys":
        del state["decoder.conv_in.bias"]
    if fault == "shape":
        state["post_quant_conv.weight"] = torch.zeros(1)
    held = {"number": 1.0, "others": {"epoch": 3, "optimizer": {"lr": 1.0}}, "names": before("vae.", state)}
    torch.save(held.get(fault, state), file)
    torch.save({"mean": torch.zeros(32)}, tmp_path / ldm.STATISTICS["va-vae-f16d32"])
    if fault == "objects":
        file.write_bytes(pickle.dumps({"state_dict": Path("x")}, protocol=2))
    if fault == "memo":  # a reference to an object that the file never named
        with zipfile.ZipFile(file) as whole, zipfile.ZipFile(tmp_path / "other.pt", "w") as broken:
            for item in whole.namelist():
                broken.writestr(item, b"\x80\x02hK." if item.endswith("data.pkl") else whole.read(item))
        file.write_bytes((tmp_path / "other.pt").read_bytes())
    if fault == "half":
        file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CellError) as caught:
        create(f"va-vae-f16d32:{file}")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_row_that_no_hub_has_says_where_its_file_is() -> None:
    with pytest.raises(CellError, match=r"not on the hub; download kl16.ckpt .* and write mar-kl16:kl16.ckpt"):
        create("mar-kl16")


# ---- the KL-VAE ---------------------------------------------------------------------------------------------------

TINY = KLVAEConfig(EncoderConfig(downsample=4, width=32, groups=4), ConvDecoderConfig(16, (1, 2, 2), 1, 4))


def published(arch: str, widths: tuple[int, ...], size: int) -> Any:
    """diffusers' network by the configuration that the authors of `arch` publish."""
    flux = arch == "flux"
    return diffusers.AutoencoderKL(
        block_out_channels=widths, layers_per_block=2, latent_channels=16 if flux else 4, sample_size=size,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        use_quant_conv=not flux, use_post_quant_conv=not flux,
    )  # fmt: skip


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_published_architectures_have_the_tensors_of_diffusers(arch: str) -> None:
    with torch.device("meta"):
        ours = KLVAE(ARCHITECTURES[arch]).state_dict()
        theirs = published(arch, (128, 256, 512, 512), 1024).state_dict()
    assert {diffusers_name(key, 4): value.numel() for key, value in ours.items()} == {
        key: value.numel() for key, value in theirs.items()
    }


@torch.no_grad()
@pytest.mark.parametrize("arch", ["sd", "flux"])
def test_published_architectures_compute_what_diffusers_computes(arch: str) -> None:
    torch.manual_seed(0)
    config = ARCHITECTURES[arch]
    narrow = replace(config, encoder=replace(config.encoder, width=32), decoder=replace(config.decoder, width=32))
    model, other = KLVAE(narrow).eval(), published(arch, (32, 64, 128, 128), 32).eval()
    own = other.state_dict()
    state = {diffusers_name(key, 4): value for key, value in model.state_dict().items()}
    other.load_state_dict({key: value.reshape(own[key].shape) for key, value in state.items()})
    posterior, expected = model.encode(IMAGES.float() / 127.5 - 1), other.encode(IMAGES.float() / 127.5 - 1).latent_dist
    torch.testing.assert_close(posterior.mean, expected.mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(posterior.std, expected.std, rtol=1e-4, atol=1e-4)
    images = model.decode(expected.mean)
    torch.testing.assert_close(images, other.decode(expected.mean).sample, rtol=1e-4, atol=1e-4)


def test_an_architecture_has_no_weights_to_measure_quality_with() -> None:
    assert create("klvae@arch=flux", random_weights=True).info.channels == 16
    with pytest.raises(InputError, match="random-weights"):
        create("klvae@arch=sd")
    with pytest.raises(InputError, match="known: sd, sdxl, flux"):
        create("klvae@arch=sd4", random_weights=True)


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
