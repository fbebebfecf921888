"""`personalize photos --mask`: masks for photos that have none, by the base's attention to a word or a user's network."""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from personalize.commands.session import open_base, resolve
from personalize.common.errors import UserError
from personalize.common.terminal import Terminal
from personalize.data.crops import Photo
from personalize.data.mask_files import Find, make_masks
from personalize.data.photo_checks import Finding
from personalize.data.photos import read_photo

WORD = "word:"  # begins what is no file, as in `generate --mask`


def add_masks(photos: list[Photo], mask: str, *, base: str, screen: Terminal) -> tuple[list[Photo], list[Finding]]:
    """The photos with the masks that could be made, read back as training will read them, and findings about these.

    mask: "word:dog", or the path of an ONNX file. UserError for a model or a base that cannot be used.
    """
    word = mask.removeprefix(WORD).strip()
    if not mask.startswith(WORD):
        from personalize.data.mask_model import read_mask_model

        segment = read_mask_model(mask)
        made, findings = make_masks(photos, lambda images: map(segment, images), Path(mask).name)
    elif word:
        made, findings = make_masks(photos, by_word(base, word, screen), f"the attention to {word!r}")
    else:
        raise UserError("--mask word: names no word. Give the class of the subject, as in --mask word:dog")
    return [read_photo(Path(photo.path)) if Path(photo.path) in made else photo for photo in photos], findings


def by_word(base: str, word: str, screen: Terminal) -> Find:
    """What finds a word in images of one subject, by `word_masks`. UserError for a base that cannot be had, or without maps."""
    from personalize.data.word_masks import word_masks
    from personalize.evaluation.encoders import load_encoders
    from personalize.generation.attention_control import require_control

    recipe = resolve(None, [f"base={base}"])
    model = open_base(recipe, screen)
    require_control(model)
    encoders = load_encoders(model.folder, model.device, dino=recipe.evaluate.dino, clip=recipe.evaluate.clip)

    def patches(images: Tensor) -> Tensor:
        """DINO leaves a border out, so the image gets one by reflection."""
        side = images.shape[-1]
        seen = encoders.spread(torch.ones(1, encoders.grid**2), (side, side)).mean().sqrt().item()
        border = round(side * (1 / seen - 1) / 2)
        return encoders.dino(pad(images, [border] * 4, mode="reflect") if border else images).patches

    return lambda images: word_masks(model, patches, images, word)
