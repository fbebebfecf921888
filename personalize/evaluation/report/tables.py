"""What the report says in words and numbers: provenance, rows of tables, and the report's twin in Markdown."""

import re

from personalize.evaluation.metrics import METRICS
from personalize.evaluation.report.html import interval, number, plain, share

ARROWS = {"higher": "↑", "lower": "↓"}
Table = tuple[list[str], list[list[str]]]  # header, rows
_SPECIAL = re.compile(r"([\\`*_\[\]<>|&])")


def origin(evaluation: dict) -> list[str]:
    """Method and base, checkpoint, time: what was scored, and when."""
    run, time = evaluation["run"], evaluation["time"][:16].replace("T", " ") + " UTC"
    return [part for part in (f"{plain(run['methods'])} on {run['base']}", run.get("checkpoint"), time) if part]


def score_rows(evaluation: dict) -> list[dict]:
    return [row for row in (evaluation.get("scores") or {}).values() if row]


def class_rows(evaluation: dict) -> list[dict]:
    """The class prompt's numbers in the shape of scores: how far it moved to the photos, and whether it still obeys."""
    found = evaluation.get("class")
    if not found:
        return []
    moved = {"title": "PRES: class pictures like the photos", "score": found["pres"], "floor": found["base"], "better": "lower",
             "relative": found.get("share")}  # fmt: skip
    moved |= {key: found.get(key) for key in ("low", "high", "ceiling")}
    moved |= {"relative_low": found.get("share_low"), "relative_high": found.get("share_high")}
    rows = [moved]
    if found.get("clip_t") is not None:
        rows.append({"title": "CLIP-T: obeys the class prompt", "score": found["clip_t"], "floor": found.get("base_clip_t")})
    return rows


def truth_rows(evaluation: dict) -> list[dict]:
    """Toyland's read-back in the shape of scores; an error is better low."""
    found = evaluation.get("truth") or {}
    rows = []
    for name, row in found.items():
        if row:
            note = f"{row['count']} pictures" if row.get("count") else ""
            better = next((metric.better for metric in METRICS.values() if metric.title == name), None)
            rows.append(
                row | {"title": name.replace("_", " ").capitalize(), "floor": row.get("base"), "better": better, "note": note}
            )
    return rows


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
    return ["prompt", "DINO", "CLIP-T", "vs base", "DIV", "pictures"], cells


def checkpoint_table(checkpoints: list[dict]) -> Table:
    cells = [
        [str(row["step"]), number(row["identity"]), interval(row.get("low"), row.get("high")),
         number(row["obeys"] - row["base_obeys"], "+.3f"), number(row.get("drift")), limits(row)]
        for row in checkpoints
    ]  # fmt: skip
    return ["step", "identity", "95 %", "obedience", "drift", ""], cells


def limits(row: dict) -> str:
    """What a checkpoint's line says of the limits."""
    kept = "within limits" if row["qualifies"] else f"over: {plain(row.get('failed') or ['a limit'])}"
    return kept if not row.get("chosen") else "chosen" if row["qualifies"] else f"chosen, though {kept}"


def by_step(evaluation: dict) -> list[dict]:
    return sorted(evaluation.get("checkpoints") or [], key=lambda row: row["step"])


def provenance(evaluation: dict) -> list[tuple[str, list[tuple[str, str]]]]:
    """(heading, (name, value) lines) of everything needed to repeat or doubt the numbers."""
    groups = [(title, evaluation.get(key)) for title, key in (
        ("Run", "run"), ("Protocol", "protocol"), ("Encoders", "encoders"), ("Preprocessing", "preprocessing"),
        ("Versions", "versions"), ("Seconds", "seconds"))]  # fmt: skip
    return [(title, [(name.replace("_", " "), plain(value)) for name, value in held.items()]) for title, held in groups if held]


def markdown(evaluation: dict) -> str:
    """The report without its pictures: short enough for an issue or a model card."""
    run, asked = evaluation["run"], (evaluation.get("class") or {}).get("prompt")
    parts = [f"# {_safe(run['prompt'])}", _safe(f"{run['name']}: {' · '.join(origin(evaluation))}")]
    parts.append("\n".join(f"- {_safe(sentence)}" for sentence in evaluation.get("verdict") or []))
    parts.append(_measures("Scores", score_rows(evaluation)))
    parts.append(_measures(f"The class prompt: {asked}", class_rows(evaluation)))
    parts.append(_measures("Read back by Toyland", truth_rows(evaluation)))
    if steps := by_step(evaluation):
        parts.append(_part("Checkpoints", checkpoint_table(steps), evaluation.get("choice") or ""))
    if prompts := evaluation.get("prompts"):
        by, prompts = worst_first(prompts)
        parts.append(_part(f"Prompts, worst {by} first", prompt_table(prompts)))
    lost = len(evaluation.get("unusable") or [])
    parts.append(f"Unusable pictures: {lost}; they count." if lost else "")
    lines = [f"- {title}: {_safe('; '.join(f'{k} {v}' for k, v in held))}" for title, held in provenance(evaluation)]
    lines += [f"- Command: {_safe(evaluation['command'])}"] if evaluation.get("command") else []
    parts.append("## Provenance\n\n" + "\n".join(lines))
    return "\n\n".join(part for part in parts if part) + "\n"


def _measures(title: str, rows: list[dict]) -> str:
    def cells(row: dict) -> list[str]:
        name = f"{row['title']} {ARROWS.get(row.get('better'), '')}".rstrip()
        numbers = [number(row.get("floor")), number(row.get("score")), interval(row.get("low"), row.get("high"))]
        return [name, *numbers, number(row.get("ceiling")), share(row.get("relative"))]

    table = (["", "base", "score", "95 %", "photos", "of the way"], [cells(row) for row in rows])
    return _part(title, table) if rows else ""


def _part(title: str, table: Table, said: str = "") -> str:
    header, rows = table
    rule = ["---"] + ["---:"] * (len(header) - 1)
    cells = [[_safe(text) for text in row] for row in (header, *rows)]
    lines = "\n".join(f"| {' | '.join(row)} |" for row in (cells[0], rule, *cells[1:]))
    return "\n\n".join(part for part in (f"## {_safe(title)}", _safe(said), lines) if part)


def _safe(text: str) -> str:
    """One line in which nothing of Markdown or HTML has a meaning."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))
