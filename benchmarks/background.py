"""Is the prompt's place there? CLIP-bg and CLIP-T against the truth.   python -m benchmarks.background [--scenes 64]

Scenes of the example subjects are rendered, so that the place is known, and held against a prompt with the right place and
one with another. AUC: how often a right pair scores above a wrong one, over all pairs. In half of the scenes of the second
columns the prompt's action is wrong too, in right and wrong pairs alike: a score of the place should not mind.
"""

import random
import statistics

import numpy as np
import torch
import typer
from torch import Tensor

from personalize.common.bases import TOYLAND
from personalize.evaluation.encoders import load_encoders
from personalize.evaluation.image_cache import load_tensors
from personalize.evaluation.metrics.background import clip_bg, subject_patches, where
from personalize.evaluation.metrics.foreground import COVERED
from personalize.evaluation.metrics.similarity import Embeddings, embed
from personalize.toyland.world.examples import PLACES as PHOTO_PLACES
from personalize.toyland.world.examples import SUBJECTS
from personalize.toyland.world.render import draw_scene
from personalize.toyland.world.scenes import ACTIONS, PLACES, Scene, sample_scene, sample_subject


def auc(right: Tensor, wrong: Tensor) -> float:
    """(N,), (M,) -> the share of pairs in which the right one is above; half for equals."""
    difference = right[:, None] - wrong[None]
    return ((difference > 0).double() + (difference == 0).double() / 2).mean().item()


def drawn(scenes: list[Scene], encoders) -> tuple[Tensor, Embeddings, Tensor]:
    """Pixels (N,3,H,W), embeddings and the true subject patches (N,P)."""
    images, masks = zip(*(draw_scene(scene, 64) for scene in scenes))
    pixels = load_tensors([image.convert("RGB") for image in images])
    covered = encoders.cover(torch.stack([torch.from_numpy(np.array(mask))[None] / 255 for mask in masks]))
    return pixels, embed(encoders, pixels), covered >= COVERED


def main(scenes: int = 64, seed: int = 0) -> None:
    torch.set_num_threads(1)
    encoders, r = load_encoders(TOYLAND, "cpu"), random.Random(seed)
    scores, overlaps = {}, []
    for word, start in SUBJECTS.values():
        subject = sample_subject(start, word)
        photos = [
            sample_scene(start + k, subject=subject, place=place, action="standing", accessory=None)
            for k, place in enumerate(PHOTO_PLACES)
        ]
        _, of_photos, foreground = drawn(photos, encoders)
        tested = [sample_scene(start + 500 + k, subject=subject) for k in range(scenes)]
        pixels, embedded, truth = drawn(tested, encoders)
        found = subject_patches(embedded, of_photos, foreground)
        overlaps += [((a & b).sum() / (a | b).sum()).item() for a, b in zip(found, truth, strict=True)]
        for share in (0, 0.5):
            actions = [r.choice([*ACTIONS]) if r.random() < share else scene.action for scene in tested]
            others = [r.choice([place for place in PLACES if place != scene.place]) for scene in tested]
            for side, places in enumerate(([scene.place for scene in tested], others)):
                prompts = [
                    f"a {word} {ACTIONS[a]} {PLACES[p]}".replace("  ", " ") for a, p in zip(actions, places, strict=True)
                ]
                words = [where(prompt, word) for prompt in prompts]
                nothing = torch.zeros_like(found)
                rows = {
                    "CLIP-T": (embedded.clip * encoders.clip_text(prompts)).sum(1),
                    "CLIP-T, words of place only": clip_bg(encoders, pixels, words, nothing),
                    "CLIP-bg": clip_bg(encoders, pixels, words, found),
                    "CLIP-bg by the true masks": clip_bg(encoders, pixels, words, truth),
                }
                for name, values in rows.items():
                    scores.setdefault(name, {}).setdefault(share, ([], []))[side].append(values)
    print("| score | AUC | right above wrong, same image | AUC, half of the actions wrong |\n|---|---|---|---|")
    for name, by_share in scores.items():
        (right, wrong), (other_right, other_wrong) = (map(torch.cat, by_share[share]) for share in (0, 0.5))
        paired = (right > wrong).double().mean().item()
        print(f"| {name} | {auc(right, wrong):.3f} | {paired:.3f} | {auc(other_right, other_wrong):.3f} |")
    print(f"subject patches, IoU with the true ones: {statistics.fmean(overlaps):.2f} of {len(overlaps)} images")


if __name__ == "__main__":
    typer.run(main)
