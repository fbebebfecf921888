"""Edits by words on Toyland, beside the same noise without control.   python -m benchmarks.editing WORK [EDITS [KEY=VALUE …]]

Swapped animals and ignored phrases as the probe reads them, the same words, images inverted and drawn again, and what control
costs. WORK gets editing.md and a sheet for each kind of edit. Change is the mean difference of pixels, of 1, in a border of
8 px, where the subject hardly is.
"""

import itertools
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import typer
from torch import Tensor

import personalize
from personalize.commands.session import open_base
from personalize.common.files import make_folder, write_text, writing
from personalize.common.terminal import Terminal
from personalize.core.inversion import ddim_inverse
from personalize.core.samplers import ddim
from personalize.core.steering import STEERING
from personalize.data.image_grid import grid
from personalize.evaluation.bootstrap import bootstrap_interval
from personalize.evaluation.metrics.toyland_truth import load_probe, prompt_adherence, read_images
from personalize.generation import sampling
from personalize.generation.editing import Edit, sample_edits
from personalize.generation.inpainting import Canvas, sampling_options
from personalize.generation.words import Emphasis
from personalize.toyland.world.scenes import ACTIONS, ANIMALS, PLACES, with_article
from personalize.training import noisy_classifier

SEEDS = 5  # edits of a pair of prompts
BORDER, SHOWN = 8, 12
INVERTED, TURNS = 25, 3  # steps of ddim, turns of each way
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


def decibels(image: Tensor, other: Tensor, span: Tensor | float) -> float:
    return (20 * torch.log10(span / (other - image).square().mean().sqrt())).item()


def exact(model, config) -> tuple[bool, float, float]:
    """Whether the same words give the same bits; the least dB of four images inverted and drawn again: of their latents by
    ddpm's residuals at guidance 5, of their pixels by ddim's fixed point at 2.2."""
    edit = next(swaps())
    streams = sampling.image_generators(1, range(4))
    source, _, same = sample_edits(model, Edit(edit.source, edit.source), streams, config)
    strong = personalize.resolve(settings=["draw.sampler=ddpm", f"draw.steps={config.steps}", "draw.guidance=5"]).draw
    residuals, iterated = [], []
    for k, image in enumerate(model.decode_latents(source)):
        z0 = model.encode_images(image[None])[0]
        back = sample_edits(model, edit, sampling.image_generators(2, [k]), strong, photo=z0)[0]
        residuals.append(decibels(z0, back, z0.max() - z0.min()))
        with torch.inference_mode():
            texts = [sampling.encode_texts(model, [text], draws=True) for text in (edit.source, "")]
            guided = sampling.text_guidance(model, *texts, replace(config, guidance=2.2))
            noise = ddim_inverse(guided, z0, model.schedule, INVERTED)
            back = ddim(guided, noise, model.schedule, INVERTED)
        iterated.append(decibels(model.decode_latents(z0), model.decode_latents(back), 2.0))
    return torch.equal(source, same), min(residuals), min(iterated)


def costs(model, config) -> dict[str, float]:
    """Seconds over those of plain drawing of as many rows, the least of `TURNS` in turn."""
    edit, rows = next(swaps()), range(3 * SEEDS)
    texts = [edit.source] * SEEDS + [edit.target] * 2 * SEEDS
    mask = torch.ones(1, model.size, model.size)
    mask[:, : model.size // 2] = 0
    canvas = Canvas(torch.zeros(3, model.size, model.size), mask)
    latents = torch.randn(8, model.latent_channels, *[model.size // model.downscale] * 2)
    network = noisy_classifier.train_classifier(
        [(latents, None)] * 2, model.schedule, rows=(1, 1), seed=0, steps=1, advance=lambda: None
    )
    gradient = noisy_classifier.class_gradient(network, noisy_classifier.SUBJECT)
    like = {"steer": lambda guided, part: STEERING["classified"](guided, model.schedule, gradient, 2)}

    def draw(options: dict):
        sampling.sample_latents(model, texts, sampling.image_generators(0, rows), config, **options)

    ways = {
        "plain": lambda: draw({}),
        "attention control": lambda: sample_edits(model, edit, sampling.image_generators(0, rows[:SEEDS]), config),
        "masks": lambda: draw(sampling_options(model, canvas, config.steps)(len(rows))),
        "like": lambda: draw(like),
    }
    seconds = {name: [] for name in ways}
    for _ in range(TURNS):
        for name, way in ways.items():
            begun = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - begun)
    return {name: min(each) / min(seconds["plain"]) for name, each in seconds.items()}


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
    same, residuals, iterated = exact(model, recipe.draw)
    lines += ["", f"The same words give {'the same' if same else 'OTHER'} bits."]
    lines.append(f"Four images inverted, at least: {residuals:.0f} dB by ddpm at guidance 5, {iterated:.0f} dB by ddim at 2.2.")
    shares = (f"{name} {cost - 1:+.0%}" for name, cost in costs(model, recipe.draw).items() if name != "plain")
    lines += ["", f"Over plain drawing of as many rows: {', '.join(shares)}."]
    write_text(work / "editing.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    typer.run(main)
