"""Class images: each is itself whatever is drawn with it, a stopped set goes on, and a set is never used wrongly."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from screens import RecordingScreen

import personalize
from personalize import models
from personalize.common import run_folder
from personalize.common.errors import UserError
from personalize.common.recipe import load_recipe
from personalize.common.terminal import SILENT
from personalize.data import class_images

ROOT = Path(personalize.__file__).parents[1]
SETTINGS = ["class_word=dog", "draw.sampler=ddim", "prior.steps=2", "prior.guidance=2", "prior.batch=2", "device=cpu"]
SETTINGS.append("dtype=float32")  # else some CPUs would draw in bfloat16


@pytest.fixture(scope="module")
def model(tiny_sd):
    return models.load_model(str(tiny_sd), device="cpu", dtype="float32", say=lambda line: None)


def recipe_of(count=6, *more):
    return load_recipe(None, [*SETTINGS, f"prior.count={count}", *more])


def settings_of(model, recipe):
    return class_images.class_image_settings(model, recipe, *recipe.class_word)


def complete(model, recipe, folder, *, root=None, word="dog"):
    """(the folder, how many were drawn)"""
    word = word and recipe.class_word[0]
    return class_images.complete_set(model, recipe, word, root=root, folder=folder, screen=SILENT)


def draw(model, folder, count=6, *more):
    recipe = recipe_of(count, *more)
    complete(model, recipe, folder)
    return folder


@pytest.fixture(scope="module")
def six(model, tmp_path_factory):
    """Six images, drawn at once."""
    return draw(model, tmp_path_factory.mktemp("six") / "set")


def start(base, folder, *, count, **environment):
    """The command in a process of its own, running."""
    words = [w for text in SETTINGS[1:] for w in ("--set", text)]
    return subprocess.Popen(
        [sys.executable, "-m", "personalize", "prior", "dog", "--base", base, "--count", str(count), "--out", folder, *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def pngs(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


def assert_same(folder, other, count=6):
    """Files and latents are equal, bit for bit."""
    assert pngs(folder) == pngs(other) and len(pngs(folder)) == count
    assert torch.equal(class_images.class_latents(folder, count), class_images.class_latents(other, count))
    assert (folder / "metadata.jsonl").read_text() == (other / "metadata.jsonl").read_text()


def test_a_set_holds_these_files(six):
    assert sorted(path.name for path in six.iterdir()) == [
        *(f"0000{i}.png" for i in range(6)),
        *(f"latents-0000{i}-0000{i + 1}.safetensors" for i in (0, 2, 4)),
        "lock.flock", "manifest.json", "metadata.jsonl",
    ]  # fmt: skip
    manifest = json.loads((six / "manifest.json").read_text())
    assert (manifest["kind"], manifest["status"], manifest["count"]) == ("prior", "finished", 6)
    assert manifest["settings"]["prompt"] == "a dog"


def test_the_images_of_a_set_differ(six):
    assert len(set(pngs(six).values())) == 6
    z0 = class_images.class_latents(six, 6)
    assert all((z0[i] - z0[j]).abs().max() > 0.1 for i in range(6) for j in range(i))


def test_an_image_is_the_decoded_latent_of_its_number(model, six):
    from personalize.generation import sampling

    redrawn = sampling.to_pil(model.decode_latents(class_images.class_latents(six, 6)))
    for again, image in zip(redrawn, class_images.load_class_images(six, 6), strict=True):
        difference = torch.tensor(list(again.tobytes())) - torch.tensor(list(image.tobytes()))
        assert difference.abs().max() <= 1


@pytest.mark.parametrize("batch", [1, 4])
def test_an_image_depends_on_its_number_alone_whatever_the_batch(model, six, tmp_path, batch):
    other = draw(model, tmp_path / "set", 5, f"prior.batch={batch}")
    assert (class_images.class_latents(other, 5) - class_images.class_latents(six, 5)).abs().max() < 1e-4


def test_two_then_six_images_are_six_at_once(model, six, tmp_path):
    folder = draw(model, tmp_path / "set", 2)
    assert len(pngs(folder)) == 2
    assert_same(draw(model, folder), six)


def test_three_then_six_images_are_six_at_once(model, tmp_path):
    folder = draw(model, tmp_path / "parts", 3, "prior.batch=3")
    assert_same(draw(model, folder, 6, "prior.batch=3"), draw(model, tmp_path / "once", 6, "prior.batch=3"))


def test_the_same_command_again_draws_nothing_and_changes_nothing(model, six):
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in six.iterdir()}
    result = complete(model, recipe_of(), six)
    assert result == (six, 0)
    assert before == {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in six.iterdir()}
    assert complete(model, recipe_of(4), six) == (six, 0)
    assert json.loads((six / "manifest.json").read_text())["count"] == 6


@pytest.mark.slow
def test_a_killed_set_goes_on_as_if_it_had_not_been(model, tiny_sd, tmp_path):
    once = draw(model, tmp_path / "once", 40, f"base={tiny_sd}")
    folder = tmp_path / "killed"
    process = start(tiny_sd, folder, count=40)
    while process.poll() is None and not list(folder.glob("latents-*")):
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert 0 < len(class_images.present_images(folder)) < 40
    assert json.loads((folder / "manifest.json").read_text())["status"] == "running"
    assert_same(draw(model, folder, 40), once, count=40)
    assert not list(folder.glob(".tmp-*")) and not (folder / "lock").exists()


def test_a_set_killed_before_its_manifest_is_not_foreign(model, six, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "lock").write_text(json.dumps({"host": os.uname().nodename, "pid": 2**22 + 1, "started": "1"}))
    assert_same(draw(model, folder), six)


def test_an_image_without_its_latents_is_drawn_anew(model, six, tmp_path):
    folder = tmp_path / "set"
    shutil.copytree(six, folder)
    (folder / "latents-00002-00003.safetensors").unlink()
    (folder / "00003.png").write_bytes(b"half an image")
    assert_same(draw(model, folder), six)


def test_a_deleted_image_is_drawn_again_and_the_others_are_not(model, six, tmp_path):
    folder = tmp_path / "set"
    shutil.copytree(six, folder)
    kept = (folder / "00000.png").stat().st_mtime_ns
    (folder / "00003.png").unlink()
    draw(model, folder)
    assert (class_images.class_latents(folder, 6) - class_images.class_latents(six, 6)).abs().max() < 1e-4
    assert (folder / "00000.png").stat().st_mtime_ns == kept
    one, other = (torch.tensor(list(Image.open(f / "00003.png").tobytes())) for f in (folder, six))
    assert (one - other).abs().max() <= 1


@pytest.mark.parametrize("ranks", [(0, 1), (1, 0)])
def test_two_processes_draw_each_image_once(model, six, tmp_path, monkeypatch, ranks):
    folder, drawn = tmp_path / "set", []
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ranks:
        monkeypatch.setenv("RANK", str(rank))
        drawn.append(complete(model, recipe_of(), folder)[1])
    assert sorted(drawn) == [2, 4]
    assert json.loads((folder / "manifest.json").read_text())["status"] == "finished"
    assert_same(folder, six)


@pytest.mark.slow
def test_two_processes_at_once_draw_the_set_of_one(six, tiny_sd, tmp_path):
    folder = tmp_path / "set"
    both = [start(tiny_sd, folder, count=6, RANK=str(rank), WORLD_SIZE="2") for rank in (0, 1)]
    assert [process.wait(timeout=200) for process in both] == [0, 0]
    assert_same(folder, six)


def test_a_set_that_another_job_draws_is_waited_for_and_not_drawn_again(model, six, tmp_path):
    folder, is_held, may_end = tmp_path / "set", threading.Event(), threading.Event()

    def other_job():
        with run_folder.lock(folder):
            is_held.set()
            may_end.wait(20)
            shutil.copytree(six, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("lock*"))

    job = threading.Thread(target=other_job)
    job.start()
    is_held.wait(20)
    screen = RecordingScreen()
    screen.say = lambda line: (screen.lines.append(line), may_end.set())
    _, drawn = class_images.complete_set(model, recipe_of(), "dog", root=tmp_path, folder=folder, screen=screen)
    job.join()
    assert drawn == 0 and screen.lines[0].startswith(f"waiting for {folder}, which process {os.getpid()} on host")
    assert_same(folder, six)


@pytest.mark.slow
def test_two_jobs_at_once_draw_one_set(six, tiny_sd, tmp_path):
    both = [start(tiny_sd, tmp_path / "set", count=6) for _ in range(2)]
    assert [process.wait(timeout=200) for process in both] == [0, 0]
    assert_same(tmp_path / "set", six)


def test_datasets_reads_a_set_as_images_with_text(six, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    rows = datasets.load_dataset("imagefolder", data_dir=str(six), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(rows) == 6
    assert set(rows["text"]) == {"a dog"}
    assert list(rows["index"]) == list(range(6))
    assert rows[3]["image"].tobytes() == Image.open(six / "00003.png").tobytes()


@pytest.fixture
def with_bfloat16(monkeypatch):
    """A CPU that has it; this one computes the same, perhaps more slowly."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": True})


@pytest.fixture
def fresh(tiny_sd):
    return models.load_model(str(tiny_sd), device="cpu", say=lambda line: None)


def test_where_the_cpu_has_bfloat16_images_are_those_of_a_base_in_it_and_the_weights_stay(
    with_bfloat16, fresh, six, tiny_sd, tmp_path
):
    def weights():
        return {id(p): p for network in fresh.networks.values() for p in network.parameters()}

    before = {key: (p.data_ptr(), p.detach().clone()) for key, p in weights().items()}
    folder = draw(fresh, tmp_path / "set", 6, "dtype=auto")
    half = models.load_model(str(tiny_sd), device="cpu", dtype="bfloat16", say=lambda line: None)
    assert_same(folder, draw(half, tmp_path / "half", 6, "dtype=bfloat16"))
    assert pngs(folder) != pngs(six)
    after = weights()
    assert fresh.dtype == torch.float32 and after.keys() == before.keys()
    for key, (place, value) in before.items():
        assert after[key].data_ptr() == place and after[key].dtype == torch.float32 and torch.equal(after[key], value)


def test_bfloat16_images_and_float32_images_are_two_sets(with_bfloat16, fresh, six, tmp_path):
    wanted = settings_of(fresh, recipe_of(6, "dtype=auto"))
    assert wanted == settings_of(fresh, recipe_of()) | {"dtype": "bfloat16"}
    with pytest.raises(UserError, match="dtype is 'float32' there, 'bfloat16' here"):
        class_images.check_folder(six, wanted)
    assert draw(fresh, six) == six, "float32 was asked for, and these are it"


@pytest.mark.parametrize("capabilities", [{"avx512_bf16": False, "avx512_f": True}, {"bf16": True}, {}])
def test_a_cpu_without_bfloat16_draws_in_float32(fresh, monkeypatch, capabilities):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert settings_of(fresh, recipe_of(6, "dtype=auto"))["dtype"] == "float32"


def test_what_is_there_needs_no_copy_of_the_weights_and_what_fails_leaves_them(with_bfloat16, fresh, tmp_path, monkeypatch):
    folder = draw(fresh, tmp_path / "set", 2, "dtype=auto")
    types = []
    monkeypatch.setattr(fresh, "decode_latents", lambda z0: types.append(fresh.unet.dtype) or 1 / 0)
    assert draw(fresh, folder, 2, "dtype=auto") == folder and not types
    (folder / "00001.png").unlink()
    with pytest.raises(ZeroDivisionError):
        draw(fresh, folder, 2, "dtype=auto")
    assert types == [torch.bfloat16] and fresh.unet.dtype == fresh.dtype == torch.float32


CHANGES = [
    "prior.prompt=a photo of a {class}", "class_word=cat", "prior.negative=red", "draw.sampler=dpm++2m", "prior.steps=3",
    "prior.guidance=1.5", "photos.size=64", "seed=1",
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_the_key_changes_with_what_decides_the_images(model, tmp_path, change):
    same, other = (settings_of(model, recipe_of(6, *more)) for more in ([], [change]))
    assert class_images.folder_for(tmp_path, same) != class_images.folder_for(tmp_path, other)


def test_the_key_changes_with_weights_and_dtype_and_with_nothing_else(model, tiny_sd, tmp_path):
    wanted = settings_of(model, recipe_of())
    for change in ({"fingerprint": "0" * 12}, {"dtype": "bfloat16"}):
        assert class_images.folder_for(tmp_path, wanted | change) != class_images.folder_for(tmp_path, wanted)
    assert class_images.folder_for(tmp_path, wanted | {"base": "elsewhere"}) == class_images.folder_for(tmp_path, wanted)
    for more in (
        ["train.lr=1"],
        ["prior.batch=5"],
        ["token=zqv"],
        ["draw.guidance=9"],
        ["draw.negative=red"],
        ["draw.steps=7"],
    ):
        assert settings_of(model, recipe_of(9, *more)) == wanted


def test_draw_steps_count_where_the_prior_has_none(model):
    steps = [settings_of(model, recipe_of(6, "prior.steps=0", f"draw.steps={n}"))["steps"] for n in (7, 8)]
    assert steps == [7, 8]


def test_each_key_has_its_own_folder_in_the_root(model, tmp_path):
    one, other = (complete(model, recipe_of(1, f"seed={seed}"), None, root=tmp_path)[0] for seed in (0, 1))
    assert one != other and one.parent == other.parent == tmp_path
    assert pngs(one) != pngs(other)


@pytest.mark.parametrize("change", ["prior.prompt=a red {class}", "seed=5", "class_word=cat"])
def test_a_set_of_something_else_is_refused_with_the_reason(model, six, change):
    wanted = settings_of(model, recipe_of(6, change))
    with pytest.raises(UserError, match="do not fit this run: .* there, .* here"):
        draw(model, six, 6, change)
    with pytest.raises(UserError, match="seed is 0 there, 5 here" if "seed" in change else "prompt is 'a dog' there"):
        class_images.check_folder(six, wanted)


def test_a_set_of_another_base_is_refused(model, six):
    wanted = settings_of(model, recipe_of()) | {"fingerprint": "0" * 12}
    with pytest.raises(UserError, match="fingerprint is"):
        class_images.check_folder(six, wanted)


def test_a_folder_with_files_of_others_is_refused_and_left_alone(model, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "holiday.png").write_bytes(b"mine")
    with pytest.raises(UserError, match="did not make, holiday.png.*--prior-images .*mine"):
        draw(model, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["holiday.png"]


@pytest.mark.parametrize("leftover", [".DS_Store", ".ipynb_checkpoints/", "Thumbs.db", "desktop.ini", "._a.png"])
def test_what_systems_leave_in_a_folder_is_no_ones_file(model, tmp_path, leftover):
    place = tmp_path / leftover
    place.mkdir() if leftover.endswith("/") else place.write_bytes(b"left")
    class_images.check_folder(tmp_path, settings_of(model, recipe_of()))
    assert place.exists()


def test_too_few_class_images_are_counted_and_the_remedy_named(six):
    with pytest.raises(UserError, match=r"lacks 2 of 8 class images, such as 00006.png. .*personalize prior"):
        class_images.class_latents(six, 8)


def test_a_class_is_asked_for(model, tmp_path):
    with pytest.raises(UserError, match="which class"):
        complete(model, recipe_of(), tmp_path, word="")


def test_the_function_prior_draws_into_the_root(tiny_sd, tmp_path):
    result = personalize.prior(
        "dog", settings=[f"base={tiny_sd}", *SETTINGS[1:], "prior.count=1"], root=tmp_path, screen=SILENT
    )
    assert result.folder.parent == tmp_path and (result.folder / "00000.png").exists()
