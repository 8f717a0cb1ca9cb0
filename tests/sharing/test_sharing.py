"""What others read of our records, and what is asked of theirs."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import jsonschema
import pytest
import yaml
from huggingface_hub import parse_eval_result_entries
from huggingface_hub.repocard_data import model_index_to_eval_results

from tests import ROOT
from tests.conftest import Ran
from tokbench.records.files import read_results
from tokbench.sharing.schema import RECORDS, text

RESULTS = ROOT / "results"
ROW = RESULTS / "adm" / "samples-256" / "jpeg-q30.json"


@pytest.mark.parametrize("name", RECORDS)
def test_the_published_schema_is_that_of_the_code(name: str) -> None:
    assert (ROOT / "docs" / "schema" / f"{name}.json").read_text() == text(RECORDS[name]), "make schema"


def test_report_as_json_is_what_the_schema_says(tokbench: Callable[..., Ran]) -> None:
    ran = tokbench("report", "--results", str(RESULTS), "--format", "json")
    assert ran.status == 0
    schemas = [jsonschema.Draft202012Validator(json.loads(text(record))) for record in RECORDS.values()]
    records = json.loads(ran.out)
    for record in records:
        schemas[record.get("kind") == "speed"].validate(record)
    assert len(records) > len(read_results(RESULTS)[0])
    broken = records[0] | {"dataset": {"name": 3}}
    with pytest.raises(jsonschema.ValidationError):
        schemas[0].validate(broken)


def test_a_card_says_what_the_record_says(tokbench: Callable[..., Ran], tmp_path: Path) -> None:
    """Read by the hub's own parser, in both forms."""
    ran = tokbench("card", str(ROW), "--benchmark", "me/samples", "--out", str(tmp_path), "--source", "https://x.org")
    assert ran.status == 0
    record = json.loads(ROW.read_text())
    measured = {name: v["value"] for name, v in record["metrics"].items() if v["value"] is not None}
    (file,) = (tmp_path / ".eval_results").iterdir()
    entries = parse_eval_result_entries(yaml.safe_load(file.read_text()))
    assert {e.task_id.removeprefix("adm-256-"): e.value for e in entries} == measured
    assert {(e.dataset_id, e.date, e.source_url) for e in entries} == {
        ("me/samples", record["provenance"]["date"], "https://x.org")
    }
    assert all("N = 29" in e.notes for e in entries)
    index = yaml.safe_load((tmp_path / "model-index.yml").read_text())["model-index"]
    name, rows = model_index_to_eval_results(index)
    assert name == "jpeg-q30"
    assert {row.metric_type: row.metric_value for row in rows} == measured


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((str(ROW),), "--benchmark"),
        ((str(ROW), str(ROW.with_name("klvae.json")), "--benchmark", "a/b"), "of one tokenizer"),
        ((str(ROW), "--benchmark", "a/b", "--push", "no name"), "no pull request"),
    ],
)
def test_a_card_that_cannot_be_is_one_line(
    tokbench: Callable[..., Ran], tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    ran = tokbench("card", *arguments, "--out", str(tmp_path))
    assert (ran.status, len(ran.err.splitlines())) == (2, 1)
    assert said in ran.err


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A record that somebody else has made, with its table."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    for path in (ROW, ROW.with_name("jpeg-q30.per_image.csv.gz")):
        shutil.copy(path, folder)
    return folder / ROW.name


@pytest.fixture
def address(theirs: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(theirs.parent)))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/{theirs.name}"
    server.shutdown()
    server.server_close()


def test_a_record_comes_from_a_file_or_an_address_and_is_not_replaced_unasked(
    tokbench: Callable[..., Ran], theirs: Path, address: str, tmp_path: Path
) -> None:
    into = str(tmp_path / "results")
    copied = tmp_path / "results" / "adm" / "samples-256" / ROW.name
    assert tokbench("results", "add", address, "--into", into).out.strip() == str(copied)
    assert copied.read_bytes() == ROW.read_bytes()
    assert "--replace" in tokbench("results", "add", str(theirs), "--into", into).err
    assert tokbench("results", "add", str(theirs), "--into", into, "--replace").status == 0
    assert tokbench("report", "--results", into).status == 0


@pytest.mark.parametrize(
    ("pattern", "instead", "said"),
    [
        (r'"protocol_fingerprint": "[^"]*"', '"protocol_fingerprint": "0"', "another one here"),
        (r'"protocol": "adm"', '"protocol": "mine"', "mine"),
        (r'"num_images": 29', '"num_images": 28', "28 images, but 29 rows"),
        (r'("ssim": \{\s+"value": )[\d.]+', r"\g<1>1.5", "lies outside"),
        (r'("psnr": \{\s+"value": )[\d.]+', r"\g<1>60.0", "have a mean of"),
        (r'("ssim-gauss": \{\s+"value": )[\d.]+', r"\g<1>0.5", "have a mean of"),
        (r'"command": "[^"]*"', '"command": ""', "no command"),
        (r'"schema": \d', '"schema": 99', "schema 99"),
    ],
)
def test_a_record_that_cannot_be_right_is_refused(
    tokbench: Callable[..., Ran], theirs: Path, tmp_path: Path, pattern: str, instead: str, said: str
) -> None:
    changed, count = re.subn(pattern, instead, theirs.read_text(), count=1)
    assert count == 1
    theirs.write_text(changed)
    ran = tokbench("results", "add", str(theirs), "--into", str(tmp_path / "results"))
    assert (ran.status, len(ran.err.splitlines())) == (2, 1)
    assert said in ran.err
    assert not (tmp_path / "results").exists()


def test_other_images_under_a_known_name_are_refused(
    tokbench: Callable[..., Ran], theirs: Path, tmp_path: Path
) -> None:
    into = str(tmp_path / "results")
    assert tokbench("results", "add", str(theirs), "--into", into).status == 0
    other = re.sub(r'("num_images": 29,\s+"fingerprint": ")\w{4}', r"\g<1>beef", theirs.read_text())
    assert other != theirs.read_text()
    theirs.write_text(other)
    assert "other images than ours" in tokbench("results", "add", str(theirs), "--into", into, "--replace").err
