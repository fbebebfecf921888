"""Metrics are the cosines the papers define, and what judges is what was asked for, or refused by name."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from personalize.common.errors import UserError
from personalize.core.rng import generator
from personalize.evaluation import encoders, preprocessing
from personalize.evaluation.encoders import Encoders, Identity
from personalize.evaluation.metrics.similarity import Embeddings, ceiling, clip_i, clip_t, dino, embed, first, first_ceiling

NOWHERE = Path("/no/base")  # a base without encoders of its own


def unit(*shape, k=0):
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator(0, "unit", k)), dim=-1)


def embedded(n, k=0, text=False):
    return Embeddings(unit(n, 5, k=k), unit(n, 7, k=k + 1), unit(n, 7, k=k + 2) if text else None)


def cosine(a, b):
    a, b = a.tolist(), b.tolist()
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def brute_force(name, images, photos):
    if name == "clip_t":
        return [cosine(c, t) for c, t in zip(images.clip, images.text, strict=True)]
    part = {"dino": "dino", "clip_i": "clip"}[name]
    rows, others = getattr(images, part), getattr(photos, part)
    return [sum(cosine(row, other) for other in others) / len(others) for row in rows]


# --- the metrics ---


def score_of(metric, images, photos):
    return metric(images) if metric is clip_t else metric(images, photos)


@pytest.mark.parametrize("metric", [dino, clip_i, clip_t])
def test_every_metric_is_its_definition_in_loops(metric):
    images, photos = embedded(6, text=True), embedded(4, k=10)
    scores = score_of(metric, images, photos)
    assert scores.shape == (6,) and scores.dtype == torch.float32
    assert scores.tolist() == pytest.approx(brute_force(metric.__name__, images, photos), abs=1e-6)


def test_the_subject_is_first_where_it_is_nearer_than_every_look_alike():
    images, photos, others = embedded(40), embedded(4, k=10), embedded(2, k=20)
    before = [
        all(own > cosine(row, other) for other in others.dino)
        for row, own in zip(images.dino, brute_force("dino", images, photos), strict=True)
    ]
    assert first(images, photos, others).tolist() == [float(each) for each in before] and 0 < sum(before) < 40
    assert first(others, others, others).tolist() == [0, 0], "a look-alike is itself among them"
    apart = Embeddings(-photos.dino.mean(0, keepdim=True), photos.clip)
    assert first_ceiling(photos, photos) == 0 and first_ceiling(embedded(1), others) is None
    copies = Embeddings(photos.dino[:1].repeat(3, 1), photos.clip)
    assert first_ceiling(copies, apart) == 1


@pytest.mark.parametrize("metric", [dino, clip_i, clip_t])
def test_a_score_does_not_depend_on_the_other_images(metric):
    images, photos = embedded(6, text=True), embedded(4, k=10)
    alone = Embeddings(images.dino[2:3], images.clip[2:3], images.text[2:3])
    torch.testing.assert_close(score_of(metric, alone, photos), score_of(metric, images, photos)[2:3])


def test_copies_score_one_and_orthogonal_images_zero():
    eye = torch.eye(4)
    same = Embeddings(eye[:1].repeat(3, 1), eye[:1].repeat(3, 1), eye[:1].repeat(3, 1))
    other = Embeddings(eye[1:3], eye[1:3])
    for score in (dino, clip_i):
        assert score(same, same).tolist() == [1, 1, 1]
        assert score(same, other).tolist() == [0, 0, 0]
    assert clip_t(same).tolist() == [1, 1, 1]
    assert clip_t(Embeddings(eye[:2], eye[:2], eye[2:])).tolist() == [0, 0]


def test_clip_t_needs_prompts_and_identity_needs_photos():
    with pytest.raises(AssertionError, match="prompts"):
        clip_t(embedded(2))
    with pytest.raises(AssertionError, match="no photos"):
        dino(embedded(2), Embeddings(torch.zeros(0, 5), torch.zeros(0, 7)))


# --- ceiling ---


def test_ceiling_of_two_photos_is_their_cosine_and_of_one_is_none():
    two = embedded(2)
    assert ceiling(two.dino) == pytest.approx(cosine(*two.dino), abs=1e-6)
    assert ceiling(two.clip) == pytest.approx(cosine(*two.clip), abs=1e-6)
    assert ceiling(embedded(1).dino) is None


def test_ceiling_leaves_each_photo_itself_out():
    photos = embedded(5)
    pairs = [cosine(photos.dino[i], photos.dino[j]) for i in range(5) for j in range(5) if i != j]
    assert ceiling(photos.dino) == pytest.approx(sum(pairs) / 20, abs=1e-6)
    assert ceiling(torch.eye(3)[:1].repeat(4, 1)) == 1.0


# --- embedding once ---


def test_each_distinct_prompt_is_encoded_once_and_each_image_keeps_its_own():
    read, seen = [], []
    table = {"a dog": torch.tensor([1.0, 0.0]), "a cat": torch.tensor([0.0, 1.0])}

    def text(prompts):
        read.append(prompts)
        return torch.stack([table[prompt] for prompt in prompts])

    def look(images):
        seen.append(len(images))
        return torch.ones(len(images), 2)

    def identity(images):
        return Identity(look(images), torch.ones(len(images), 4, 2))

    judge = Encoders(dino=identity, clip_image=look, clip_text=text, cover=None, spread=None, grid=2, names={}, looks={})
    got = embed(judge, torch.zeros(4, 3, 8, 8), ["a dog", "a cat", "a dog", "a dog"])
    assert read == [["a dog", "a cat"]] and seen == [4, 4]
    assert got.text.tolist() == [[1, 0], [0, 1], [1, 0], [1, 0]]
    assert got.dino.shape == (4, 2) and got.patches.shape == (4, 4, 2)
    assert embed(judge, torch.zeros(2, 3, 8, 8)).text is None and len(read) == 1


# --- preprocessing ---


def random_image(width, height):
    noise = np.random.default_rng(0).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def tensor(image):
    return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1)[None] / 127.5 - 1


@pytest.mark.parametrize("size", [(64, 64), (300, 200), (200, 600), (512, 512), (256, 256)])
@pytest.mark.parametrize("look,short", [(preprocessing.IMAGENET, 256), (preprocessing.OPENAI, 224)])
def test_preprocessing_is_pillows_bicubic_then_the_middle_then_mean_and_deviation(size, look, short):
    image = random_image(*size)
    scale = short / min(size)
    resized = image.resize((max(short, int(size[0] * scale)), max(short, int(size[1] * scale))), Image.Resampling.BICUBIC)
    left, top = (resized.width - 224) // 2, (resized.height - 224) // 2
    cut = np.array(resized.crop((left, top, left + 224, top + 224)), dtype=np.float64) / 255
    want = (cut - np.array(look.mean)) / np.array(look.std)
    got = preprocessing.preprocess(tensor(image), look, 224)[0].permute(1, 2, 0).double().numpy()
    difference = np.abs(got - want)
    # Pillow rounds to bytes after each of its two passes: at most two bytes, in units of the deviation
    assert got.shape == (224, 224, 3) and difference.max() < 2.1 / 255 / 0.22 and difference.mean() < 0.5 / 255 / 0.22


def test_images_of_the_encoders_own_size_are_shown_as_they_are():
    images = torch.rand(2, 3, 64, 64, generator=generator(0, "shown", 0)) * 2 - 1
    torch.testing.assert_close(preprocessing.preprocess(images, preprocessing.PLAIN, 64), images)


def test_resizing_never_leaves_the_range_of_pixels():
    edge = torch.zeros(1, 3, 32, 32)
    edge[..., 16:] = 1
    assert preprocessing.resize(edge, 100).min() == 0 and preprocessing.resize(edge, 100).max() == 1


# --- loading ---


@pytest.fixture
def offline(monkeypatch):
    import huggingface_hub.constants as hub

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def toyland(eyes):
    return encoders.load_encoders(eyes, "cpu")


def images(n, size=64):
    return torch.rand(n, 3, size, size, generator=generator(0, "images", size)) * 2 - 1


def test_embeddings_have_length_one_and_do_not_depend_on_the_batch(toyland):
    many = images(encoders.BATCH + 3)
    token, patches = (lambda x: toyland.dino(x).token), (lambda x: toyland.dino(x).patches)
    for encode in (token, patches, toyland.clip_image):
        rows = encode(many)
        assert len(rows) == len(many) and rows.dtype == torch.float32 and not rows.requires_grad
        torch.testing.assert_close(rows.norm(dim=-1), torch.ones(rows.shape[:-1]))
        torch.testing.assert_close(encode(many[-2:]), rows[-2:], atol=1e-5, rtol=1e-4)
    texts = toyland.clip_text(["a dog in the snow", "a cat " * 40])
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(2))
    assert texts.shape[1] == toyland.clip_image(many[:1]).shape[1]


def test_embeddings_are_those_of_transformers(toyland, eyes):
    from transformers import CLIPModel, CLIPTokenizer, ViTModel

    three, prompts = images(3), ["a dog in the snow", "a cat"]
    with torch.inference_mode():
        vit = ViTModel.from_pretrained(eyes / "encoders" / "identity", add_pooling_layer=False).eval()
        clip = CLIPModel.from_pretrained(eyes / "encoders" / "clip").eval()
        words = CLIPTokenizer.from_pretrained(eyes / "tokenizer")
        ids = words(prompts, padding="max_length", max_length=32, return_tensors="pt")
        out = clip(**ids, pixel_values=three)
        tokens = torch.nn.functional.normalize(vit(three).last_hidden_state, dim=-1)
    torch.testing.assert_close(toyland.dino(three).token, tokens[:, 0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(toyland.dino(three).patches, tokens[:, 1:], atol=1e-5, rtol=1e-4)
    assert toyland.dino(three).patches.shape == (3, toyland.grid**2, 192)
    torch.testing.assert_close(toyland.clip_image(three), out.image_embeds, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(toyland.clip_text(prompts), out.text_embeds, atol=1e-5, rtol=1e-4)


def test_other_bases_take_folders_and_look_through_the_published_preprocessing(toyland, eyes):
    vit, clip = eyes / "encoders" / "identity", eyes / "encoders" / "clip"
    other = encoders.load_encoders(NOWHERE, "cpu", dino=str(vit), clip=str(clip))
    assert other.names == toyland.names
    large = images(2, 96)
    shown = preprocessing.preprocess(large, preprocessing.IMAGENET, 64)
    torch.testing.assert_close(other.dino(large).token, toyland.dino(shown).token, atol=1e-5, rtol=1e-4)
    prompts = ["a dog in the snow"]
    torch.testing.assert_close(other.clip_text(prompts), toyland.clip_text(prompts))


def test_token_and_patches_come_from_one_forward_pass(eyes, monkeypatch):
    from transformers import ViTModel

    seen, forward = [], ViTModel.forward
    monkeypatch.setattr(ViTModel, "forward", lambda self, **given: seen.append(1) or forward(self, **given))
    embed(encoders.load_encoders(eyes, "cpu"), images(3))
    assert seen == [1]


@pytest.mark.parametrize("other", [False, True])
def test_the_line_on_preprocessing_tells_the_numbers_that_are_used(other, toyland, eyes):
    vit, clip = eyes / "encoders" / "identity", eyes / "encoders" / "clip"
    judge = encoders.load_encoders(NOWHERE, "cpu", dino=str(vit), clip=str(clip)) if other else toyland
    statistics = {
        "ImageNet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        "OpenAI": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    }
    large = images(2, 150)
    # Toyland's own encoders are shown 64 px in [-1,1] as they are
    for line, see, plain in (
        (judge.looks["dino"], lambda x: judge.dino(x).token, lambda x: toyland.dino(x).token),
        (judge.looks["clip"], judge.clip_image, toyland.clip_image),
    ):
        short, crop = map(int, re.fullmatch(r"short side (\d+) bicubic with antialias, centre crop (\d+), .*", line).groups())
        shown = (large + 1) / 2
        shown = torch.nn.functional.interpolate(shown, size=(short, short), mode="bicubic", antialias=True).clamp(0, 1)
        start = (short - crop) // 2
        shown = shown[..., start : start + crop, start : start + crop]
        mean, std = statistics.get(line.split(", ")[-1].split()[0], ((0.5,) * 3, (0.5,) * 3))
        shown = (shown - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        torch.testing.assert_close(see(large), plain(shown), atol=1e-5, rtol=1e-4)
    assert judge.looks["dino"].startswith("short side 73 " if other else "short side 64 ")
    assert preprocessing.IMAGENET.short * 224 == 256 and preprocessing.OPENAI.short * 224 == 224


def test_masks_come_to_the_patches_that_see_the_masked_pixels(eyes, tmp_path):
    """Without layers a patch's row depends on its own pixels alone: it changes exactly where the mask reaches it."""
    from transformers import ViTModel

    flat = ViTModel.from_pretrained(eyes / "encoders" / "identity", num_hidden_layers=0, add_pooling_layer=False)
    flat.save_pretrained(tmp_path)
    for base in (eyes, NOWHERE):
        judge = encoders.load_encoders(base, "cpu", dino=str(tmp_path), clip=str(eyes / "encoders" / "clip"))
        for height, width in ((64, 64), (80, 150), (150, 80)):
            mask = torch.zeros(1, 1, height, width)
            mask[..., 21:52, 30:47] = 1
            black = torch.full((1, 3, height, width), -1.0)
            changed = (judge.dino(black + 2 * mask).patches - judge.dino(black).patches).abs().amax(2) > 1e-6
            covered = judge.cover(mask)
            assert covered.shape == (1, judge.grid**2) and 0 < (covered > 0).sum() < judge.grid**2
            assert torch.equal(changed, covered > 1e-6), (base, height, width)
            torch.testing.assert_close(judge.cover(torch.ones_like(mask)), torch.ones(1, judge.grid**2))


def test_names_tell_weights_apart_not_places(eyes, tmp_path):
    from transformers import ViTModel

    source = eyes / "encoders" / "identity"
    changed = ViTModel.from_pretrained(source, add_pooling_layer=False)
    changed.layernorm.bias.data[0] += 1
    changed.save_pretrained(tmp_path / "identity")
    one = encoders.load_encoders(eyes, "cpu")
    two = encoders.load_encoders(eyes, "cpu", dino=str(tmp_path / "identity"))
    assert one.names["dino"].startswith("identity sha256:") and two.names["dino"].startswith("identity sha256:")
    assert one.names["dino"] != two.names["dino"] and one.names["clip"] == two.names["clip"]


@pytest.mark.parametrize("kind,name", [("dino", "facebook/dino-vits16"), ("clip", "openai/clip-vit-base-patch32")])
def test_an_encoder_that_cannot_be_downloaded_is_named_with_the_remedy(kind, name, eyes, offline):
    own = {"dino": str(eyes / "encoders" / "identity"), "clip": str(eyes / "encoders" / "clip")}
    with pytest.raises(UserError) as caught:
        encoders.load_encoders(NOWHERE, "cpu", **{**own, kind: ""})
    assert name in str(caught.value) and f"evaluate.{kind}=" in str(caught.value)


def test_pickled_weights_are_refused(eyes, tmp_path):
    source = eyes / "encoders" / "identity"
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no model\.safetensors.*never read"):
        encoders.load_encoders(NOWHERE, "cpu", dino=str(tmp_path))


def test_weights_that_are_missing_in_part_are_refused_not_drawn_at_random(eyes, tmp_path):
    from safetensors.torch import load_file, save_file

    source = eyes / "encoders" / "identity"
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    weights = load_file(source / "model.safetensors")
    del weights["layernorm.bias"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack layernorm\.bias"):
        encoders.load_encoders(NOWHERE, "cpu", dino=str(tmp_path))


def test_damaged_absent_and_foreign_folders_are_refused(eyes, tmp_path):
    source = eyes / "encoders" / "identity"
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors at all")
    for given, why in ((tmp_path, "cannot load the identity"), (Path("/no/such"), "no such folder")):
        with pytest.raises(UserError, match=why):
            encoders.load_encoders(NOWHERE, "cpu", dino=str(given))
    with pytest.raises(UserError, match="'clip', where a ViT is needed"):
        encoders.load_encoders(eyes, "cpu", dino=str(eyes / "encoders" / "clip"))
    (tmp_path / "encoders").mkdir()
    with pytest.raises(UserError, match="no such folder"):
        encoders.load_encoders(tmp_path, "cpu")
