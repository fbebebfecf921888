"""`personalize evaluate`: is it the same subject, does it still listen, is a dog still a dog? Scores, and a page to read."""

import csv
import io
import time
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from personalize.common import run_folder
from personalize.common.errors import UserError
from personalize.common.prompts import fill
from personalize.common.recipe import Recipe
from personalize.common.terminal import SILENT, Terminal
from personalize.data import class_images, photo_checks
from personalize.data.crops import Photo
from personalize.data.photos import load_photos
from personalize.evaluation import checkpoint_selection, encoders, image_cache, scoring, summary
from personalize.evaluation.metrics import diversity, memorization, toyland_truth
from personalize.evaluation.protocols import Protocol
from personalize.evaluation.report import page
from personalize.evaluation.report.verdict import verdict
from personalize.models.interface import LatentModel
from personalize.models.locate import public_name
from personalize.toyland.world.scenes import CLASSES
from personalize.training import load_run, validation

PRIOR_SHOWN = 20  # class pictures on the page


@dataclass(frozen=True)
class EvaluateResult:
    """metrics: what metrics.json holds; report: the page."""

    metrics: dict
    page: Path


@dataclass(frozen=True)
class Job:
    """A subject of a run at one of its checkpoints ("": its result), by a protocol."""

    folder: Path
    subject: dict
    at: str
    protocol: Protocol
    with_photos: bool = True

    @property
    def out(self) -> Path:
        many = len(run_folder.read_manifest(self.folder).get("subjects", ())) > 1
        return self.folder / "evaluation" / (run_folder.slug(self.subject["token"]) if many else "")


def run(model: LatentModel, job: Job, recipe: Recipe, *, screen: Terminal = SILENT) -> EvaluateResult:
    """Draw with the base, then with the run put into it, what is not there yet; score both against the photos."""
    manifest = load_run.require_run(job.folder)
    load_run.resolve_checkpoint(model, job.folder, manifest, job.at)
    trained_on, held_out = _photos(job.subject)
    ask = recipe.evaluate
    lpips = diversity.read_lpips(Path(ask.lpips), model.device) if ask.lpips else None
    probe = toyland_truth.load_probe() if model.name == "toyland" and job.subject["class"] in CLASSES else None
    seers = encoders.load_encoders(model.name, model.device, dino=ask.dino, clip=ask.clip)
    began = time.monotonic()
    base = _sit(model, job, recipe, "", screen=screen)
    name = load_run.load_run(model, job.folder, manifest, at=job.at)
    sittings = [base, _sit(model, job, recipe, name, screen=screen)]
    drawn = time.monotonic() - began
    judge = scoring.make_reference(
        seers, trained_on, held_out, size=model.size, crop=recipe.photos.crop, class_word=job.subject["class"],
        lpips=lpips, probe=probe,
    )  # fmt: skip
    rows, pictures = [], []
    for sat in sittings:
        loaded, bad = image_cache.load_images(sat)
        rows += scoring.score_images(judge, sat, loaded, bad)
        pictures += loaded
    metrics = _metrics(judge, rows, job, recipe) | {
        "run": _about(job, manifest, name, photos=len(judge.photos.dino)),
        "protocol": _protocol(job.protocol, recipe, model),
        "choice": manifest.get("why", ""),
        "checkpoints": checkpoint_selection.checkpoint_rows(
            checkpoint_selection.read_scored(job.folder / checkpoint_selection.FILE), recipe.choose, manifest.get("chosen")
        ),
        "seconds": {"drawing": round(drawn, 2), "metrics": round(time.monotonic() - began - drawn, 2)},
        "encoders": seers.names | ({"lpips": lpips.name} if lpips else {}),
        "preprocessing": seers.looks,
        "photos": _health([*trained_on, *held_out], recipe, size=model.size, held_out=len(held_out)) if job.with_photos else [],
    }
    metrics["verdict_levels"], metrics["verdict"] = map(list, zip(*verdict(metrics)))
    squares = scoring.photo_squares([*trained_on, *held_out], model.size, recipe.photos.crop) if job.with_photos else []
    shown = _shown(job, squares, list(zip(rows, pictures, strict=True)))
    return _written(job.out, metrics, rows, shown)


def _sit(model: LatentModel, job: Job, recipe: Recipe, name: str, *, screen: Terminal) -> image_cache.ImageSet:
    """The pictures that the protocol wants of the run put into the model, or where `name` is "" of the base, all drawn."""
    root = job.folder / "evaluation" / "pictures" if name else job.folder.parent / validation.BASE_PICTURES
    way = {"seed": recipe.seed, "purpose": "evaluate", "how": validation.sampling_config(recipe)}
    place = image_cache.cache_folder(root, name or validation.base_cache_name(model), model, **way)
    token = job.subject["token"] if name else ""
    sat = image_cache.image_set(job.protocol, place, class_prompt=recipe.prior.prompt, token=token, word=job.subject["class"])
    image_cache.generate_missing(
        model, sat, **way, progress=screen.progress, what=f"drawing by the {'run' if name else 'base'}"
    )
    return sat


def _metrics(judge: scoring.Reference, rows: list[dict], job: Job, recipe: Recipe) -> dict:
    subject, tops = job.subject, judge.ceilings
    among = memorization.leave_one_out(judge.photos)
    scores = summary.scores(rows, tops)
    if judge.lpips and "diversity" in scores:
        scores["diversity"]["title"] = "DIV: LPIPS"
    return {
        "schema": 1, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "photos_included": job.with_photos,
        "scores": scores,
        "class": summary.drift(rows, fill(recipe.prior.prompt, "", subject["class"]), tops["dino"]),
        "copying": summary.memorization(rows, None if among is None else among.tolist()),
        "truth": summary.truth_summary(rows), "prompts": summary.by_prompt(rows),
        "unusable": [{"prompt": r["prompt"], "index": r["index"], "why": r["unusable"]} for r in rows if r["unusable"]],
        "versions": run_folder.library_versions(),
    }  # fmt: skip


def _about(job: Job, manifest: dict, name: str, *, photos: int) -> dict:
    train, chosen = manifest["recipe"]["train"], manifest.get("chosen")
    at = f"step {chosen}, chosen" if chosen else "the last step"
    return {
        "name": job.folder.name, "model": name,
        "prompt": job.subject["prompt"], "token": job.subject["token"], "class": job.subject["class"],
        "base": public_name(manifest["base"]), "methods": manifest["methods"], "steps": train["steps"], "lr": train["lr"],
        "checkpoint": f"checkpoint {job.at}" if job.at else at, "seed": manifest["seed"], "photos": photos,
    }  # fmt: skip


def _protocol(protocol: Protocol, recipe: Recipe, model: LatentModel) -> dict:
    draw = recipe.draw
    return {
        "name": protocol.name, "prompts": len(protocol.templates), "count": protocol.count,
        "class_count": protocol.class_count, "seed": recipe.seed, "sampler": draw.sampler, "steps": draw.steps,
        "guidance": draw.guidance, "size": draw.size or model.size, "dtype": str(model.dtype).removeprefix("torch."),
    }  # fmt: skip


def _photos(subject: dict) -> tuple[list[Photo], list[Photo]]:
    """Those that it was trained on and those that were held out. UserError where one is gone or has changed."""
    sources = [row["path"] for row in subject["photos"]]
    if sources[0].startswith("hf:"):
        found, _ = load_photos(sources[0].rpartition("[")[0], min_size=1)
    else:
        gone = [path for path in sources if not Path(path).exists()]
        if gone:
            raise UserError(f"photo {gone[0]} of this run is no longer there; put it back to score against it.")
        found, _ = load_photos(sources, min_size=1)
    rows = subject["photos"]
    if len(found) != len(rows):
        raise UserError(f"{sources[0]} and its like are {len(found)} photos now, and this run knew {len(rows)}.")
    for photo, row in zip(found, rows, strict=True):
        if photo.sha256 != row["sha256"]:
            raise UserError(
                f"photo {photo.path} is not the one this run was trained on: its content has changed. Bring the old one back."
            )
    kept = [row.get("held_out", False) for row in rows]
    return [p for p, held in zip(found, kept) if not held], [p for p, held in zip(found, kept) if held]


def _health(photos: list[Photo], recipe: Recipe, *, size: int, held_out: int) -> list[dict]:
    """What `personalize photos` says of each."""
    found = photo_checks.check_photos(photos, size, how=scoring.fixed_crop(recipe.photos.crop))
    first_held = len(photos) - held_out
    return [
        {"file": photo.name, "trained": k < first_held, "notes": [finding.text for finding in found.each[k]]}
        for k, photo in enumerate(photos)
    ]


def _shown(job: Job, photos: list[Image.Image], drawn: list[tuple[dict, Image.Image]]) -> page.Shown:
    """What the page shows; drawn: each row and its picture."""
    prior, folder = [], job.subject["prior_folder"]
    if folder and Path(folder).is_dir():
        prior = class_images.load_class_images(Path(folder), min(PRIOR_SHOWN, len(class_images.present_images(Path(folder)))))
    return page.Shown(
        photos=photos,
        prior=prior,
        cells={(row["prompt"], row["index"]): picture for row, picture in drawn if row["kind"] == "subject"},
        base_class=[picture for row, picture in drawn if row["kind"] == "base class"],
        tuned_class=[picture for row, picture in drawn if row["kind"] == "class"],
    )


def _written(out: Path, metrics: dict, rows: list[dict], shown: page.Shown) -> EvaluateResult:
    out.mkdir(parents=True, exist_ok=True)
    run_folder.write_json(out / "metrics.json", metrics)
    table = io.StringIO()
    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(table, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    run_folder.write_text(out / "per_image.csv", table.getvalue())
    run_folder.write_text(out / "report.md", page.markdown(metrics))
    run_folder.write_text(out / "report.html", page.html(metrics, shown))
    return EvaluateResult(metrics, out / "report.html")
