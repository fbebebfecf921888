"""`report.html`: one file that holds everything, asks nothing of the network, and is read from the verdict down."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from personalize.evaluation.report.figures import checkpoint_path, histogram, mark, range_bar
from personalize.evaluation.report.html import Album, Markup, el, interval, join, number, share
from personalize.evaluation.report.tables import (
    ARROWS,
    Table,
    by_step,
    checkpoint_table,
    class_rows,
    markdown,
    origin,
    prompt_table,
    provenance,
    score_rows,
    truth_rows,
    worst_first,
)

__all__ = ["Shown", "html", "markdown"]
STYLE = Path(__file__).parents[2] / "common" / "page.css"
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
HERO_PHOTOS, HERO_PICTURES = 6, 6
ACROSS = 8  # prompts beside each other in the contact sheet


@dataclass(frozen=True)
class Shown:
    """Pictures of a report.

    photos       empty where they are left out
    prior        a few class pictures the run trained with
    cells        (prompt, index) -> picture by the run; the same index is the same noise
    base_class   the class prompt by the base, and
    tuned_class  by the run, from the same noise
    """

    photos: list[Image.Image]
    prior: list[Image.Image]
    cells: dict[tuple[str, int], Image.Image]
    base_class: list[Image.Image]
    tuned_class: list[Image.Image]


def html(evaluation: dict, shown: Shown) -> str:
    """metrics.json and the pictures -> the page. A section without data is left out."""
    photos = shown.photos if evaluation.get("photos_included") else []
    hero = _spread(shown.cells)
    pairs = (evaluation.get("copying") or {}).get("pairs") or []
    paired = [shown.cells[p["prompt"], p["index"]] for p in pairs if (p["prompt"], p["index"]) in shown.cells]
    album = Album([*photos, *paired, *(shown.cells[key] for key in hero)])
    parts = (
        _head(evaluation, bool(photos)), _hero(album, photos, shown.cells, hero), _scores(evaluation), _checkpoints(evaluation),
        _sheet(evaluation, shown.cells, album), _prompts(evaluation), _copying(evaluation, photos, shown.cells, album),
        _class(evaluation, shown, album), _truth(evaluation), _photo_health(evaluation), _provenance(evaluation),
    )  # fmt: skip
    body = el("body", el("main", *parts))
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=POLICY),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", f"{evaluation['run']['prompt']}: evaluation of {evaluation['run']['name']}"),
        el("style", Markup(STYLE.read_text(encoding="utf-8") + album.css())),
    )
    return "<!doctype html>\n" + el("html", head, body, lang="en") + "\n"


def _head(evaluation: dict, with_photos: bool) -> Markup:
    run, sentences = evaluation["run"], evaluation.get("verdict") or []
    said = []
    for sentence, level in zip(sentences, evaluation.get("verdict_levels") or []):
        first, colon, rest = sentence.partition(": ")
        said.append(el("li", mark(level), el("p", el("strong", first), el("span", rest) if colon else None)))
    quiet = el("p", "This page holds your photos; --no-photos leaves them out.", class_="quiet") if with_photos else None
    *made, time = origin(evaluation)
    line = el("p", "".join(f"{part} · " for part in made), el("span", time, class_="whole"), class_="line")
    title = (el("p", run["name"], class_="over"), el("h1", run["prompt"]), line)
    return el("header", *title, quiet, el("ul", *said, class_="verdict") if said else None)


def _hero(album: Album, photos: list, cells: dict, keys: list) -> Markup | None:
    blocks = []
    if photos:
        few = photos[:HERO_PHOTOS]
        words = "The photos" if len(few) == len(photos) else f"{len(few)} of {len(photos)} photos"
        blocks.append(_mosaic([album.show(p, f"photo {k + 1}") for k, p in enumerate(few)], words))
    if keys:
        pictures = [album.show(cells[key], key[0]) for key in keys]
        several = len({prompt for prompt, _ in keys}) == len(keys)
        words = f"Drawn by the run{': the first picture of a prompt each' if several else ''}, not picked"
        blocks.append(_mosaic(pictures, words, row=not photos))
    return el("section", el("div", *blocks, class_="hero")) if blocks else None


def _mosaic(tiles: list[Markup], caption: str, *, row: bool = False) -> Markup:
    """Two rows of squares; of an odd number the first is four times as large. row: one row of them."""
    odd = len(tiles) % 2 and not row
    columns = len(tiles) if row else (len(tiles) + 3 * odd) // 2
    kind = "tiles row" if row else "tiles odd" if odd else "tiles"
    inside = el("div", *tiles, class_=kind, style=f"--n:{columns}")
    return el("figure", inside, el("figcaption", caption), style=f"--n:{columns}")


def _spread(cells: dict) -> list[tuple[str, int]]:
    """Keys of the pictures at the top: the first of each of a few prompts from all over the list; never the best ones."""
    keys = sorted(cells, key=lambda key: key[1])
    first = {}
    for key in keys:
        first.setdefault(key[0], key)
    firsts = list(first.values())
    if len(firsts) < HERO_PICTURES:
        return keys[:HERO_PICTURES]
    return [firsts[k * len(firsts) // HERO_PICTURES] for k in range(HERO_PICTURES)]


def _scores(evaluation: dict) -> Markup | None:
    rows = score_rows(evaluation)
    note = "Bars run from 0 to 1. Ticks: the base, on the same prompts without the token, and the photos among themselves."
    return _section("Scores", note, _measures(rows)) if rows else None


def _measures(rows: list[dict]) -> Markup:
    """Rows of name, base, bar, photos, score, interval and share; a column that no row fills is left out."""
    tops, ways = (any(row.get(key) is not None for row in rows) for key in ("ceiling", "relative"))
    names = [("", "name"), ("base", "floor"), ("", "bar"), ("photos", "ceil"), ("score", "score"), ("95 %", "ci")]
    names.append(("of the way", "way"))
    gone = {"ceil": tops, "way": ways, "ci": any(interval(row.get("low"), row.get("high")) for row in rows)}
    kept = [(title, class_) for title, class_ in names if gone.get(class_, True)]

    def cells(row: dict) -> dict:
        spread, top, way = (
            interval(row.get("relative_low"), row.get("relative_high"), share),
            row.get("ceiling"),
            row.get("relative"),
        )
        name = join(row["title"], el("small", ARROWS[row["better"]]) if row.get("better") in ARROWS else None)
        return {
            "name": join(name, el("em", row["note"]) if row.get("note") else None),
            "floor": number(row.get("floor")), "bar": range_bar(row), "ceil": None if top is None else number(top),
            "score": number(row.get("score")), "ci": interval(row.get("low"), row.get("high")),
            "way": None if way is None else join(share(way), el("small", spread) if spread else None),
        }  # fmt: skip

    head = el("tr", *[el("th", title, class_=class_, scope="col") for title, class_ in kept])
    body = [el("tr", *[el("td", held[class_], class_=class_) for _, class_ in kept]) for held in map(cells, rows)]
    return el("table", el("thead", head), el("tbody", *body), class_="measures")


def _checkpoints(evaluation: dict) -> Markup | None:
    rows = by_step(evaluation)
    if not rows:
        return None
    table = _table(checkpoint_table(rows), "n n ci n n words", marked=[bool(row.get("chosen")) for row in rows])
    legend = el("p", "Ring: chosen. Hollow: breaks a limit. Upright lines: 95 % intervals.", class_="note")
    figure = el("div", checkpoint_path(rows), legend)
    return _section("Checkpoints", evaluation.get("choice") or "", el("div", figure, _box(table), class_="beside"))


def _sheet(evaluation: dict, cells: dict, album: Album) -> Markup | None:
    """Prompts as columns, noise as rows; many prompts in groups of equal width."""
    prompts, unusable = list(dict.fromkeys(prompt for prompt, _ in cells)), evaluation.get("unusable") or []
    if not cells:
        return _section("Unusable pictures", _lost(unusable)) if unusable else None
    lost = {(row["prompt"], row["index"]): row["why"] for row in unusable if row["prompt"] in prompts}
    rows = sorted({index for _, index in [*cells, *lost]})
    groups = -(-len(prompts) // ACROSS)
    columns = -(-len(prompts) // groups)

    def cell(key: tuple[str, int]) -> Markup:
        picture = album.show(cells[key], f"{key[0]}, {key[1] + 1}") if key in cells else el("span", class_="pic none")
        return el("td", picture, el("b", lost[key]) if key in lost else None, class_="lost" if key in lost else None)

    tables = []
    for at in range(0, len(prompts), columns):
        held = prompts[at : at + columns]
        empty = [el("td")] * (columns - len(held))
        head = el("tr", el("th"), *[el("th", prompt, scope="col") for prompt in held], *empty)
        body = [el("tr", el("th", str(k + 1), scope="row"), *[cell((p, k)) for p in held], *empty) for k in rows]
        tables.append(_box(el("table", el("thead", head), el("tbody", *body), class_="sheet", style=f"--n:{columns}")))
    note = "A column is a prompt. A row is the same noise throughout."
    return _section("Contact sheet", f"{note} {_lost(unusable)}".strip(), *tables)


def _lost(unusable: list[dict]) -> str:
    if not unusable:
        return ""
    counts = Counter(row["why"] for row in unusable)
    reasons = ", ".join(f"{count} {why}" for why, count in counts.items())
    return f"{len(unusable)} unusable ({reasons}): scored as drawn, never left out; those of the run are marked here."


def _prompts(evaluation: dict) -> Markup | None:
    if not evaluation.get("prompts"):
        return None
    by, rows = worst_first(evaluation["prompts"])
    return _section("Prompts", f"Worst {by} first.", _box(_table(prompt_table(rows), "words n n n n ci")))


def _copying(evaluation: dict, photos: list, cells: dict, album: Album) -> Markup | None:
    found = evaluation.get("copying")
    if not found:
        return None
    apart = found.get("leave_one_out") or []
    words = "Each picture by the DINO cosine to its nearest photo."
    words += " Shaded: photos to their own nearest other photo; what lies right of it is suspect." if apart else ""
    figure = el("div", histogram(found["nearest"], apart) if found.get("nearest") else None, el("p", words, class_="note"))
    pairs = [_pair(pair, photos, cells, album) for pair in found.get("pairs") or []]
    nearest = el("div", el("h3", "The nearest pairs"), el("div", *pairs, class_="pairs")) if pairs else None
    note = f"{found['copied']} of {found['pictures']} pictures count as copies."
    if found.get("auth_pct") is not None:
        note += f" AuthPct {number(found['auth_pct'], '.1f')}%: so many lie farther from their nearest photo than that photo"
        note += " lies from its own nearest one."
    return _section("Does it copy the photos?", note, el("div", figure, nearest, class_="beside"))


def _pair(pair: dict, photos: list, cells: dict, album: Album) -> Markup:
    """A picture, beside its nearest photo where photos are shown."""
    key, photo = (pair["prompt"], pair["index"]), pair["photo"]
    sides = [album.show(photos[photo], f"photo {photo + 1}")] if photo < len(photos) else []
    sides += [album.show(cells[key], pair["prompt"])] if key in cells else []
    said = join(el("b", number(pair["cosine"])), f" photo {photo + 1} · {pair['prompt']}, {pair['index'] + 1}")
    return el("figure", el("div", *sides, class_="duo") if sides else None, el("figcaption", said))


def _class(evaluation: dict, shown: Shown, album: Album) -> Markup | None:
    rows, word = class_rows(evaluation), evaluation["run"].get("class") or "subject"
    pairs = [
        el("div", album.show(old, f"base {k + 1}"), album.show(new, f"run {k + 1}"), class_="duo")
        for k, (old, new) in enumerate(zip(shown.base_class, shown.tuned_class))
    ]
    if not rows and not pairs:
        return None
    a = "an" if word[0].lower() in "aeiou" else "a"
    prompt = (evaluation.get("class") or {}).get("prompt")
    note = f"The prompt is “{prompt}”, without the token. Of the way: how far it moved from the base to the photos."
    seen = []
    if pairs:
        seen.append(el("h3", "Left by the base, right by the run, from the same noise"))
        seen.append(el("div", *pairs, class_="pairs small"))
    if shown.prior:
        few = [album.show(one, f"class picture {k + 1}") for k, one in enumerate(shown.prior)]
        seen += [el("h3", "Some of the class pictures it trained with"), el("div", *few, class_="strip")]
    return _section(f"Is {a} {word} still {a} {word}?", note if prompt else "", _measures(rows) if rows else None, *seen)


def _truth(evaluation: dict) -> Markup | None:
    rows = truth_rows(evaluation)
    note = "Toyland knows what each prompt asked for, and reads it back from the pictures."
    return _section("Read back by Toyland", note, _measures(rows)) if rows else None


def _photo_health(evaluation: dict) -> Markup | None:
    rows = evaluation.get("photos")
    if not rows:
        return None
    cells = []
    for row in rows:
        cells.append([row["file"], "trained" if row.get("trained") else "held out", "; ".join(row.get("notes") or []) or "–"])
    return _section("Photos", "", _box(_table((["file", "", "notes"], cells), "words words words")))


def _provenance(evaluation: dict) -> Markup:
    groups = []
    for title, lines in provenance(evaluation):
        pairs = [join(el("dt", name), el("dd", value)) for name, value in lines]
        groups.append(el("div", el("h3", title), el("dl", *pairs)))
    command = el("pre", evaluation["command"]) if evaluation.get("command") else None
    return el("details", el("summary", "How these numbers were made"), command, el("div", *groups, class_="groups"))


def _section(title: str, note: str, *parts: Markup | None) -> Markup:
    return el("section", el("h2", title), el("p", note, class_="note") if note else None, *parts)


def _table(table: Table, kinds: str, *, marked: Iterable[bool] = ()) -> Markup:
    """kinds: a class for each column: words, n (numbers) or ci (lighter numbers)."""
    (header, rows), classes = table, kinds.split()
    marks = [*marked] or [False] * len(rows)
    head = el("tr", *[el("th", title, class_=c, scope="col") for title, c in zip(header, classes)])
    body = [
        el("tr", *[el("td", text, class_=c) for text, c in zip(row, classes)], class_="marked" if on else None)
        for row, on in zip(rows, marks)
    ]
    return el("table", el("thead", head), el("tbody", *body))


def _box(table: Markup) -> Markup:
    """Wider than the page: it scrolls sideways inside."""
    return el("div", table, class_="box", tabindex=0)
