"""TAEF2 and TAESANA: held against diffusers' AutoencoderTiny, and against what their author's code gives."""

from pathlib import Path
from typing import Any

import pytest
import torch

from baselines.families.taesd import CONFIGS, FILES, TAESD
from baselines.published import VERIFIED
from tests import ROOT
from tests.baselines.test_pretrained import KL, both_ways
from tokbench.errors import CellError
from tokbench.evaluation.evaluate import evaluate
from tokbench.registry import create
from tokbench.weights.files import file_sha256

diffusers = pytest.importorskip("diffusers", reason="a machine may have torch and no diffusers")

SHARED = ROOT.resolve().parent / "shared" / "published" / "taef2"
IMAGES = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def saved(name: str, folder: Path) -> tuple[TAESD, str]:
    """A model with random weights, and the spec of its two half-precision files."""
    torch.manual_seed(0)
    model = TAESD(CONFIGS[name]).half().float().eval()
    for side in ("encoder", "decoder"):
        tensors = {key: value.half() for key, value in getattr(model, side).state_dict().items()}
        torch.save(tensors, folder / f"{name}_{side}.pth")
    return model, f"{name}:{folder}"


@torch.no_grad()
def test_without_its_global_branch_taef2_is_the_tiny_autoencoder_of_diffusers(tmp_path: Path) -> None:
    model, _ = saved("taef2", tmp_path)
    for key, value in model.named_parameters():
        if ".pool.3." in key:
            value.zero_()
    other = diffusers.AutoencoderTiny(latent_channels=32).eval()
    state = {f"encoder.layers.{key}": value for key, value in model.encoder.state_dict().items()}
    for key, value in model.decoder.state_dict().items():  # there the bound of latents is no layer
        number, _, rest = key.partition(".")
        state[f"decoder.layers.{int(number) - 1}.{rest}"] = value
    other.load_state_dict({key: value for key, value in state.items() if ".pool." not in key})
    x = IMAGES.float() / 127.5 - 1
    z = other.encode(x).latents
    torch.testing.assert_close(model.encode(x)[0], torch.nn.functional.pixel_unshuffle(z, 2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.decode(model.encode(x)[0])[0], other.decode(z).sample, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "side"), [("taef2", 16), ("taesana", 32)])
def test_a_row_loads_from_its_two_files_and_keeps_the_contract(name: str, side: int, tmp_path: Path) -> None:
    model, spec = saved(name, tmp_path)
    tokenizer = create(spec)
    latents, decoded = both_ways(tokenizer, IMAGES)
    assert latents.shape == (3, tokenizer.info.channels, 64 // side, 64 // side)
    with torch.no_grad():
        torch.testing.assert_close(latents, model.encode(IMAGES.float() / 127.5 - 1)[0])
        torch.testing.assert_close(decoded, model.decode(latents)[0])
    again = both_ways(tokenizer, IMAGES[1:2], torch.tensor([1]))
    torch.testing.assert_close(again[1], decoded[1:2], rtol=1e-3, atol=1e-4)


def test_taef2_decodes_the_normalised_latents_of_flux2(tmp_path: Path) -> None:
    small = KL | {"latent_channels": 32, "block_out_channels": (8, 8, 8, 16)}
    small |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    flux = diffusers.AutoencoderKLFlux2(**small)
    flux.bn.running_mean.uniform_(-1, 1)
    flux.save_pretrained(tmp_path / "flux2")
    _, taef2 = saved("taef2", tmp_path)
    big = f"flux2-vae:{tmp_path / 'flux2'}"
    latents, decoded = both_ways(create(f"{big}+{taef2}"), IMAGES)
    assert torch.equal(latents, both_ways(create(big), IMAGES)[0])
    assert torch.equal(decoded, create(taef2).decode(latents, seeds=torch.zeros(3), size=(64, 64)))


@pytest.mark.parametrize(("fault", "said"), [("gone", "damaged or half downloaded"), ("keys", "unexpected: 0.bias")])
def test_a_bad_file_costs_its_row_with_one_line(fault: str, said: str, tmp_path: Path) -> None:
    _, spec = saved("taef2", tmp_path)
    if fault == "gone":
        (tmp_path / "taef2_decoder.pth").unlink()
    else:
        (tmp_path / "taef2_decoder.pth").write_bytes((tmp_path / "taef2_encoder.pth").read_bytes())
    with pytest.raises(CellError, match=said):
        create(spec)


def test_without_its_files_a_row_says_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKBENCH_OFFLINE", "1")
    with pytest.raises(CellError, match=r"download https://.*taef2_encoder.pth and write taef2:FOLDER"):
        create("taef2")
    with pytest.raises(CellError, match=r"download FOLDER \(two files, .* and write taesana:FOLDER"):
        create("taesana")


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="the published files of TAEF2 are not here")
def test_the_published_taef2_gives_what_its_authors_code_gives() -> None:
    """Measured with github.com/madebyollin/taesd's own network in tokbench's harness: 26.70 dB, SSIM 0.858."""
    result: Any = evaluate(create(f"taef2:{SHARED}"), "samples", 256, ("psnr", "ssim"))
    assert result.metrics["psnr"].value == pytest.approx(26.70, abs=0.005)
    assert result.metrics["ssim"].value == pytest.approx(0.858, abs=0.0005)
    assert result.tokenizer.verified
    assert result.tokenizer.weights == VERIFIED["taef2"]["weights"]
    assert {name: file_sha256(SHARED / name) for name in FILES} == FILES
