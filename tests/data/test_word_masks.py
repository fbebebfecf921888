"""Masks by the base's attention to the class word: from seeds to patches to the edges of the image."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from personalize.commands.check_photos import check_photos
from personalize.commands.photo_masks import by_word
from personalize.common.errors import UserError
from personalize.common.terminal import SILENT
from personalize.data.photos import load_photos
from personalize.data.word_masks import by_colours, likeness
from personalize.evaluation import encoders
from personalize.evaluation.encoders import Identity
from personalize.evaluation.preprocessing import IMAGENET
from personalize.toyland.world.render import draw_scene
from personalize.toyland.world.scenes import sample_scene, sample_subject

EYE = torch.eye(8)


def overlap(a, b):
    return ((a & b).sum() / (a | b).sum()).item()


def test_a_patch_is_the_subject_where_it_is_like_the_seeds_of_any_photo():
    subject, others = EYE[0], EYE[1:6]
    first = torch.stack([subject, *others[:4], *others])  # the attention is sure of the first patch, and of the last three not
    second = torch.stack([others[0], subject, *others[:4], *others[:4]])  # here it knows nothing of the subject's place
    cells = torch.tensor([[1.0] + [0.5] * 6 + [0.0] * 3, [0.5] * 7 + [0.0] * 3])
    found = likeness(torch.stack([first, second]), cells)
    assert found[0, 0] > 0.9 and found[1, 1] > 0.9 and (found > 0.6).sum() == 2


def test_the_edges_are_those_of_the_colours():
    truth = torch.zeros(64, 64, dtype=torch.bool)
    truth[20:41, 13:50] = True
    noise = 0.2 * torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    image = (
        torch.where(truth, torch.tensor([0.8, -0.2, -0.8])[:, None, None], torch.tensor([-0.5, 0.3, 0.6])[:, None, None])
        + noise
    )
    coarse = torch.nn.functional.avg_pool2d(truth.float()[None], 25, 1, 12)[0]
    assert overlap(coarse > 0.5, truth) < 0.8
    found = by_colours(image, coarse)
    assert overlap(found >= 0.5, truth) > 0.97 and (found.min(), found.max()) == (0, 1)


def test_toyland_finds_the_subject_of_photos_without_masks(tmp_path):
    subject = sample_subject(42, "cat")
    truths = {}
    for k, place in enumerate(("snow", "beach", "forest")):
        image, mask = draw_scene(sample_scene(42 + k, subject=subject, place=place, accessory=None), 64)
        image.convert("RGB").resize((128, 96)).save(tmp_path / f"{k}.png")
        truths[f"{k}.png"] = mask.resize((128, 96))
    result = check_photos(tmp_path, size=64, mask="word:cat", out=tmp_path / "page.html")
    told = "masks/ has masks by the attention to 'cat' for 0.png, 1.png, 2.png: see that their outlines are right"
    assert told in [finding.text for finding in result.findings]
    photos, _ = load_photos(tmp_path, min_size=1)
    overlaps = [overlap(*(np.asarray(m) >= 128 for m in (photo.mask, truths[photo.name]))) for photo in photos]
    assert min(overlaps) > 0.6, overlaps


def test_an_encoder_that_leaves_a_border_out_sees_the_whole_photo(tiny_sd, monkeypatch):
    seen = []

    def dino(images):
        seen.append(IMAGENET.square((images + 1) / 2, 56))  # what is left of them, 14 px a patch
        cells = torch.nn.functional.avg_pool2d(seen[0], 14).flatten(2).transpose(1, 2)
        return Identity(cells[:, 0], torch.nn.functional.normalize(cells - 0.5, dim=-1))

    judge = SimpleNamespace(dino=dino, grid=4, spread=lambda p, size: IMAGENET.spread(p.float().unflatten(1, (1, 4, -1)), size))
    monkeypatch.setattr(encoders, "load_encoders", lambda *place, **options: judge)
    image = Image.new("RGB", (90, 60), (40, 40, 200))
    image.paste((230, 40, 30), (0, 0, 30, 20))
    (mask,) = by_word(str(tiny_sd), "dog", SILENT)([image])
    assert mask.shape == (64, 64) and 0 <= mask.min() <= mask.max() <= 1
    whole = image.resize((56, 56), Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(whole) / 255 - seen[0][0].permute(1, 2, 0).numpy()).mean() < 0.03


def test_a_word_must_be_said(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="--mask word: names no word. Give the class"):
        check_photos(tmp_path, size=64, mask="word: ", out=tmp_path / "page.html")
