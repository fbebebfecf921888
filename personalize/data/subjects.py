"""A subject of a run: its photos, the token and the class word that name it. A run may have several."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from personalize.common.errors import UserError
from personalize.common.prompts import fill
from personalize.common.recipe import Recipe
from personalize.common.settings import read_toml
from personalize.data.crops import Photo
from personalize.data.mask_coverage import require_usable_masks
from personalize.data.photos import load_photos

LEAST = 5  # photos of a subject, from which some are held out


# google/dreambooth's subjects by class word (CC BY 4.0)
DREAMBOOTH = {
    "backpack": "backpack backpack_dog", "stuffed animal": "bear_plushie grey_sloth_plushie wolf_plushie",
    "bowl": "berry_bowl", "can": "can", "candle": "candle", "cat": "cat cat2", "clock": "clock",
    "sneaker": "colorful_sneaker shiny_sneaker", "dog": "dog dog2 dog3 dog5 dog6 dog7 dog8",
    "toy": "duck_toy monster_toy poop_emoji rc_car robot_toy", "boot": "fancy_boot", "glasses": "pink_sunglasses",
    "cartoon": "red_cartoon", "teapot": "teapot", "vase": "vase",
}  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """photos: trained on; held_out: for evaluation only."""

    token: str
    class_word: str
    photos: list[Photo]
    held_out: list[Photo] = field(default_factory=list)

    def prompt(self, template: str) -> str:
        return fill(template, self.token, self.class_word)


def load_subjects(sources: Sequence, recipe: Recipe, *, tokens: Sequence[str], size: int) -> tuple[list[Subject], list[str]]:
    """One source of photos, token and class word each -> subjects, and remarks on the photos."""
    words = recipe.class_word
    if len(sources) != len(words):
        raise UserError(
            f"{len(sources)} folders of photos and {len(words)} class words ({', '.join(words)}): "
            "give one --class for each folder."
        )
    if recipe.train.cut_mix and len(words) == 1:
        raise UserError(
            f"train.cut_mix = {recipe.train.cut_mix} puts two subjects into one image, and there is only {words[0]!r}. "
            "Give a folder and a --class for each subject, or leave it out."
        )
    if recipe.train.cut_mix and recipe.photos.shape == "buckets":
        raise UserError(
            f"train.cut_mix = {recipe.train.cut_mix} cuts two photos of one shape, and photos.shape = buckets keeps theirs. "
            "Give photos.shape=square, or leave out train.cut_mix."
        )
    subjects, remarks = [], []
    for source, token, word in zip(sources, tokens, words, strict=True):
        photos, notices = load_photos(source, min_size=recipe.photos.min_size or size)
        if recipe.photos.background < 1 or recipe.photos.crop == "subject":
            require_usable_masks(photos)
        held = min(recipe.photos.hold_out, len(photos) - LEAST + 1) if len(photos) >= LEAST else 0
        subjects.append(Subject(token, word, photos[: len(photos) - held], photos[len(photos) - held :]))
        if held:
            names = ", ".join(photo.name for photo in subjects[-1].held_out)
            remarks.append(f"{names} is kept from training, to judge by (photos.hold_out=0 trains on all)")
        remarks += notices
    return subjects, remarks


def list_subjects(source: str) -> dict[str, tuple[str, str]]:
    """A folder of subjects' folders, each with a subject.toml, or hf:google/dreambooth -> name -> (photos, class word)."""
    if source.startswith("hf:"):
        if source != "hf:google/dreambooth":
            raise UserError(f"{source!r} does not say its subjects' classes; give hf:google/dreambooth or a folder of folders.")
        return {name: (f"{source}/{name}", word) for word, names in DREAMBOOTH.items() for name in names.split()}
    subjects = {}
    for path in sorted(Path(source).glob("*/subject.toml")):
        word = read_toml(path).get("class")
        if not isinstance(word, str):
            raise UserError(f'{path} does not say the class, such as: class = "dog"')
        subjects[path.parent.name] = str(path.parent), word
    if not subjects:
        raise UserError(f'{source} holds no folder with a subject.toml that says its class, such as: class = "dog"')
    return subjects
