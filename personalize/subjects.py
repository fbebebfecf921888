"""A subject of a run: its photos, the token and the class word that name it. A run may have several."""

from collections.abc import Sequence
from dataclasses import dataclass

from personalize import photos as photo_files
from personalize.config import Recipe
from personalize.crops import Photo
from personalize.errors import UserError
from personalize.prompts import fill


@dataclass(frozen=True)
class Subject:
    token: str
    class_word: str
    photos: list[Photo]

    def prompt(self, template: str) -> str:
        return fill(template, self.token, self.class_word)


def load(sources: Sequence, recipe: Recipe, *, tokens: Sequence[str], size: int) -> tuple[list[Subject], list[str]]:
    """One source of photos, token and class word each -> subjects, and what there is to say of the photos."""
    words = recipe.class_word
    if len(sources) != len(words):
        raise UserError(
            f"{len(sources)} folders of photos and {len(words)} class words ({', '.join(words)}): "
            "give one --class for each folder."
        )
    found, said = [], []
    for source, token, word in zip(sources, tokens, words, strict=True):
        photos, notices = photo_files.load(source, min_size=recipe.photos.min_size or size)
        found.append(Subject(token, word, photos))
        said += notices
    return found, said
