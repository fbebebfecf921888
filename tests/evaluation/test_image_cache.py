"""An image is drawn once, is the same whoever else is drawn, and one that shows nothing is said to."""

from pathlib import Path

import numpy as np
import pytest
import torch

from personalize import models
from personalize.common.errors import UserError
from personalize.common.recipe_sections import SamplingConfig
from personalize.common.terminal import SILENT
from personalize.evaluation import image_cache
from personalize.evaluation.protocols import Protocol
from personalize.generation import sampling
from personalize.generation.attention_maps import AttentionMaps, normalised, word_maps

HOW = SamplingConfig("ddim", 2, 3.0)


@pytest.fixture(scope="module")
def model(tiny_sd):
    return models.load_model(str(tiny_sd), device="cpu", dtype="float32", say=lambda line: None)


def sat(folder, jobs):
    prompts = [prompt for prompt, _ in jobs]
    return image_cache.ImageSet(["subject"] * len(jobs), prompts, list(jobs), prompts, folder)


def draw(model, folder, jobs, **options):
    """How many were drawn."""
    missing = len(image_cache.missing_images(folder, jobs))
    way = {"seed": 0, "purpose": "evaluate", "config": HOW, "progress": SILENT.progress, "what": "drawing"} | options
    image_cache.generate_missing(model, sat(folder, jobs), **way)
    assert not image_cache.missing_images(folder, jobs)
    return missing


def test_only_what_is_missing_is_drawn_and_nothing_changes(model, tmp_path):
    jobs = [("a dog", 0), ("a dog", 1), ("a cat", 0)]
    assert draw(model, tmp_path, jobs) == 3
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert draw(model, tmp_path, [*jobs, ("a cat", 1)]) == 1
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.name in before} == before and len(before) == 3


def test_an_image_does_not_depend_on_the_others(model, tmp_path):
    jobs = [("a dog", 0), ("a dog", 1), ("a cat in the snow", 0)]
    draw(model, tmp_path / "all", jobs)
    draw(model, tmp_path / "one", jobs[2:])
    (one,), _ = image_cache.load_images(sat(tmp_path / "one", jobs[2:]))
    every, _ = image_cache.load_images(sat(tmp_path / "all", jobs))
    assert np.abs(np.asarray(one, int) - np.asarray(every[2], int)).max() <= 1


def test_what_is_loaded_is_what_was_drawn_to_eight_bits(model, tmp_path):
    draw(model, tmp_path, [("a dog", 0)])
    z0 = sampling.sample_latents(model, ["a dog"], sampling.image_generators(0, [0], "evaluate"), HOW)
    images, bad = image_cache.load_images(sat(tmp_path, [("a dog", 0)]))
    assert (image_cache.load_tensors(images) - model.decode_latents(z0)).abs().max() <= 1.01 / 255 and bad == [""]


def test_a_sitting_is_each_prompt_and_the_class_prompt_by_number():
    asked = Protocol("own", ("a {token} {class} asleep", "a {class}"), 2, 3)
    run = image_cache.image_set(asked, Path("p"), class_prompt="a {class}", token="sks", word="dog")
    base = image_cache.image_set(asked, Path("p"), class_prompt="a {class}", token="", word="dog")
    assert run.jobs == [("a sks dog asleep", 0), ("a sks dog asleep", 1), *(("a dog", n) for n in (0, 1, 0, 1, 2))]
    assert run.plain == [prompt for prompt, _ in base.jobs] and run.templates == base.templates
    assert run.kinds == ["subject"] * 4 + ["class"] * 3 and base.kinds == ["base"] * 4 + ["base class"] * 3


def test_images_of_other_settings_have_another_folder(model, tiny_sd, tmp_path):
    def at(by=model, **change):
        return image_cache.cache_folder(
            tmp_path, "step-000100", by, **({"seed": 0, "purpose": "evaluate", "config": HOW} | change)
        )

    half = models.load_model(str(tiny_sd), device="cpu", dtype="bfloat16", say=lambda line: None)

    assert at() == at(config=SamplingConfig("ddim", 2, 3.0, batch=7)) == at(config=SamplingConfig("ddim", 2, 3.0, size=32))
    others = [at(seed=1), at(purpose="choose"), at(config=SamplingConfig("ddim", 3, 3.0)), at(half)]
    assert len({at(), *others}) == 5


def test_black_images_and_those_that_are_no_numbers_are_kept_and_named(model, tmp_path, monkeypatch):
    decoded = torch.stack([torch.full((3, 32, 32), -1.0), torch.full((3, 32, 32), torch.nan), torch.zeros(3, 32, 32)])
    monkeypatch.setattr(model, "decode_latents", lambda z0: decoded)
    jobs = [("a dog", n) for n in range(3)]
    draw(model, tmp_path, jobs)
    images, bad = image_cache.load_images(sat(tmp_path, jobs))
    assert len(images) == 3 and bad == ["black", "not a number", ""]


def test_a_damaged_image_is_named_with_the_remedy(model, tmp_path):
    draw(model, tmp_path, [("a dog", 0)])
    path = image_cache.image_file(tmp_path, ("a dog", 0))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be read.*drawn again"):
        image_cache.load_images(sat(tmp_path, [("a dog", 0)]))


PLACES = [("a dog 1", 1), *((f"a dog {k}", 0) for k in range(6))]
WORDS = ("a", "dog")


def test_the_maps_of_a_few_images_are_kept_and_change_none(model, tmp_path, monkeypatch):
    made, mean = [], AttentionMaps.mean
    monkeypatch.setattr(AttentionMaps, "mean", lambda self, side: made.append(mean(self, side)) or made[-1])
    draw(model, tmp_path / "plain", PLACES)
    draw(model, tmp_path / "words", PLACES, words=WORDS)
    for job in PLACES:
        plain, mapped = (image_cache.image_file(tmp_path / name, job) for name in ("plain", "words"))
        assert plain.read_bytes() == mapped.read_bytes()
    kept = image_cache.load_maps(sat(tmp_path / "words", PLACES))
    assert list(kept) == [PLACES[k] for k in (1, 2, 4, 5)] and sum(map(len, made)) == 4, "and no more than these are made"
    every = []
    generators = sampling.image_generators(0, [number for _, number in PLACES], "evaluate")
    sampling.sample_latents(model, [prompt for prompt, _ in PLACES], generators, HOW, maps=every)
    for job, maps in kept.items():
        words = word_maps(model, job[0], every[PLACES.index(job)])
        torch.testing.assert_close(maps, normalised(torch.stack([words[word] for word in WORDS])), rtol=0, atol=0.6 / 255)
    assert not image_cache.load_maps(sat(tmp_path / "plain", PLACES))
    draw(model, tmp_path / "plain", PLACES, words=WORDS)
    assert not image_cache.load_maps(sat(tmp_path / "plain", PLACES)), "nothing is drawn again for its maps"


def test_what_has_no_maps_keeps_none(model, tmp_path, monkeypatch):
    draw(model, tmp_path / "unsaid", PLACES[:2], words=("a", "cat"))
    draw(model, tmp_path / "unread", PLACES[:2], words=WORDS, config=SamplingConfig("ddim", 2, 0.0))
    monkeypatch.setattr("personalize.generation.attention_maps.why_not_fast", lambda unet: "act_fn is 'gelu'")
    draw(model, tmp_path / "library", PLACES[:2], words=WORDS)
    for name in ("unsaid", "unread", "library"):
        assert not image_cache.load_maps(sat(tmp_path / name, PLACES[:2])) and not (tmp_path / name / "maps").exists()


def test_a_damaged_map_is_named_with_the_remedy(model, tmp_path):
    draw(model, tmp_path, PLACES[1:2], words=WORDS)
    path = image_cache.maps_file(tmp_path, PLACES[1])
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match="maps.*cannot be read.*no map of it"):
        image_cache.load_maps(sat(tmp_path, PLACES[1:2]))


def test_names_from_strangers_stay_in_the_folder(tmp_path):
    path = image_cache.image_file(tmp_path, ("../../etc/passwd \0 <script>" + "x" * 500, 3))
    assert path.parent == tmp_path and len(path.name) < 100
    assert image_cache.image_file(tmp_path, ("a dog!", 0)) != image_cache.image_file(tmp_path, ("a dog?", 0))
