"""The truth probes: what they read of drawn images they never saw, what prompts ask, how far a subject is off."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from personalize.commands.pretrain import Pretrain
from personalize.common.bases import TOYLAND
from personalize.common.errors import UserError
from personalize.common.files import write_json
from personalize.evaluation import image_cache, summary
from personalize.evaluation.metrics import toyland_truth
from personalize.models import fingerprint
from personalize.toyland import probes
from personalize.toyland.pretraining import pipeline
from personalize.toyland.world.render import draw_scene
from personalize.toyland.world.scenes import CLASSES, HELD_OUT, PROBE_SEED, VIEWS, caption, sample_scene, sample_subject

FIRST = HELD_OUT + 9_000_000
COUNT = 120
RED_HAT = {"accessory": "hat", "accessory_colour": "red"}


def images(scenes) -> torch.Tensor:
    """N scenes -> (N,3,64,64) in [-1,1]."""
    array = np.stack([np.asarray(draw_scene(scene)[0]) for scene in scenes])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1


@pytest.fixture(scope="module")
def probe():
    return toyland_truth.load_probe()


@pytest.fixture(scope="module")
def scenes():
    return [sample_scene(FIRST + k) for k in range(COUNT)]


@pytest.fixture(scope="module")
def reading(probe, scenes):
    return toyland_truth.read_images(probe, images(scenes))


def right(reading, scenes, table: str) -> float:
    goal = probes.scene_truth(scenes)[table]
    return (reading.chances[table].argmax(1) == goal)[goal != probes.IGNORE_INDEX].float().mean().item()


def shares(scores: dict[str, torch.Tensor]) -> dict[str, float]:
    return {table: score.nanmean().item() for table, score in scores.items()}


def test_the_probe_reads_images_it_never_saw(reading, scenes):
    floors = {"class": 0.98, "place": 0.98, "action": 0.95, "accessory": 0.95, "accessory_colour": 0.85}
    assert {table: got for table, least in floors.items() if (got := right(reading, scenes, table)) < least} == {}
    for table, chances in reading.chances.items():
        assert chances.shape == (COUNT, len(probes.TABLES[table]))
        torch.testing.assert_close(chances.sum(1), torch.ones(COUNT))


def test_an_image_reads_the_same_alone_and_nearly_the_same_at_another_size(probe, reading, scenes):
    alone = toyland_truth.read_images(probe, images(scenes[:1]))
    torch.testing.assert_close(alone.values["body"], reading.values["body"][:1], rtol=1e-4, atol=1e-4)
    larger = torch.nn.functional.interpolate(images(scenes), (128, 144), mode="bicubic")
    assert right(toyland_truth.read_images(probe, larger[..., 8:136]), scenes, "class") > 0.95


@pytest.mark.parametrize(
    "prompt, asked",
    [
        ("a sks dog swimming", {"class": "dog", "action": "swimming"}),
        ("A photo of a Cat, wearing a red hat in a room.", {"class": "cat", "place": "room"} | RED_HAT),
        ("a red dog in the city at night", {"class": "dog", "place": "city"}),
        ("a blue car jumping on the beach", {"class": "car", "action": "jumping", "place": "beach"}),
        (
            "a robot standing wearing an orange hat",
            {"class": "robot", "action": "standing", "accessory": "hat", "accessory_colour": "orange"},
        ),
        ("a dog in a forest", {"class": "dog", "place": "forest"}),
        ("a dog and a cat in the snow", {"place": "snow"}),
        ("a hotdog wearing a santa hat in the bedroom", {"accessory": "hat"}),
        ("a red boat riding a skateboard in front of a castle", {"class": "boat", "action": "riding", "place": "castle"}),
        (
            "on the moon, a sleeping owl with a white flag",
            {"class": "owl", "action": "sleeping", "place": "moon", "accessory": "flag", "accessory_colour": "white"},
        ),
        ("", {}),
    ],
)
def test_a_prompt_asks_for_what_its_words_say(prompt, asked):
    assert toyland_truth.wanted(prompt) == asked


def test_captions_ask_for_nothing_that_is_not_there():
    for seed in range(2000):
        scene = sample_scene(seed)
        is_so = {"class": scene.subject.class_word, "place": scene.place, "action": scene.action}
        if scene.accessory:
            is_so |= {"accessory": scene.accessory.kind, "accessory_colour": scene.accessory.colour}
        text = caption(scene, seed)
        asked = toyland_truth.wanted(text)
        assert asked.items() <= is_so.items() and ("class" in asked) == bool(text)


def test_drawn_images_obey_their_captions_and_not_those_of_others(reading, scenes):
    captions = [caption(scene, k) for k, scene in enumerate(scenes)]
    own = toyland_truth.prompt_adherence(reading, captions)
    for k, text in enumerate(captions):
        asked = toyland_truth.wanted(text)
        assert {table for table, score in own.items() if not score[k].isnan()} == set(asked) & set(toyland_truth.SCORED)
    assert min(shares(own).values()) > 0.9
    assert max(shares(toyland_truth.prompt_adherence(reading, captions[1:] + captions[:1])).values()) < 0.6


def test_the_class_word_is_asked_where_the_prompt_names_no_class(reading, scenes):
    bare = toyland_truth.prompt_adherence(reading, ["a sks swimming"] * COUNT)
    assert bare["class"].isnan().all() and not bare["action"].isnan().any()
    dogs = torch.tensor([scene.subject.class_word == "dog" for scene in scenes]).float()
    assert (
        toyland_truth.prompt_adherence(reading, ["a sks swimming"] * COUNT, "toy dog")["class"] == dogs
    ).float().mean() > 0.95


@pytest.mark.parametrize("word", CLASSES)
def test_a_subject_is_nearer_to_itself_than_half_of_another(probe, word):
    seeds = range(FIRST + 10_000, FIRST + 10_008)
    who = [sample_subject(seed, word) for seed in seeds]
    photos = [[sample_scene(seed + 100 * k, subject=each, action="standing", accessory=None) for k in range(4)]
              for seed, each in zip(seeds, who)]  # fmt: skip
    own, other, photographed = [], [], []
    for k, each in enumerate(who):
        seen = toyland_truth.read_images(probe, images(photos[k]))
        error = lambda reference: toyland_truth.identity_error(toyland_truth.errors(seen, reference, word)).mean()  # noqa: E731, B023
        own.append(error(toyland_truth.parameters(each)))
        other.append(error(toyland_truth.parameters(who[k - 1])))
        photographed.append(error(toyland_truth.of_photos(seen)))
    own, other, photographed = (torch.stack(each).mean().item() for each in (own, other, photographed))
    assert own < 0.5 * other and photographed < 0.5 * other
    assert 0.6 < other < 1.4


def test_every_part_of_an_identity_is_scored_for_every_class(scenes):
    reading = toyland_truth.read_images(probes.Probe().eval(), images(scenes[:3]))
    parts = {"body", "second", "detail", "proportions", "pattern", "ear", "tail"}
    for word in (*CLASSES, "lion"):
        assert set(toyland_truth.errors(reading, toyland_truth.parameters(sample_subject(1, "dog")), word)) == parts, word


def test_every_scene_has_a_truth_to_learn_from(scenes):
    goal = probes.scene_truth(scenes)
    assert {table for table in probes.TABLES if (goal[table] == probes.IGNORE_INDEX).any()} == {"accessory_colour"}
    assert ((goal["accessory"] == 0) == (goal["accessory_colour"] == probes.IGNORE_INDEX)).all()
    model = probes.Probe()
    assert probes.probe_loss(model(images(scenes)), goal).isfinite()


def test_an_accessory_is_right_where_its_kind_is_and_the_colour_that_is_asked():
    """Three images: a red hat, a blue hat, a red scarf."""

    def certain(table: str, words: list[str]) -> torch.Tensor:
        return torch.eye(len(toyland_truth.TABLES[table]))[[toyland_truth.TABLES[table].index(word) for word in words]]

    chances = {table: certain(table, [words[0]] * 3) for table, words in toyland_truth.TABLES.items()}
    chances["accessory"] = certain("accessory", ["hat", "hat", "scarf"])
    chances["accessory_colour"] = certain("accessory_colour", ["red", "blue", "red"])
    seen = toyland_truth.Reading(chances, {})
    assert toyland_truth.prompt_adherence(seen, ["a dog wearing a red hat"] * 3)["accessory"].tolist() == [1, 0, 0]
    assert toyland_truth.prompt_adherence(seen, ["a dog wearing a silly hat"] * 3)["accessory"].tolist() == [1, 1, 0]
    assert toyland_truth.prompt_adherence(seen, ["a red dog"] * 3)["accessory"].isnan().all()


def test_two_subjects_at_random_are_one_apart():
    error = {part: [] for part in toyland_truth.expected("robot")}
    for seed in range(300, 340):
        a, b = sample_subject(seed, "robot"), toyland_truth.parameters(sample_subject(seed + 1000, "robot"))
        values = {k: torch.tensor([v]) for k, v in probes.values(a).items()}
        exact = {k: torch.eye(len(probes.TABLES[k]))[[row]] for k, row in probes.kinds(a).items()}
        for part, off in toyland_truth.errors(toyland_truth.Reading(exact, values), b, "robot").items():
            error[part].append(off.item())
    assert np.mean(list(error.values())) == pytest.approx(1, abs=0.15)


def test_the_probes_seeds_are_no_other_stages_and_not_held_out():
    """The base and the encoders count up from 0 in `pipeline.run_stages`; what is judged starts at HELD_OUT."""
    s = Pretrain()
    others = max(s.pictures, s.subjects * VIEWS)
    assert others < PROBE_SEED and PROBE_SEED + s.probe_pictures <= HELD_OUT
    assert pipeline._probe_scene(5) == sample_scene(PROBE_SEED + 5)


def test_the_shipped_probe_is_small_half_precision_and_no_pickle():
    folder = TOYLAND / "probes"
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", probes.SIZES}
    assert (folder / "model.safetensors").stat().st_size <= 2e6
    told = json.loads((TOYLAND / "pretraining.json").read_text())["settings"]
    assert (told["probe_pictures"], told["probe_steps"]) == (Pretrain().probe_pictures, Pretrain().probe_steps)


def test_a_base_is_the_same_with_and_without_its_probes(tmp_path):
    import shutil

    shutil.copytree(TOYLAND, tmp_path / "base", ignore=shutil.ignore_patterns("probes"))
    assert fingerprint(tmp_path / "base") == fingerprint(TOYLAND)


def test_probes_of_another_world_or_none_at_all_are_refused(tmp_path, probe):
    with pytest.raises(UserError):
        toyland_truth.load_probe(tmp_path)
    probes.export(tmp_path / "probes", probe)
    again = toyland_truth.load_probe(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(probe.state_dict().values(), again.state_dict().values()))
    sizes = json.loads((tmp_path / "probes" / probes.SIZES).read_text())
    sizes["tables"]["place"].append("moon")
    write_json(tmp_path / "probes" / probes.SIZES, sizes)
    with pytest.raises(UserError, match="another Toyland"):
        toyland_truth.load_probe(tmp_path)


def test_disturbing_is_a_function_of_its_generator_and_keeps_most_of_an_image(scenes):
    x = images(scenes[:16])
    a, b = (probes.augment(x, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b) and a.shape == x.shape and a.abs().max() <= 1
    assert 0.005 < (a - x).abs().mean() < 0.25


@pytest.mark.parametrize("word", ["dog", "duck", "robot"])
def test_a_part_of_another_is_counted_in_words_and_a_right_one_is_not(probe, word):
    """Scenes of a subject, of it with one part changed, and the words for that."""
    who = sample_subject(77, word)
    changes = {"detail": {"detail": (60, 160, 75)}, "pattern": {"pattern": "plain" if who.pattern != "plain" else "belt"}}
    seeds = range(HELD_OUT + 91_000, HELD_OUT + 91_024)

    def off(**change):
        scenes = [sample_scene(seed, subject=replace(who, **change), accessory=None) for seed in seeds]
        images = image_cache.load_tensors([draw_scene(scene)[0] for scene in scenes])
        errors = toyland_truth.errors(toyland_truth.read_images(probe, images), toyland_truth.parameters(who), word)
        rows = [
            {"kind": "subject", "template": "a", "index": k} | {f"off_{part}": v[k].item() for part, v in errors.items()}
            for k in range(len(images))
        ]
        return {part["part"]: part["off"] / part["of"] for part in summary.parts_off(rows, word)}

    right = off()
    for part, change in changes.items():
        assert off(**change)[part] > right[part] + 0.3, (part, right)
    assert "pattern is another's" in toyland_truth.off_in_words("pattern", word)


def test_every_class_has_words_for_its_parts():
    for word in CLASSES:
        words = {toyland_truth.off_in_words(part, word) for part in toyland_truth.OFF}
        assert len(words) == len(toyland_truth.OFF) == len(toyland_truth.PARTS)
    assert toyland_truth.off_in_words("detail", "dog") == "the feet and tail have another colour"
    assert toyland_truth.off_in_words("tail", "cat") == "the tail has another shape"
