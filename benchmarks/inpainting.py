"""Animals and accessories painted into rendered scenes of Toyland.    python -m benchmarks.inpainting WORK [N [KEY=VALUE …]]

The subject's box becomes another animal; the box in which a hat, scarf … would be drawn gets it. Read by the probe, for
--careful 1 and 3. WORK gets inpainting.md and a sheet for each: the scene, its reconstruction by the VAE, what was painted.

seam   the mean jump between neighbouring pixels where the mask is feathered, over the reconstruction's there
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import typer
from PIL import Image, ImageChops
from torch import Tensor

import personalize
from benchmarks.toyland import prompt
from personalize.commands.session import open_base
from personalize.common.files import make_folder, write_text, writing
from personalize.common.terminal import Terminal
from personalize.data.image_grid import grid
from personalize.evaluation.image_cache import load_tensors
from personalize.evaluation.metrics.toyland_truth import load_probe, prompt_adherence, read_images
from personalize.generation import sampling
from personalize.generation.inpainting import Canvas, feathered, paste_kept, sampling_options
from personalize.toyland.world.render import draw_scene
from personalize.toyland.world.scenes import ANIMALS, HELD_OUT, Scene, sample_scene

FIRST = HELD_OUT + 9_700_000  # seeds that no other part of the project uses
VISITS, SHOWN = (1, 3), 12
Job = tuple[Scene, Scene, Image.Image]  # what the photo shows, what is asked for, and an image whose box is painted


def another_animal(size: int) -> Iterator[Job]:
    for k in itertools.count():
        scene = replace(sample_scene(FIRST + k), accessory=None)
        if scene.subject.class_word in ANIMALS:
            other = ANIMALS[(ANIMALS.index(scene.subject.class_word) + 1 + k % (len(ANIMALS) - 1)) % len(ANIMALS)]
            yield scene, replace(scene, subject=replace(scene.subject, class_word=other)), draw_scene(scene, size)[1]


def an_accessory(size: int) -> Iterator[Job]:
    for k in itertools.count(100_000):
        scene = sample_scene(FIRST + k)
        if scene.accessory:
            bare = replace(scene, accessory=None)
            yield bare, scene, ImageChops.difference(draw_scene(bare, size)[0], draw_scene(scene, size)[0])


def canvas(model, job: Job, visits: int) -> Canvas:
    """The box of the job's image, one latent cell larger, is painted."""
    left, top, right, bottom = job[2].convert("L").getbbox()
    mask, cell = torch.zeros(1, model.size, model.size), model.downscale
    mask[:, max(0, top - cell) : bottom + cell, max(0, left - cell) : right + cell] = 1
    return Canvas(load_tensors([draw_scene(job[0], model.size)[0]])[0], mask, visits=visits)


def jump(image: Tensor, weight: Tensor) -> float:
    """The mean difference, of 2, of neighbouring pixels between which `weight` (1,H,W) changes."""
    pairs = [(x.diff(dim=d).abs().mean(0), weight[0].diff(dim=d - 1) != 0) for x, d in ((image, 1), (image, 2))]
    return torch.cat([difference[where] for difference, where in pairs]).mean().item()


def measure(model, probe, jobs: list[Job], visits: int, config) -> tuple[list[str], list[Tensor]]:
    """The cells of a row, and (scene, reconstruction, painted) of the first jobs."""
    images, seams, shown = [], [], []
    for k, job in enumerate(jobs):
        place = canvas(model, job, visits)
        streams = sampling.image_generators(0, [k], "inpainting")
        z0 = sampling.sample_latents(
            model, [prompt(job[1])], streams, config, **sampling_options(model, place, config.steps)(1)
        )
        painted = paste_kept(model.decode_latents(z0), place, model.downscale)[0]
        plain = model.decode_latents(model.encode_images(place.pixels[None])[0])[0]
        weight = feathered(place.mask, model.downscale)
        seams.append((jump(painted, weight), jump(plain, weight)))
        images.append(painted)
        shown += [place.pixels, plain, painted] if k < SHOWN else []
    right = prompt_adherence(read_images(probe, torch.stack(images)), [prompt(job[1]) for job in jobs])
    ratio = sum(a for a, _ in seams) / sum(b for _, b in seams)
    names = ("class", "place", "action", "accessory")
    cells = ["" if right[name].isnan().all() else f"{right[name].nanmean():.2f}" for name in names]
    return [str(len(jobs)), str(visits), *cells, f"{ratio:.2f}"], shown


def main(work: Path, count: int = typer.Argument(100), settings: list[str] = typer.Argument([])) -> None:  # noqa: B008
    recipe = personalize.resolve(settings=["draw.sampler=ddpm", *settings])
    model, probe = open_base(recipe, Terminal()), load_probe()
    make_folder(work)
    lines = ["| painted | n | careful | class | place | action | accessory | seam |", "|---|---|---|---|---|---|---|---|"]
    kinds: dict[str, Callable] = {"another animal": another_animal, "an accessory": an_accessory}
    for name, kind in kinds.items():
        jobs = list(itertools.islice(kind(model.size), count))
        for visits in VISITS:
            cells, shown = measure(model, probe, jobs, visits, recipe.draw)
            lines.append(f"| {' | '.join([name, *cells])} |")
            print(lines[-1], flush=True)
            with writing(work / f"{name}, careful {visits}.png") as temporary:
                grid(sampling.to_pil(torch.stack(shown)), 6).save(temporary)
    write_text(work / "inpainting.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    typer.run(main)
