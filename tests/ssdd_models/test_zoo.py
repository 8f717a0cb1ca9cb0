"""SSDD checkpoints: released files, our own, what does not fit, and the specs that name them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ssdd_models.encoder import EncoderConfig
from ssdd_models.ssdd import SSDD, SSDDConfig
from ssdd_models.tokenizer import SSDDTokenizer
from ssdd_models.uvit import SIZES, DecoderConfig
from tests.reference import full_shapes
from tokbench.checkpoints import read_header
from tokbench.errors import CellError, InputError
from tokbench.registry import create
from tokbench.runtime.device import hash_state
from tokbench.runtime.seeding import image_seeds

ENCODER, DECODER = EncoderConfig(8, 4, 32), DecoderConfig((32, 32, 32, 32), 2, 2)
IMAGES = torch.randint(0, 256, (2, 3, 32, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
SEEDS = image_seeds(IMAGES, 0)


def saved(path: Path, info: dict[str, Any] | None = None, **options: Any) -> SSDD:
    torch.manual_seed(0)
    model = SSDD(**{"encoder": ENCODER, "decoder": DECODER, **options}).eval()
    model.save_pretrained(path, info=info)
    return model


def through(tokenizer: Any) -> torch.Tensor:
    with torch.inference_mode():
        latents = tokenizer.encode(IMAGES, sample=False, seeds=SEEDS)
        return tokenizer.decode(latents, seeds=SEEDS, size=(32, 40))


def test_save_and_load_keep_weights_and_configuration(tmp_path: Path) -> None:
    model = saved(tmp_path / "a.safetensors", {"note": "n"}, z_mean=(1, 2, 3, 4), z_std=2.0, steps=1, time_shift=4.0)
    loaded = SSDD.from_pretrained(tmp_path / "a.safetensors")
    assert loaded.config == model.config
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert read_header(tmp_path / "a.safetensors")[1]["info"] == {"note": "n"}
    model.half().save_pretrained(tmp_path / "folder")
    assert SSDD.from_pretrained(tmp_path / "folder").decoder.conv_in.weight.dtype == torch.float32
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["model.safetensors"]


def test_a_repositorys_name_is_fetched_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = saved(tmp_path / "a.safetensors")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *given, **_: str(tmp_path / "a.safetensors"))
    assert SSDD.from_pretrained("me/ssdd").config == model.config


def test_a_released_file_is_read_by_its_shapes_alone(tmp_path: Path) -> None:
    shapes = full_shapes("f8c4", "XS")
    save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, tmp_path / "any_name.safetensors")
    for spec in (f"ssdd:{tmp_path}/any_name.safetensors", f"{tmp_path}/any_name.safetensors"):
        tokenizer = create(spec)
        assert tokenizer.info.decode_steps == 8
        assert (tokenizer.info.downsample, tokenizer.info.channels, tokenizer.info.size_multiple) == (8, 4, 8)
    assert SSDD.from_pretrained(tmp_path / "any_name.safetensors").config == SSDDConfig(EncoderConfig(), SIZES["XS"])


@pytest.mark.parametrize(("size", "expected"), [("B", 268_991_676), ("L", 547_508_988)])
def test_the_bytes_of_released_files_follow_from_our_keys_and_shapes(size: str, expected: int) -> None:
    with torch.device("meta"):
        state = SSDD("f16c16", size).state_dict()
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key in sorted(state):
        end = offset + 4 * state[key].numel()
        header[key] = {"dtype": "F32", "shape": list(state[key].shape), "data_offsets": [offset, end]}
        offset = end
    length = len(json.dumps(header, separators=(",", ":")))
    assert 8 + -(-length // 8) * 8 + offset == expected


def test_a_file_that_does_not_fit_lists_missing_and_unexpected_keys(tmp_path: Path) -> None:
    model = saved(tmp_path / "a.safetensors")
    state = {k: v.contiguous() for k, v in model.state_dict().items() if "conv_norm_out" not in k}
    state["decoder.extra.weight"] = torch.zeros(1)
    state["decoder.conv_out.bias"] = torch.zeros(4)
    save_file(state, tmp_path / "b.safetensors")
    with pytest.raises(InputError, match="not the tensors of this model") as caught:
        SSDD.from_pretrained(tmp_path / "b.safetensors")
    for part in (
        "2 missing: decoder.conv_norm_out.bias, decoder.conv_norm_out.weight",
        "1 unexpected: decoder.extra.weight",
        r"1 of another shape: decoder.conv_out.bias (4,), not (3,)",
    ):
        assert part in str(caught.value)
    with pytest.raises(InputError, match="2 missing"):
        create(f"ssdd:{tmp_path}/b.safetensors")


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("no")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "dit.safetensors", metadata={"tokbench": '{"model": "dit"}'})
    for name, reason in (("text", "not a readable"), ("other", "not an SSDD checkpoint"), ("dit", "holds dit")):
        with pytest.raises((CellError, InputError), match=reason):
            create(f"ssdd:{tmp_path}/{name}.safetensors")
    with pytest.raises(InputError, match="no such file"):
        create("ssdd:nowhere.safetensors")
    with pytest.raises(FileNotFoundError):
        SSDD.from_pretrained(tmp_path / "nowhere.safetensors")


def test_options_of_a_spec_and_of_a_file(tmp_path: Path) -> None:
    saved(tmp_path / "a.safetensors", {"losses": ["lpips-vgg"], "licence": "Apache-2.0", "note": "demo"}, steps=1)
    spec = f"ssdd:{tmp_path}/a.safetensors"
    assert create(spec).info.decode_steps == 1
    assert create(spec).info.losses == ("lpips-vgg",)
    assert create(f"{spec}@steps=3").info.decode_steps == 3
    assert not torch.equal(through(create(f"{spec}@steps=3")), through(create(f"{spec}@steps=3@time_shift=1.0")))
    for wrong, reason in (("@steps=0", "positive"), ("@steps=x", "expected int"), ("@stps=1", "unknown option")):
        with pytest.raises(InputError, match=reason):
            create(spec + wrong)
    assert create(f"{spec}@random_weights=true").info.note.startswith("random weights")


def test_each_image_has_its_own_noise_and_the_state_is_hashed(tmp_path: Path) -> None:
    saved(tmp_path / "a.safetensors", steps=1)
    tokenizer = create(f"ssdd:{tmp_path}/a.safetensors")
    assert hash_state(tokenizer) is not None
    both = through(tokenizer)
    with torch.inference_mode():
        latents = tokenizer.encode(IMAGES, sample=False, seeds=SEEDS)
        second = tokenizer.decode(latents[1:], seeds=SEEDS[1:], size=(32, 40))
        drawn = tokenizer.encode(IMAGES, sample=True, seeds=SEEDS)
    torch.testing.assert_close(both[1:], second, rtol=0, atol=1e-5)
    assert not torch.equal(latents, drawn)
    assert both.shape == IMAGES.shape
    assert both.dtype == torch.float32


def test_latents_travel_normalised(tmp_path: Path) -> None:
    plain = saved(tmp_path / "a.safetensors")
    scaled = saved(tmp_path / "b.safetensors", z_mean=1.0, z_std=2.0)
    one, other = (SSDDTokenizer(model).encode(IMAGES, sample=False, seeds=SEEDS) for model in (plain, scaled))
    torch.testing.assert_close(other, (one - 1) / 2)


def test_a_decoder_alone_reads_the_latents_of_sd_vae(tmp_path: Path) -> None:
    model = saved(tmp_path / "a.safetensors", external_encoder=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "b.safetensors")
    for name in ("a", "b"):
        tokenizer = create(f"ssdd:{tmp_path}/{name}.safetensors@steps=1")
        assert tokenizer.info.latent_space == "sd"
        with pytest.raises(CellError, match=r"only a decoder; write sd-vae-ft-mse\+"):
            tokenizer.encode(IMAGES, sample=False, seeds=SEEDS)
    z = torch.randn(2, 4, 4, 5)
    travelling = tokenizer.decode(z * 0.18215, seeds=SEEDS, size=(32, 40))
    unscaled = SSDDTokenizer(saved(tmp_path / "c.safetensors", steps=1)).decode(z, seeds=SEEDS, size=(32, 40))
    assert unscaled.shape == travelling.shape
    torch.testing.assert_close(travelling, _decoded(model, z), rtol=0, atol=1e-5)


def _decoded(model: SSDD, z: torch.Tensor) -> torch.Tensor:
    from tokbench.runtime.seeding import normal

    return model.decode(z, 1, normal(SEEDS ^ 0x55D0, (3, 32, 40), device="cpu"))


def test_released_weights_are_found_in_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot(repository: str, *, allow_patterns: list[str], local_files_only: bool) -> str:
        asked.append((repository, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    saved(tmp_path / "F8C4" / "SSDD_M_256.safetensors")
    info = create("ssdd-m-f8c4").info
    assert (info.licence, info.latent_space, info.decode_steps) == ("CC-BY-NC 4.0", "ssdd-f8c4", 8)
    assert asked == [("facebook/SSDD", ["F8C4/*_M_256*"])]
    with pytest.raises(CellError, match="no file"):
        create("ssdd-xl-f8c4")
    for spec in ("ssdd-m-f8c5", "ssdd-h-f8c4", "ssdd-xl-sdvae"):
        with pytest.raises(InputError, match="not among the released weights"):
            create(spec)


def test_random_weights_exist_in_any_size() -> None:
    tokenizer = create("ssdd-xs-f4c3@random_weights=true@steps=1")
    assert through(tokenizer).shape == IMAGES.shape
    assert create("ssdd-xs-sdvae", random_weights=True).info.latent_space == "sd"
    with pytest.raises(InputError, match="decoder size 'XXL'"):
        create("ssdd-xxl-f8c4", random_weights=True)


def test_the_command_line_decodes_with_a_file(tmp_path: Path, photographs: Path, tokbench: Callable[..., Any]) -> None:
    saved(tmp_path / "a.safetensors", steps=1)
    ran = tokbench(
        "run", "--models", f"mine=ssdd:{tmp_path}/a.safetensors", "--res", 32, "--data", photographs,
        "--metrics", "psnr", "--limit", 2, "--out", tmp_path / "runs", "--device", "cpu",
    )  # fmt: skip
    assert ran.status == 0, ran.err
    assert "mine" in ran.out


@pytest.mark.parametrize(("latent", "shape"), [("", (4, 8, 8)), ("-f16c16", (16, 4, 4))])
def test_both_demo_decoders_of_a_latent_take_the_latents_of_one_encoder(latent: str, shape: tuple[int, ...]) -> None:
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seeds = torch.zeros(1, dtype=torch.int64)
    klvae, ssdd = create(f"klvae{latent}"), create(f"ssdd{latent}")
    encoded = [model.encode(images, sample=False, seeds=seeds) for model in (klvae, ssdd)]
    assert encoded[0].shape[1:] == shape
    assert torch.equal(*encoded)
    joined = create(f"klvae{latent}+ssdd{latent}")
    decoded = joined.decode(encoded[0], seeds=seeds, size=(64, 64))
    assert torch.equal(decoded, ssdd.decode(encoded[0], seeds=seeds, size=(64, 64)))


def test_demo_models_of_two_latents_do_not_join() -> None:
    with pytest.raises(InputError, match="latents differ"):
        create("klvae+ssdd-f16c16")
