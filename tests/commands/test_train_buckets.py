"""A run whose photos keep their shape, as the commands know it: class images, resuming, drawing and scoring in any shape."""

import json
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file
from screens import RecordingScreen

import personalize
from personalize.common import run_folder
from personalize.common.errors import Interrupted, UserError
from personalize.data import class_images
from personalize.training import loop

ROOT = Path(personalize.__file__).parents[1]
SETTINGS = ["class_word=dog", "token=zqv", "device=cpu", "photos.hold_out=0", "photos.shape=buckets", "train.methods=lora"]
SETTINGS += ["train.lr=1e-2", "train.steps=4", "prior.count=4", "prior.steps=1", "draw.steps=1", "draw.sampler=ddim"]
SIZES = [(72, 24), (72, 24), (48, 48), (24, 72)]  # of photos; the buckets are 48×16, 32×32 and 16×48


@pytest.fixture(scope="module")
def shaped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shaped")
    for k, size in enumerate(SIZES):
        Image.open(ROOT / "data_examples" / "dog" / f"0{k}.png").convert("RGB").resize(size).save(folder / f"{k}.png")
    return folder


def train(base, photos, place, *more, **options):
    places = {"runs": place / "runs", "priors": place / "priors"}
    return personalize.train(photos, settings=[f"base={base}", *SETTINGS, *more], **places, **options).folder


@pytest.mark.slow
def test_class_images_are_drawn_in_the_buckets_and_a_stopped_run_goes_on_bit_for_bit(tiny_sd, shaped, tmp_path, monkeypatch):
    screen = RecordingScreen()
    folder = train(tiny_sd, shaped, tmp_path, screen=screen)
    assert "photos keep their shape, in 3 sizes: 16×48 (1), 32×32 (1), 48×16 (2); each batch is of one size" in screen.lines
    manifest = run_folder.read_manifest(folder)
    assert {name: each["size"] for name, each in manifest["prior"].items()} == {
        "dog 48x16": "48x16", "dog 16x48": "16x48", "dog 32": 32,
    }  # fmt: skip
    drawn = {path.parent: Image.open(path).size for path in (tmp_path / "priors").rglob("00000.png")}
    assert sorted(drawn.values()) == [(16, 48), (32, 32), (48, 16)]
    most = Path(manifest["subjects"][0]["prior_folder"])
    assert drawn[most] == (48, 16) and len(class_images.present_images(most)) == 2, "the shape of most photos first"
    assert Image.open(folder / "photos.png").size == (4 * 48 + 3 * 4, 48)
    verified = personalize.verify(folder)
    assert not verified.failed and verified.passed[-1].endswith("bit for bit")
    run_steps = loop.run_steps

    def stopped(run, start, **options):  # after two steps, as a signal would
        raise_at, step = 2, run.engine.step
        counted = []

        def one(batch, **named):
            if len(counted) == raise_at:
                raise Interrupted("stopped")
            counted.append(batch)
            return step(batch, **named)

        run.engine.step = one
        return run_steps(run, start, **options)

    other = tmp_path / "other"
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(loop, "run_steps", stopped)
        train(tiny_sd, shaped, other, "train.checkpoint_every=2")
    assert run_folder.checkpoints(next((other / "runs").glob("*")))[-1].name == "step-000002"
    again = train(tiny_sd, shaped, other, "train.checkpoint_every=2")
    one, two = (load_file(f / "model/pytorch_lora_weights.safetensors") for f in (folder, again))
    assert all((one[name] == two[name]).all() for name in one)


def test_ones_own_class_images_are_cut_to_each_bucket(tiny_sd, shaped, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    for k in range(3):
        Image.open(ROOT / "data_examples" / "dog" / f"0{k}.png").resize((60, 50)).save(own / f"{k}.png")
    folder = train(tiny_sd, shaped, tmp_path, prior_images=own)
    manifest = run_folder.read_manifest(folder)
    assert {each["images"] for each in manifest["prior"].values()} == {"own"} and manifest["recipe"]["prior"]["count"] == 3
    sizes = sorted(Image.open(path).size for path in (tmp_path / "priors").rglob("*.png"))
    assert sizes == [(16, 48)] * 3 + [(32, 32)] * 3 + [(48, 16)] * 3


def test_a_folder_of_drawn_images_has_one_size_and_a_small_photo_does_not_fill_its_bucket(tiny_sd, shaped, tmp_path):
    with pytest.raises(UserError, match="--prior drawn holds images of one size, and these photos have 3"):
        train(tiny_sd, shaped, tmp_path, prior_folder=Path("drawn"))
    with pytest.raises(UserError, match=r"\.png is 72×24 px, and its bucket of 96×32 px would enlarge it"):
        train(tiny_sd, shaped, tmp_path, "photos.size=64")
    with pytest.raises(UserError, match="photos.size = 40 px is not a multiple of 16.* The nearest: 32 or 48"):
        train(tiny_sd, shaped, tmp_path, "photos.size=40")
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_plan_rehearses_the_largest_bucket_also_of_a_single_photo(tiny_sd, shaped, photos):
    settings = [f"base={tiny_sd}", *SETTINGS[2:], "prior.count=3"]
    peaks = [personalize.plan(source, class_word="dog", settings=settings).peak for source in (shaped, photos / "00.png")]
    assert peaks[0] == pytest.approx(peaks[1], rel=0.05)


@pytest.mark.slow
def test_toyland_learns_and_is_scored_in_any_shape(tmp_path):
    """Checkpoints are chosen, and the run evaluated with its maps, by images of 96×64 px; photos are of 64×64 and 96×32."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for k in range(4):
        size = (64, 64) if k % 2 else (120, 40)
        Image.open(ROOT / "data_examples" / "dog" / f"0{k}.png").convert("RGB").resize(size).save(folder / f"{k}.png")
    settings = [text for text in SETTINGS if not text.startswith(("train.lr", "train.steps", "prior.count"))]
    settings += [
        "draw.size=96x64",
        "choose.every=1",
        "choose.count=1",
        "choose.class_count=1",
        "train.steps=1",
        "prior.count=0",
    ]
    run = personalize.train(folder, settings=settings, runs=tmp_path / "runs").folder
    images = list((run / "choosing").rglob("*.png"))
    assert images and {Image.open(path).size for path in images} == {(96, 64)}
    options = ["evaluate.protocol=quick", "evaluate.count=1", "evaluate.class_count=1", "draw.size=96x64"]
    result = personalize.evaluate(run, settings=[*options, "device=cpu", "draw.steps=1"])
    assert result.metrics["protocol"]["size"] == "96x64"
    assert "96×64 px" in result.report.read_text() or "96x64" in result.report.read_text()
    assert json.loads((run / "evaluation" / "metrics.json").read_text())["photos"][0]["notes"][0].startswith("0.png: 120×40 px")
