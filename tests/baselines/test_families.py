"""Families with a reader of their own: small instances, saved in the published layout, loaded as users load them.

The networks were also run beside their authors' code with equal random weights; that code is not kept here.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from baselines import pretrained
from baselines.families import bsq_vit, capacitor, flextok, flowmo, ldm, raev2, seed_voken, softvq, titok, var, vitok
from baselines.families.bsq_vit import BSQViT
from baselines.families.flextok import FlexTok
from baselines.families.flowmo import FlowMo
from baselines.families.ldm import LDMConfig
from baselines.families.raev2 import RAEv2
from baselines.families.rotary_vit import ViTConfig
from baselines.families.seed_voken import IndexBackpropagation, LookupConfig, LookupFree
from baselines.families.softvq import SoftVQ
from baselines.families.titok import TiTok
from baselines.families.var import MultiScale
from baselines.families.vitok import ViTok
from baselines.families.vtp import DEFAULTS, VTP
from baselines.hub import read_tensors
from baselines.published import PUBLISHED
from tests.baselines.test_pretrained import CLASSES, SD, both_ways, save
from tokbench.data.pixels import to_float
from tokbench.errors import CellError, InputError
from tokbench.evaluation.reconstruct import Timer, reconstruct
from tokbench.records.measurement import Measurement
from tokbench.registry import create
from tokbench.runtime.device import hash_state
from tokbench.runtime.seeding import normal

SEEDS = torch.tensor([1, 2])


def small(config: LDMConfig | LookupConfig) -> Any:
    if isinstance(config, LDMConfig):
        return replace(config, width=32, blocks=1, z_channels=8, latent_channels=8, codebook_size=64)
    return replace(config, width=32, blocks=1)


@pytest.fixture(autouse=True)
def shrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every configuration with narrow levels, so that the public path runs on small files."""
    for module in (seed_voken, var):
        monkeypatch.setattr(module, "CONFIGS", {name: small(config) for name, config in module.CONFIGS.items()})
    monkeypatch.setattr(titok, "SIZES", {"S": (32, 1, 2), "B": (32, 1, 4), "L": (64, 1, 4)})
    monkeypatch.setattr(titok, "MASKGIT_WIDTHS", (32, 32, 64, 64, 64))
    tiny = {"encoder_width": 384, "decoder_width": 384, "encoder_depth": 1, "decoder_depth": 1}
    configs = {name: replace(config, **tiny) for name, config in flowmo.CONFIGS.items()}
    monkeypatch.setattr(flowmo, "CONFIGS", configs)
    monkeypatch.setattr(flowmo, "PATCH", 16)
    tiny = {"encoder_model": "vit_tiny_patch16_224", "decoder_model": "vit_tiny_patch16_224", "codebook_size": 16}
    soft = {name: replace(config, **tiny) for name, config in softvq.CONFIGS.items()}
    monkeypatch.setattr(softvq, "CONFIGS", soft)
    small_flextok = flextok.FlexTokConfig(1, 1)
    monkeypatch.setattr(flextok, "CONFIGS", dict.fromkeys(flextok.CONFIGS, small_flextok))
    monkeypatch.setattr(flextok, "VAE", SD | {"latent_channels": 16})
    monkeypatch.setattr(raev2, "CONFIGS", dict.fromkeys(raev2.CONFIGS, (0, 1)))
    monkeypatch.setattr(raev2, "ENCODER", ViTConfig(32, 2, 2, layer_scale=True))
    monkeypatch.setattr(raev2, "DECODER", {"width": 32, "depth": 1, "heads": 2, "hidden": 32})
    for constant, value in {"PATCH": 16, "WIDTH": 24, "DEPTH": 1, "HEADS": 2, "HIDDEN": 8}.items():
        monkeypatch.setattr(bsq_vit, constant, value)
    shallow = {name: replace(config, depth=2) for name, config in vitok.CONFIGS.items()}
    monkeypatch.setattr(vitok, "CONFIGS", shallow)
    monkeypatch.setattr(vitok, "SIZES", {"L": (32, 2), "T": (32, 4)})


def randomise(model: nn.Module) -> nn.Module:
    """Weights that make codes differ, which the classes' own beginnings hardly do."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape)
        if parameter.ndim == 1:
            parameter.data = 0.1 * noise + (not name.endswith("bias"))
        else:
            parameter.data = noise * (1.0 if "embedding" in name or "token" in name else parameter[0].numel() ** -0.5)
    return model.eval()


def voken(name: str, folder: Path) -> tuple[Any, str]:
    """Trained weights, which are not to be used, their moving average without dots, and the loss's networks."""
    config = seed_voken.CONFIGS[name]
    model = randomise(LookupFree(config) if isinstance(config, LookupConfig) else IndexBackpropagation(config))
    state = model.state_dict()
    trained = {key: torch.zeros_like(value) for key, value in state.items()}
    average = {f"model_ema.{key.replace('.', '')}": value for key, value in state.items()}
    rest = {"loss.discriminator.main.0.weight": torch.zeros(1), "model_ema.decay": torch.zeros(())}
    torch.save({"state_dict": trained | average | rest}, folder / "model.ckpt")
    return model, f"{name}:{folder / 'model.ckpt'}"


def multi_scale(name: str, folder: Path) -> tuple[Any, str]:
    model = randomise(MultiScale(var.CONFIGS[name]))
    state = dict(model.state_dict())
    held = {"quantize.ema_vocab_hit_SV": torch.zeros(10, 64)}
    for key, value in state.items():
        if ".attn" in key and ".q." in key:
            value = torch.cat([state[key.replace(".q.", f".{one}.")] for one in "qkv"])
        if ".k." not in key and ".v." not in key:
            key = key.replace("smoothings.", "quantize.quant_resi.qresi_ls.")
            held[key.replace(".q.", ".qkv.")] = value
    torch.save(held, folder / "vae.pth")
    return model, f"{name}:{folder / 'vae.pth'}"


def one_dimensional(name: str, folder: Path) -> tuple[Any, str]:
    model = randomise(TiTok(titok.CONFIGS[name]))
    held = dict(model.state_dict())
    held["latent_tokens"] = held.pop("encoder.latent_tokens")
    save_file(held, folder / "model.safetensors")
    return model, f"{name}:{folder / 'model.safetensors'}"


class Down(nn.Module):
    """Stands for a Cosmos encoder: continuous latents, or codes and what they stand for."""

    def __init__(self, factor: int, discrete: bool) -> None:
        super().__init__()
        self.conv, self.discrete = nn.Conv2d(3, 16, factor, stride=factor), discrete

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.conv(x)
        return (h[:, 0].mul(100).abs().int(), h) if self.discrete else (h, h)


class Up(nn.Module):
    def __init__(self, factor: int, discrete: bool) -> None:
        super().__init__()
        self.conv, self.discrete = nn.ConvTranspose2d(1 if discrete else 16, 3, factor, stride=factor), discrete

    def forward(self, z: Tensor) -> Tensor:
        return self.conv(z[:, None].to(self.conv.weight.dtype) / 100 if self.discrete else z)


@torch.no_grad()
def scripted(name: str, folder: Path) -> tuple[Any, str]:
    row = PUBLISHED[name]
    model, example = nn.Module(), torch.zeros(1, 3, 32, 32, dtype=torch.bfloat16)
    for side, build in (("encoder", Down), ("decoder", Up)):
        network = randomise(build(row.downsample, bool(row.codebook_size))).bfloat16()
        torch.jit.save(torch.jit.trace(network, example), folder / f"{side}.jit")
        example = network(example)[0]
        setattr(model, side, network)
    model.encode = lambda x: model.encoder(x.bfloat16())[:1]
    model.decode = lambda z: (model.decoder(z).float(),)
    return model, f"{name}:{folder}"


def from_noise(name: str, folder: Path) -> tuple[Any, str]:
    model: Any = randomise(FlowMo(flowmo.CONFIGS[name]))
    average = dict(model.state_dict())
    for one in ("mod", "attn", "mlp"):
        average = {key.replace(f".txt.{one}.", f".txt_{one}.").replace(f".img.{one}.", f".img_{one}."): value
                   for key, value in average.items()}  # fmt: skip
    trained = {key: torch.zeros_like(value) for key, value in average.items()}
    torch.save({"model_state_dict": trained, "model_ema_state_dict": average, "total_steps": 1}, folder / "flowmo.pth")
    noise = normal(SEEDS, (3, 256, 256), device="cpu")
    model.decode = lambda z: (model.sample(noise, z, 2),)
    return model, f"{name}:{folder / 'flowmo.pth'}@steps=2"


def soft(name: str, folder: Path) -> tuple[Any, str]:
    config = softvq.CONFIGS[name]
    model = randomise(SoftVQ(config))
    rest = {"encoder.mask_token": torch.zeros(1), "quantize.codebook_used": torch.zeros(4, 16)}
    rest |= {"encoder.freqs_t_x": torch.zeros(1), "projection.0.weight": torch.zeros(1)}
    save_file(dict(model.state_dict()) | rest, folder / "model.safetensors")
    stated = asdict(config) | {"num_codebooks": config.num_codebooks or 1, "vq_mean": 0.0}
    (folder / "config.json").write_text(json.dumps(stated))
    return model, f"{name}:{folder / 'model.safetensors'}"


def in_two_files(name: str, folder: Path) -> tuple[Any, str]:
    model = randomise(ViTok(vitok.CONFIGS[name]))
    for side in ("encoder", "decoder"):
        save_file(getattr(model, side).state_dict(), folder / f"{side}.safetensors")
    return model, f"{name}:{folder}"


def binary(name: str, folder: Path) -> tuple[Any, str]:
    model = randomise(BSQViT(bsq_vit.CONFIGS[name]))
    average = {f"module.module.{key}": value for key, value in model.state_dict().items()}
    tables = {"module.module.quantize.basis": torch.zeros(1), "n_averaged": torch.zeros(())}
    trained = {f"module.{key}": torch.zeros_like(value) for key, value in model.state_dict().items()}
    torch.save({"state_dict": trained, "ema_state_dict": average | tables}, folder / "bsq.pt")
    return model, f"{name}:{folder / 'bsq.pt'}"


def with_text_side(name: str, folder: Path) -> tuple[Any, str]:
    sizes = {"vision_embed_dim": 32, "vision_depth": 1, "vision_num_heads": 2, "vision_init_values": 1e-5}
    sizes |= {"decoder_embed_dim": 48, "decoder_depth": 2, "decoder_num_heads": 2, "decoder_use_qk_norm": True}
    model = randomise(VTP(DEFAULTS | sizes))
    held = {f"trunk.{key}": value for key, value in model.encoder.state_dict().items()}
    held |= {f"pixel_decoder.{key}": value for key, value in model.decoder.state_dict().items()}
    rest = {"trunk.mask_token": torch.zeros(1, 32), "visual_proj.weight": torch.zeros(1), "logit_scale": torch.ones(1)}
    save_file(held | rest, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(sizes | {"model_type": "vtp"}))
    return model, f"{name}:{folder}"


def with_frozen_encoder(name: str, folder: Path) -> tuple[Any, str]:
    model: Any = randomise(RAEv2(raev2.CONFIGS[name]))
    held = dict(model.encoder.state_dict())
    for key in [key for key in held if key.endswith("qkv.bias")]:
        mask = torch.ones(3, 32)
        mask[1] = 0
        held[f"{key}_mask"] = mask.flatten()
        model.encoder.get_parameter(key).data *= mask.flatten()
    held |= {"mask_token": torch.zeros(1), "norm.weight": torch.zeros(1), "norm.bias": torch.zeros(1)}
    path, place = folder / PUBLISHED[name].file, folder / PUBLISHED[name].subfolder
    path.parent.mkdir(parents=True)
    torch.save(held, path)
    names = {"to_q": "attention.query", "to_k": "attention.key", "to_v": "attention.value", "to_out.0": "output.dense"}
    place.mkdir(parents=True)
    held = {re.sub("|".join(names), lambda found: names[found[0]], key): value
            for key, value in model.decoder.state_dict().items()}  # fmt: skip
    torch.save(held, place / "decoder.pt")
    mean, variance = torch.randn(32, 16, 16), torch.rand(32, 16, 16) + 0.5
    torch.save({"mean": mean, "var": variance}, place / "stats.pt")
    encode, decode = model.encode, model.decode
    model.encode = lambda x: ((encode(x)[0] - mean) / (variance + 1e-5).sqrt(),)
    model.decode = lambda z: decode(z * (variance + 1e-5).sqrt() + mean)
    return model, f"{name}:{folder}"


def of_parts(name: str, folder: Path) -> tuple[Any, str]:
    """A config.json that lists the parts, which may differ from what the class takes by default."""
    config = replace(flextok.CONFIGS[name], kinds=1, last_time=1.0, scale=0.5)
    model: Any = randomise(FlexTok(config))
    places = {"encoder": {"tokens": "encoder", "vae": "vae.vae.encoder", "quant": "vae.vae.quant_conv"},
              "decoder": {"flow": "decoder", "vae": "vae.vae.decoder", "quant": "vae.vae.post_quant_conv"}}  # fmt: skip
    held = {}
    for side, names in places.items():
        for key, value in getattr(model, side).state_dict().items():
            first, _, rest = key.partition(".")
            held[f"{names[first]}.{rest}"] = value
    save_file(held | {"decoder.module_dict.dec_nested_dropout.dropout_mask_token": torch.zeros(1)},
              folder / "model.safetensors")  # fmt: skip
    stated = {
        "encoder": {"module_dict": {"enc_transformer": {"depth": 1}}},
        "decoder": {"module_dict": {
            "dec_transformer": {"depth": 1, "adaLN_expansion": 1}, "dec_latent_dropout": {},
            "dec_to_patches": {"adaLN_emb_read_key": "time"}, "dec_time_embedder": {"max_timestep": 1.0}}},
        "vae": {"scaling_factor": 0.5},
        "regularizer": {"levels": flextok.LEVELS},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(stated))
    noise = normal(SEEDS, (16, 32, 32), device="cpu")
    model.decode = lambda z: (model.sample(noise, z, 2),)
    return model, f"{name}:{folder}@steps=2"


SAVED: dict[str, Callable[[str, Path], tuple[Any, str]]] = {
    "seed_voken": voken, "var": multi_scale, "titok": one_dimensional, "cosmos": scripted,
    "flowmo": from_noise, "softvq": soft, "vitok": in_two_files, "bsq_vit": binary,
    "vtp": with_text_side, "raev2": with_frozen_encoder, "flextok": of_parts,
}  # fmt: skip
# A row for each way that a network is built; the others differ in numbers that the table states.
NAMES = [
    *(
        "open-magvit2-f8",
        "ibq-f16-1024",
        "wetok-f32-general",
        "var-f16",
        "titok-l32",
        "titok-bl64-vq",
        "titok-ll32-vae",
    ),
    *("cosmos-ci8x8", "cosmos-di16x16", "flowmo-lo", "softvq-b-32", "maetok-b-128", "vitok-v2-350m-f16c32"),
    *("vitok-v2-5b-f32c64", "bsq-vit-18bit", "vtp-s", "raev2-k7", "flextok-d12-d12"),
]


def images(name: str) -> Tensor:
    side = PUBLISHED[name].resolution or 64
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(2, 3, 8, 8, generator=generator)
    return (nn.functional.interpolate(coarse, size=(side, side), mode="bilinear").clamp(0, 1) * 255).byte()


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # torch calls TorchScript old; only the test writes it
@pytest.mark.parametrize("name", NAMES)
def test_a_row_loads_from_its_published_layout_and_keeps_the_contract(name: str, tmp_path: Path) -> None:
    row, pixels = PUBLISHED[name], images(name)
    model, spec = SAVED[row.kind](name, tmp_path)
    tokenizer: Any = create(spec)
    latents, decoded = both_ways(tokenizer, pixels, SEEDS)
    with torch.no_grad():
        raw = model.encode(pixels.float() / 127.5 - 1)[0]
        raw = getattr(raw, "mean", raw) if not isinstance(raw, Tensor) else raw
        torch.testing.assert_close(latents, raw.to(latents.dtype), rtol=1e-4, atol=1e-5)
        near = 1e-3 * decoded.abs().max().item()  # what kernels for other batches differ by, in random networks
        torch.testing.assert_close(decoded, model.decode(raw)[0], rtol=0, atol=near)
    assert decoded.shape == pixels.shape
    assert decoded.dtype == torch.float32
    assert not tokenizer.info.verified
    if row.tokens_per_image:
        assert latents[0].numel() == row.tokens_per_image * (row.channels or 1)
        assert tokenizer.info.tokens_per_image == row.tokens_per_image
    elif row.kind != "bsq_vit":  # its patches are larger here
        assert latents.shape[-2:] == (pixels.shape[2] // row.downsample, pixels.shape[3] // row.downsample)
    if row.codebook_size:
        assert latents.dtype == torch.int64
        assert latents.unique().numel() > 1
        assert 0 <= latents.min() <= latents.max() < row.codebook_size
        bits = latents[0].numel() * math.log2(row.codebook_size)
        assert tokenizer.bits(latents).tolist() == pytest.approx([bits] * 2)
    alone = both_ways(tokenizer, pixels[1:], SEEDS[1:])
    assert (alone[0] == latents[1:]).double().mean() > 0.97 or not row.codebook_size
    if torch.equal(alone[0], latents[1:]):
        torch.testing.assert_close(alone[1], decoded[1:], rtol=0, atol=near)
    assert torch.equal(both_ways(tokenizer, pixels, SEEDS)[1], decoded)
    assert torch.equal(both_ways(tokenizer, pixels, SEEDS + 1)[1], decoded) == tokenizer.info.deterministic


def test_every_row_has_a_configuration_that_agrees_with_the_table() -> None:
    kinds = {row.kind for row in PUBLISHED.values() if row.kind.islower()}
    assert kinds == {*SAVED, "ldm", "taesd", "capacitor"}
    assert kinds - {"taesd", "ldm", "capacitor"} == {PUBLISHED[name].kind for name in NAMES}
    for row in PUBLISHED.values():
        module: Any = import_module(f"baselines.families.{row.kind}") if row.kind in kinds else None
        if not hasattr(module, "CONFIGS"):  # diffusers' classes, and what states its sizes in its files
            continue
        config = module.CONFIGS[row.name]
        for column, field in (("tokens_per_image", "tokens"), ("tokens_per_image", "num_latent_tokens"),
                              ("channels", "codebook_embed_dim"), ("resolution", "image_size")):  # fmt: skip
            if hasattr(config, field):
                assert getattr(row, column) == getattr(config, field), row.name
        if hasattr(config, "bits"):
            assert row.codebook_size == 2**config.bits, row.name


def test_a_decoder_alone_takes_flux2s_normalised_latents_and_has_no_encoder(tmp_path: Path) -> None:
    sizes = {"model_dim": 24, "decoder_depth": 3, "decoder_start_blocks": 1, "decoder_end_blocks": 1}
    sizes |= {"adaln_low_rank_rank": 4, "mlp_ratio": 2.0}
    network = randomise(capacitor.Decoder(capacitor.DEFAULTS | sizes))
    held = {f"decoder.{key}": value for key, value in network.state_dict().items()}
    save_file(held | {"decoder.path_drop_mask_feature": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    tokenizer: Any = create(f"capacitor-decoder:{tmp_path}@steps=2")
    latents = torch.randn(2, 128, 4, 4)
    decoded = tokenizer.decode(latents, seeds=SEEDS, size=(64, 64))
    with torch.no_grad():  # DDIM by hand: to the middle, where signal and noise are alike, and to the end
        x = normal(SEEDS, (3, 64, 64), device="cpu") * 0.558 * math.cos(math.atan(math.exp(-5)))
        for t, angle, following in ((1.0, math.pi / 2 - math.atan(math.exp(-5)), math.pi / 4),
                                    (0.5, math.pi / 4, math.atan(math.exp(-5)))):  # fmt: skip
            image = network(x, torch.full((2,), t), latents)
            x = math.cos(following) * image + math.sin(following) * (x - math.cos(angle) * image) / math.sin(angle)
    torch.testing.assert_close(decoded, x, rtol=1e-4, atol=1e-4)
    assert (tokenizer.info.decode_steps, tokenizer.info.deterministic) == (2, False)
    with pytest.raises(CellError, match=r"a decoder alone; write flux2-vae\+ before it"):
        tokenizer.encode(images("capacitor-decoder"), sample=False, seeds=SEEDS)
    shared = create(f"taef2+capacitor-decoder:{tmp_path}", random_weights=True)
    assert both_ways(shared, images("capacitor-decoder"), SEEDS)[1].shape == (2, 3, 64, 64)


ONE_EACH = {PUBLISHED[name].kind: name for name in NAMES}


@pytest.mark.parametrize(
    "kind", sorted(ONE_EACH.keys() - {"cosmos", "vitok", "vtp", "raev2", "flextok"})
)  # of one file
def test_every_reader_takes_the_average_of_a_file_with_two_sets_and_says_so(kind: str, tmp_path: Path) -> None:
    name = ONE_EACH[kind]
    spec = SAVED[kind](name, tmp_path)[1].partition("@")[0]
    (file,) = (one for one in tmp_path.iterdir() if one.suffix != ".json")
    tensors, _ = read_tensors(file, name)
    torch.save({"model": {key: one * 0 for key, one in tensors.items()}, "ema": tensors}, tmp_path / "two.pt")
    several = create(f"{name}:{tmp_path / 'two.pt'}")
    assert "weights ema of a file that also holds model (@weights=model)" in several.info.note
    alone, trained = create(spec), create(f"{name}:{tmp_path / 'two.pt'}@weights=model")
    assert hash_state(several) == hash_state(alone) != hash_state(trained)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(
    "name", ["open-magvit2-f16", "ibq-f16-1024", "wetok-f8", "var-f16", "titok-l32", "titok-bl64-vq", "cosmos-di8x8",
             "flowmo-lo", "flextok-d12-d12", "bsq-vit-18bit", "vq-f8", "llamagen-vq16", "vq-f4"]
)  # fmt: skip
def test_nan_before_the_codes_of_any_family_fails_and_names_the_images(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row, pixels = PUBLISHED[name], images(name)
    if row.kind in SAVED:
        tokenizer = create(SAVED[row.kind](name, tmp_path)[1])
    elif row.kind == "ldm":
        monkeypatch.setattr(ldm, "CONFIGS", {name: small(ldm.CONFIGS[name])})
        tokenizer = create(name, random_weights=True)
    else:
        tokenizer = create(str(save("VQModel", CLASSES["VQModel"][0], tmp_path)))

    def spoilt(images: Tensor) -> Tensor:
        return to_float(images).index_fill(0, torch.tensor([1]), float("nan"))

    batch = ["good", "bad"], pixels, SEEDS[:, None]
    measured = Measurement(resolution=64)
    reconstruct(tokenizer, batch, measured.rules, torch.float32, Timer(torch.device("cpu")))
    monkeypatch.setattr(pretrained, "to_float", spoilt)
    with pytest.raises(CellError, match=r"NaN or infinity in the encoder's output, before its quantiser of bad$"):
        reconstruct(tokenizer, batch, measured.rules, torch.float32, Timer(torch.device("cpu")))


@pytest.mark.parametrize("name", ["titok-l32", "var-f16"])
def test_another_resolution_is_refused_with_the_one_it_takes(name: str, tmp_path: Path) -> None:
    tokenizer = create(SAVED[PUBLISHED[name].kind](name, tmp_path)[1])
    with pytest.raises(CellError, match=f"{name}.*: works at 256 px only, not at 64 x 64"):
        both_ways(tokenizer, torch.zeros(2, 3, 64, 64, dtype=torch.uint8), SEEDS)


def test_signs_become_bits_and_bits_signs() -> None:
    model = LookupFree(LookupConfig((1, 1), bits=5, groups=2, width=32, blocks=1))
    seen: list[Tensor] = []
    model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    codes = torch.randint(0, 32, (2, 2, 3, 3))
    model.decode(codes)
    assert set(seen[0].unique().tolist()) == {-1.0, 1.0}
    model.encoder.forward = lambda x: seen[0]  # type: ignore[method-assign]
    assert torch.equal(model.encode(torch.zeros(1))[0], codes)


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.undo()
    with torch.device("meta"):
        yield


def test_the_published_sizes_are_those_of_the_papers(whole: None) -> None:
    """Millions of parameters as the papers give them, rounded or cut."""
    models = {
        "titok-l32": (TiTok(titok.CONFIGS["titok-l32"]), 641),
        "titok-b64": (TiTok(titok.CONFIGS["titok-b64"]), 204),
        "titok-s128": (TiTok(titok.CONFIGS["titok-s128"]), 83),
        "var-f16": (MultiScale(var.CONFIGS["var-f16"]), 109),
        "vitok-v2-350m-f16c64": (ViTok(vitok.CONFIGS["vitok-v2-350m-f16c64"]), 354),
    }
    for name, (model, expected) in models.items():
        assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(expected, abs=1), name


def test_parameters_are_counted_as_the_table_has_them(whole: None) -> None:
    """Of a row of each kind."""
    for row in {row.kind: row for row in PUBLISHED.values() if row.params}.values():
        networks = create(row.name, random_weights=True).networks.values()
        count = sum(parameter.numel() for network in networks for parameter in network.parameters())
        assert count / 1e6 == pytest.approx(row.params, abs=0.05), row.name


@pytest.mark.parametrize("fault", ["text", "missing"])
def test_a_file_that_is_no_torchscript_costs_its_row_with_one_line(fault: str, tmp_path: Path) -> None:
    if fault == "text":
        (tmp_path / "encoder.jit").write_text("no archive")
    with pytest.raises(CellError, match=r"cosmos-ci8x8: .*encoder.jit is no TorchScript file"):
        create(f"cosmos-ci8x8:{tmp_path}")


def test_cosmos_has_no_random_weights() -> None:
    with pytest.raises(CellError, match="its network is in its files only"):
        create("cosmos-di8x8", random_weights=True)


def test_flowmo_counts_its_evaluations_with_those_of_guidance() -> None:
    assert create("flowmo-lo", random_weights=True).info.decode_steps == PUBLISHED["flowmo-lo"].decode_steps == 31
    assert create("flowmo-lo@steps=1", random_weights=True).info.decode_steps == 1
    with pytest.raises(InputError, match="steps must be at least 1"):
        create("flowmo-lo@steps=0", random_weights=True)
