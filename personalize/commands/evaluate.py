"""`personalize evaluate`: is it the same subject, does it still listen, is a dog still a dog? Scores, and a page to read."""

import csv
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from personalize import choosing, doctor, gallery, latent, priorset, report, rundir, scoring, summary, trained, watching
from personalize import photos as photo_files
from personalize.config import Recipe
from personalize.crops import Photo
from personalize.errors import UserError
from personalize.metrics import copying, diversity, encoders, truth
from personalize.modelcard import public_name
from personalize.models.base import LatentModel
from personalize.prompts import fill, without_token
from personalize.protocols import Protocol
from personalize.terminal import SILENT, Terminal
from personalize.toyland import world
from personalize.verdict import verdict

PRIOR_SHOWN = 20  # class pictures on the page


@dataclass(frozen=True)
class EvaluateResult:
    """metrics: what metrics.json holds; report: the page."""

    metrics: dict
    report: Path


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
        many = len(rundir.read_manifest(self.folder).get("subjects", ())) > 1
        return self.folder / "evaluation" / (rundir.slug(self.subject["token"]) if many else "")


@dataclass(frozen=True)
class Part:
    """Pictures of one kind: jobs and their templates, where they lie, what can be used of them."""

    kind: str
    templates: list[str]
    jobs: list[gallery.Job]
    place: Path

    def load(self) -> tuple[list[Image.Image], dict[int, str]]:
        return gallery.load(self.place, self.jobs)


def run(model: LatentModel, job: Job, recipe: Recipe, *, screen: Terminal = SILENT) -> EvaluateResult:
    """Draw with the base, then with the run put into it, what is not there yet; score both against the photos."""
    manifest = trained.require(job.folder)
    trained.resolve(model, job.folder, manifest, job.at)
    trained_on, held_out = _photos(job.subject)
    ask = recipe.evaluate
    lpips = diversity.read_lpips(Path(ask.lpips), model.device) if ask.lpips else None
    probe = truth.load() if model.name == "toyland" and job.subject["class"] in world.CLASSES else None
    seers = encoders.load(model.name, model.device, dino=ask.dino, clip=ask.clip)
    began = time.monotonic()
    name, parts = _draw_all(model, job, recipe, manifest, screen)
    drawn = time.monotonic() - began
    judge = scoring.judge(
        seers, trained_on, held_out, size=model.size, crop=recipe.photos.crop, class_word=job.subject["class"],
        lpips=lpips, probe=probe,
    )  # fmt: skip
    pictures = {part.kind: part.load() for part in parts}
    rows = [row for part in parts for row in _rows(judge, part, *pictures[part.kind], token=job.subject["token"])]
    metrics = _metrics(judge, rows, job, recipe, manifest, model) | {
        "seconds": {"drawing": round(drawn, 2), "metrics": round(time.monotonic() - began - drawn, 2)},
        "encoders": seers.names | ({"lpips": lpips.name} if lpips else {}),
        "preprocessing": seers.looks,
        "photos": _health([*trained_on, *held_out], recipe, size=model.size, held_out=len(held_out)) if job.with_photos else [],
    }
    metrics["run"]["model"] = name
    metrics["verdict_levels"], metrics["verdict"] = map(list, zip(*verdict(metrics)))
    shown = _shown(job, recipe, [*trained_on, *held_out], {p.kind: (p, *pictures[p.kind]) for p in parts}, model.size)
    return _written(job.out, metrics, rows, shown)


def _draw_all(model: LatentModel, job: Job, recipe: Recipe, manifest: dict, screen: Terminal) -> tuple[str, list[Part]]:
    """Every picture that the protocol wants, in its folder; the model ends as the run's, whose name comes first."""
    subject, how = job.subject, watching.drawing(recipe)
    token, word = subject["token"], subject["class"]
    base_place = gallery.place(
        job.folder.parent / watching.BASE_PICTURES, f"base-{model.fingerprint[:12]}", model,
        seed=recipe.seed, purpose="evaluate", how=how,
    )  # fmt: skip
    base = _parts(job, recipe, "base", "base class", token="", word=word, place=base_place)
    _draw(model, base, recipe, how, screen, "drawing by the base")
    name = trained.put_into(model, job.folder, manifest, at=job.at)
    root = job.folder / "evaluation" / "pictures"
    place = gallery.place(root, name, model, seed=recipe.seed, purpose="evaluate", how=how)
    tuned = _parts(job, recipe, "subject", "class", token=token, word=word, place=place)
    _draw(model, tuned, recipe, how, screen, "drawing by the run")
    return name, base + tuned


def _parts(job: Job, recipe: Recipe, kind: str, class_kind: str, *, token: str, word: str, place: Path) -> list[Part]:
    asked = [(kind, job.protocol.templates, token, job.protocol.count)]
    if job.protocol.class_count:
        asked.append((class_kind, (recipe.prior.prompt,), "", job.protocol.class_count))
    parts = []
    for what, templates, named, count in asked:
        told = [template for template in templates for _ in range(count)]
        jobs = [(fill(template, named, word), number) for template in templates for number in range(count)]
        parts.append(Part(what, told, jobs, place))
    return parts


def _draw(model: LatentModel, parts: list[Part], recipe: Recipe, how: latent.Drawing, screen: Terminal, what: str) -> None:
    jobs = [job for part in parts for job in part.jobs]
    todo = len(gallery.missing(parts[0].place, jobs))
    if todo:
        with screen.progress(what, len(jobs), done=len(jobs) - todo, unit="pictures") as advance:
            gallery.draw(model, parts[0].place, jobs, seed=recipe.seed, purpose="evaluate", how=how, advance=advance)


def _rows(judge: scoring.Judge, part: Part, pictures: list, bad: dict[int, str], *, token: str) -> list[dict]:
    plain = [without_token(prompt, token) for prompt, _ in part.jobs]
    return scoring.rows(judge, part.kind, templates=part.templates, jobs=part.jobs, pictures=pictures, bad=bad, plain=plain)


def _metrics(judge: scoring.Judge, rows: list[dict], job: Job, recipe: Recipe, manifest: dict, model: LatentModel) -> dict:
    subject, tops = job.subject, judge.ceilings
    among = copying.leave_one_out(judge.photos)
    scored = choosing.read(job.folder / choosing.FILE)
    chosen = manifest.get("chosen")
    scores = summary.scores(rows, tops)
    if judge.lpips and "diversity" in scores:
        scores["diversity"]["title"] = "DIV: LPIPS"
    return {
        "schema": 1, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "photos_included": job.with_photos,
        "run": _about(job, manifest, photos=len(judge.photos.dino)),
        "protocol": _protocol(job.protocol, recipe, model),
        "scores": scores,
        "class": summary.drift(rows, fill(recipe.prior.prompt, "", subject["class"]), tops["dino"]),
        "copying": summary.copies(rows, None if among is None else among.tolist()),
        "truth": summary.truths(rows), "prompts": summary.by_prompt(rows),
        "checkpoints": choosing.table(scored, recipe.choose, chosen), "choice": manifest.get("why", ""),
        "unusable": [{"prompt": r["prompt"], "index": r["index"], "why": r["unusable"]} for r in rows if r["unusable"]],
        "versions": rundir.library_versions(),
    }  # fmt: skip


def _about(job: Job, manifest: dict, *, photos: int) -> dict:
    train, chosen = manifest["recipe"]["train"], manifest.get("chosen")
    at = f"step {chosen}, chosen" if chosen else "the last step"
    return {
        "name": job.folder.name, "prompt": job.subject["prompt"], "token": job.subject["token"], "class": job.subject["class"],
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
        found, _ = photo_files.load(sources[0].rpartition("[")[0], min_size=1)
    else:
        gone = [path for path in sources if not Path(path).exists()]
        if gone:
            raise UserError(f"photo {gone[0]} of this run is no longer there; put it back to score against it.")
        found, _ = photo_files.load(sources, min_size=1)
    rows = subject["photos"]
    for photo, row in zip(found, rows, strict=True):
        if photo.sha256 != row["sha256"]:
            raise UserError(
                f"photo {photo.path} is not the one this run was trained on: its content has changed. Bring the old one back."
            )
    kept = [row.get("held_out", False) for row in rows]
    return [p for p, held in zip(found, kept) if not held], [p for p, held in zip(found, kept) if held]


def _health(photos: list[Photo], recipe: Recipe, *, size: int, held_out: int) -> list[dict]:
    """What `personalize photos` says of each."""
    found = doctor.examine(photos, size, how=scoring.still(recipe.photos.crop))
    first_held = len(photos) - held_out
    return [
        {"file": photo.name, "trained": k < first_held, "notes": [finding.text for finding in found.each[k]]}
        for k, photo in enumerate(photos)
    ]


def _shown(job: Job, recipe: Recipe, photos: Sequence[Photo], parts: dict, size: int) -> report.Shown:
    def pictures(kind: str) -> list[Image.Image]:
        return parts[kind][1] if kind in parts else []

    prior, folder = [], job.subject["prior_folder"]
    if folder and Path(folder).is_dir():
        prior = priorset.pictures(Path(folder), min(PRIOR_SHOWN, len(priorset.present(Path(folder)))))
    part, drawn, _ = parts["subject"]
    return report.Shown(
        photos=scoring.squares(photos, size, recipe.photos.crop) if job.with_photos else [],
        prior=prior,
        cells=dict(zip(part.jobs, drawn, strict=True)),
        base_class=pictures("base class"),
        tuned_class=pictures("class"),
    )


def _written(out: Path, metrics: dict, rows: list[dict], shown: report.Shown) -> EvaluateResult:
    out.mkdir(parents=True, exist_ok=True)
    rundir.write_json(out / "metrics.json", metrics)
    table = io.StringIO()
    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(table, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    rundir.write_text(out / "per_image.csv", table.getvalue())
    rundir.write_text(out / "report.md", report.markdown(metrics))
    rundir.write_text(out / "report.html", report.html(metrics, shown))
    return EvaluateResult(metrics, out / "report.html")
