"""Edits by words on Toyland, beside the same noise without control.   python -m benchmarks.editing WORK [EDITS [KEY=VALUE …]]

Swapped animals and ignored phrases as the probe reads them, the same words, and images inverted and drawn again. WORK gets
editing.md and a sheet for each kind of edit. Change is the mean difference of pixels, of 1, in a border of 8 px, where the
subject hardly is.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

import torch
import typer

import personalize
from personalize.commands.session import open_base
from personalize.common.files import make_folder, write_text, writing
from personalize.common.terminal import Terminal
from personalize.data.image_grid import grid
from personalize.evaluation.bootstrap import bootstrap_interval
from personalize.evaluation.metrics.toyland_truth import load_probe, prompt_adherence, read_images
from personalize.generation import sampling
from personalize.generation.editing import Edit, sample_edits
from personalize.generation.words import Emphasis
from personalize.toyland.world.scenes import ACTIONS, ANIMALS, PLACES, with_article

SEEDS = 5  # edits of a pair of prompts
BORDER, SHOWN = 8, 12
PHRASE = "wearing a blue hat"


def scenes() -> Iterator[tuple[str, str, str]]:
    """Two animals and what they do where, endlessly."""
    places = zip(itertools.cycle(ACTIONS.values()), itertools.cycle(PLACES.values()), strict=False)
    for (old, new), words in zip(itertools.cycle(itertools.permutations(ANIMALS, 2)), places, strict=False):
        yield with_article(old), with_article(new), " ".join(words)


def swaps() -> Iterator[Edit]:
    return (Edit(f"{old} {scene}", f"{new} {scene}") for old, new, scene in scenes())


def phrases() -> Iterator[Edit]:
    for old, _, scene in scenes():
        prompt = f"{old} {PHRASE} {scene}"
        yield Edit(prompt, prompt, emphasis=Emphasis(ignored=(PHRASE,)))


def measure(model, probe, edits, count: int, config) -> tuple[list[dict], list]:
    """A row for each of `count` edits, and the images of the first."""
    rows, shown = [], []
    for edit in itertools.islice(edits, -(-count // SEEDS)):
        z0 = sample_edits(model, edit, sampling.image_generators(0, range(SEEDS)), config)
        images = model.decode_latents(z0.flatten(0, 1))
        wanted = edit.target.replace(f"{PHRASE} ", "")
        reading = read_images(probe, images[2 * SEEDS :])
        right = prompt_adherence(reading, [wanted] * SEEDS)
        images = images.unflatten(0, (3, SEEDS))
        change = (images[1:] - images[0]).abs() / 2
        change[..., BORDER:-BORDER, BORDER:-BORDER] = torch.nan
        plain, edited = change.nanmean((2, 3, 4))
        for k in range(SEEDS):
            row = {name: right[name][k].item() for name in ("class", "place", "action")}
            row |= {"bare": float(reading.chances["accessory"][k].argmax() == 0), "prompt": edit.source}
            rows.append(row | {"plain": plain[k].item(), "edited": edited[k].item()})
        shown += images.transpose(0, 1).flatten(0, 1)[: 3 * max(0, SHOWN - len(shown) // 3)]
    return rows[:count], sampling.to_pil(torch.stack(shown))


def exact(model, config) -> tuple[bool, float]:
    """Whether the same words give the same bits, and the least dB of four images inverted at guidance 5."""
    edit = next(swaps())
    streams = sampling.image_generators(1, range(4))
    source, _, same = sample_edits(model, Edit(edit.source, edit.source), streams, config)
    strong = personalize.resolve(settings=["draw.sampler=ddpm", f"draw.steps={config.steps}", "draw.guidance=5"]).draw
    decibels = []
    for k, image in enumerate(model.decode_latents(source)):
        z0 = model.encode_images(image[None])[0]
        back = sample_edits(model, edit, sampling.image_generators(2, [k]), strong, photo=z0)[0]
        decibels.append((20 * torch.log10((z0.max() - z0.min()) / (back - z0).square().mean().sqrt())).item())
    return torch.equal(source, same), min(decibels)


def line(name: str, rows: list[dict], keys: tuple[str, ...]) -> str:
    cells = [f"{sum(row[key] for row in rows) / len(rows):.2f}" for key in keys]
    saved = [1 - row["edited"] / row["plain"] for row in rows]
    less = bootstrap_interval(saved, [(row["prompt"],) for row in rows])
    return f"| {name} | {len(rows)} | {' | '.join(cells)} | {less.mean:.0%} ({less.low:.0%} to {less.high:.0%}) |"


def main(work: Path, edits: int = typer.Argument(100), settings: list[str] = typer.Argument([])) -> None:  # noqa: B008
    recipe = personalize.resolve(settings=settings)
    model, probe = open_base(recipe, Terminal()), load_probe()
    make_folder(work)
    keys = ("class", "place", "action", "bare")
    lines = [f"| edit | n | {' | '.join(keys)} | border changes less (95 %) |", "|---|---|" + "---|" * (len(keys) + 1)]
    for name, kind in (("swap", swaps), ("ignore", phrases)):
        rows, images = measure(model, probe, kind(), edits, recipe.draw)
        lines.append(line(name, rows, keys))
        print(lines[-1], flush=True)
        with writing(work / f"{name}.png") as temporary:
            grid(images, 3).save(temporary)
    same, decibels = exact(model, recipe.draw)
    lines += ["", f"The same words give {'the same' if same else 'OTHER'} bits; inverted images are {decibels:.0f} dB or more."]
    write_text(work / "editing.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    typer.run(main)
