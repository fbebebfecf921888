"""What the report says in words and numbers: provenance, rows of tables, and the report's twin in Markdown."""

import re

from personalize.evaluation.metrics import METRICS

ARROWS = {"higher": "↑", "lower": "↓"}
Table = tuple[list[str], list[list[str]]]  # header, rows
BLEED = (
    "Each cell: the score (95 %), and how far it is on the way to those photos. The way begins at what the base draws, or at "
    "how alike the photos of both subjects are, whichever is nearer."
)
_EXPONENT = re.compile(r"e([+-])0*(\d)")
_SPECIAL = re.compile(r"([\\`*_\[\]<>|&])")


def number(value: float | None, form: str = ".3f") -> str:
    """0.790, with a true minus sign; a dash for None."""
    return "–" if value is None else f"{value:{form}}".replace("-", "−")


def share(value: float | None) -> str:
    """81%; a dash for None."""
    return "–" if value is None else f"{number(100 * value, '.0f')}%"


def interval(low: float | None, high: float | None, say=number) -> str:
    """0.760–0.820; nothing where either end is missing."""
    return "" if low is None or high is None else f"{say(low)}–{say(high)}".replace("%–", "–")


def plain(value) -> str:
    """A setting as people write it: lists with commas, 1e-4, a dash for None."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain, value)) or "–"
    if isinstance(value, float):
        return _EXPONENT.sub(lambda m: f"e{m[1].strip('+')}{m[2]}", f"{value:g}")
    return "–" if value is None or value == "" else str(value)


def origin(evaluation: dict) -> list[str]:
    """Method and base, checkpoint, time: what was scored, and when."""
    run, time = evaluation["run"], evaluation["time"][:16].replace("T", " ") + " UTC"
    return [part for part in (f"{plain(run['methods'])} on {run['base']}", run.get("checkpoint"), time) if part]


def score_rows(evaluation: dict) -> list[dict]:
    return [row for row in (evaluation.get("scores") or {}).values() if row]


def agreement(evaluation: dict) -> str:
    """How far to trust DINO, where truth is known; "" where it is not."""
    agrees = evaluation.get("agreement")
    return "" if agrees is None else f"DINO agrees with the truth in {number(100 * agrees, '.0f')} % of pairs."


def class_rows(evaluation: dict) -> list[dict]:
    """The class prompt's numbers in the shape of scores: how far it moved to the photos, and whether it still follows."""
    drift = evaluation.get("class")
    if not drift:
        return []
    moved = {key: drift.get(key) for key in ("low", "high", "ceiling")}
    moved |= {"title": "PRES: class images like the photos", "score": drift["pres"], "floor": drift["base"]}
    moved |= {f"relative{end}": drift.get(f"share{end}") for end in ("", "_low", "_high")} | {"better": "lower"}
    if drift.get("clip_t") is None:
        return [moved]
    return [moved, {"title": "CLIP-T: follows the class prompt", "score": drift["clip_t"], "floor": drift.get("base_clip_t")}]


def bleed_tables(evaluation: dict) -> list[tuple[str, Table]]:
    """Of several subjects, by DINO and where Toyland reads it back by truth -> title and table: words down, photos across."""
    pairs = (evaluation.get("bleed") or {}).get("pairs") or []
    by = {"DINO": pairs, "identity error": [pair | (pair["truth"] or {}) for pair in pairs if pair.get("truth")]}
    return [(name, _bleed_table(cells)) for name, cells in by.items() if cells]


def _bleed_table(pairs: list[dict]) -> Table:
    names, rows = list(dict.fromkeys(pair["photos"] for pair in pairs)), {}
    for pair in pairs:
        spread = interval(pair["low"], pair["high"], lambda value: number(value, ".2f"))
        rows.setdefault(pair["word"], []).append(f"{number(pair['score'], '.2f')} ({spread}), {share(pair['share'])}")
    return ["images of", *(f"photos of {name}" for name in names)], [[word, *cells] for word, cells in rows.items()]


def bleed_lines(evaluation: dict) -> list[str]:
    """The tables of `bleed_tables` for a terminal."""
    lines = []
    for name, (header, rows) in bleed_tables(evaluation):
        wide = [max(len(row[k]) for row in (header, *rows)) for k in range(len(header))]
        each = ("  ".join(text.ljust(width) for text, width in zip(row, wide, strict=True)).rstrip() for row in (header, *rows))
        lines += [f"Bleed by {name} (95 %), share of the way to the photos:", *each]
    return lines


def truth_rows(evaluation: dict) -> list[dict]:
    """Toyland's read-back in the shape of scores; an error is better low."""
    better = {metric.title: metric.better for metric in METRICS.values()}
    return [
        row | {"title": name.replace("_", " ").capitalize(), "floor": row.get("base"), "better": better.get(name),
               "note": f"{row['count']} images" if row.get("count") else ""}
        for name, row in (evaluation.get("truth") or {}).items() if row
    ]  # fmt: skip


def measure_texts(row: dict) -> dict:
    """A row of scores in words; "" for what only some rows have. small: what stands beside a text."""
    ceiling, relative = row.get("ceiling"), row.get("relative")
    spread = interval(row.get("relative_low"), row.get("relative_high"), share)
    return {
        "name": row["title"], "note": row.get("note"), "floor": number(row.get("floor")), "score": number(row.get("score")),
        "ceil": "" if ceiling is None else number(ceiling), "ci": interval(row.get("low"), row.get("high")),
        "way": "" if relative is None else share(relative),
        "small": {"name": ARROWS.get(row.get("better"), ""), "way": "" if relative is None else spread},
    }  # fmt: skip


def worst_first(prompts: list[dict]) -> tuple[str, list[dict]]:
    """By DINO where every prompt has one, else by CLIP-T against the base -> (what it was sorted by, prompts)."""
    if all(row.get("dino") is not None for row in prompts):
        return "DINO", sorted(prompts, key=lambda row: row["dino"])
    return "CLIP-T against the base", sorted(prompts, key=lambda row: against_base(row) or 0.0)


def against_base(row: dict) -> float | None:
    """CLIP-T minus the base's."""
    if row.get("clip_t") is None or row.get("base_clip_t") is None:
        return None
    return row["clip_t"] - row["base_clip_t"]


def prompt_table(prompts: list[dict]) -> Table:
    cells = [
        [row["prompt"], number(row.get("dino")), number(row.get("clip_t")), number(against_base(row), "+.3f"),
         number(row.get("diversity")), str(row["count"])]
        for row in prompts
    ]  # fmt: skip
    return ["prompt", "DINO", "CLIP-T", "vs base", "DIV", "images"], cells


def checkpoint_table(checkpoints: list[dict]) -> Table:
    cells = [
        [str(row["step"]), number(row.get("strength", 1.0), "g"), number(row["identity"]),
         interval(row.get("low"), row.get("high")),
         number(row["obeys"] - row["base_obeys"], "+.3f"), number(row.get("drift")), limits(row)]
        for row in checkpoints
    ]  # fmt: skip
    return ["step", "strength", "identity", "95 %", "adherence", "drift", ""], cells


def photo_table(photos: list[dict]) -> Table:
    sides = ["trained" if row.get("trained") else "held out" for row in photos]
    cells = [[row["file"], side, "; ".join(row.get("notes") or []) or "–"] for row, side in zip(photos, sides)]
    return ["file", "", "notes"], cells


def limits(row: dict) -> str:
    """What a checkpoint's line says of the limits."""
    kept = "within limits" if row["qualifies"] else f"over: {plain(row.get('failed') or ['a limit'])}"
    return kept if not row.get("chosen") else "chosen" if row["qualifies"] else f"chosen, though {kept}"


def by_step(evaluation: dict) -> list[dict]:
    return sorted(evaluation.get("checkpoints") or [], key=lambda row: (row["step"], row.get("strength", 1.0)))


def provenance(evaluation: dict) -> list[tuple[str, list[tuple[str, str]]]]:
    """(heading, (name, value) lines) of everything needed to repeat or doubt the numbers."""
    groups = [(key, evaluation.get(key)) for key in ("run", "protocol", "encoders", "preprocessing", "versions", "seconds")]
    return [(key.capitalize(), [(name.replace("_", " "), plain(value)) for name, value in values.items()])
            for key, values in groups if values]  # fmt: skip


def markdown(evaluation: dict) -> str:
    """The report without its images: short enough for an issue or a model card."""
    run, asked = evaluation["run"], (evaluation.get("class") or {}).get("prompt")
    parts = [f"# {_safe(run['prompt'])}", _safe(f"{run['name']}: {' · '.join(origin(evaluation))}")]
    parts.append("\n".join(f"- {_safe(sentence)}" for sentence in evaluation.get("verdict") or []))
    parts.append(_measures("Scores", score_rows(evaluation)))
    parts.append(agreement(evaluation))
    parts.append(_measures(f"The class prompt: {asked}", class_rows(evaluation)))
    parts.append(_measures("Read back by Toyland", truth_rows(evaluation)))
    for name, table in bleed_tables(evaluation):
        parts.append(_part(f"Do the subjects stay apart? By {name}", table, BLEED))
    if steps := by_step(evaluation):
        parts.append(_part("Checkpoints", checkpoint_table(steps), evaluation.get("choice") or ""))
    if prompts := evaluation.get("prompts"):
        by, prompts = worst_first(prompts)
        parts.append(_part(f"Prompts, worst {by} first", prompt_table(prompts)))
    lost = len(evaluation.get("unusable") or [])
    parts.append(f"Unusable images: {lost}; they count." if lost else "")
    lines = [f"- {title}: {_safe('; '.join(f'{k} {v}' for k, v in held))}" for title, held in provenance(evaluation)]
    lines += [f"- Command: {_safe(evaluation['command'])}"] if evaluation.get("command") else []
    parts.append("## Provenance\n\n" + "\n".join(lines))
    return "\n\n".join(part for part in parts if part) + "\n"


def _measures(title: str, rows: list[dict]) -> str:
    cells = []
    for row in map(measure_texts, rows):
        name = f"{row['name']} {row['small']['name']}".rstrip()
        cells.append([name, row["floor"], row["score"], row["ci"], row["ceil"] or "–", row["way"] or "–"])
    return _part(title, (["", "base", "score", "95 %", "photos", "of the way"], cells)) if rows else ""


def _part(title: str, table: Table, said: str = "") -> str:
    header, rows = table
    rule = ["---"] + ["---:"] * (len(header) - 1)
    cells = [[_safe(text) for text in row] for row in (header, *rows)]
    lines = "\n".join(f"| {' | '.join(row)} |" for row in (cells[0], rule, *cells[1:]))
    return "\n\n".join(part for part in (f"## {_safe(title)}", _safe(said), lines) if part)


def _safe(text: str) -> str:
    """One line in which nothing of Markdown or HTML has a meaning."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))
