"""Truth, for Toyland only: what an image shows, what its prompt asked for, how far its subject is from the one meant.

N images, K kinds of a table of `probes.TABLES`. The reader has seen drawn images only, never a generated one, so
that these numbers do not come from the networks that draw, nor from the encoders whose cosines the other metrics take.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from personalize.common.bases import TOYLAND
from personalize.evaluation.encoders import BATCH
from personalize.evaluation.preprocessing import PLAIN, preprocess
from personalize.toyland import probes
from personalize.toyland.probes import SIZE, TABLES, Probe
from personalize.toyland.world import scenes
from personalize.toyland.world.render import draw_scene
from personalize.toyland.world.scenes import ACCESSORIES, ACTIONS, CLASSES, COLOURS, PLACES, PROPORTIONS, Subject, sample_scene

KINDS = ("pattern", "ear", "tail")
PARTS = (*probes.VALUES, *KINDS)  # of an identity
# part -> error above which another subject is seen, and the share of rendered scenes of the right one that are misread so
OFF = {"body": (0.5, 0.04), "second": (0.5, 0.10), "detail": (0.5, 0.11), "proportions": (0.6, 0.02),
       "pattern": (0.9, 0.16), "ear": (0.9, 0.18), "tail": (0.9, 0.17)}  # fmt: skip
SEEN = 5.0  # px of an image's 4096 that another word or proportion must change, or nobody could see it
CONTRAST = (COLOURS["white"], COLOURS["black"])
PAIRED = 200  # subjects of a class, whose pairs tell how far two at random are apart
SAID = {  # table -> word -> what a prompt may say for it
    "class": {word: (word,) for word in CLASSES},
    "place": {word: (phrase, word) for word, phrase in PLACES.items()},
    "action": {word: (phrase,) for word, phrase in ACTIONS.items()},
    "accessory": {word: (word,) for word in ACCESSORIES},
    "accessory_colour": {word: tuple(f"{word} {kind}" for kind in ACCESSORIES) for word in COLOURS},
}
SCORED = ("class", "place", "action", "accessory")  # an accessory is right where its kind is, and the colour if asked


@dataclass(frozen=True)
class Reading:
    """N images as the probe reads them, float32 on the CPU.

    chances  of each table, (N,K): probabilities that sum to 1
    values   body, second, detail (N,3) in opponent axes (`world.opponent`); proportions (N,4) in deviations of the world's own
    """

    chances: dict[str, Tensor]
    values: dict[str, Tensor]


@dataclass(frozen=True)
class Identity:
    """One individual: the row of its pattern, ear and tail in their tables; its colours (3,), proportions (4,)."""

    kinds: dict[str, int]
    values: dict[str, Tensor]


def load_probe(folder: Path = TOYLAND, device: torch.device | str = "cpu") -> Probe:
    """The probe beside a Toyland base. UserError where there is none."""
    return probes.load_probe(folder / "probes").to(device)


@torch.inference_mode()
def read_images(probe: Probe, images: Tensor) -> Reading:
    """(N,3,H,W) in [-1,1] -> what each shows. Shown at 64 px: the short side, then the centre."""
    device = next(probe.parameters()).device
    parts = [probe(preprocess(part.to(device), PLAIN, SIZE)) for part in images.split(BATCH)]
    out = {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
    return Reading({k: out[k].softmax(1) for k in TABLES}, {k: out[k] for k in probes.VALUES})


def wanted(prompt: str) -> dict[str, str]:
    """What a prompt asks for by its words: class, place, action, accessory, the accessory's colour; absent: not asked.

    A prompt that names two of a kind asks for neither.
    """
    text = " ".join(["", *re.findall(r"\w+", prompt.lower()), ""])
    named = {
        table: [word for word, phrases in said.items() if any(f" {phrase} " in text for phrase in phrases)]
        for table, said in SAID.items()
    }
    return {table: words[0] for table, words in named.items() if len(words) == 1}


def prompt_adherence(reading: Reading, prompts: Sequence[str], class_word: str = "") -> dict[str, Tensor]:
    """N images, N prompts -> (N,) for class, place, action, accessory: 1 right, 0 wrong, NaN where it is not asked.

    class_word: the class that is asked for where a prompt names none, as "a sks swimming" does.
    """
    assert len(prompts) == len(reading.chances["class"]), (len(prompts), len(reading.chances["class"]))
    out = {table: torch.full((len(prompts),), torch.nan) for table in SCORED}
    default = {table: word for table, word in wanted(class_word).items() if table == "class"}
    for row, prompt in enumerate(prompts):
        for table, word in (default | wanted(prompt)).items():
            right = float(TABLES[table][reading.chances[table][row].argmax()] == word)
            column = out["accessory" if table == "accessory_colour" else table]
            column[row] = right if column[row].isnan() else min(right, column[row].item())
    return out


def parameters(subject: Subject) -> Identity:
    """The truth of a subject; NaN for a proportion that its class does not show."""
    return Identity(probes.kinds(subject), {k: torch.tensor(v) for k, v in probes.values(subject).items()})


def exact(subjects: Sequence[Subject]) -> Reading:
    """N subjects -> what a probe without fault would read of their identities."""
    truths = [parameters(each) for each in subjects]
    return Reading(
        {k: F.one_hot(torch.tensor([t.kinds[k] for t in truths]).clamp(0), len(TABLES[k])).float() for k in KINDS},
        {k: torch.stack([t.values[k] for t in truths]) for k in probes.VALUES},
    )


def of_photos(reading: Reading) -> Identity:
    """K photos as they were read -> their mean: for a subject whose truth is not known."""
    rows = {name: int(reading.chances[name].mean(0).argmax()) for name in KINDS}
    return Identity(rows, {name: value.mean(0) for name, value in reading.values.items()})


def identity_error(parts: dict[str, Tensor]) -> Tensor:
    """What `errors` gave of N images -> (N,), their mean; 0 is the subject itself, 1 another of its class at random."""
    return torch.stack(list(parts.values())).mean(0)


def errors(reading: Reading, reference: Identity, class_word: str) -> dict[str, Tensor]:
    """N images -> (N,) for each part of an identity that can be seen, over its mean for two at random.

    body, second, detail: distance in opponent axes; proportions: mean difference; pattern, ear, tail: 1 - chance of the
    right one.
    """
    usual = expected(class_word)
    return {part: off / usual[part] for part, off in _apart(reading, reference, class_word).items()}


def off_in_words(part: str, class_word: str) -> str:
    """What is another than the subject's where a part is off, such as "the feet and tail have another colour"."""
    second, detail, ear, tail = scenes.PART_NAMES[class_word]
    colours, kinds = {"body": "body", "second": second, "detail": detail}, {"ear": ear, "tail": tail}
    if part in ("pattern", "proportions"):
        return f"the {part} {'is' if part == 'pattern' else 'are'} another's"
    name = (colours | kinds)[part]
    has = "have" if name.endswith("s") or " and " in name else "has"
    return f"the {name} {has} another {'colour' if part in colours else 'shape'}"


@cache
def expected(class_word: str) -> dict[str, float]:
    """The mean of each part over all pairs of the class's subjects of seeds 0 to 199, by their truth."""
    who = [scenes.sample_subject(seed, class_word) for seed in range(PAIRED)]
    reading = exact(who)
    apart = [_apart(reading, parameters(each), class_word) for each in who]
    others = PAIRED * (PAIRED - 1)  # the diagonal is 0
    return {part: sum(each[part].sum().item() for each in apart) / others for part in apart[0]}


@cache
def visible(class_word: str) -> frozenset[str]:
    """What of a subject can be seen for its class; all of it for a class unknown here.

    Colours always; the rest where another of its table, or a proportion a deviation above the middle for one below,
    changes an image of a subject in black and white by SEEN px on average. A car has no tail; a cat's ears differ by half
    a pixel.
    """
    middle = {name: (low + high) / 2 for name, (low, high) in PROPORTIONS.items()}
    step = {name: (high - low) / 12**0.5 for name, (low, high) in PROPORTIONS.items()}
    choices = {name: TABLES[name] for name in KINDS} | {k: (middle[k] - step[k], middle[k] + step[k]) for k in middle}
    if class_word not in CLASSES:
        return frozenset({*probes.COLOUR_FIELDS, *choices})
    changes = {name: 0.0 for name in choices}
    for body, second in (CONTRAST, CONTRAST[::-1]):
        who = replace(scenes.sample_subject(0, class_word), body=body, second=second, detail=second)
        for name, values in choices.items():
            first, *others = (_standing(replace(who, **{name: value})) for value in values)
            changes[name] += sum(np.abs(first - other).mean(2).sum() for other in others) / len(others) / 2
    return frozenset({*probes.COLOUR_FIELDS, *(name for name, change in changes.items() if change >= SEEN)})


def _standing(who: Subject) -> np.ndarray:
    """(64,64,3) in [0,1]."""
    return np.asarray(draw_scene(sample_scene(0, subject=who, place="meadow", action="standing", accessory=None))[0]) / 255


def _apart(reading: Reading, reference: Identity, class_word: str) -> dict[str, Tensor]:
    """(N,) of each part in its own unit; what cannot be seen for the class is left out."""
    seen = visible(class_word)
    off = {part: value - reference.values[part] for part, value in reading.values.items()}
    out = {part: off[part].norm(dim=1) for part in probes.COLOUR_FIELDS if part in seen}
    columns = [k for k, name in enumerate(PROPORTIONS) if name in seen]
    if columns:
        out["proportions"] = off["proportions"][:, columns].abs().mean(1)
    chances = {part: reading.chances[part][:, reference.kinds[part]] for part in KINDS if part in seen}
    return out | {part: 1 - chance for part, chance in chances.items()}
