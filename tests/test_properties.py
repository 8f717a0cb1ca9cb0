"""Laws that hold of anything drawn: metrics, stores, specs, settings, records, crops."""

import contextlib
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from tests.made_records import record
from tokbench import registry
from tokbench.config import describe, from_dict, override, to_dict
from tokbench.data.crops import crop
from tokbench.errors import InputError
from tokbench.generation.train import PRESETS
from tokbench.metrics import METRICS, distribution, frechet, pixel
from tokbench.protocols import PROTOCOLS, find_protocol, parse_resolution
from tokbench.records.measurement import Measurement
from tokbench.records.result import Provenance, Settings, Value, from_json, to_json
from tokbench.records.samples import SampleStore
from tokbench.training.optimisation import RunConfig

few = settings(derandomize=True, max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
seeds = st.integers(0, 2**31)
numbers = st.floats(allow_nan=False, allow_infinity=False)
PIXEL = {
    "psnr": lambda real, fake: pixel.psnr(pixel.squared_error(real, fake)),
    "ssim": pixel.ssim, "ssim-gauss": pixel.ssim_gauss,
}  # fmt: skip


def images(seed: int, count: int = 2, low: int = 0, high: int = 256) -> Tensor:
    """Smooth enough for structure, uint8 [B, 3, 16, 20]."""
    coarse = np.random.default_rng(seed).integers(low, high, (count, 3, 4, 5))
    return torch.from_numpy(coarse.repeat(4, 2).repeat(4, 3)).byte()


# ---- metrics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PIXEL)
@few
@given(seeds, seeds)
def test_pixel_metrics_are_symmetric_best_of_equals_and_blind_to_the_batch(name: str, first: int, second: int) -> None:
    real, fake, score = images(first, 3), images(second, 3), PIXEL[name]
    found = score(real, fake)
    torch.testing.assert_close(found, score(fake, real))
    torch.testing.assert_close(found, torch.cat([score(real[i : i + 1], fake[i : i + 1]) for i in range(3)]))
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(found[order], score(real[order], fake[order]))
    best = 100.0 if name == "psnr" else 1.0
    assert score(real, real).tolist() == pytest.approx([best] * 3)
    assert (found <= best + 1e-6).all()


@pytest.mark.parametrize("name", PIXEL)
@few
@given(seeds, st.integers(1, 20))
def test_more_noise_and_a_shifted_range_are_worse(name: str, seed: int, amount: int) -> None:
    real, score = images(seed, 2, 64, 192), PIXEL[name]
    pattern = torch.from_numpy(np.random.default_rng(seed).choice([-1, 1], real.shape))
    weak, strong = (score(real, (real + factor * amount * pattern).byte()) for factor in (1, 3))
    assert (strong < weak).all()
    assert (weak < score(real, real)).all()
    halved = score(real, (real / 2 + 64).byte())  # [0, 1] taken for [-1, 1]
    assert (halved < (40 if name == "psnr" else 0.99)).all()


@few
@given(seeds, st.integers(3, 40), st.integers(1, 6))
def test_distances_of_features_are_symmetric_zero_of_equals_and_blind_to_order(seed: int, num: int, dim: int) -> None:
    rng = np.random.default_rng(seed)
    real, fake = (rng.standard_normal((num, dim)).astype(np.float32) + shift for shift in (0.0, 0.5))
    order = rng.permutation(num)
    there, back = (frechet.distance(*map(frechet.moments, pair)) for pair in ((real, fake), (fake, real)))
    assert there == pytest.approx(back, rel=1e-6, abs=1e-6)
    assert there >= 0
    assert there == pytest.approx(
        frechet.distance(frechet.moments(real[order]), frechet.moments(fake)), rel=1e-4, abs=1e-5
    )
    assert frechet.distance(frechet.moments(real), frechet.moments(real)) == 0
    kid = distribution.kernel_distance
    assert kid(real, fake, subset=num, repeats=1)[0] == pytest.approx(kid(fake, real, subset=num, repeats=1)[0])
    if num > 3:
        assert np.array_equal(distribution.covered(fake, real[order]), distribution.covered(fake, real))
        assert distribution.covered(real, real).all()
    codes = rng.integers(0, 9, (num, dim))
    assert distribution.perplexity(codes) == pytest.approx(distribution.perplexity(codes[order]))
    assert distribution.perplexity(codes) + 1e-9 >= 1


# ---- what is stored -----------------------------------------------------------------------------------------------


@few
@given(st.data(), st.integers(1, 6), seeds)
def test_any_order_of_appends_kills_and_ranks_gives_the_same_store(data: st.DataObject, num: int, seed: int) -> None:
    ids = [f"image {number}" for number in range(num)]
    values = np.random.default_rng(seed).standard_normal((num, 3))
    with tempfile.TemporaryDirectory() as folder:
        while missing := sorted(set(range(num)) - {ids.index(i) for i in SampleStore(Path(folder)).done(["x"], [])}):
            rank = data.draw(st.integers(0, 2))
            store = SampleStore(Path(folder), rank=rank)
            order = data.draw(st.permutations(missing))
            for start in range(0, len(order), size := data.draw(st.integers(1, 5))):
                rows = order[start : start + size]
                features = {("fake", "f"): values[rows].astype(np.float32)}
                store.append([ids[row] for row in rows], {"x": values[rows, 0], "y": values[rows, 1]}, features)
                if data.draw(st.booleans()):
                    store.flush()
                if data.draw(st.integers(0, 5)) == 0:
                    break  # killed: what was not flushed is lost
            else:
                store.flush()
        final = SampleStore(Path(folder))
        assert final.ids == sorted(ids)
        in_order = [ids.index(sample) for sample in final.ids]
        assert np.array_equal(final.column("x"), values[in_order, 0])
        assert np.array_equal(final.column("y"), values[in_order, 1])
        assert np.array_equal(final.features("fake", "f"), values[in_order].astype(np.float32))


value = st.builds(
    Value, st.none() | numbers, st.none() | numbers, st.none() | numbers, st.none() | numbers, st.integers(0, 10**9),
    st.text(),
)  # fmt: skip


@few
@given(
    st.dictionaries(st.sampled_from(sorted(METRICS)), value), st.dictionaries(st.text(), st.text()), st.text(),
    st.lists(seeds, max_size=4), st.none() | st.booleans(), st.dictionaries(st.text(), numbers),
)  # fmt: skip
def test_records_are_read_as_they_were_written(
    metrics: dict[str, Value], texts: dict[str, str], spec: str, drawn: list[int], dirty: bool | None,
    seconds: dict[str, float],
) -> None:  # fmt: skip
    made = replace(
        record("row"), metrics=metrics, unavailable=texts, settings=Settings(spec=spec, seeds=tuple(drawn)),
        measurement=Measurement(seeds=tuple(drawn)), provenance=Provenance(dirty=dirty, seconds=seconds, command=spec),
    )  # fmt: skip
    again = from_json(to_json(made))
    assert again == made
    assert to_json(again) == to_json(made)


# ---- what is typed ------------------------------------------------------------------------------------------------

names = st.from_regex(r"[a-z0-9._-]{1,12}", fullmatch=True)


@few
@given(
    st.none() | names,
    st.integers(1, 100),
    st.sampled_from(["jpeg-q{}", "webp-q{}", "bicubic-f{}", "flowmo-lo@steps={}"]),
)
def test_specs_are_read_as_they_are_printed(alias: str | None, number: int, form: str) -> None:
    text = form.format(number)
    spec = registry.parse(f"{alias}={text}" if alias else text)
    again = registry.parse(f"{spec.row}={spec.text}")
    assert (again.row, again.text, again.parts) == (spec.row, spec.text, spec.parts)
    assert registry.ROW_NAME.fullmatch(spec.row)
    assert spec.row == (alias or spec.row)
    assert list(spec.parts[0].options.values()) == [number]
    joined = registry.parse(f"{text}+{text}")
    assert [part.options for part in joined.parts] == [spec.parts[0].options] * 2


@few
@given(st.text(max_size=30))
def test_any_text_is_a_spec_a_resolution_or_a_line(text: str) -> None:
    for read in (registry.parse, registry.parse_all, parse_resolution):
        with contextlib.suppress(InputError):
            read(text)


@few
@given(
    st.fixed_dictionaries(
        {}, optional={"run.steps": st.integers(1, 10**6), "run.batch_size": st.integers(1, 512), "tokenizer": names,
                      "optim.learning_rate": st.floats(1e-8, 1), "label_dropout": st.floats(0, 1)}
    ),
    st.sampled_from(sorted(PRESETS)),
)  # fmt: skip
def test_settings_are_read_as_they_are_printed(changes: dict[str, Any], preset: str) -> None:
    config = override(PRESETS[preset], [f"{key}={new}" for key, new in changes.items()])
    assert override(PRESETS[preset], describe(config)) == config
    assert from_dict(type(config), to_dict(config)) == config
    assert isinstance(config.run, RunConfig)


# ---- crops --------------------------------------------------------------------------------------------------------


@few
@given(
    st.sampled_from([(1, 1), (1, 9000), (9000, 40), (40, 9000)]) | st.tuples(st.integers(1, 9000), st.integers(1, 40))
    | st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.sampled_from([8, 17, "24x16", "native"]), st.sampled_from(sorted(PROTOCOLS)),
)  # fmt: skip
def test_a_crop_of_any_image_has_the_size_asked_for(size: tuple[int, int], res: Any, protocol: str) -> None:
    image = Image.new("RGB", size, (10, 200, 30))
    pixels = crop(image, parse_resolution(str(res)), find_protocol(protocol))
    width, height = size if res == "native" else (24, 16) if res == "24x16" else (res, res)
    assert pixels.shape == (height, width, 3)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - [10, 200, 30]).max() <= 1  # one colour stays it
