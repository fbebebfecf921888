"""CLIP-bg: what stands around the subject against the prompt's place, and nothing of the subject."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks.background import auc, drawn
from personalize.common import prompts
from personalize.common.bases import TOYLAND
from personalize.common.prompts import fill
from personalize.evaluation import metrics, requirements, summary
from personalize.evaluation.encoders import load_encoders
from personalize.evaluation.metrics.background import clip_bg, subject_patches, where
from personalize.evaluation.metrics.inputs import Images
from personalize.evaluation.metrics.similarity import Embeddings
from personalize.evaluation.preprocessing import IMAGENET, OPENAI, PLAIN
from personalize.toyland.world.examples import SUBJECTS
from personalize.toyland.world.scenes import PLACES, sample_scene, sample_subject

EYE = torch.eye(6)


def embedded(*patches):
    rows = torch.zeros(len(patches), 6)
    return Embeddings(rows, rows, patches=torch.stack(patches))


@pytest.mark.parametrize(
    ("prompt", "place"),
    [
        ("a dog in the snow", "in the snow"),
        ("a photo of a Dog, swimming on top of water.", "on top of water"),
        ("a dog with a blue balloon in the city at night", "in the city at night"),
        ("a dog wearing a yellow scarf, flying in front of a castle", "in front of a castle"),
        ("a dog with a city in the background", "with a city in the background"),
        ("a dog with a hat and with a blue house in the background", "with a blue house in the background"),
        ("a dog in a purple wizard outfit", ""),
        ("a dog in a police outfit on the moon", "on the moon"),
        ("a dog wearing a red hat", ""),
        ("a cube shaped dog", ""),
        ("a hot dog stand dog", ""),
        ("in the snow, a dog", ""),
        ("", ""),
    ],
)
def test_the_words_of_place_are_those_behind_the_subject(prompt, place):
    assert where(prompt, "dog") == place


def test_the_lists_of_prompts_say_places_and_outfits_are_none():
    def found(templates):
        return [where(fill(template, "", "dog"), "dog") for template in templates]

    assert found(prompts.LIVE)[:10] == [fill(t, "", "dog").removeprefix("a dog ") for t in prompts.LIVE[:10]] and not any(
        found(prompts.LIVE)[10:]
    )
    assert all(found(prompts.OBJECT)[:20]) and not any(found(prompts.OBJECT)[20:])
    assert [bool(place) for place in found(prompts.TOYLAND)] == [False, *[True] * 7]


def test_a_patch_is_the_subject_where_the_nearest_one_of_a_photo_with_a_mask_is():
    photos = embedded(EYE[[0, 1, 2, 3]], EYE[[4, 4, 4, 4]])
    foreground = torch.tensor([[True, True, False, False], [False] * 4])
    images = embedded(EYE[[3, 1, 2, 0]], torch.nn.functional.normalize(EYE[[4, 4, 4, 4]] + 0.1 * EYE[[0, 2, 1, 3]]))
    assert subject_patches(images, photos, foreground).tolist() == [[False, True, False, True], [True, False, True, False]]


def judge():
    """Sees the mean colour, two patches a side; a text is the colour that it names."""
    colours = {"in red": [1.0, 0, 0], "in green": [0, 1.0, 0]}
    return SimpleNamespace(
        clip_image=lambda images: torch.nn.functional.normalize((images.mean((2, 3)) + 1).clamp(min=1e-6), dim=1),
        clip_text=lambda texts: torch.tensor([colours[text] for text in texts]),
        spread=lambda patches, size: PLAIN.spread(patches.float().view(-1, 1, 2, 2), size),
    )  # fmt: skip


def test_the_subject_is_no_part_of_the_score():
    red, green, blue = (2 * row.view(3, 1, 1) - 1 for row in torch.eye(3))
    image = red.expand(3, 8, 8).clone()
    subject = torch.tensor([[True, False, False, False]])
    for colour in (red, green, blue):
        image[:, :4, :4] = colour
        scores = [clip_bg(judge(), image[None], [place], subject).item() for place in ("in red", "in green")]
        assert scores == pytest.approx([1, 0], abs=1e-4)
    assert clip_bg(judge(), image[None], ["in red"], ~subject).isnan().item() is False
    image[:, :, 4:] = green
    assert clip_bg(judge(), image[None], ["in green"], subject).item() > 0.6


def test_without_a_place_or_a_background_nothing_is_said():
    image = torch.zeros(3, 3, 8, 8)
    subject = torch.tensor([[False] * 4, [True] * 4, [True, True, False, False]])
    assert clip_bg(judge(), image, ["", "in red", "in red"], subject).isnan().tolist() == [True, True, False]
    assert clip_bg(judge(), image[:1], [""], subject[:1]).isnan().all()


@pytest.mark.parametrize("look", [PLAIN, IMAGENET, OPENAI])
@pytest.mark.parametrize("size", [(64, 64), (448, 448), (96, 160), (160, 96)])
def test_marks_lie_where_the_encoder_saw_the_patches(look, size):
    patches = (torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    marks = look.spread(patches, size)
    assert marks.shape == (2, 1, *size) and set(marks.unique().tolist()) <= {0, 1}
    again = torch.nn.functional.avg_pool2d(look.square(marks, 32), 8)
    assert torch.equal((again > 0.5).float(), patches)


def test_it_is_measured_only_with_masks_and_can_be_required():
    one = torch.nn.functional.normalize(torch.ones(1, 4), dim=1)
    photos = Embeddings(one, one, patches=one[None].expand(1, 4, 4))
    reference = metrics.Reference(None, photos, None, torch.zeros(1, 4, dtype=torch.bool))
    assert "clip_bg" in metrics.measured(reference)
    assert "clip_bg" not in metrics.measured(metrics.Reference(None, photos, None, None))
    nothing = Images(reference, torch.zeros(1, 3, 8, 8), photos, SimpleNamespace(plain=["a dog in red"]))
    assert metrics.METRICS["clip_bg"].score(nothing) is None, "no photo's mask covers a patch"
    assert requirements.read_requirements(["clip_bg.score>=0.1"])[0].name == "clip_bg.score"


def test_images_drawn_towards_clip_t_are_no_score_of_clip_bg():
    scores = {name: {"title": name} for name in ("clip_t", "clip_bg", "clip_i")}
    summary.mark_towards(scores, "clip_t")
    assert summary.marked({"scores": scores}) == ["clip_t", "clip_bg"]


def test_on_toyland_it_tells_the_right_place_from_another_better_than_clip_t():
    encoders = load_encoders(TOYLAND, "cpu")
    word, seed = SUBJECTS["dog"]
    subject, places = sample_subject(seed, word), list(PLACES)[:8]
    _, photos, foreground = drawn([sample_scene(seed, subject=subject, place="meadow", accessory=None)], encoders)
    scenes = [sample_scene(seed + 300 + k, subject=subject, place=place) for k, place in enumerate(places * 2)]
    pixels, images, truth = drawn(scenes, encoders)
    found = subject_patches(images, photos, foreground)
    assert (found & truth).sum() / (found | truth).sum() > 0.6
    said = [[f"a dog sleeping {PLACES[place]}" for place in (places * 2)[shift:] + places[:shift]] for shift in (0, 3)]
    bg = [clip_bg(encoders, pixels, [where(prompt, word) for prompt in each], found) for each in said]
    whole = [(images.clip * encoders.clip_text(each)).sum(1) for each in said]
    assert auc(*bg) > 0.9 and auc(*bg) > auc(*whole) + 0.05, (auc(*bg), auc(*whole))
