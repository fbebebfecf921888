"""`personalize evaluate`: is it the same subject, does it still listen, is a dog still a dog? Scores and a contact sheet."""

import json
import time
from dataclasses import dataclass
from pathlib import Path

from personalize import latent, priorset, rundir, scoring, trained
from personalize import photos as photo_files
from personalize.config import Recipe
from personalize.crops import Photo, batch, largest_box, square
from personalize.errors import UserError
from personalize.metrics import encoders
from personalize.metrics.similarity import embed
from personalize.models.base import LatentModel
from personalize.prompts import fill, without_token
from personalize.sheet import Section, Table, contact_sheet
from personalize.terminal import SILENT, Terminal

TITLES = {"dino": "DINO (same subject)", "clip_i": "CLIP-I (same content)", "clip_t": "CLIP-T (obeys the prompt)"}


@dataclass(frozen=True)
class EvaluateResult:
    """scores: what scores.json holds; sheet: the contact sheet."""

    scores: dict
    sheet: Path


def run(
    model: LatentModel, folder: Path, recipe: Recipe, *, subject: dict, at: str, templates: tuple[str, ...],
    screen: Terminal = SILENT,
) -> EvaluateResult:  # fmt: skip
    """Draw with the base, then with the run put into it, and score both against the photos of one of its subjects."""
    manifest = trained.require(folder)
    token, word = subject["token"], subject["class"]
    photos = _photos(subject)
    prompts = [fill(t, token, word) for t in templates]
    plain = [without_token(p, token) for p in prompts]
    class_prompt = fill(recipe.prior.prompt, "", word)
    draw, ask = recipe.draw, recipe.evaluate
    how = latent.Drawing(draw.sampler, draw.steps, draw.guidance, draw.rescale, draw.interval, draw.negative, batch=draw.batch)
    judge = encoders.load(model.name, model.device, dino=ask.dino, clip=ask.clip)

    def drawn(which: list[str], what: str):
        with screen.progress(what, len(which) * ask.count + ask.class_count, unit="pictures") as advance:
            seen = scoring.draw_prompts(model, which, ask.count, seed=recipe.seed, how=how, advance=advance)
            if not ask.class_count:
                return seen, None
            return seen, scoring.draw_prompts(
                model, [class_prompt], ask.class_count, seed=recipe.seed, how=how, advance=advance
            )

    base, base_class = drawn(plain, "drawing by the base")
    name = trained.put_into(model, folder, manifest, at=at)
    tuned, tuned_class = drawn(prompts, "drawing by the run")
    crop = "center" if recipe.photos.crop == "random" else recipe.photos.crop
    real = embed(judge, batch(photos, model.size, how=crop))
    judged = scoring.score(judge, real, tuned=tuned, base=base, plain=base.prompts)
    scores = judged.summary | {"run": str(folder), "model": name, "class_word": word, "seed": recipe.seed}
    scores["encoders"] = judge.names
    if ask.class_count:
        scores["class"] = scoring.drift(judge, real, tuned=tuned_class.images, base=base_class.images, prompt=class_prompt)
    squares = [square(p, model.size, largest_box(p, crop)) for p in photos]
    sections = _sections(subject, squares, tuned=tuned, classes=(base_class, tuned_class), class_prompt=class_prompt)
    page = contact_sheet(
        [*sections, _table(scores)], title=subject["prompt"], subtitle=_subtitle(manifest, recipe, name),
        verdict=verdict(scores, word), footer="personalize evaluate",
    )  # fmt: skip
    return _written(folder / "evaluation", scores, judged.pictures, page)


def _written(out: Path, scores: dict, pictures: list[dict], page) -> EvaluateResult:
    out.mkdir(exist_ok=True)
    rundir.write_json(out / "scores.json", scores | {"versions": rundir.library_versions(), "time": time.time()})
    rundir.write_text(out / "per_image.jsonl", "".join(json.dumps(row) + "\n" for row in pictures))
    with rundir.writing(out / "sheet.png") as temporary:
        page.save(temporary)
    return EvaluateResult(scores, out / "sheet.png")


def verdict(scores: dict, word: str) -> list[str]:
    """The scores in plain words. Thresholds are rules of thumb, for one run's own floor and ceiling."""
    identity, obeys = scores["dino"]["relative"], scores["clip_t"]["score"] - scores["clip_t"]["floor"]
    lines = []
    if identity is None:
        lines.append("There is one photo only: no ceiling to compare with.")
    else:
        how = (
            "It is the same subject"
            if identity >= 0.6
            else "It is a relative"
            if identity >= 0.3
            else "It is not yet the subject"
        )
        lines.append(f"{how}: {identity:.0%} of the way from any {word} to the photos.")
    kept = obeys > -0.05
    lines.append(f"It {'still listens' if kept else 'listens less'}: CLIP-T {obeys:+.3f} against the base on the same prompts.")
    if "class" in scores:
        room = (scores["dino"]["ceiling"] or 1.0) - scores["class"]["base"]["pres"]
        share = scores["class"]["excess"] / room if room > 0 else 0.0
        still = f"A {word} is still any {word}" if share < 0.25 else f"Other {word}s have begun to look like it"
        moved = f"moved {share:.0%} of the way to the photos" if share > 0 else "did not move towards the photos"
        lines.append(f"{still}: class pictures {moved}.")
    return lines


def _photos(subject: dict) -> list[Photo]:
    sources = [row["path"] for row in subject["photos"]]
    if sources[0].startswith("hf:"):
        found, _ = photo_files.load(sources[0].partition("[")[0], min_size=1)
        return found
    gone = [path for path in sources if not Path(path).exists()]
    if gone:
        raise UserError(f"photo {gone[0]} of this run is no longer there; put it back to score against it.")
    found, _ = photo_files.load(sources, min_size=1)
    hashes = {row["sha256"] for row in subject["photos"]}
    for photo in found:
        if photo.sha256 not in hashes:
            raise UserError(f"photo {photo.path} is not the one this run was trained on: its content has changed.")
    return found


def _sections(subject: dict, squares: list, *, tuned: scoring.Drawn, classes: tuple, class_prompt: str) -> list:
    sections = [Section("The photos", f"what the run was shown, as {subject['prompt']!r}", [("", squares)], cell=160)]
    prior = subject["prior_folder"]
    if prior and Path(prior).is_dir():
        count = min(100, len(priorset.present(Path(prior))))
        note = "drawn by the frozen base before training, to keep the class what it is"
        sections.append(
            Section(
                f"Class pictures: {class_prompt}",
                note,
                [("", priorset.pictures(Path(prior), count))],
                cell=52,
                columns=20,
            )
        )
    pictures = latent.to_pil(tuned.images)
    rows: dict[str, list] = {}
    for prompt, picture in zip(tuned.prompts, pictures, strict=True):
        rows.setdefault(prompt, []).append(picture)
    note = "the same noise down each column"
    sections.append(Section("The same subject, elsewhere", note, list(rows.items())))
    base, now = classes
    if base is not None:
        both = [("by the base", latent.to_pil(base.images)), ("by the run, same noise", latent.to_pil(now.images))]
        sections.append(Section(f"{class_prompt}: still any {subject['class']}?", "", both, columns=4))
    return sections


def _table(scores: dict) -> Table:
    def shown(value: float | None, form: str = ".3f") -> str:
        return "-" if value is None else f"{value:{form}}"

    rows = [
        [TITLES[m], *(shown(scores[m][k]) for k in ("floor", "score", "ceiling")), shown(scores[m]["relative"], ".0%")]
        for m in TITLES
    ]
    if "class" in scores:
        drift, top = scores["class"], scores["dino"]["ceiling"]
        rows.append(["PRES (class pictures like the photos)", shown(drift["base"]["pres"]), shown(drift["tuned"]["pres"]),
                     shown(top), ""])  # fmt: skip
    return Table(
        "Scores",
        ["", "base", "this run", "photos", "of the way"],
        rows,
        note="base: the same prompts without the token",
    )


def _subtitle(manifest: dict, recipe: Recipe, name: str) -> str:
    train = manifest["recipe"]["train"]
    return (
        f"{', '.join(manifest['methods'])} on {manifest['base']}, {train['steps']} steps at lr {train['lr']:g}, {name}; "
        f"{recipe.draw.steps} steps of {recipe.draw.sampler}, guidance {recipe.draw.guidance:g}, seed {recipe.seed}"
    )
