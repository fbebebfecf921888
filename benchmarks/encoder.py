"""Do the scores of identity see what a person sees?    python -m benchmarks.encoder [--base FOLDER] [--subjects N] [--out FILE]

Rendered scenes only, whose truth is known exactly. Two questions, over all classes:

parts      Five photos of a subject, and two images: the subject, and it with one part changed. How often has the right one the
           higher score? In the same scene, and in two scenes that differ in place, action, accessory and all else.
agreement  Two images of one prompt, in each of which none to five parts are changed. How often has the one with the lower
           identity error, by its true parameters, the higher score?

A tie counts half. Prints Markdown; --out writes the numbers as JSON. What the report says of a Toyland's DINO it reads from
BASE/encoders/identity/agreement.json.
"""

import argparse
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.machine import machine
from personalize.common.bases import TOYLAND
from personalize.common.files import write_json
from personalize.evaluation import encoders, image_cache
from personalize.evaluation.metrics import foreground, similarity, toyland_truth
from personalize.evaluation.metrics.similarity import Embeddings
from personalize.toyland.world.render import draw_scene
from personalize.toyland.world.scenes import (
    CLASSES,
    EARS,
    HELD_OUT,
    MIN_COLOUR_DISTANCE,
    PATTERNS,
    PROPORTIONS,
    TAILS,
    Scene,
    Subject,
    distance,
    sample_colour,
    sample_scene,
    sample_subject,
)

FIRST = HELD_OUT + 20_000_000  # seeds that no other part of the project uses
PARTS = ("body", "second", "detail", "pattern", "ear", "tail")
SCORES = {"dino": "DINO", "clip_i": "CLIP-I", "dino_fg": "DINO-fg", "first": "first"}
PHOTOS = 5
LOOK_ALIKES = 16  # others of the class, for `first`: in an evaluation they are the base's class images
MOST_CHANGED = 5
SAME, OTHER = "same scene", "other scene"
RELATIVES = {"body": 1, "second": 1, "detail": 1, "pattern": 2, "ear": 2, "tail": 2}  # part -> subjects that differ in it only


def relatives(subject: Subject, seed: int) -> list[Subject]:
    """Subjects that differ from this one in one part only, as many and in the order that RELATIVES says."""
    r = random.Random(f"relatives/{seed}")
    own = (subject.body, subject.second, subject.detail)
    changes = []
    for part in ("body", "second", "detail"):
        colour = own[0]
        while any(distance(colour, other) < MIN_COLOUR_DISTANCE for other in own):
            colour = sample_colour(r)
        changes.append((part, colour))
    for part, table in (("pattern", PATTERNS), ("ear", EARS), ("tail", TAILS)):
        others = [word for word in table if word != getattr(subject, part)]
        changes += [(part, word) for word in r.sample(others, RELATIVES[part])]
    return [replace(subject, **{part: value}) for part, value in changes]


@dataclass(frozen=True)
class Judge:
    """What scores are taken against: K photos of a subject, their foreground, and others of its class, embedded."""

    encoder: encoders.Encoders
    photos: Embeddings
    foreground: Tensor
    look_alikes: Embeddings

    def scores(self, scenes: Sequence[Scene]) -> dict[str, Tensor]:
        """N scenes -> (N,) by score."""
        images = self.embed(scenes)
        return {
            "dino": similarity.dino(images, self.photos),
            "clip_i": similarity.clip_i(images, self.photos),
            "dino_fg": foreground.dino_fg(images, self.photos, self.foreground),
            "first": similarity.first(images, self.photos, self.look_alikes),
        }

    def embed(self, scenes: Sequence[Scene]) -> Embeddings:
        return similarity.embed(self.encoder, image_cache.load_tensors([draw_scene(scene)[0] for scene in scenes]))


def judge(encoder: encoders.Encoders, subject: Subject, seed: int) -> Judge:
    """Photos as the examples' are: standing, with nothing worn."""
    photos = [sample_scene(seed + k, subject=subject, action="standing", accessory=None) for k in range(PHOTOS)]
    drawn = [draw_scene(scene) for scene in photos]
    masks = [torch.from_numpy(np.array(mask))[None] / 255 for _, mask in drawn]
    seeds = range(seed + 50, seed + 50 + LOOK_ALIKES)
    others = [sample_scene(k, subject=sample_subject(k, subject.class_word)) for k in seeds]
    embedded = similarity.embed(encoder, image_cache.load_tensors([image for image, _ in drawn]))
    bare = Judge(encoder, embedded, foreground.marked(encoder, masks), embedded)
    return replace(bare, look_alikes=bare.embed(others))


def cases(encoder: encoders.Encoders, count: int) -> Iterator[tuple[int, Subject, Judge]]:
    """`count` subjects of each class, each with the first of 100 seeds of its own and its judge."""
    for c, word in enumerate(CLASSES):
        for k in range(count):
            seed = FIRST + 100 * (c * 1000 + k)
            subject = sample_subject(seed, word)
            yield seed, subject, judge(encoder, subject, seed)


def with_one_changed(subject: Subject, seed: int) -> dict[str, Subject]:
    """Part that can be seen -> the subject with another one."""
    others, seen = relatives(subject, seed), toyland_truth.visible(subject.class_word)
    return {
        part: next(other for other in others if getattr(other, part) != getattr(subject, part))
        for part in PARTS
        if part in seen
    }


def part_pairs(judge: Judge, subject: Subject, seed: int) -> dict[tuple[str, str, str], float]:
    """(scenes, part, score) -> 1 where the right one is nearer, 0.5 for a tie."""
    scene, elsewhere = sample_scene(seed + 90, subject=subject), sample_scene(seed + 91)
    changed = with_one_changed(subject, seed)
    scenes = [replace(where, subject=other) for where in (scene, elsewhere) for other in changed.values()]
    names = [(where, part) for where in (SAME, OTHER) for part in changed]
    found = judge.scores([scene, *scenes])
    return {(*name, score): nearer(values[0], values[k + 1]) for score, values in found.items() for k, name in enumerate(names)}


def graded_pair(judge: Judge, subject: Subject, seed: int) -> dict[str, float]:
    """Score -> 1 where it is higher for the image with the lower identity error, 0.5 for a tie; empty where both are equal."""
    r = random.Random(f"graded/{seed}")
    prompt = sample_scene(seed + 92)
    same = {"place": prompt.place, "action": prompt.action, "accessory": prompt.accessory}
    scenes = [sample_scene(seed + 93 + k, subject=graded(subject, r, seed + 95 + k), **same) for k in range(2)]
    reading = toyland_truth.exact([scene.subject for scene in scenes])
    a, b = toyland_truth.identity_error(toyland_truth.errors(reading, toyland_truth.parameters(subject), subject.class_word))
    found = judge.scores(scenes)
    return {score: nearer(*(values if a < b else values.flip(0))) for score, values in found.items()} if a != b else {}


def graded(subject: Subject, r: random.Random, seed: int) -> Subject:
    """The subject with none to MOST_CHANGED of its parts another's, its proportions one of them."""
    other = sample_subject(seed, subject.class_word)
    chosen = r.sample((*PARTS, "proportions"), r.randint(0, MOST_CHANGED))
    fields = [field for part in chosen for field in (PROPORTIONS if part == "proportions" else (part,))]
    return replace(subject, **{field: getattr(other, field) for field in fields})


def nearer(right: Tensor, wrong: Tensor) -> float:
    return 0.5 if right == wrong else float(right > wrong)


def measure(encoder: encoders.Encoders, count: int) -> dict:
    """Shares by scenes, part and score, the agreement by score, and how many pairs each is of."""
    pairs, graded_pairs = [], []
    for seed, subject, one in cases(encoder, count):
        pairs.append(part_pairs(one, subject, seed))
        graded_pairs.append(graded_pair(one, subject, seed))
    names = dict.fromkeys(name for row in pairs for name in row)
    values = {name: [row[name] for row in pairs if name in row] for name in names}
    agreement = {score: [row[score] for row in graded_pairs if row] for score in SCORES}
    tables = {
        scenes: {part: {score: _share(values[scenes, part, score]) for score in SCORES} for part in PARTS}
        for scenes in (SAME, OTHER)
    }
    return tables | {
        "agreement": {score: _share(found) for score, found in agreement.items()},
        "pairs": min(map(len, values.values())),
        "graded pairs": len(agreement["dino"]),
    }


def _share(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 4)


def report(found: dict) -> str:
    header = [f"| | {' | '.join(PARTS)} |", "|---" * (len(PARTS) + 1) + "|"]
    rows = [
        f"| {title}, {scenes} | {' | '.join(f'{found[scenes][part][score]:.2f}' for part in PARTS)} |"
        for scenes in (SAME, OTHER)
        for score, title in SCORES.items()
    ]
    agreement = ", ".join(f"{title} {100 * found['agreement'][score]:.0f} %" for score, title in SCORES.items())
    said = f"{found['pairs']} pairs a part. Agreement with truth, {found['graded pairs']} pairs of one prompt: {agreement}."
    return "\n".join([*header, *rows, "", said])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, default=TOYLAND, help="a folder that `personalize pretrain` made")
    parser.add_argument("--subjects", type=int, default=20, help="of each class")
    parser.add_argument("--out", type=Path, help="a JSON file for the numbers")
    options = parser.parse_args()
    start = time.time()
    encoder = encoders.load_encoders(options.base, "cpu")
    found = measure(encoder, options.subjects)
    record = {"command": f"python -m benchmarks.encoder --subjects {options.subjects}", "machine": machine(),
              "date": time.strftime("%Y-%m-%d"), "seconds": round(time.time() - start), "encoders": encoder.names}  # fmt: skip
    if options.out:
        write_json(options.out, record | found)
    print(report(found), f"\n{record['seconds']} s, {record['machine']}; {encoder.names['dino']}", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
