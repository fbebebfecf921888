"""`personalize export`: a run as other programs read it, kept only where a fresh process draws the same image with it."""

import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL.Image import Image

from personalize.commands.export import hub, model_card, targets, verify
from personalize.commands.export.hub import Push
from personalize.commands.export.targets import Form, Product
from personalize.commands.export.verify import Check, Files
from personalize.commands.session import RUNS, open_run
from personalize.common import run_folder
from personalize.common.errors import UserError
from personalize.common.files import append_jsonl, content_hash, read_json, read_jsonl, scratch_folder, writing
from personalize.common.recipe import Recipe, recipe_from_dict
from personalize.common.terminal import SILENT, Terminal
from personalize.common.untrusted import Table, Text
from personalize.formats import single_file
from personalize.models.interface import LatentModel
from personalize.training import load_run

FOLDER = "export"  # in the run's folder
RECORD, STAGE, UPLOAD = "exports.jsonl", "stage", "upload-to-hub"  # in that one
RECORD_ROW = Table({"path": Text(), "sha256": Text()}, needs=("path", "sha256"))


@dataclass(frozen=True)
class _Job:
    """at: a checkpoint, or "" for the run's result; check: whether a fresh process draws with what was written."""

    folder: Path
    manifest: dict
    form: Form
    at: str
    check: bool
    push: Push | None


@dataclass(frozen=True)
class ExportResult:
    """files: what was written, the main one first; check: None where none was asked for; url: of the repository, or ""."""

    files: list[Path]
    check: Check | None
    url: str = ""


def export(
    run: Path | str | None = None,
    *,
    to: str,
    fuse: bool = False,
    half: bool = False,
    out: Path | str | None = None,
    checkpoint: str = "",
    base: str = "",
    check: bool = True,
    push: str = "",
    public: bool = False,
    with_photos: bool = False,
    settings: Sequence[str] = (),
    runs: Path = RUNS,
    screen: Terminal = SILENT,
) -> ExportResult:
    """A run (the newest finished one in `runs`), or one of its checkpoints, as other programs read it.

    to: diffusers, single-file, kohya or a1111-embedding; `fuse` bakes an adapter into its base; `half`: half precision.
    What was written is kept only if a fresh process draws the run's image with it; check=False leaves that out. push:
    owner/name on the hub. UserError where the run has no such form, where something else lies at the place, and where the
    check fails.
    """
    if not push and (public or with_photos):
        raise UserError("--public and --with-photos are about a repository on the hub: name it, --push owner/name.")
    folder = Path(run) if run else run_folder.newest_run(Path(runs))
    manifest, form, goal = load_run.require_run(folder), Form(to, fuse, half), Push(push, public, with_photos) if push else None
    targets.require_possible(manifest["methods"], form, dora=manifest["recipe"].get("lora", {}).get("dora", False))
    place, stem = _place(folder, manifest, form, Path(out).expanduser() if out else None)
    if goal:
        hub.require_possible(goal, folder)
    # float32 whatever the device: an adapter baked into half precision would lose much of itself.
    _, model, recipe, _ = open_run(
        run, runs=runs, base=base, settings=[*settings, "dtype=float32", "train.offload=false"], screen=screen
    )
    manifest["recipe"]["train"]["quantize"] = ""  # adapters on a quantized base are exported for the plain one
    job, home = _Job(folder, manifest, form, checkpoint, check, goal), folder / FOLDER
    if form.to == "single-file":
        single_file.require_packable(model.folder, f"base {model.name!r}")
    products = targets.products_of(model, manifest["methods"], form, subjects=manifest["subjects"], stem=stem)
    with run_folder.lock(home):
        new = [product for product in products if not _vocabulary_is_there(model, place, product)]
        for product in new:
            _require_ours(home, place / product.name)
        run_folder.require_free_disk(home, _bytes(model, form, products))
        with scratch_folder(home / STAGE) as stage:
            name, written, result, samples = _write(model, job, recipe, products=products, stage=stage, screen=screen)
            for product in new:  # the record first: what lies there after a kill is known as ours
                _record(home, stage / product.name, place / product.name, job, result)
                _put(stage / product.name, place / product.name)
        files = [place / product.name for product in new]
        _say(files, new, result, screen)
        if not goal:
            return ExportResult(files, result)
        card = _card(model, job, name, written, main=products[0], prompts=[prompt for prompt, _ in samples])
        photos = folder / hub.PHOTOS if with_photos else None
        everything, images = [place / product.name for product in products], [image for _, image in samples]
        upload = hub.prepare_upload(home / UPLOAD, card, files=everything, images=images, photos=photos)
    return ExportResult(files, result, hub.upload(upload, goal))


def _write(
    model: LatentModel, job: _Job, recipe: Recipe, *, products: list[Product], stage: Path, screen: Terminal
) -> tuple[str, Files, Check | None, list[tuple[str, Image]]]:
    """The products into the stage, checked -> the name of the run's state, the files, and (prompt, image) for a card.

    What the model draws comes first: writing takes it apart.
    """
    manifest, form, draw = job.manifest, job.form, recipe.draw
    prompt, samples = manifest["subjects"][0]["prompt"], []
    base = verify.draw_in_process(model, prompt, draw.guidance) if job.check else None
    name = load_run.load_run(model, job.folder, manifest, at=job.at)
    if job.check:
        own = verify.draw_in_process(model, prompt, draw.guidance)
        verify.require_margin(own, base, half=form.half)
    if job.push:
        samples = hub.sample_images(model, job.folder, manifest, draw, seed=recipe.seed, checkpoint=name, screen=screen)
    trained = recipe_from_dict(manifest["recipe"], str(job.folder))
    screen.say(f"writing {products[0].name}")
    files = targets.write(model, trained, form, products=products, stage=stage)
    if not job.check:
        return name, files, None, samples
    if form.to == "diffusers" and (products[0].kind == targets.BASE or files.loras):
        screen.say("opening it with plain diffusers")
        verify.require_opens_plainly(stage / products[0].name, lora_of=files.base if files.loras else None)
    screen.say("drawing with it in a fresh process")
    # A tokenizer in a folder knows the tokens of a word, but not that the word stands for all of them.
    fresh_prompt = model.expand_words(prompt) if targets.bakes_words(manifest["methods"], form) else prompt
    written = verify.draw_in_fresh_process(model, files, fresh_prompt, draw.guidance, scratch=stage / ".check")
    return name, files, verify.compare_images(written, own, base, half=form.half), samples


def _place(folder: Path, manifest: dict, form: Form, out: Path | None) -> tuple[Path, str]:
    """The folder that the products go into, and the main one's name without its ending.

    out: the main file or folder, or for files a folder that is there; None: in the run's own folder.
    """
    stem = targets.stem(manifest["methods"], form, subjects=manifest["subjects"], run=folder.resolve().name)
    if out is None:
        return folder / FOLDER, stem
    if form.to == "diffusers":
        if out.suffix == ".safetensors":
            raise UserError(f"--to {form.to} writes a folder, and --out {out} names a file. Leave its ending out.")
        return out.parent, out.name
    if out.is_dir():
        return out, stem
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out} should end with .safetensors, or be a folder that is there.")
    return out.parent, out.stem


def _vocabulary_is_there(model: LatentModel, place: Path, product: Product) -> bool:
    """Whether the base's tokenizer lies beside another of its single files already."""
    written, tokenizer = place / product.name, model.folder / "tokenizer"
    return product.kind == targets.VOCABULARY and written.is_dir() and content_hash(written) == content_hash(tokenizer)


def _require_ours(home: Path, path: Path) -> None:
    """UserError for something that is not, unchanged, what an export of this run left there."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    rows = read_jsonl(home / RECORD, RECORD_ROW)
    if content_hash(path) not in [row["sha256"] for row in rows if row["path"] == _named(home, path)]:
        place = f"{os.path.relpath(path)} is there already, and it is not what an export of this run left there"
        raise UserError(f"{place}. Move it away, or give another place: --out.")


def _put(source: Path, final: Path) -> None:
    if final.is_dir() and not source.is_dir():
        raise UserError(f"{final} is a folder, and a file goes there. Move it away, or give another place: --out.")
    with writing(final) as temporary:
        shutil.move(source, temporary)


def _named(home: Path, path: Path) -> str:
    """A path as the record has it: runs may be moved."""
    path, home = path.resolve(), home.resolve()
    return path.relative_to(home).as_posix() if path.is_relative_to(home) else str(path)


def _record(home: Path, staged: Path, final: Path, job: _Job, check: Check | None) -> None:
    entry = asdict(job.form) | {"checkpoint": job.at, "check": asdict(check) if check else None, "time": time.time()}
    append_jsonl(home / RECORD, {"path": _named(home, final), "sha256": content_hash(staged)} | entry)


def _bytes(model: LatentModel, form: Form, products: list[Product]) -> int:
    """Of a whole base; a single file lies there as a folder too, and again as what the check unpacks."""
    if products[0].kind != targets.BASE:
        return 0
    whole = sum(p.numel() for network in (*model.networks.values(), model.vae) for p in network.parameters())
    file = (2 if form.half else 4) * whole
    return file if form.to == "diffusers" else 4 * whole + 2 * file


def _say(files: list[Path], products: list[Product], check: Check | None, screen: Terminal) -> None:
    for file, product in zip(files, products, strict=True):
        screen.say(f"wrote {os.path.relpath(file)}")
        if product.kind == targets.WORD:
            screen.say(f"in AUTOMATIC1111 and ComfyUI its name is the word: write {file.stem} for {product.token}")
    screen.say(str(check) if check else "not checked: nothing was drawn with it")


def _card(model: LatentModel, job: _Job, name: str, written: Files, *, main: Product, prompts: list[str]) -> model_card.Card:
    names = {main.name: targets.BASE} if main.kind == targets.BASE else {}
    names |= {path.name: targets.LORA for path in written.loras}
    names |= {path.name: targets.WORD for path, _ in written.embeddings}
    path = job.folder / "evaluation" / "metrics.json"
    metrics = read_json(path) if path.exists() else {}
    return model_card.Card(
        repo=job.push.repo, manifest=job.manifest, family=targets.family(model), to=job.form.to, fused=job.form.fuse,
        files=names, samples=[(prompt, f"samples/{i}.png") for i, prompt in enumerate(prompts, 1)],
        scores=metrics["scores"] if metrics.get("run", {}).get("model") == name else {},
        photos=hub.PHOTOS if job.push.with_photos else "", inpaints=model.inpaints,
    )  # fmt: skip
