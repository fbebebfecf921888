"""`personalize evaluate`: is it the same subject, does it still listen, is a dog still a dog? Scores, and a page to read."""

import csv
import io
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from personalize.commands.evaluated_images import Job, drawn_beside, drawn_set, every_subject
from personalize.commands.session import PRIORS, RUNS, open_run
from personalize.commands.told_photos import METHOD, told_photos, told_sets
from personalize.common import run_folder
from personalize.common.errors import UserError
from personalize.common.files import write_json, write_text
from personalize.common.prompts import fill, weights_read_as_text
from personalize.common.recipe import Recipe
from personalize.common.terminal import SILENT, Terminal
from personalize.data import class_images, photo_checks
from personalize.data.buckets import sizes_of
from personalize.data.crops import Photo, photo_squares
from personalize.data.image_prompt import read_image_prompt
from personalize.data.map_sheet import heated
from personalize.evaluation import bleed, checkpoint_selection, encoders, image_cache, requirements, scoring, summary
from personalize.evaluation.metrics import ceilings, diversity, memorization, toyland_truth
from personalize.evaluation.metrics.inputs import Reference
from personalize.evaluation.protocols import Protocol, protocol
from personalize.evaluation.report import page, tables
from personalize.evaluation.report.verdict import verdict
from personalize.models.interface import LatentModel
from personalize.models.locate import public_name
from personalize.models.prompt_chunks import chunks_needed, longer
from personalize.toyland.world.scenes import CLASSES
from personalize.training import fixed_loss, load_run, steering

PRIOR_SHOWN = 20  # class images on the page


@dataclass(frozen=True)
class EvaluateResult:
    """metrics: what metrics.json holds; report: the page; failed: a line for each requirement that is not met."""

    metrics: dict
    report: Path
    failed: Sequence[str] = ()


def evaluate(
    run: Path | str | None = None,
    *,
    base: str = "",
    checkpoint: str = "",
    token: str = "",
    image_prompt: Path | str = "",
    class_word: str = "",
    image_scale: float | None = None,
    adapter: Path | None = None,
    photos: bool = True,
    require: Sequence[str] = (),
    settings: Sequence[str] = (),
    runs: Path = RUNS,
    screen: Terminal = SILENT,
) -> EvaluateResult:
    """Scores of a run (the newest finished one in `runs`) against its photos, and a page to read.

    Images are drawn by the base, then by the run; those of an earlier call are used again. token: the subject of a run
    that has several, the first without it. image_prompt: photos that the run is told beside each of the subject's prompts, as
    `generate` takes them; without a run, those of a `class_word` that the bare base is told. photos=False leaves them off the
    page. require: what must be reached, such as "drift<=0.2". UserError where a photo is gone or has changed, the run has no
    such checkpoint, or no such value exists.
    """
    required, untrained, record = requirements.read_requirements(require), bool(image_prompt and not run), {}
    if untrained:
        if checkpoint or token:
            raise UserError("--image-prompt without a run is told to the bare base. Leave out --checkpoint and --token.")
        options = {"base": base, "scale": image_scale, "adapter": adapter, "settings": settings, "runs": runs}
        folder, model, recipe, manifest, image = told_photos(image_prompt, class_word, **options, screen=screen)
    else:
        if class_word:
            raise UserError("--class is of photos that the bare base is told, --image-prompt. A run has a class of its own.")
        folder, model, recipe, manifest = open_run(run, runs=runs, base=base, settings=settings, screen=screen)
        image, record = read_image_prompt(model, image_prompt, scale=image_scale, adapter=adapter)
    subject = load_run.run_subject(manifest, token)
    wanted = protocol(recipe.evaluate, model.has_world, subject["class"])
    job = Job(Path(os.path.abspath(folder)), manifest, subject, checkpoint, wanted, recipe, record)
    if not untrained:
        load_run.resolve_checkpoint(model, job.folder, manifest, checkpoint)
    trained_on, held_out = load_run.run_photos(subject)
    reference, names = _reference(model, job, trained_on, held_out)
    began = time.monotonic()
    image_sets = [drawn_set(model, job, "", screen)]
    who = steering.of_run(job.folder, manifest, subject["token"]) if recipe.draw.like else None
    steer = steering.prepare(model, recipe, who, tokens=[subject["token"]], priors=PRIORS, screen=screen)
    several = [] if steer or record or len(manifest["subjects"]) == 1 else every_subject(job, model)
    by_base = [drawn_set(model, each, "", screen) for each in several]
    name = METHOD if untrained else load_run.load_run(model, job.folder, manifest, at=checkpoint)
    for line in _remarks(model, job):  # now that it knows the run's words
        screen.say(line)
    if untrained:
        image_sets += told_sets(model, recipe, job.folder, image, image_sets[0], steer=steer and steer.of, screen=screen)
    elif record:
        image_sets += drawn_beside(model, job, name, image, screen, steer)
    else:
        image_sets.append(drawn_set(model, job, name, screen, steer))
    by_run = [drawn_set(model, each, name, screen) for each in several]
    drawing = time.monotonic() - began
    rows, drawings = [], []
    for image_set in image_sets:  # the base's first, whose class images are the look-alikes of all
        loaded, reasons = image_cache.load_images(image_set)
        images = scoring.embed_images(reference, image_set, loaded)
        if reference.look_alikes is None:
            reference = scoring.with_look_alikes(reference, images, reasons)
        rows += scoring.score_images(replace(images, reference=reference), reasons)
        drawings += loaded
    between = bleed.bleed_table(_drawn(model, reference, several, by_base, by_run)) if several else None
    seconds = {"drawing": round(drawing, 2), "metrics": round(time.monotonic() - began - drawing, 2)}
    all_photos, crop = [*trained_on, *held_out], recipe.photos.crop
    scored = checkpoint_selection.read_scored(job.folder / checkpoint_selection.FILE)
    metrics = _metrics(reference, rows, job) | {
        "bleed": between,
        "photos_included": photos,
        "run": _about(job, name, photos=len(reference.photos.dino)),
        "protocol": _protocol(wanted, recipe, model),
        "choice": manifest.get("why", ""),
        "checkpoints": checkpoint_selection.checkpoint_rows(
            scored, recipe.choose, (manifest.get("chosen"), manifest.get("strength", 1.0))
        ),
        "fixed_loss": fixed_loss.logged(job.folder),
        "seconds": seconds,
        "encoders": names,
        "agreement": encoders.truth_agreement(model.folder, names["dino"]) if model.has_world else None,
        "preprocessing": reference.encoders.looks,
        "photos": _health(all_photos, model, recipe, trained=len(trained_on)) if photos else [],
    }
    if steer:
        metrics["steering"] = steer.record
        if steer.towards:
            summary.mark_towards(metrics["scores"], steer.towards)
    metrics["verdict_levels"], metrics["verdict"] = map(list, zip(*verdict(metrics)))
    squares = photo_squares(all_photos, model.size, crop) if photos else []
    page_of = _written(job.out, metrics, rows, _shown(job, squares, list(zip(rows, drawings, strict=True)), image_sets[-1]))
    return EvaluateResult(metrics, page_of, requirements.failures(required, metrics))


def _remarks(model: LatentModel, job: Job) -> Iterator[str]:
    """What of the prompts is not read, by the base or by the encoder that scores them."""
    token, word = job.subject["token"], job.subject["class"]
    texts = [fill(template, token, word) for template in (*job.protocol.templates, job.recipe.prior.prompt)]
    yield from weights_read_as_text(texts, model.weighting)
    for text in texts:
        if rest := model.truncated_words(text):
            yield f"prompt {text!r} is too long for this base; it does not see: {rest!r} ({longer(model)})"
    if long := [text for text in texts if chunks_needed(model, text) > 1 and model.chunks > 1]:
        yield f"CLIP-T reads the first chunk of a prompt alone, and {long[0]!r} has more: its score says nothing of the rest"


def _reference(
    model: LatentModel, job: Job, trained_on: list[Photo], held_out: list[Photo]
) -> tuple[Reference, dict[str, str]]:
    """What images are scored against, and the names of the encoders with the hashes of their weights."""
    settings, word = job.recipe.evaluate, job.subject["class"]
    lpips = diversity.read_lpips(Path(settings.lpips), model.device) if settings.lpips else None
    probe = toyland_truth.load_probe(model.folder) if model.has_world and word in CLASSES else None
    judges = encoders.load_encoders(model.folder, model.device, dino=settings.dino, clip=settings.clip)
    crop, tools = job.recipe.photos.crop, {"lpips": lpips, "probe": probe}
    reference = scoring.make_reference(judges, trained_on, held_out, size=model.size, crop=crop, class_word=word, **tools)
    return reference, judges.names | ({"lpips": lpips.name} if lpips else {})


def _drawn(model: LatentModel, like: Reference, jobs: list[Job], *sets: list[image_cache.ImageSet]) -> list[bleed.Drawn]:
    """The subjects with their images by the base and by the run, seen by the encoders and the probe of `like`."""
    drawn, known = [], all(job.subject["class"] in CLASSES for job in jobs)
    for job, base, run in zip(jobs, *sets, strict=True):
        photos, _ = load_run.run_photos(job.subject)
        reference = scoring.make_reference(
            like.encoders, photos, (), size=model.size, crop=job.recipe.photos.crop, class_word=job.subject["class"],
            probe=like.probe if known else None,
        )  # fmt: skip
        drawn.append(bleed.Drawn.of(job.subject["token"], reference, base, run))
    return drawn


def _metrics(reference: Reference, rows: list[dict], job: Job) -> dict:
    subject, tops = job.subject, ceilings(reference)
    similarities = memorization.leave_one_out(reference.photos)
    scores = summary.scores(rows, tops)
    if reference.lpips and "diversity" in scores:
        scores["diversity"]["title"] = "DIV: LPIPS"
    return {
        "schema": 1, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "scores": scores,
        "class": summary.drift(rows, fill(job.recipe.prior.prompt, "", subject["class"]), tops["dino"]),
        "copying": summary.memorization(rows, None if similarities is None else similarities.tolist()),
        "truth": summary.truth_summary(rows), "parts": summary.parts_off(rows, subject["class"]),
        "prompts": summary.by_prompt(rows),
        "unusable": [{"prompt": r["prompt"], "index": r["index"], "why": r["unusable"]} for r in rows if r["unusable"]],
        "versions": run_folder.library_versions(),
    }  # fmt: skip


def _about(job: Job, name: str, *, photos: int) -> dict:
    manifest, subject = job.manifest, {key: job.subject[key] for key in ("prompt", "token", "class")}
    train, chosen = manifest["recipe"]["train"], manifest.get("chosen")
    state = checkpoint_selection.state_name(chosen or 0, manifest.get("strength", 1.0))
    result = f"{state}, chosen" if chosen else "the last step"
    checkpoint = manifest.get("untrained") or (f"checkpoint {job.checkpoint}" if job.checkpoint else result)
    checkpoint += f", photos at scale {job.told['image_prompt']['scale']:g}" if job.told else ""
    return {
        "name": job.folder.name, "model": name, **subject, "base": public_name(manifest["base"]),
        "methods": manifest["methods"], "steps": train["steps"], "lr": train["lr"], "checkpoint": checkpoint,
        "seed": manifest["seed"], "photos": photos,
    }  # fmt: skip


def _protocol(protocol: Protocol, recipe: Recipe, model: LatentModel) -> dict:
    draw, counts = recipe.draw, {"count": protocol.count, "class_count": protocol.class_count}
    sampling = {"seed": recipe.seed, "sampler": draw.sampler, "steps": draw.steps, "guidance": draw.guidance}
    sampling |= {"size": draw.size or model.size, "dtype": str(model.dtype).removeprefix("torch.")}
    return {"name": protocol.name, "prompts": len(protocol.templates), **counts, **sampling}


def _health(photos: list[Photo], model: LatentModel, recipe: Recipe, *, trained: int) -> list[dict]:
    """What `personalize photos` says of each."""
    shape, px = recipe.photos.shape, {"edge": model.size, "step": 8 * model.downscale}
    sizes = [] if shape == "square" else sizes_of(photos, shape, **px)
    report = photo_checks.examine_photos(photos, model.size, crop=recipe.photos.crop, sizes=sizes)
    notes = [[finding.text for finding in each] for each in report.each]
    return [{"file": photo.name, "trained": k < trained, "notes": notes[k]} for k, photo in enumerate(photos)]


def _shown(
    job: Job, photos: list[Image.Image], drawn: list[tuple[dict, Image.Image]], by_run: image_cache.ImageSet
) -> page.Shown:
    """What the page shows; drawn: each row and its image."""
    prior, folder = [], job.subject["prior_folder"]
    if folder and Path(folder).is_dir():
        prior = class_images.load_class_images(Path(folder), min(PRIOR_SHOWN, len(class_images.present_images(Path(folder)))))
    base_class, tuned_class = ([image for row, image in drawn if row["kind"] == kind] for kind in ("base class", "class"))
    cells = {(row["prompt"], row["index"]): image for row, image in drawn if row["kind"] == "subject"}
    words, kept = (job.subject["token"], job.subject["class"]), image_cache.load_maps(by_run)
    maps = {key: {word: heated(cells[key], m) for word, m in zip(words, each, strict=True)} for key, each in kept.items()}
    return page.Shown(photos=photos, prior=prior, cells=cells, base_class=base_class, tuned_class=tuned_class, maps=maps)


def _written(out: Path, metrics: dict, rows: list[dict], shown: page.Shown) -> Path:
    write_json(out / "metrics.json", metrics)
    table = io.StringIO()
    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(table, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(out / "per_image.csv", table.getvalue())
    write_text(out / "report.md", tables.markdown(metrics))
    write_text(out / "report.html", page.html(metrics, shown))
    return out / "report.html"
