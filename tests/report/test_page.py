"""The page in a real browser: Debian's chromium, headless, driven by playwright."""

import csv
import dataclasses
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image

from tests import ROOT
from tests.made_records import record, rows, write
from tokbench.evaluation.pictures import save_pairs
from tokbench.records.files import image_folders
from tokbench.report.blind.page import read_votes, write_blind_page
from tokbench.report.build import build
from tokbench.report.changes import changes_table
from tokbench.report.collect import gather
from tokbench.report.columns import ResultEntry
from tokbench.report.leaderboard import blocks
from tokbench.report.page.html import script_json, write_page
from tokbench.report.reported import read_reported, reported_table

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NASTY = "<script>window.harm=1</script><img src=x onerror=window.harm=1>"
AXE = ROOT / "build" / "node_modules" / "axe-core" / "axe.min.js"
REPORTED = ROOT / "results" / "reported.csv"
IDS = [f"img{i:05}" for i in range(12)]


def planes(images: np.ndarray) -> list[torch.Tensor]:
    """uint8 [N, H, W, 3] -> N tensors [3, H, W]."""
    return list(torch.from_numpy(images).permute(0, 3, 1, 2))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    results, before, out = (tmp_path_factory.mktemp(name) for name in ("results", "before", "site"))
    real = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    for i, (name, c) in enumerate([("ssdd", 4), ("klvae", 4), ("f8c16", 16)]):
        result = record(name, seed=i, n=12, shift=i, channels=c, family=name, note=NASTY, trained_on=NASTY)
        path = write(results, result, rows(i, 12, i))
        save_pairs(path, dict(zip(IDS, zip(planes(real), planes(real // (i + 2)), strict=True), strict=True)))
        write(before, dataclasses.replace(result, metrics=record(name, n=12, shift=1).metrics), rows(0, 12, 1))
    write(results, record("evil", seed=9, n=12, family=NASTY, note="</script>" + NASTY))
    write(results, record("other", seed=5, n=12, res=512))
    entries, _, _ = gather(results)
    named = [rename(entry, NASTY) if entry.name == "evil" else entry for entry in entries]
    reported = reported_table(read_reported(REPORTED)[:40])
    assert reported is not None
    write_page(blocks(named), [reported], out, changes_table(entries, before))
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


@pytest.fixture(scope="module", params=[(1400, 900), (390, 844)], ids=["desk", "phone"])
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
        ("request", lambda r: r.url.startswith(("file:", "data:", "blob:")) or problems.append(r.url)),
    ]
    for event, handler in watch:
        tab.on(event, handler)
    tab.goto("about:blank")  # another state of the same page would not load it again
    tab.goto((site / "index.html").as_uri())
    tab.wait_for_selector("#stage")
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
    page.select_option("#side-c", "")
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
    page.select_option("#side-c", "")
    page.focus("#stage")
    page.keyboard.press("e")
    page.keyboard.press("Home")
    shot = Image.open(io.BytesIO(page.locator("#stage").screenshot()))
    shown = np.asarray(shot.convert("RGB"))
    assert shown.mean() > 150  # half of random values times four: mostly white
    page.keyboard.press("e")
    page.select_option("#side-b", "(input)")
    plain = np.asarray(Image.open(io.BytesIO(page.locator("#stage").screenshot())).convert("RGB"))
    assert 100 < plain.mean() < 150


def test_images_are_sorted_by_any_metric_worst_or_best_first(page: "Page", site: Path) -> None:
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


def test_three_share_one_zoom_side_by_side_and_take_turns_in_flicker(page: "Page") -> None:
    for side, name in (("a", "ssdd"), ("b", "klvae"), ("c", "f8c16")):
        page.select_option(f"#side-{side}", name)
    handles = page.locator(".handle:visible")
    assert handles.count() == 2
    handles.nth(1).press("Home")
    assert [handle.get_attribute("aria-valuenow") for handle in handles.all()] == ["0", "0"]  # they do not cross
    page.click("#mode-beside")
    page.click("[data-zoom='4']")
    page.focus("#stage")
    page.keyboard.press("ArrowLeft")
    boxes = [layer.bounding_box() for layer in page.locator(".layer").all()]
    views = [view.bounding_box() for view in page.locator(".layer .view").all()]
    for box, shown in zip(boxes, views, strict=True):
        assert box is not None
        assert shown is not None
        assert shown["width"] == pytest.approx(4 * boxes[0]["width"], rel=0.01)  # type: ignore[index]
        assert shown["x"] - box["x"] == pytest.approx(views[0]["x"] - boxes[0]["x"], abs=1)  # type: ignore[index]
    page.keyboard.press("f")
    assert page.locator(".layer:visible").count() == 1
    page.wait_for_selector("#tag-1:visible")  # turns by itself
    page.keyboard.press("3")
    assert page.locator(".tag:visible").inner_text().startswith("f8c16")
    stage, shown = page.locator("#stage").bounding_box(), page.locator(".view:visible").bounding_box()
    assert stage is not None
    assert shown is not None
    assert shown["width"] == pytest.approx(4 * stage["width"], rel=0.01)  # the zoom is kept
    page.click("[data-zoom='1']")
    page.locator("#stage").click()
    assert page.locator(".tag:visible").inner_text().startswith("ssdd")


def test_values_by_image_name_the_worst_and_open_their_pictures(page: "Page") -> None:
    page.select_option("#side-b", "klvae")
    page.select_option("#sort-metric", "psnr")
    psnr = rows(1, 12, 1)["psnr"]
    named = page.locator(".extremes p").first.locator("button")
    assert [button.inner_text().split()[0] for button in named.all()] == [IDS[i] for i in np.argsort(psnr)[:5]]
    assert page.locator("#spread circle").count() == 3 * 12
    named.nth(2).click()
    assert page.locator("#which").inner_text().startswith(IDS[np.argsort(psnr)[2]])


def test_a_point_of_the_plot_shows_its_numbers_and_a_picture(page: "Page") -> None:
    page.locator("#scatter .point[data-name=klvae] circle").hover()
    assert page.locator("#tip").inner_text().strip().startswith("klvae")
    assert page.locator("#tip img").evaluate("image => image.decode().then(() => image.naturalWidth)") == 32
    page.locator("#table th").first.hover()


def test_columns_can_be_chosen_and_what_is_shown_downloaded(page: "Page", tmp_path: Path) -> None:
    page.click("summary")
    page.locator("#columns label", has_text=re.compile("^ssim$")).locator("input").uncheck()
    page.fill("#filter", "ssdd")
    with page.expect_download() as download:
        page.click("#download")
    download.value.save_as(tmp_path / "table.csv")
    table = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    assert [row["tokenizer"] for row in table] == ["ssdd"]
    assert float(table[0]["psnr"]) == record("ssdd", seed=0, n=12, shift=0).metrics["psnr"].value
    assert float(table[0]["psnr.stderr"]) > 0
    assert "ssim" not in table[0]


def test_a_link_holds_the_state(page: "Page") -> None:
    page.locator("#table th", has_text=re.compile("^psnr")).locator("button").click()
    page.locator("#table tr[data-name=klvae] input").check()
    page.select_option("#side-c", "f8c16")
    page.click("#mode-beside")
    page.click("[data-zoom='2']")
    page.click("#errors")
    page.select_option("#sort-order", "best")
    state = "JSON.stringify([$('table').innerText, view, state.sort, state.down, [...state.picked]])"
    before = page.evaluate(state)
    page.wait_for_function("location.hash.includes('best=1')")
    link = str(page.locator("#link").evaluate("link => link.href"))
    page.goto("about:blank")
    page.goto(link)
    page.wait_for_selector("#film button")
    assert page.evaluate(state) == before


def test_what_changed_against_another_folder_is_shown(page: "Page") -> None:
    shown = page.locator("#changes tbody tr").all_inner_texts()
    assert any(re.search(r"f8c16\s+psnr ↑.*better", row) for row in shown), shown
    assert any(re.search(r"ssdd\s+psnr ↑.*worse", row) for row in shown), shown
    assert "only here" in page.locator("#changes .notes").inner_text()


def test_the_names_stay_while_a_table_is_scrolled(page: "Page") -> None:
    name = page.locator("#table tr[data-name=ssdd] td").first
    before = name.bounding_box()
    page.locator("#leaderboard .scroll").evaluate("box => box.scrollLeft = 200")
    assert name.bounding_box() == before


def test_axe_finds_nothing_in_light_and_dark(page: "Page") -> None:
    """WCAG 2.2 AA as far as a program can tell."""
    if not AXE.exists():
        pytest.skip("axe-core is not installed: npm install --prefix build --no-save axe-core")
    page.locator("#table tr[data-name=klvae] input").check()
    page.add_script_tag(path=AXE)
    whole = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]
    schemes: list[tuple[Literal["light", "dark"], list[str]]] = [("light", whole), ("dark", ["color-contrast"])]
    for scheme, rules in schemes:
        page.emulate_media(color_scheme=scheme)
        found = page.evaluate("rules => axe.run({runOnly: rules})", rules)["violations"]
        assert [f"{one['id']}: {node['html']} {node['failureSummary']}" for one in found for node in one["nodes"]] == []


def test_our_own_results_open_on_pictures_in_one_file(tab: "Page", tmp_path: Path) -> None:
    """The README's screenshot is this page: `make screenshot`."""
    assert build([ROOT / "results"], format="html", out=tmp_path / "page.html") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert (tmp_path / "page.html").stat().st_size < 15_000_000
    size = tab.viewport_size
    assert size is not None
    tab.emulate_media(color_scheme="light")
    tab.goto((tmp_path / "page.html").as_uri())
    assert tab.locator("#block option:checked").inner_text() == "samples at 256 px · protocol adm"
    assert tab.locator("#film button").count() == 8
    assert tab.locator("#strip button").all_inner_texts()[0].strip() == "input"
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    tab.locator("#stage img").first.evaluate("image => image.decode()")
    if size["width"] > 1000:
        tab.set_viewport_size({"width": 1300, "height": 1040})
        tab.evaluate("document.getElementById('compare').scrollIntoView()")
        shot = Image.open(io.BytesIO(tab.screenshot()))
        tab.set_viewport_size(size)
        (ROOT / "build").mkdir(exist_ok=True)
        shot.convert("RGB").save(ROOT / "build" / "page.png", optimize=True)


def test_kept_pictures_are_those_that_were_measured() -> None:
    """PSNR of the committed pictures is that of the committed rows, but for another processor's rounding."""
    entries = [e for e in gather(ROOT / "results" / "adm" / "samples-256")[0] if e.path]
    pictured = [(e, *image_folders(e.path)) for e in entries if e.path and image_folders(e.path)[1].is_dir()]
    assert {"ssdd", "klvae", "taef2", "jpeg-q30", "bicubic-f8"} <= {entry.name for entry, *_ in pictured}
    for entry, real, fake in pictured:
        psnr = dict(zip(entry.rows[0], entry.rows[1]["psnr"], strict=True))
        for path in fake.iterdir():
            a, b = (np.asarray(Image.open(folder / path.name), dtype=float) for folder in (real, fake))
            assert 10 * np.log10(255**2 / np.mean((a - b) ** 2)) == pytest.approx(psnr[path.stem], abs=0.05)
    folders = {folder for _, *both in pictured for folder in both}
    assert sum(path.stat().st_size for folder in folders for path in folder.iterdir()) < 8_000_000


def test_a_page_leaves_out_pictures_that_have_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "results"
    path = write(folder, record("one", n=12), rows(0, 12, 0))
    real = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    save_pairs(path, dict(zip(IDS, zip(planes(real), planes(real), strict=True), strict=True)))
    size = sum(file.stat().st_size for file in path.parent.glob("*.images/*"))
    monkeypatch.setattr("tokbench.report.page.html.PICTURE_BYTES", size // 2)
    text = write_page(blocks(gather(folder)[0]), [], tmp_path / "page.html").read_text()
    assert text.count("data:image/png") == 2 * 6
    assert '"left_out":6' in text


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
