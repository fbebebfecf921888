"""Bleed is a share: 0 what is no fault of the run, 1 the photos of another subject, by whichever score it is measured."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from personalize.evaluation.bleed import Drawn, bleed_of_rows, bleed_table, others_of, shares
from personalize.evaluation.image_cache import ImageSet
from personalize.evaluation.metrics import toyland_truth
from personalize.evaluation.metrics.inputs import Images, Reference
from personalize.evaluation.metrics.similarity import Embeddings
from personalize.evaluation.report.tables import bleed_lines, bleed_tables
from personalize.toyland.world.render import draw_scene
from personalize.toyland.world.scenes import HELD_OUT, sample_scene, sample_subject

FIRST = HELD_OUT + 9_900_000
KEYS = [("a {token} swimming", 0), ("a {token} swimming", 1), ("a {token}", 0)]
AXES = torch.eye(8)


def near(axis: int, cosine: float, aside: int, count: int = 3) -> torch.Tensor:
    """Unit vectors at this cosine with an axis, all else along another."""
    return (cosine * AXES[axis] + (1 - cosine**2) ** 0.5 * AXES[aside]).expand(count, 8)


def images(reference: Reference, dino: torch.Tensor, kind: str, reading=None) -> Images:
    templates = [template for template, _ in KEYS]
    wanted = ImageSet([kind] * 3, templates, KEYS, templates, place=None)
    found = Images(reference, torch.zeros(3, 3, 8, 8), Embeddings(dino, dino), wanted)
    if reading is not None:
        found.__dict__["reading"] = reading
    return found


def drawn(token: str, axis: int, run: torch.Tensor, base: torch.Tensor) -> Drawn:
    """A subject whose photos lie along an axis."""
    reference = Reference(None, Embeddings(near(axis, 1.0, 0), near(axis, 1.0, 0)), None, None, class_word="dog")
    return Drawn(token, reference, images(reference, base, "base"), images(reference, run, "subject"))


@pytest.mark.parametrize(
    ("value", "base", "apart", "top", "share"),
    [
        (0.2, 0.2, None, 1.0, 0.0),
        (0.6, 0.2, None, 1.0, 0.5),
        (1.0, 0.2, 0.1, 1.0, 1.0),
        (0.6, 0.2, 0.6, 1.0, 0.0),  # the two are so alike themselves
        (0.1, 0.2, 0.6, 1.0, -1.25),
        (0.5, 0.9, 1.1, 0.1, 0.5),  # an error, of which less is nearer
        (0.5, 0.9, 0.5, 0.1, 0.0),
    ],
)
def test_bleed_is_a_share_of_the_way_from_what_is_no_fault_of_the_run(value, base, apart, top, share):
    found = shares(dict.fromkeys(KEYS, value), dict.fromkeys(KEYS, base), apart=apart, top=top)
    assert [*found] == KEYS and [*found.values()] == pytest.approx([share] * 3)


@pytest.mark.parametrize(("base", "apart", "top"), [(0.9, None, 0.92), (0.1, 0.98, 1.0), (0.3, 1.02, 1.0), (1.05, 0.2, 1.0)])
def test_where_the_subjects_are_as_alike_as_the_photos_of_one_there_is_no_scale(base, apart, top):
    assert shares(dict.fromkeys(KEYS, 0.5), dict.fromkeys(KEYS, base), apart=apart, top=top) == {}


def test_the_table_tells_which_word_draws_whom():
    """Word A draws its own subject, word B three quarters of the way to A's."""
    base = near(1, 0.2, 4)
    table = bleed_table([drawn("A", 1, near(1, 1.0, 0), base), drawn("B", 2, near(1, 0.8, 2), base)])
    found = {(pair["word"], pair["photos"]): pair for pair in table["pairs"]}
    assert [*found] == [("A", "A"), ("A", "B"), ("B", "A"), ("B", "B")]
    assert found["A", "A"]["share"] == pytest.approx(1) and found["A", "B"]["share"] == pytest.approx(0)
    assert found["B", "A"]["share"] == pytest.approx(0.75) and found["B", "B"]["share"] == pytest.approx(0.6)
    assert found["B", "A"]["score"] == pytest.approx(0.8) and found["B", "A"]["base"] == pytest.approx(0.2)
    assert found["A", "B"]["apart"] == pytest.approx(0) and found["A", "A"]["apart"] is None
    assert (table["word"], table["photos"], table["share"]) == ("B", "A", found["B", "A"]["share"])
    assert all(pair["share_low"] <= pair["share"] <= pair["share_high"] and pair["truth"] is None for pair in table["pairs"])


def test_class_images_have_no_part_in_it():
    subjects = [drawn(token, axis, near(axis, 1.0, 0), near(4, 1.0, 0)) for token, axis in (("A", 1), ("B", 2))]
    kinds = ["subject", "class", "class"]
    dino = torch.cat([near(1, 1.0, 0, count=1), near(2, 1.0, 0, count=2)])
    run = replace(subjects[0].run, embedded=Embeddings(dino, dino), wanted=replace(subjects[0].run.wanted, kinds=kinds))
    found = bleed_table([replace(subjects[0], run=run), subjects[1]])["pairs"]
    assert found[0]["score"] == pytest.approx(1) and found[1]["score"] == pytest.approx(0)


def test_rows_of_a_checkpoint_give_the_same_shares_as_the_table():
    base, subjects = near(1, 0.2, 4), []
    for token, axis, run in (("A", 1, near(1, 1.0, 0)), ("B", 2, near(1, 0.8, 2))):
        subjects.append(drawn(token, axis, run, base))
    references = [each.reference for each in subjects]

    def rows(seen: Images, kind: str) -> list[dict]:
        named = [{"kind": kind, "template": template, "index": number} for template, number in KEYS]
        return others_of(named, seen, references)

    found = bleed_of_rows(rows(subjects[1].run, "subject"), rows(subjects[1].base, "base"), 1, references)
    assert [*found] == [0] and [*found[0].values()] == pytest.approx([0.75] * 3)


def test_on_toyland_the_truth_says_it_too():
    """Images of word B show A's dog: by truth most of the way to A, and not to B."""
    probe, dogs = toyland_truth.load_probe(), [sample_subject(FIRST + k, "dog") for k in range(2)]

    def read(who, first, count):
        scenes = [sample_scene(first + k, subject=who, place="meadow", action="standing", accessory=None) for k in range(count)]
        array = np.stack([np.asarray(draw_scene(scene)[0]) for scene in scenes])
        pixels = torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1
        return toyland_truth.read_images(probe, pixels)

    photos = [read(dog, FIRST + 10 * k, 3) for k, dog in enumerate(dogs)]
    others = read(sample_subject(FIRST + 7, "dog"), FIRST + 70, 3)
    subjects = []
    for k, token in enumerate("AB"):
        plain = drawn(token, k + 1, near(1, 1.0, 0), near(4, 1.0, 0))
        reference = replace(plain.reference, identity=toyland_truth.of_photos(photos[k]), reading=photos[k])
        by_run = images(reference, near(1, 1.0, 0), "subject", read(dogs[0], FIRST + 50 + 10 * k, 3))
        subjects.append(Drawn(token, reference, images(reference, near(4, 1.0, 0), "base", others), by_run))
    table = bleed_table(subjects)
    truth = {(pair["word"], pair["photos"]): pair["truth"]["share"] for pair in table["pairs"]}
    assert truth["A", "A"] > 0.7 and truth["B", "A"] > 0.7 and truth["A", "B"] < 0.2 and truth["B", "B"] < 0.5
    titles = [title for title, _ in bleed_tables({"bleed": table})]
    lines = bleed_lines({"bleed": table})
    assert titles == ["DINO", "identity error"] and len(lines) == 2 * 4
    assert " ".join(lines[1].split()) == "images of photos of A photos of B"
