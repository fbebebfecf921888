"""What `export` writes is what was trained, to whoever reads it: a fresh process draws the run's image with it.

B is the bare base's image, R the run's own, X that of the exported files alone: X is R, and R is not B.
"""

import copy
import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from bases import packable
from PIL import Image
from safetensors import safe_open

import personalize
from personalize import models
from personalize.commands import export as export_command
from personalize.commands.export import model_card, targets, verify
from personalize.commands.export.hub import Push
from personalize.commands.export.hub import require_possible as require_push_possible
from personalize.commands.export.model_card import Card
from personalize.commands.export.targets import Form
from personalize.common.errors import UserError
from personalize.generation import sampling
from personalize.models.lazy_imports import lazy_imports

PHOTOS = Path(__file__).parents[2] / "data_examples" / "dog"
DRAW = ["draw.size=32", "draw.steps=4", "draw.sampler=ddim", "draw.count=1", "draw.guidance=5.0", "device=cpu"]
TRAIN = ["device=cpu", "prior.count=0", "train.steps=3", "train.batch=2"]
LORA = ["train.methods=lora", "train.text_encoder=true", "train.lr=6e-2", "lora.rank=3", "lora.alpha=7.5"]
RARE = "token=zqv"
METHODS = {
    "full": ["train.methods=full", "train.text_encoder=true", "train.lr=3e-3", RARE],
    "lora": [*LORA, RARE],
    "lokr": ["train.methods=lokr", "train.lr=1e-1", RARE],
    "words": ["train.methods=textual-inversion", "train.lr=1", "embedding.vectors=2"],
    "pivotal": [*LORA, "train.methods=[textual-inversion,lora]", "embedding.lr=1", "embedding.vectors=2"],
    "custom": ["train.methods=custom-diffusion", "train.lr=1e-2", "embedding.lr=1"],
}  # fmt: skip
CASES = [
    "full sd diffusers", "full sd diffusers half", "full sd single-file", "full sd single-file half",
    "lora sd diffusers", "lora sd diffusers half", "lora sd kohya", "lora sd kohya half",
    "lora sd diffusers fuse", "lora sd single-file fuse",
    "lora sdxl diffusers", "lora sdxl kohya", "lora sdxl single-file fuse",
    "lokr sd kohya", "lokr sd diffusers fuse", "lokr sd single-file fuse",
    "words sd diffusers", "words sd a1111-embedding", "words sdxl a1111-embedding",
    "pivotal sd diffusers", "pivotal sd kohya", "pivotal sd diffusers fuse", "pivotal sd single-file fuse",
    "custom sd diffusers fuse", "custom sd single-file fuse",
]  # fmt: skip
FRESH = """
import json, sys
import personalize
from personalize import models
jobs, known = json.load(sys.stdin)
models.load_model = read_once(models.load_model, known)
for job in jobs:
    print(personalize.generate(**job).files[0])
"""


def read_once(load, known):
    """`models.load` that reads each of the known bases once, and gives copies: each read takes a third of a second."""
    kept = {}

    def call(base, **options):
        if base not in known:
            return load(base, **options)
        key = base, options["dtype"]
        if key not in kept:
            kept[key] = load(base, **options)
        return copy.deepcopy(kept[key], {id(kept[key].family): kept[key].family})

    return call


@pytest.fixture(scope="module")
def bases(tiny_sd, tiny_sdxl, tmp_path_factory):
    place = tmp_path_factory.mktemp("bases")
    return {name: packable(base, place / name) for name, base in (("sd", tiny_sd), ("sdxl", tiny_sdxl))}


@pytest.fixture(scope="module", autouse=True)
def bases_are_read_once(bases):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "load_model", read_once(models.load_model, [str(base) for base in bases.values()]))
        yield


@pytest.fixture(scope="module")
def run_of(bases, tmp_path_factory):
    """A finished run of a method on a base, once."""
    made, root = {}, tmp_path_factory.mktemp("runs")

    def get(method, base="sd"):
        if (method, base) not in made:
            settings = [*TRAIN, *METHODS[method], f"base={bases[base]}"]
            made[method, base] = personalize.train(
                PHOTOS, class_word="dog", settings=settings, runs=root / f"{method}-{base}"
            ).folder
        return made[method, base]

    return get


@pytest.fixture(scope="module")
def images(run_of, bases, tmp_path_factory):
    """{(method, base): (B, R)}"""
    made, root = {}, tmp_path_factory.mktemp("images")

    def get(method, base):
        if (method, base) not in made:
            run = run_of(method, base)
            prompt = prompt_of(run)
            bare = personalize.generate([prompt], base=str(bases[base]), settings=DRAW, out=root / f"{method}-{base}-bare")
            own = personalize.generate([prompt], run=run, settings=DRAW, out=root / f"{method}-{base}")
            made[method, base] = pixels(bare.files[0]), pixels(own.files[0])
        return made[method, base]

    return get


@pytest.fixture(scope="module")
def drawn(run_of, bases, tmp_path_factory):
    """{case: X}, all drawn by one fresh process, which is given the files and nothing of the run."""
    root, jobs = tmp_path_factory.mktemp("exports"), []
    for case in CASES:
        method, base, to, *more = case.split()
        run, out = run_of(method, base), root / case.replace(" ", "-")
        out.mkdir()
        if to == "diffusers":
            out = out / "folder"
        files = personalize.export(run, to=to, fuse="fuse" in more, half="half" in more, out=out, check=False).files
        jobs.append(job_of(case, run, files, bases[base]) | {"settings": DRAW, "out": str(root / "drawn" / str(len(jobs)))})
    code = "import copy\n" + inspect.getsource(read_once) + FRESH
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps([jobs, [str(base) for base in bases.values()]]), capture_output=True,
        text=True, env=os.environ | {"PERSONALIZE_CACHE": str(root / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {case: pixels(path) for case, path in zip(CASES, done.stdout.split("\n"))}


def job_of(case, run, files, base):
    """What a user of the files would give to `generate`."""
    method, _, to, *more = case.split()
    prompt, token = prompt_of(run), token_of(run)
    beside = [path for path in files[1:] if path.suffix == ".safetensors"]
    if to == "a1111-embedding":
        beside = files
    if beside:  # there the file's name is the word
        prompt = prompt.replace(token, beside[0].stem)
    job = {"base": str(base), "prompts": [prompt], "embeddings": [str(path) for path in beside]}
    if method == "full" or "fuse" in more:
        job["base"] = str(files[0])
    elif to == "kohya":
        job["loras"] = [str(files[0])]
    elif to == "diffusers":
        job["loras"] = [str(files[0])] if method != "words" else []
        job["embeddings"] = [str(files[0])] if method != "lora" else []
    if method == "pivotal" and to == "diffusers" and "fuse" in more:  # a tokenizer does not know that two tokens are one word
        job["prompts"] = [prompt.replace(token, f"{token} {token}_1")]
    return job


def subject_of(run):
    return json.loads((run / "manifest.json").read_text())["subjects"][0]


def prompt_of(run):
    return subject_of(run)["prompt"]


def token_of(run):
    return subject_of(run)["token"]


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.mark.parametrize("case", CASES)
def test_a_fresh_process_draws_the_runs_image_with_the_files_alone(case, drawn, images):
    method, base, *_, last = case.split()
    bare, own = images(method, base)
    allowed = verify.SAME_HALF if last == "half" else verify.SAME
    print(case, verify.distance(drawn[case], own), verify.distance(own, bare))
    assert verify.distance(drawn[case], own) <= allowed
    assert verify.distance(drawn[case], bare) >= verify.MARGIN * allowed


@pytest.mark.parametrize("half", [False, True])
def test_plain_diffusers_draws_the_runs_image_by_a_folder_that_knows_the_word(run_of, images, tmp_path, half):
    """A LoRA and a word of two vectors, baked in. That it reads our LoRA and embedding files is tested with those."""
    with lazy_imports():
        from diffusers import DDIMScheduler, DiffusionPipeline

    run = run_of("pivotal")
    folder = personalize.export(run, to="diffusers", fuse=True, half=half, out=tmp_path / "dog", check=False).files[0]
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    options = {"num_inference_steps": 4, "guidance_scale": 5.0, "generator": sampling.image_generators(0, range(1))}
    image = np.asarray(pipeline(prompt_of(run), **options).images[0])
    assert verify.distance(image, images("pivotal", "sd")[1]) <= (verify.SAME_HALF if half else verify.SAME)


@pytest.fixture
def no_process(monkeypatch, images):
    """Instead of a fresh process: hands over the run's image, or one that is told."""

    def patch(method="lora", *, image=None):
        own = images(method, "sd")[1] if image is None else image
        monkeypatch.setattr(verify, "draw_in_fresh_process", lambda *args, **options: own)

    return patch


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.slow
def test_the_commands_own_check_says_how_near_and_how_far(run_of, terminal):
    """The one test of a real fresh process with its options: a LoRA and an embedding on the run's base."""
    run = run_of("pivotal")
    status, out, err = terminal("export", run, "--to", "kohya", "--set", "draw.guidance=5.0", "--device", "cpu", "--json")
    assert (status, err) == (0, "") and out.count("\n") == 1
    found = json.loads(out)
    assert found["check"]["to_run"] <= found["check"]["allowed"] == verify.SAME
    assert found["check"]["to_base"] >= verify.MARGIN * verify.SAME
    assert [Path(file).name for file in found["files"]] == ["subject-dog-lora.safetensors", "subject-dog.safetensors"]
    assert names(run / "export") == ["exports.jsonl", "lock.flock", "subject-dog-lora.safetensors", "subject-dog.safetensors"]
    rows = [json.loads(line) for line in (run / "export" / "exports.jsonl").read_text().splitlines()]
    assert {"subject-dog-lora.safetensors", "subject-dog.safetensors"} == {
        row["path"] for row in rows if row["check"] == found["check"]
    }


def test_an_export_that_draws_another_image_is_not_kept_and_an_older_one_is(run_of, images, no_process):
    run = run_of("lora")
    good = personalize.export(run, to="kohya", settings=DRAW, check=False).files[0]
    before, rows = good.read_bytes(), (run / "export" / "exports.jsonl").read_text()
    no_process(image=images("lora", "sd")[0])  # as if the file did nothing
    with pytest.raises(
        UserError, match=r"does not draw the run's image, so it is not kept: .* \d+\.\d\d of 255 .* and 0\.0 from"
    ):
        personalize.export(run, to="kohya", settings=DRAW)
    with pytest.raises(UserError, match="does not draw the run's image"):
        personalize.export(run, to="single-file", fuse=True, settings=DRAW)
    assert names(run / "export") == ["exports.jsonl", "lock.flock", good.name]
    assert good.read_bytes() == before and (run / "export" / "exports.jsonl").read_text() == rows


def test_a_file_that_a_fresh_process_cannot_read_is_not_kept(run_of, monkeypatch, tmp_path):
    failed = subprocess.CompletedProcess([], 2, "", "warning: none of this\nerror: the file was made for another base.\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: failed)
    said = "cannot draw with what was written, so it is not kept: the file was made for another base."
    with pytest.raises(UserError, match=said):
        personalize.export(run_of("lora"), to="kohya", settings=DRAW, out=tmp_path / "x.safetensors")
    assert names(tmp_path) == []


def test_a_run_that_is_hardly_trained_cannot_be_checked(run_of, monkeypatch, tmp_path):
    monkeypatch.setattr(verify, "MARGIN", 100)
    with pytest.raises(UserError, match=r"is \d+\.\d\d of 255 away from the base's, less than the 50 .*--no-check"):
        personalize.export(run_of("lora"), to="kohya", settings=DRAW, out=tmp_path / "x.safetensors")
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("methods", "form", "works"),
    [
        (["full"], "kohya", "--to diffusers, --to single-file"),
        (["full"], "diffusers --fuse", "--to diffusers, --to single-file"),
        (["lora"], "a1111-embedding", "--to diffusers, --to kohya, --to diffusers --fuse, --to single-file --fuse"),
        (["lora"], "single-file", "--to diffusers, --to kohya, --to diffusers --fuse, --to single-file --fuse"),
        (["lora"], "kohya --fuse", "--to diffusers, --to kohya, --to diffusers --fuse, --to single-file --fuse"),
        (["boft"], "kohya", "--to diffusers --fuse, --to single-file --fuse"),
        (["loha"], "diffusers", "--to kohya, --to diffusers --fuse, --to single-file --fuse"),
        (["textual-inversion"], "single-file", "--to diffusers, --to a1111-embedding"),
        (["lora", "textual-inversion"], "a1111-embedding", "--to diffusers, --to kohya, --to diffusers --fuse"),
        (["textual-inversion", "oft"], "diffusers", "--to diffusers --fuse, --to single-file --fuse"),
        (["custom-diffusion"], "diffusers", "--to diffusers --fuse, --to single-file --fuse"),
    ],
)
def test_a_form_that_a_method_does_not_have_names_those_it_has(methods, form, works):
    to, fuse = form.split()[0], "--fuse" in form
    with pytest.raises(UserError, match=f"cannot be exported --to {form}. What works: {works}"):
        targets.require_possible(methods, Form(to, fuse, False))


def test_what_cannot_be_done_is_said_before_a_base_is_loaded(run_of, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "load_model", None)
    run = run_of("lora")
    for options, said in [
        ({"to": "khoya"}, "unknown format --to 'khoya'; did you mean 'kohya'"),
        ({"to": "single-file"}, "a run of lora cannot be exported --to single-file"),
        ({"to": "diffusers", "out": tmp_path / "x.safetensors"}, "writes a folder, and --out .*x.safetensors names a file"),
        ({"to": "kohya", "out": tmp_path / "x.pt"}, "should end with .safetensors, or be a folder that is there"),
        ({"to": "kohya", "public": True}, "--push owner/name"),
        ({"to": "kohya", "push": "me"}, "--push 'me' is not the name of a repository. Give owner/name"),
    ]:
        with pytest.raises(UserError, match=said):
            personalize.export(run, **options)


def test_a_base_that_no_single_file_can_hold_is_refused_by_name_before_anything_is_drawn(tiny_sd, tmp_path, monkeypatch):
    """Its heads and groups are not those that a reader takes for its widths; so it is with Toyland."""
    settings = [*TRAIN, *METHODS["full"], "train.steps=1", f"base={tiny_sd}"]
    run = personalize.train(PHOTOS, class_word="dog", settings=settings, runs=tmp_path / "runs").folder
    monkeypatch.setattr(verify, "draw_in_process", None)
    with pytest.raises(UserError, match=f"base '{tiny_sd}' has unet.attention_head_dim = 4 instead of 8.* Use --to diffusers"):
        personalize.export(run, to="single-file", settings=DRAW)
    assert not (run / "export").exists()


def test_the_terminal_asks_for_a_format_and_for_a_run(terminal):
    assert terminal("export")[::2] == (2, "error: which format? Give --to diffusers, single-file, kohya or a1111-embedding.\n")
    status, out, err = terminal("export", "--to", "kohya")
    assert (status, out) == (2, "") and "Make one: personalize train PHOTOS --class WORD" in err


def test_only_an_unchanged_export_of_the_same_run_is_replaced(run_of, tmp_path):
    out = tmp_path / "dog.safetensors"
    write = lambda method, **more: personalize.export(run_of(method), to="kohya", out=out, check=False, **more)  # noqa: E731
    out.write_text("mine")
    with pytest.raises(UserError, match="is there already, and it is not what an export of this run left there"):
        write("lora")
    assert out.read_text() == "mine"
    out.unlink()
    write("lora")
    whole = out.read_bytes()
    write("lora", half=True)
    assert out.stat().st_size < len(whole), "our own, in another precision now"
    with pytest.raises(UserError, match="is there already"):
        write("pivotal")
    out.write_bytes(whole)  # also our own: as an export leaves it that was killed before it put the next one there
    write("lora", half=True)
    out.write_bytes(whole[:-1])
    with pytest.raises(UserError, match="is there already"):
        write("lora")


def test_an_empty_folder_is_filled_and_another_is_not(run_of, tmp_path):
    (tmp_path / "empty").mkdir()
    personalize.export(run_of("lora"), to="diffusers", out=tmp_path / "empty", check=False)
    assert names(tmp_path / "empty") == ["pytorch_lora_weights.safetensors"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        personalize.export(run_of("lora"), to="diffusers", out=tmp_path / "mine", check=False)
    assert names(tmp_path / "mine") == ["letter.txt"]


def test_files_go_into_a_folder_that_is_there_under_their_own_names(run_of, tmp_path):
    """The tiny base has a vocabulary of its own, which a single file cannot hold."""
    files = personalize.export(run_of("pivotal"), to="single-file", fuse=True, out=tmp_path, check=False).files
    run = run_of("pivotal").name
    assert [path.name for path in files] == [f"{run}-fused.safetensors", "subject-dog.safetensors", "tokenizer"]
    assert names(tmp_path) == sorted(path.name for path in files)
    more = personalize.export(run_of("lora"), to="single-file", fuse=True, out=tmp_path / "x.safetensors", check=False).files
    assert [path.name for path in more] == ["x.safetensors"], "the vocabulary of the same base lies there already"


def test_a_lora_on_top_of_a_run_adds_to_it(run_of, images, tmp_path):
    """The run less itself is the base."""
    run = run_of("lora")
    file = personalize.export(run, to="kohya", out=tmp_path / "dog.safetensors", check=False).files[0]
    undone = personalize.generate(
        [prompt_of(run)], run=run, loras=[f"{file}:-1"], settings=DRAW, out=tmp_path / "undone"
    ).files[0]
    assert verify.distance(pixels(undone), images("lora", "sd")[0]) < 0.01


def test_a_checkpoint_is_exported_as_it_was(run_of, tmp_path):
    run = run_of("lora")
    result = personalize.export(run, to="kohya", out=tmp_path / "a.safetensors", check=False).files[0]
    last = personalize.export(run, to="kohya", checkpoint="3", out=tmp_path / "b.safetensors", check=False).files[0]
    assert tensors(result) == tensors(last)
    with pytest.raises(UserError, match="has no checkpoint '2'; it has step-000003"):
        personalize.export(run, to="kohya", checkpoint="2", out=tmp_path / "c.safetensors", check=False)


def test_a_kohya_file_says_rank_and_alpha_and_no_path(run_of, tmp_path):
    files = {}
    for base in ("sd", "sdxl"):
        out = tmp_path / f"{base}.safetensors"
        files[base] = personalize.export(run_of("lora", base), to="kohya", out=out, check=False).files[0]
    found = tensors(files["sd"])
    assert {key.split("_")[1] for key in found} == {"unet", "te"}
    assert {key.split("_")[1] for key in tensors(files["sdxl"])} == {"unet", "te1", "te2"}
    assert {value for key, value in found.items() if key.endswith(".alpha")} == {((), 7.5)}
    assert {value[0][0] for key, value in found.items() if key.endswith(".lora_down.weight")} == {3}
    assert str(tmp_path.parents[1]).encode() not in files["sd"].read_bytes()


def tensors(path):
    """{name: (shape, sum)}"""
    with safe_open(path, "pt") as file:
        values = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return {key: (tuple(value.shape), float(value.double().sum())) for key, value in values.items()}


class Hub:
    """HfApi that keeps what it is told."""

    calls, private, fails = [], True, None

    def create_repo(self, repo, **options):
        Hub.calls.append(("create", repo, options))
        if Hub.fails:
            raise Hub.fails
        return f"https://huggingface.co/{repo}"

    def model_info(self, repo):
        return type("Info", (), {"private": Hub.private})

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        Hub.calls.append(("upload", repo_id, sorted(p.relative_to(folder_path).as_posix() for p in folder_path.rglob("*.*"))))


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    Hub.calls, Hub.private, Hub.fails = [], True, None
    return Hub


def pushed(run, **options):
    return personalize.export(run, to="kohya", push="me/my-dog", settings=DRAW, check=False, **options)


def test_a_push_is_private_and_has_a_card_and_samples_and_no_photos(run_of, hub):
    run = run_of("pivotal")
    (run / "evaluation").mkdir(exist_ok=True)
    scores = {"dino": {"title": "DINO: same subject", "floor": 0.25, "score": 0.5, "ceiling": None, "relative": None}}
    (run / "evaluation" / "metrics.json").write_text(json.dumps({"run": {"model": "model"}, "scores": scores}))
    assert pushed(run).url == "https://huggingface.co/me/my-dog"
    samples = [f"samples/{i}.png" for i in range(1, 5)]
    files = ["README.md", *samples, "subject-dog-lora.safetensors", "subject-dog.safetensors"]
    assert hub.calls == [("create", "me/my-dog", {"exist_ok": True, "private": True}), ("upload", "me/my-dog", files)]
    folder = run / "export" / "upload-to-hub"
    card = (folder / "README.md").read_text()
    for line in (
        'instance_prompt: a <subject> dog', "| prompt | `a <subject> dog` |", "| `lora.alpha` | `7.5` | `0.0` |",
        "| DINO: same subject | 0.250 | 0.500 | - |", "say `a subject-dog dog` in a prompt", "(samples/4.png)",
        "4 photos, which are not in this repository",
    ):  # fmt: skip
        assert line in card, card
    assert "license" not in card and "base_model" not in card, "the base is a folder of this machine"
    everything = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert str(run.parents[1]).encode() not in everything, "no path of this machine"


def test_samples_are_the_runs_own_images_where_there_are_some_less_what_their_files_say(run_of, hub):
    run = run_of("lora")
    personalize.generate(["a zqv dog asleep"], run=run, settings=DRAW)
    pushed(run)
    assert hub.calls[1][2] == ["README.md", "samples/1.png", f"{run.name}.safetensors"]
    folder = run / "export" / "upload-to-hub"
    assert "`a zqv dog asleep`" in (folder / "README.md").read_text()
    assert Image.open(folder / "samples" / "1.png").info == {}


def test_photos_are_published_when_asked_and_only_as_the_squares_of_the_preview(run_of, hub):
    pushed(run_of("pivotal"), with_photos=True, public=True)
    assert hub.calls[0][2]["private"] is False and "photos.png" in hub.calls[1][2]
    assert "![The photos](photos.png)" in (run_of("pivotal") / "export" / "upload-to-hub" / "README.md").read_text()


def test_a_repository_that_is_public_already_gets_nothing_unless_it_may(run_of, hub):
    hub.private = False
    with pytest.raises(UserError, match="me/my-dog is there and for everyone to see.*--public"):
        pushed(run_of("pivotal"))
    assert [call[0] for call in hub.calls] == ["create"]
    pushed(run_of("pivotal"), public=True)


def test_without_a_network_the_folder_with_the_card_stays(run_of, monkeypatch):
    with pytest.raises(UserError, match="written, but not pushed to me/my-dog: .*is in .*upload-to-hub"):
        pushed(run_of("pivotal"))
    assert (run_of("pivotal") / "export" / "upload-to-hub" / "README.md").exists()


def test_a_card_of_a_base_on_the_hub_names_it_and_its_licence(run_of):
    manifest = json.loads((run_of("lora") / "manifest.json").read_text())
    manifest["base"] = manifest["recipe"]["base"] = "stabilityai/stable-diffusion-xl-base-1.0"
    manifest["recipe"]["train"]["init_from"] = "/home/me/secret/dog.safetensors"
    card = model_card.text(
        Card("me/dog", manifest, family="sdxl", to="diffusers", fused=False, samples=[], scores={},
             files={"pytorch_lora_weights.safetensors": "LoRA"})
    )  # fmt: skip
    for line in (
        'base_model: stabilityai/stable-diffusion-xl-base-1.0', 'base_model_relation: adapter', 'license: openrail++',
        'tags:\n- text-to-image\n- stable-diffusion-xl\n- dreambooth\n- lora\n', "`\"dog.safetensors\"`",
        'pipeline.load_lora_weights("me/dog", weight_name="pytorch_lora_weights.safetensors")',
    ):  # fmt: skip
        assert line in card, card
    assert "secret" not in card and "Samples" not in card and "Scores" not in card
    assert "image=image" not in card


@pytest.mark.parametrize(
    "family, kind", [("sd", "StableDiffusionInpaintPipeline"), ("sdxl", "StableDiffusionXLInpaintPipeline")]
)
def test_a_card_of_an_inpainting_base_says_that_it_takes_an_image_and_a_mask(run_of, family, kind):
    manifest = json.loads((run_of("lora") / "manifest.json").read_text())
    options = {
        "family": family,
        "to": "single-file",
        "fused": True,
        "samples": [],
        "scores": {},
        "files": {"dog.safetensors": "base"},
    }
    card = model_card.text(Card("me/dog", manifest, **options, inpaints=True))
    assert f'{kind}.from_single_file("dog.safetensors")' in card and "- inpainting\n" in card
    assert 'pipeline("a zqv dog", image=image, mask_image=mask).images[0]  # PIL images; the mask is white where' in card


@pytest.mark.parametrize("name", ["absolute", "../secret.png", "linked.png", "secret.jpg"])
def test_a_run_of_a_stranger_publishes_no_image_but_its_own(run_of, hub, tmp_path, name):
    """Its images.jsonl could name any file of yours: what is no PNG in its own folder is drawn anew instead."""
    run, secret = tmp_path / "run", tmp_path / "run" / "secret.png"
    shutil.copytree(run_of("pivotal"), run, ignore=shutil.ignore_patterns("export", "images"))
    (run / "images").mkdir()
    Image.new("RGB", (32, 32), (255, 0, 255)).save(secret)
    (run / "images" / "linked.png").symlink_to(secret)
    Image.new("RGB", (32, 32), (255, 0, 255)).save(run / "images" / "secret.jpg")
    row = {"file": str(secret) if name == "absolute" else name, "prompt": "a dog", "checkpoint": "model"}
    (run / "images" / "images.jsonl").write_text(json.dumps(row) + "\n")
    pushed(run)
    samples = sorted((run / "export" / "upload-to-hub" / "samples").iterdir())
    assert len(samples) == 4 and all(np.any(pixels(path) != (255, 0, 255)) for path in samples)


def test_a_run_that_is_reached_by_a_link_has_its_photos(run_of, tmp_path):
    (tmp_path / "run").symlink_to(run_of("lora"))
    require_push_possible(Push("owner/name", False, True), tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "photos.png").symlink_to(run_of("lora") / "photos.png")
    with pytest.raises(UserError, match="other has no photos.png of its own"):
        require_push_possible(Push("owner/name", False, True), tmp_path / "other")


def test_an_export_that_was_killed_before_or_after_it_was_put_there_can_be_repeated(run_of, tmp_path, monkeypatch):
    out = tmp_path / "dog.safetensors"
    write = lambda **more: personalize.export(run_of("lora"), to="kohya", out=out, check=False, **more)  # noqa: E731
    write(half=True)
    put = export_command._put

    def killed(source, final):
        raise KeyboardInterrupt

    def killed_after(source, final):
        put(source, final)
        raise KeyboardInterrupt

    for kill in (killed, killed_after):
        monkeypatch.setattr(export_command, "_put", kill)
        with pytest.raises(KeyboardInterrupt):
            write()
        monkeypatch.setattr(export_command, "_put", put)
        write(half=kill is killed)


def test_no_config_of_an_export_names_a_folder_of_this_machine(run_of, tmp_path):
    for method, fuse in (("full", False), ("lora", True)):
        folder = personalize.export(run_of(method), to="diffusers", fuse=fuse, out=tmp_path / method, check=False).files[0]
        configs = [path.read_text() for path in folder.rglob("*.json")]
        assert len(configs) > 4 and not [text for text in configs if "_name_or_path" in text or str(tmp_path.parent) in text]


def test_text_encoders_have_the_names_of_every_released_one(run_of, tmp_path):
    """Those of transformers 5 lack "text_model.", and transformers 4 then fills the encoder with random numbers."""
    for method, fuse in (("full", False), ("lora", True)):
        folder = personalize.export(run_of(method), to="diffusers", fuse=fuse, out=tmp_path / method, check=False).files[0]
        with safe_open(next((folder / "text_encoder").glob("*.safetensors")), "pt") as file:
            keys = set(file.keys())
        assert {"text_model.embeddings.token_embedding.weight", "text_model.encoder.layers.0.self_attn.q_proj.weight",
                "text_model.encoder.layers.1.mlp.fc2.bias", "text_model.final_layer_norm.weight"} <= keys  # fmt: skip
        assert all(key.startswith("text_model.") for key in keys)


def test_a_dora_is_not_exported_to_kohyas_form_that_programs_read_in_two_ways(run_of, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(run_of("lora"), run, ignore=shutil.ignore_patterns("export", "images"))
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["recipe"]["lora"]["dora"] = True
    (run / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="dora = true has no form of kohya's .*--to single-file --fuse"):
        personalize.export(run, to="kohya", out=tmp_path, check=False)


def test_a_diffusers_lora_has_its_scale_in_its_weights(run_of, tmp_path):
    """The run has alpha 7.5 and rank 3; who reads no header takes alpha for the rank."""
    (folder, *_) = personalize.export(run_of("lora"), to="diffusers", out=tmp_path / "lora", check=False).files
    with safe_open(folder / "pytorch_lora_weights.safetensors", "pt") as file:
        header = json.loads(file.metadata()["lora_adapter_metadata"])
    assert header["unet.lora_alpha"] == header["unet.r"] == 3 and not header["unet.alpha_pattern"]
