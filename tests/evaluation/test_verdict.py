"""The verdict says in words what the numbers say, one question a sentence."""

import pytest

from personalize.evaluation.report.verdict import BAD, GOOD, WARN, verdict


def metrics(relative=0.8, lost=0.0, share=0.1, **more):
    return {
        "run": {"class": "dog"},
        "scores": {"dino": {"relative": relative, "ceiling": 0.9}, "clip_t": {"score": 0.6 * (1 - lost), "floor": 0.6}},
        "class": {"share": share},
        "copying": {"copied": 0, "pictures": 32},
        "unusable": [],
    } | more


def levels(found):
    return [level for level, _ in found]


@pytest.mark.parametrize(("relative", "level", "words"), [
    (0.8, GOOD, "same subject: 80%"), (0.4, WARN, "resembles"), (0.1, BAD, "not yet"), (None, WARN, "no more alike"),
])  # fmt: skip
def test_identity(relative, level, words):
    first = verdict(metrics(relative=relative))[0]
    assert first[0] == level and words in first[1]


@pytest.mark.parametrize(("lost", "level", "words"), [(0.0, GOOD, "still listens"), (0.08, WARN, "less"), (0.3, BAD, "less")])
def test_obedience(lost, level, words):
    second = verdict(metrics(lost=lost))[1]
    assert second[0] == level and words in second[1]


@pytest.mark.parametrize(("share", "level", "words"), [
    (-0.1, GOOD, "The subjects stay apart: images of sks are no nearer to the photos of any other."),
    (0.1, GOOD, "The subjects stay apart: images of sks are 10% of the way to the photos of zwx, at most."),
    (0.3, WARN, "One subject shows in another: images of sks are 30% of the way to the photos of zwx."),
    (0.7, BAD, "One subject shows in another: images of sks are 70% of the way to the photos of zwx."),
    (None, WARN, "Whether the subjects stay apart cannot be said: their photos are as alike as those of one."),
])  # fmt: skip
def test_bleed_between_subjects(share, level, words):
    found = verdict(metrics(bleed={"share": share, "word": "sks", "photos": "zwx"}))
    assert (level, words) in found and len(found) == 1 + len(verdict(metrics()))


@pytest.mark.parametrize(("share", "level", "words"), [
    (None, WARN, "cannot be said"),
    (-0.1, GOOD, "did not move"), (0.2, GOOD, "still any dog"), (0.4, WARN, "Other dogs"), (0.7, BAD, "70%"),
])  # fmt: skip
def test_the_class(share, level, words):
    third = verdict(metrics(share=share))[2]
    assert third[0] == level and words in third[1]


def part(words, off, usual=0.1):
    return {"part": "x", "words": words, "off": off, "of": 32, "usual": usual}


def test_where_truth_is_known_it_says_which_parts_are_anothers():
    wrong = [part("the pattern is another's", 8), part("the feet and tail have another colour", 20), part("the ears have", 5)]
    found = verdict(metrics(parts=wrong))
    assert found[1] == (
        WARN, "The feet and tail have another colour in 20 of 32 images, the pattern is another's in 8 of 32 images."
    )  # fmt: skip
    assert found[0][0] == WARN and "resembles" in found[0][1]  # DINO says 80 %, but the feet are another's in most
    good = verdict(metrics(parts=[part("the ears have", 5)]))
    assert good[1][0] == GOOD and good[0] == (GOOD, "It is the same subject: 80% of the way from any dog to the photos.")


def test_copies_and_unusable_images_are_said_only_where_there_are_some():
    assert levels(verdict(metrics())) == [GOOD] * 3
    assert len(verdict(metrics(**{"class": None}))) == 2
    some = metrics(copying={"copied": 20, "pictures": 32}, unusable=[{"why": "black"}, {"why": "black"}])
    assert [line for _, line in verdict(some)[3:]] == [
        "20 of 32 images are nearer to a photo than the photos are to each other: look for copies.",
        "2 images are unusable (black); scored as drawn, not left out.",
    ]
    assert levels(verdict(some))[3:] == [BAD, BAD]


def test_no_change_has_no_sign_of_loss():
    assert "CLIP-T +0.000" in verdict(metrics(lost=1e-5))[1][1]


def test_a_single_photo_has_no_ceiling():
    found = metrics()
    found["scores"]["dino"] = {"relative": None, "ceiling": None}
    assert verdict(found)[0] == (WARN, "There is one photo only: no ceiling to compare with.")
