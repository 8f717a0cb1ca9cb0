"""Names, specs and options of tokenizers."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import TINY
from tokbench import registry
from tokbench.errors import CellError, InputError
from tokbench.registry import Entry, create, describe_model, parse, parse_all, row_name


def factory(
    quality: int,
    scale: float = 1.0,
    exact: bool = False,
    file: Path | None = None,
    mode: Literal["a", "b"] = "a",
    random_weights: bool = False,
) -> dict[str, object]:
    return {"quality": quality}


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Entry("toy-q{quality}", factory, "for tests")
    monkeypatch.setattr(registry.TOKENIZERS, "_known", {**registry.TOKENIZERS.all(), entry.name: entry})


def test_options_get_the_types_that_the_factory_declares() -> None:
    options = parse("toy-q7@scale=0.5@exact=true@mode=b@file=none").parts[0].options
    assert options == {"quality": 7, "scale": 0.5, "exact": True, "mode": "b", "file": None}


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("jpg-q50", "did you mean jpeg-q{quality}"),
        ("toy-q7@scal=2", "did you mean scale"),
        ("toy-q7.5", "option quality=7.5: expected int"),
        ("toy-q7@exact=yes", "expected true or false"),
        ("toy-q7@mode=c", "expected one of a, b"),
        ("toy-q7@scale=1@scale=2", "given twice"),
        ("toy-q7@quality=8", "given twice"),
        ("toy-q7@file=/nowhere/x.bin", "no such file"),
        ("Row A=identity", "may hold only"),
        ("identity+identity+identity", "exactly two"),
        ("identity:file.bin", "takes no file"),
        ("/nowhere/model.safetensors", "no such file or folder"),
        ("a=", "empty"),
        ("nowhere.py:make", "no such file: nowhere.py"),
        (TINY.replace(":tiny", ":huge"), 'no function "huge"'),
    ],
)
def test_a_wrong_spec_is_refused_with_the_reason(spec: str, said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        parse(spec)


@pytest.mark.parametrize(
    ("spec", "row"),
    [("JPEG-q50", "jpeg-q50"), ("toy-q7@scale=2", "toy-q7-scale-2"), ("mine=toy-q7@scale=2", "mine"),
     ("identity+bicubic-f8", "identity-bicubic-f8"), (TINY, "tiny"), (f"{TINY}@bias=0.1", "tiny-bias-0.1")],
)  # fmt: skip
def test_a_row_is_named_by_its_alias_or_by_its_spec(spec: str, row: str) -> None:
    assert row_name(spec) == row


PLACES = ["my_model.py:load", "./my_model.py:load", "../{folder}/my_model.py:load", "{here}/my_model.py:load"]


@pytest.mark.parametrize("place", PLACES)
def test_no_name_comes_from_a_path(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(TINY.partition(":")[0], tmp_path / "my_model.py")
    with (tmp_path / "my_model.py").open("a") as file:
        file.write("\n\ndef load(bias=0.5):\n    return tiny(bias=bias)\n")
    spec = place.format(folder=tmp_path.name, here=tmp_path)
    assert (row_name(spec), create(spec).info.name) == ("load", "tiny")  # what the model calls itself
    assert create(f"{spec}@bias=1").info.name == "tiny-bias-1"
    assert create(f"own={spec}").info.name == "own"


@pytest.mark.parametrize(
    ("spec", "row"),
    [("runs/big/", "big"), ("runs/big/model.safetensors", "big"), ("./vae.safetensors", "vae"),
     ("toy:runs/big/model.safetensors", "toy-big"), ("toy:nowhere/x", "toy-nowhere-x")],
)  # fmt: skip
def test_files_and_folders_are_called_by_their_own_name(
    spec: str, row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "big").mkdir(parents=True)
    for path in ("runs/big/model.safetensors", "vae.safetensors"):
        (tmp_path / path).write_bytes(b"")
    opener = Entry("toy", lambda file: None, "for tests", accepts=lambda path: True)
    monkeypatch.setattr(registry.TOKENIZERS, "_known", {"toy": opener})
    monkeypatch.setattr(registry, "read_header", lambda path: ({}, {}))
    assert row_name(spec) == row


@pytest.mark.parametrize(
    ("given", "value"),
    [("number=16", 16), ("plain=7", 7), ("share=0.5", 0.5), ("word=x", "x"), ("flag=true", True), ("free=none", None),
     ("free=[1, 2]", [1, 2]), ("free=1e-3", 1e-3), ("free=sample", "sample")],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["Model", "load"])
def test_options_without_annotations_have_the_type_of_their_default_or_of_python(
    kind: str, given: str, value: object, tmp_path: Path
) -> None:
    options = "self, free, number: int = 1, plain=32, share=1.0, word='a', flag=False"
    function = options.removeprefix("self, ")
    code = f"class Model:\n    def __init__({options}):\n        pass\n\ndef load({function}):\n    pass\n"
    (tmp_path / "made.py").write_text(code)
    spec = f"{tmp_path}/made.py:{kind}@{given}" + ("" if "free" in given else "@free=1")
    assert parse(spec).parts[0].options[given.partition("=")[0]] == value
    assert "  @plain: int = 32" in describe_model(spec)
    assert "  @free: any (needed)" in describe_model(spec)


def test_an_unknown_model_shows_five_near_ones_and_how_to_list_all() -> None:
    with pytest.raises(InputError) as refused:
        parse("sd-vae-ft-mze")
    assert "did you mean sd-vae-ft-mse" in str(refused.value)
    assert len(str(refused.value)) < 250
    assert str(refused.value).endswith(f"`tokbench list models` shows all {len(registry.TOKENIZERS.all())}")
    with pytest.raises(InputError, match=r"write .*tiny\.py:FUNCTION"):
        parse(TINY.partition(":")[0])


def test_what_is_named_twice_is_taken_once_and_two_of_one_name_get_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert [spec.row for spec in parse_all("identity,identity, b=identity")] == ["identity", "b"]
    assert [spec.row for spec in parse_all("a=identity,a=jpeg-q50,a=jpeg-q60")] == ["a", "a-2", "a-3"]
    assert "jpeg-q50 is called a-2: another is a (NAME=SPEC names a row)" in capsys.readouterr().err


def test_a_file_of_specs_stands_for_them(tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("bicubic-f8\n")
    (tmp_path / "specs.txt").write_text(f"# floors\nidentity, j=jpeg-q50  # a codec\n\n{tmp_path}/more.txt\n")
    assert [spec.row for spec in parse_all(f"{tmp_path}/specs.txt,jpeg-q9")] == [
        "identity",
        "j",
        "bicubic-f8",
        "jpeg-q9",
    ]


def test_a_file_with_a_factory_is_a_model() -> None:
    tokenizer = create(f"mine={TINY}@noise=0.5")
    assert tokenizer.info.name == "mine"
    assert tokenizer.info.deterministic is False


def test_a_model_that_does_not_load_fails_alone() -> None:
    with pytest.raises(CellError, match="the weights are gone"):
        create(f"{TINY}@fault=load")


def test_a_file_that_gives_no_tokenizer_fails_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("def load():\n    return 3\ndef typo():\n    return None.weights\n")
    with pytest.raises(CellError, match="int is no tokenizer, it lacks info, networks, encode, decode"):
        create(f"{file}:load")
    with pytest.raises(CellError, match="no attribute 'weights'"):
        create(f"{file}:typo")
    file.write_text("{}['x']")
    with pytest.raises(InputError, match="does not run"):
        create(f"{file}:load")


def test_a_file_may_import_what_lies_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    shutil.copy(TINY.partition(":")[0], tmp_path / "beside_it.py")
    (tmp_path / "mine.py").write_text("from beside_it import tiny\n")
    assert create(f"{tmp_path}/mine.py:tiny@bias=0.1").info.family == "tiny"


def test_joined_tokenizers_encode_with_the_first_and_decode_with_the_second() -> None:
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seeds = torch.zeros(2, dtype=torch.int64)
    first, second, joined = create(TINY), create(f"{TINY}@bias=0.1"), create(f"{TINY}+{TINY}@bias=0.1")
    latents = first.encode(images, sample=False, seeds=seeds)
    assert torch.equal(joined.encode(images, sample=False, seeds=seeds), latents)
    expected = second.decode(latents, seeds=seeds, size=(16, 16))
    assert torch.equal(joined.decode(latents, seeds=seeds, size=(16, 16)), expected)


def test_joined_tokenizers_must_share_the_latent_space() -> None:
    with pytest.raises(InputError, match="latents differ"):
        create(f"{TINY}+bicubic-f8")


def test_a_checkpoint_says_which_model_it_is(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"w": torch.zeros(1)}, path, metadata={"tokbench": '{"model": "klvae"}'})
    part = parse(str(path)).parts[0]
    assert (part.entry.name, part.options["file"]) == ("klvae", path)
    path.write_bytes(b"no safetensors")
    with pytest.raises(InputError, match="not a readable safetensors file"):
        parse(str(path))


def test_naming_models_does_not_import_torch() -> None:
    code = "import sys, tokbench.registry as r; r.TOKENIZERS.all(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_plugin_that_does_not_load_stops_nobody_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = importlib.metadata.EntryPoint("theirs", "no_such_package:register", "tokbench.plugins")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [broken])
    monkeypatch.setattr(registry, "_loaded", [])
    registry.load_plugins()
    assert "plugin theirs (no_such_package:register) does not load" in caplog.text


def test_a_checkout_that_is_not_installed_has_its_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [])
    monkeypatch.setattr("importlib.metadata.distribution", missing)
    assert {point.name for point in registry._plugins()} == {"baselines", "ssdd", "generation"}
