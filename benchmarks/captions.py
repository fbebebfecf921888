"""Are written captions true? `personalize photos --caption` on Toyland.   python -m benchmarks.captions [--scenes 1200]

Scenes of subjects that no network has seen, in all places and actions. The base's CLIP gets the image and the class; what it
says is held against the scene. "absent": the same with the true phrase taken out of the list, where nothing should be said.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
import typer
from torch import Tensor

from personalize.common.bases import TOYLAND
from personalize.evaluation.captioner import SURE, choose_phrases, phrase_lists
from personalize.evaluation.encoders import Clip, load_clip
from personalize.toyland.world.render import draw_scene
from personalize.toyland.world.scenes import ACTIONS, HELD_OUT, PLACES, Scene, sample_scene

FIRST = HELD_OUT + 50_000
TRUTH = {"place": PLACES, "action": ACTIONS}


def measure(count: int, sure: float = SURE, *, absent: bool = False) -> dict[str, dict[str, float]]:
    """Of place and action: the share of scenes of which it is said, and the share of these where it is right.

    absent: and the share of scenes of which another is said where the list lacks the true one.
    """
    clip, lists = load_clip(TOYLAND, "cpu"), phrase_lists("toyland")
    scenes = [sample_scene(FIRST + k) for k in range(count)]
    images = torch.stack([torch.from_numpy(np.array(draw_scene(scene)[0])).permute(2, 0, 1) for scene in scenes]) / 127.5 - 1
    result = {}
    for kind, phrases in TRUTH.items():
        true = [phrases[getattr(scene, kind)] for scene in scenes]
        said = _said(clip, images, scenes, range(count), kind, lists[kind], sure=sure)
        right = [said[k] == true[k] for k in range(count) if said[k]]
        result[kind] = {"said": len(right) / count, "right": sum(right) / len(right)}
        others: dict[int, str] = {}
        for phrase in lists[kind] if absent else ():
            rows = [k for k in range(count) if true[k] == phrase]
            others |= _said(clip, images, scenes, rows, kind, [one for one in lists[kind] if one != phrase], sure=sure)
        result[kind]["absent"] = sum(map(bool, others.values())) / count
    return result


def _said(
    clip: Clip, images: Tensor, scenes: Sequence[Scene], rows: Sequence[int], kind: str, phrases: Sequence[str], *, sure: float
) -> dict[int, str]:
    """Some of the scenes by number -> the phrase of each, or ""."""
    of_class, said = defaultdict(list), {}
    for k in rows:
        of_class[scenes[k].subject.class_word].append(k)
    for word, numbers in of_class.items():
        chosen = choose_phrases(clip, images[numbers], word, {kind: phrases}, sure=sure)
        said |= {k: one.get(kind, "") for k, one in zip(numbers, chosen, strict=True)}
    return said


def main(scenes: int = 1200) -> None:
    print("| said from a share of | of | said | of these right | said where the list lacks it |\n|---|---|---|---|---|")
    for sure in (0.3, SURE, 0.7, 0.9):
        for kind, row in measure(scenes, sure, absent=True).items():
            print(f"| {sure} | {kind} | {row['said']:.1%} | {row['right']:.1%} | {row['absent']:.1%} |")


if __name__ == "__main__":
    typer.run(main)
