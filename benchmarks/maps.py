"""Do words look where they are? Attention maps on Toyland.   python -m benchmarks.maps RUN [--scenes 60] [--seed N --word dog]

Scenes of the subject of a run, whose seed and class are given (default: the dog of `benchmarks.subjects`), are rendered
with their true masks, noised, and read by the run with a prompt that says them. A word's map, cut at a threshold, is held
against the mask of the subject, for an accessory's word against that of the accessory: intersection over union in pixels.
Beside it: all of the image, and the mean mask of the other scenes, which know nothing of the image; and the true mask in
latent cells, than which no map is better.
"""

import statistics
from pathlib import Path

import torch
import typer
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from benchmarks.subjects import seed_of
from personalize.commands.session import open_run
from personalize.common.terminal import Terminal
from personalize.evaluation.image_cache import load_tensors
from personalize.generation.attention_maps import normalised
from personalize.generation.word_mask import LEVELS, image_maps
from personalize.generation.words import tokens_of
from personalize.toyland.world.render import draw_scene
from personalize.toyland.world.scenes import ACTIONS, PLACES, Scene, accessory_words, sample_scene, sample_subject
from personalize.training.load_run import load_run

THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
BODY = 128  # of the mask, where an accessory is 255


def iou(mask: Tensor, truth: Tensor) -> float:
    return ((mask & truth).sum() / (mask | truth).sum().clamp(min=1)).item()


def prompt_of(scene: Scene, noun: str) -> str:
    worn = accessory_words(scene.accessory) if scene.accessory else ""
    return " ".join(filter(None, ("a", noun, worn, ACTIONS[scene.action], PLACES[scene.place])))


def row(name: str, masks: list[Tensor], truths: list[Tensor]) -> str:
    """masks (H,W) of 0 to 1: cut at each threshold."""
    cells = [statistics.fmean(iou(m > cut, t) for m, t in zip(masks, truths, strict=True)) for cut in THRESHOLDS]
    return f"| {name} | {len(masks)} | {' | '.join(f'{cell:.2f}' for cell in cells)} |"


def main(run: Path, scenes: int = 60, seed: int = seed_of("dev", 0), word: str = "dog") -> None:
    folder, model, _, manifest = open_run(run, runs=Path("runs"), base="", settings=["device=cpu"], screen=Terminal())
    load_run(model, folder, manifest)
    token, individual = manifest["subjects"][0]["token"], sample_subject(seed, word)
    drawn = [sample_scene(seed + 100 + k, subject=individual) for k in range(scenes)]
    images, masks = zip(*(draw_scene(scene, model.size, BODY) for scene in drawn))
    pixels = torch.stack([torch.frombuffer(bytearray(m.tobytes()), dtype=torch.uint8).view(m.size) for m in masks])
    subject, accessory = pixels > BODY // 2, pixels > (BODY + 255) // 2

    def words(prompt: str, maps: Tensor, phrase: str) -> Tensor:
        each = maps[tokens_of(model, prompt, phrase)].mean(0)
        return normalised(interpolate(each[None, None], size=pixels.shape[1:], mode="bilinear")[0, 0])

    found: dict[str, tuple[list, list]] = {}
    z0 = model.encode_images(load_tensors([image.convert("RGB") for image in images]))[0]
    for k, scene in enumerate(drawn):
        prompt = prompt_of(scene, f"{token} {word}")
        for levels in (LEVELS, *((level,) for level in (0.2, 0.5, 0.8))):
            maps = image_maps(model, z0[k : k + 1], prompt, levels=levels)
            said = f"levels {', '.join(f'{level:g}' for level in levels)}"
            phrases = {token: subject, word: subject, f"{token} {word}": subject}
            phrases |= {scene.accessory.kind: accessory} if scene.accessory else {}
            for phrase, truth in phrases.items():
                masks_of, truths = found.setdefault((said, phrase if truth is subject else "accessory"), ([], []))
                masks_of.append(words(prompt, maps, phrase))
                truths.append(truth[k])
    print(f"| map | n | {' | '.join(f'> {cut:g}' for cut in THRESHOLDS)} |\n|---|---|{'---|' * len(THRESHOLDS)}")
    for (said, phrase), (maps, truths) in found.items():
        print(row(f"{phrase}, {said}", maps, truths))
    mean, truths = subject.float(), list(subject)
    cells = avg_pool2d(mean[:, None], model.downscale)
    print(row("all of the image", list(torch.ones_like(mean)), truths))
    print(row("mean mask of the others", list((mean.sum(0) - mean) / (scenes - 1)), truths))
    for side in (cells.shape[-1], cells.shape[-1] // 2):
        small = interpolate(avg_pool2d(cells, cells.shape[-1] // side), size=mean.shape[1:], mode="bilinear")
        print(row(f"true mask in {side} × {side}", list(small[:, 0]), truths))


if __name__ == "__main__":
    typer.run(main)
