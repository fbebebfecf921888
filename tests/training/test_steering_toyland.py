"""On Toyland: CLIP guidance raises the score that it climbs; a classifier of five photos brings their subject nearer."""

import pytest

import personalize
from benchmarks import guidance, subjects, toyland
from personalize import models
from personalize.common.bases import TOYLAND
from personalize.common.terminal import SILENT
from personalize.evaluation import bootstrap, encoders
from personalize.evaluation.metrics import toyland_truth
from personalize.toyland.world.scenes import sample_scene, sample_subject
from personalize.training import steering

COUNT = 20
SEED = subjects.seed_of("dev", 0)  # of a dog


@pytest.mark.slow
def test_clip_guidance_raises_clip_t(tmp_path):
    model = models.load_model(str(TOYLAND), device="cpu", say=lambda line: None)
    encoder = encoders.load_encoders(model.folder, "cpu")
    texts = [toyland.prompt(sample_scene(guidance.FIRST + k)) for k in range(COUNT)]
    words, clip_t = encoder.clip_text(texts), []
    for scale in (0, 1):
        settings = ["draw.guidance=1", "draw.steps=16", f"draw.guide_clip={scale}"]
        images = guidance.guided(model, texts, settings, tmp_path)
        clip_t.append((encoder.clip_image(images) * words).sum(1).mean().item())
    assert clip_t[1] > clip_t[0] + 0.02, clip_t


@pytest.mark.slow
def test_a_classifier_of_five_photos_lowers_the_identity_error_on_the_bare_base(tmp_path):
    """By truth, and the place is still the prompt's."""
    model, probe = models.load_model(str(TOYLAND), device="cpu", say=lambda line: None), toyland_truth.load_probe()
    (tmp_path / "photos").mkdir()
    for k, photo in enumerate(subjects.render_photos(SEED, "dog")):
        photo.save(tmp_path / "photos" / f"{k}.png")
    recipe = personalize.resolve(settings=["draw.like=3", "draw.steps=16", "draw.guidance=2.2"])
    subject = steering.of_photos(tmp_path / "photos", "dog", recipe, model.size)
    steer = steering.prepare(model, recipe, subject, priors=tmp_path / "priors", screen=SILENT)
    texts, error, place = ["a dog in front of a castle"] * 48, [], []
    for wrap in (None, lambda rows: steer.of([texts[k] for k in rows])):
        reading = toyland_truth.read_images(probe, guidance.generate(model, texts, recipe.draw, wrap))
        truth = toyland_truth.parameters(sample_subject(SEED, "dog"))
        error.append(toyland_truth.identity_error(toyland_truth.errors(reading, truth, "dog")))
        place.append(toyland_truth.prompt_adherence(reading, texts)["place"].mean().item())
    change = bootstrap.paired_difference(*({(k,): e for k, e in enumerate(part.tolist())} for part in reversed(error)))
    figures = f"identity error {error[0].mean():.3f}, change {change.mean:+.3f} ({change.low:+.3f} to {change.high:+.3f})"
    assert change.mean <= -0.1 and place[1] >= 0.9, (figures, place)
    print(figures, place)
