"""`report.html`: one file that loads nothing from the network and is read from the verdict down."""

from collections import Counter
from dataclasses import dataclass, field

from PIL import Image

from personalize.common.html import render
from personalize.evaluation.report import figures, tables

HERO_PHOTOS, HERO_IMAGES = 6, 6
SHEET_COLUMNS = 8  # prompts side by side in the contact sheet


@dataclass(frozen=True)
class Shown:
    """Images of a report.

    photos       empty where they are left out
    prior        a few class images the run trained with
    cells        (prompt, index) -> image by the run; the same index is the same noise
    base_class   the class prompt by the base, and
    tuned_class  by the run, from the same noise
    maps         some of the keys of `cells` -> word -> that image, with where it attends to the word
    """

    photos: list[Image.Image]
    prior: list[Image.Image]
    cells: dict[tuple[str, int], Image.Image]
    base_class: list[Image.Image]
    tuned_class: list[Image.Image]
    maps: dict[tuple[str, int], dict[str, Image.Image]] = field(default_factory=dict)


def html(evaluation: dict, shown: Shown) -> str:
    """metrics.json and the images -> the page. A section without data is left out."""
    photos = shown.photos if evaluation.get("photos_included") else []
    hero = _spread(shown.cells)
    pair_keys = [(pair["prompt"], pair["index"]) for pair in (evaluation.get("copying") or {}).get("pairs") or []]
    repeated = [*photos, *(shown.cells[key] for key in (*pair_keys, *hero, *shown.maps) if key in shown.cells)]
    return render(
        "evaluation/report/page.html.j2",
        report=evaluation,
        origin=tables.origin(evaluation),
        photos=photos,
        photo_tiles=[(photo, f"photo {k + 1}") for k, photo in enumerate(photos[:HERO_PHOTOS])],
        hero=[(shown.cells[key], key[0]) for key in hero],
        verdict=list(zip(evaluation.get("verdict") or [], evaluation.get("verdict_levels") or [])),
        class_pairs=list(zip(shown.base_class, shown.tuned_class)),
        shown=shown,
        styles={id(image): (f"p{k}", image) for k, image in enumerate(repeated)},
        scores=_measures(tables.score_rows(evaluation)),
        class_scores=_measures(tables.class_rows(evaluation)),
        truth=_measures(tables.truth_rows(evaluation)),
        checkpoints=tables.by_step(evaluation),
        worst_first=tables.worst_first(evaluation.get("prompts") or []),
        sheet=_sheet(shown.cells, evaluation.get("unusable") or []),
        tables=tables,
        figures=figures,
        id=id,
    )


def _spread(cells: dict) -> list[tuple[str, int]]:
    """Keys of the images at the top: the first of each of a few prompts from all over the list; never the best ones."""
    keys = sorted(cells, key=lambda key: key[1])
    firsts = [next(key for key in keys if key[0] == prompt) for prompt in dict.fromkeys(prompt for prompt, _ in keys)]
    if len(firsts) < HERO_IMAGES:
        return keys[:HERO_IMAGES]
    return [firsts[k * len(firsts) // HERO_IMAGES] for k in range(HERO_IMAGES)]


def _measures(rows: list[dict]) -> list[dict]:
    return [tables.measure_texts(row) | {"bar": figures.range_bar(row)} for row in rows]


def _sheet(cells: dict, unusable: list[dict]) -> dict:
    """Prompts as columns, noise as rows; many prompts in groups of equal width. `unusable`: a sentence about such images."""
    prompts = list(dict.fromkeys(prompt for prompt, _ in cells))
    lost = {(row["prompt"], row["index"]): row["why"] for row in unusable if row["prompt"] in prompts}
    groups = -(-len(prompts) // SHEET_COLUMNS)
    reasons = ", ".join(f"{count} {why}" for why, count in Counter(row["why"] for row in unusable).items())
    sentence = f"{len(unusable)} unusable ({reasons}): scored as drawn, never left out; those of the run are marked here."
    return {
        "prompts": prompts,
        "columns": -(-len(prompts) // max(1, groups)),
        "rows": sorted({index for _, index in [*cells, *lost]}),
        "lost": lost,
        "unusable": sentence if unusable else "",
    }
