"""The page in a real browser: Debian's chromium, headless, driven by playwright."""

import dataclasses
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests import ROOT
from tests.made_records import record, rows, write
from tokbench.evaluation.pictures import save_pairs
from tokbench.report.blind.page import read_votes, write_blind_page
from tokbench.report.collect import gather
from tokbench.report.columns import ResultEntry
from tokbench.report.leaderboard import blocks
from tokbench.report.page.html import script_json, write_page
from tokbench.report.reported import read_reported, reported_table

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NASTY = "<script>window.harm=1</script><img src=x onerror=window.harm=1>"
REPORTED = ROOT / "results" / "reported.csv"
IDS = [f"img{i:05}" for i in range(12)]


def planes(images: np.ndarray) -> list[torch.Tensor]:
    """uint8 [N, H, W, 3] -> N tensors [3, H, W]."""
    return list(torch.from_numpy(images).permute(0, 3, 1, 2))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    results, out = tmp_path_factory.mktemp("results"), tmp_path_factory.mktemp("site")
    real = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    for i, (name, c) in enumerate([("ssdd", 4), ("klvae", 4), ("f8c16", 16)]):
        result = record(name, seed=i, n=12, shift=i, channels=c, family=name, note=NASTY, trained_on=NASTY)
        path = write(results, result, rows(i, 12, i))
        save_pairs(path, dict(zip(IDS, zip(planes(real), planes(real // (i + 2)), strict=True), strict=True)))
    write(results, record("evil", seed=9, n=12, family=NASTY, note="</script>" + NASTY))
    write(results, record("other", seed=5, n=12, res=512))
    entries, _, _ = gather(results)
    named = [rename(entry, NASTY) if entry.name == "evil" else entry for entry in entries]
    reported = reported_table(read_reported(REPORTED)[:40])
    assert reported is not None
    write_page(blocks(named), [reported], out)
    write_blind_page(named, 6, out)
    return out


def rename(entry: ResultEntry, name: str) -> ResultEntry:
    info = dataclasses.replace(entry.result.tokenizer, name=name)
    return dataclasses.replace(entry, result=dataclasses.replace(entry.result, tokenizer=info))


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("chromium is not installed")
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module", params=[(1280, 900), (390, 844)], ids=["desk", "phone"])
def tab(browser: "Browser", request: pytest.FixtureRequest) -> Iterator["Page"]:
    width, height = request.param
    context = browser.new_context(viewport={"width": width, "height": height}, has_touch=width < 500)
    yield context.new_page()
    context.close()


@pytest.fixture
def page(tab: "Page", site: Path) -> Iterator["Page"]:
    """The page fresh from disk; a complaint in the console, an error or a request to a network fails the test."""
    problems: list[str] = []
    watch: list[tuple[Any, Any]] = [
        ("console", lambda message: problems.append(message.text)),
        ("pageerror", lambda error: problems.append(str(error))),
        ("request", lambda r: r.url.startswith(("file:", "data:")) or problems.append(r.url)),
    ]
    for event, handler in watch:
        tab.on(event, handler)
    tab.goto((site / "index.html").as_uri())
    tab.locator("#compare").scroll_into_view_if_needed()  # the images wait for that
    tab.wait_for_selector("#stage")
    tab.evaluate("scrollTo(0, 0)")
    yield tab
    for event, handler in watch:
        tab.remove_listener(event, handler)
    assert problems == []


def names(page: "Page") -> list[str]:
    return [str(row.get_attribute("data-name")) for row in page.locator("#table tbody tr[data-name]").all()]


def test_first_view_is_complete_and_fits_the_width(page: "Page") -> None:
    assert set(names(page)) == {"ssdd", "klvae", "f8c16", NASTY}
    assert page.locator("#scatter .point").count() == 4
    assert page.locator("#film button").count() == 12
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.locator("#more table tbody tr").count() == 40


def test_names_and_notes_from_files_do_no_harm(page: "Page") -> None:
    page.locator("#table label", has_text="onerror").first.hover()
    assert "onerror" in page.locator("#tip").inner_text()
    assert page.evaluate("window.harm") is None
    assert page.locator("img[src=x]").count() == 0


def test_sorting_by_click_and_by_key(page: "Page") -> None:
    head = page.locator("#table th", has_text=re.compile("^psnr")).locator("button")
    ranked = names(page)
    head.click()
    assert names(page)[0] == "f8c16"  # the best first
    head.press("Enter")
    assert names(page)[-1] == "f8c16"
    assert page.locator("#table th[aria-sort=ascending]").count() == 1
    page.keyboard.press("Enter")  # the heading kept the focus
    assert names(page) == ranked


def test_filter_keeps_matching_rows(page: "Page") -> None:
    page.fill("#filter", "f8c16")
    assert names(page) == ["f8c16"]
    page.fill("#filter", "no such thing")
    assert names(page) == []


def test_selection_is_shared_by_table_and_plot(page: "Page") -> None:
    page.locator("#scatter .point[data-name=ssdd]").press("Enter")
    assert page.locator("#table tr.picked").get_attribute("data-name") == "ssdd"
    page.locator("#table tr[data-name=klvae] input").check()
    assert page.locator("#scatter .point.picked").count() == 2
    page.check("#only")
    assert set(names(page)) == {"ssdd", "klvae"}
    page.click("#clear")
    assert page.locator("#scatter .point.picked").count() == 0


def test_axes_of_the_plot_can_be_chosen(page: "Page") -> None:
    page.select_option("#plot-y", "psnr")
    assert "psnr" in page.locator("#scatter svg").get_attribute("aria-label")  # type: ignore[operator]


def test_provenance_and_descriptions_show_on_hover(page: "Page") -> None:
    page.locator("#table tr[data-name=ssdd] label").hover()
    assert "tokbench run --models ssdd" in page.locator("#tip").inner_text()
    page.locator("#table th", has_text=re.compile("^psnr")).hover()
    assert "signal-to-noise" in page.locator("#tip").inner_text()


def split(page: "Page") -> int:
    return int(str(page.locator("#handle").get_attribute("aria-valuenow")))


def test_divider_follows_pointer_and_keys(page: "Page") -> None:
    handle = page.locator("#handle")
    handle.scroll_into_view_if_needed()
    box, stage = handle.bounding_box(), page.locator("#stage").bounding_box()
    assert box is not None
    assert stage is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(stage["x"] + stage["width"] * 0.8, box["y"] + box["height"] / 2, steps=4)
    page.mouse.up()
    assert abs(split(page) - 80) <= 1
    handle.press("ArrowLeft")
    assert abs(split(page) - 78) <= 1
    handle.press("Home")
    assert split(page) == 0


def test_two_models_an_image_zoom_and_error_maps_by_keyboard(page: "Page") -> None:
    page.select_option("#side-a", "ssdd")
    page.select_option("#side-b", "klvae")
    page.focus("#stage")
    first = page.locator("#which").inner_text()
    page.keyboard.press("n")
    assert page.locator("#which").inner_text() != first
    page.keyboard.press("+")
    assert page.evaluate("getComputedStyle(document.getElementById('stage')).getPropertyValue('--s')") == "2"
    page.keyboard.press("e")
    assert page.locator(".layer.errors img").count() == 4
    page.keyboard.press("s")
    assert page.locator("#side-a").input_value() == "klvae"
    images = page.locator("#stage img")
    images.first.evaluate("image => image.decode()")
    assert all(image.evaluate("image => image.naturalWidth") == 32 for image in images.all())


def test_error_map_shows_the_difference(page: "Page") -> None:
    """|real - fake| x 4, as a screenshot of one flat patch shows it."""
    page.select_option("#side-b", "ssdd")
    page.focus("#stage")
    page.keyboard.press("e")
    page.keyboard.press("Home")
    shot = Image.open(io.BytesIO(page.locator("#stage").screenshot()))
    shown = np.asarray(shot.convert("RGB"))
    assert shown.mean() > 150  # half of random values times four: mostly white
    page.keyboard.press("e")
    page.select_option("#side-b", "\0input")
    plain = np.asarray(Image.open(io.BytesIO(page.locator("#stage").screenshot())).convert("RGB"))
    assert 100 < plain.mean() < 150


def test_images_are_sorted_by_any_metric_worst_or_best_first(page: "Page", site: Path) -> None:
    page.wait_for_function("rowsOf[state.block] !== undefined")
    page.select_option("#side-b", "klvae")
    page.select_option("#sort-metric", "psnr")
    psnr = rows(1, 12, 1)["psnr"]
    order = [button.get_attribute("title") for button in page.locator("#film button").all()]
    assert order == [IDS[i] for i in np.argsort(psnr)]
    page.select_option("#sort-order", "best")
    assert page.locator("#film button").first.get_attribute("title") == IDS[int(np.argmax(psnr))]


def test_strip_shows_all_models_and_chooses_one(page: "Page") -> None:
    strip = page.locator("#strip button")
    assert [button.get_attribute("title") for button in strip.all()] == ["input", "klvae", "ssdd", "f8c16"]
    strip.nth(2).click()
    assert page.locator("#side-b").input_value() == "ssdd"


def test_another_data_set_can_be_chosen(page: "Page") -> None:
    page.select_option("#block", label="samples at 512 px · protocol adm")
    assert names(page) == ["other"]
    page.locator("#compare").scroll_into_view_if_needed()
    page.locator("#viewer", has_text="No images were saved").wait_for()


def test_light_and_dark_follow_the_system_and_the_button(page: "Page") -> None:
    back = "getComputedStyle(document.body).backgroundColor"
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate(back)
    page.emulate_media(color_scheme="light")
    light = page.evaluate(back)
    assert dark != light
    page.click("#theme")
    assert page.evaluate(back) == dark


def test_images_load_only_when_near(browser: "Browser", site: Path) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 600})
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto((site / "index.html").as_uri())
    page.wait_for_selector("#table tbody tr")
    assert not [url for url in asked if "/images/" in url or "/rows/" in url]
    page.locator("#compare").scroll_into_view_if_needed()
    page.wait_for_selector("#film img[src]")
    assert page.locator("#film img:not([src])").count() > 0
    page.close()


def test_json_in_the_page_cannot_end_its_script() -> None:
    text = script_json({"a": "</script><!--", "b": "\u2028 é"})
    assert "<" not in text
    assert json.loads(text) == {"a": "</script><!--", "b": "\u2028 é"}


def test_blind_votes_outlast_a_reload_and_are_exported(tab: "Page", site: Path, tmp_path: Path) -> None:
    tab.goto((site / "blind.html").as_uri())
    assert tab.locator("figure img").evaluate_all("all => all.every(image => image.complete && image.naturalWidth > 0)")
    tab.keyboard.press("f")
    assert tab.locator("figure:visible").count() == 1
    tab.keyboard.press("f")
    for key in "120b01":
        tab.keyboard.press(key)
    tab.reload()
    assert tab.locator("#state").inner_text() == "5 of 6, 4 votes"
    with tab.expect_download() as download:
        tab.locator("#export").click()
    download.value.save_as(tmp_path / "votes.json")
    assert [vote["choice"] for vote in read_votes(tmp_path / "votes.json")["votes"]] == [
        "first",
        "second",
        "tie",
        "first",
    ]
