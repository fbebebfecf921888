"""Is the mask of a photo right that the base's attention makes?   python -m benchmarks.masks [--each 4] [--seed N]

Photos of a new subject of each class are rendered with their true masks; `photos --mask word:CLASS` marks them, not knowing
these. Intersection over union at half brightness, beside the mean mask of all other photos, which looks at no image.
"""

import statistics

import numpy as np
import torch
import typer

from personalize.commands.photo_masks import by_word
from personalize.common.terminal import SILENT
from personalize.toyland.world.render import draw_scene
from personalize.toyland.world.scenes import CLASSES, sample_scene, sample_subject


def iou(mask: np.ndarray, truth: np.ndarray) -> float:
    return ((mask & truth).sum() / max(1, (mask | truth).sum())).item()


def main(each: int = 4, seed: int = 820_000) -> None:
    torch.set_num_threads(1)
    truths, rows = [], {}
    for k, word in enumerate(CLASSES):
        subject = sample_subject(seed + k, word)
        scenes = [sample_scene(seed + 100 + 10 * k + j, subject=subject, accessory=None) for j in range(each)]
        images, masks = zip(*(draw_scene(scene, 64) for scene in scenes))
        truths += [np.asarray(mask) >= 128 for mask in masks]
        found = by_word("toyland", word, SILENT)([image.convert("RGB") for image in images])
        rows[word] = [iou(mask >= 0.5, truth) for mask, truth in zip(found, truths[-each:], strict=True)]
    mean = np.stack(truths).sum(0)
    blind = [iou((mean - truth) / (len(truths) - 1) > 0.3, truth) for truth in truths]
    every = [value for values in rows.values() for value in values]
    print("| class | IoU |\n|---|---|")
    print("\n".join(f"| {word} | {statistics.fmean(values):.2f} |" for word, values in rows.items()))
    print(f"| all {len(every)} | {statistics.fmean(every):.2f} |\n| mean mask of the others | {statistics.fmean(blind):.2f} |")
    print(f"least {min(every):.2f}; below 0.5: {sum(value < 0.5 for value in every)}")


if __name__ == "__main__":
    typer.run(main)
