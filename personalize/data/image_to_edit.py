"""The files of an image to begin with and of its mask  ->  a canvas at the size the base draws."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from personalize.common.errors import UserError
from personalize.common.image_size import Size, as_size, in_words
from personalize.common.untrusted import read_bytes
from personalize.data.crops import Crop, Photo, binary_mask, fixed_box, image_tensor, mask_tensor
from personalize.data.decode import decode
from personalize.generation.inpainting import Canvas
from personalize.generation.word_mask import word_mask
from personalize.models.interface import LatentModel

WORD = "word"  # begins a mask that is found by a word of the prompt: word:hat
STRENGTH = 0.6  # of the steps, without a mask: the layout stays and the subject changes


@dataclass(frozen=True)
class ImageToEdit:
    """An image file, read; its mask says in white what is painted anew. `strength` and `visits` as in `Canvas`.

    word: of the prompt, in place of a mask: what is painted anew is where the base sees it.
    """

    photo: Photo
    strength: float
    visits: int
    word: str = ""

    @property
    def identity(self) -> dict:
        """All of it that decides an image, for images.jsonl."""
        files = {"image": {"file": self.photo.name, "sha256": self.photo.sha256}}
        if self.photo.mask is not None:
            files["mask"] = {"sha256": self.photo.mask_sha256} | ({"word": self.word} if self.word else {})
        return files | {"strength": self.strength, "careful": self.visits}

    def masked_by(self, model: LatentModel, prompt: str, size: int | Size) -> "ImageToEdit":
        """With the mask of the prompt's `word` in the part that is drawn, at the size of the photo, as a file would give it."""
        box = fixed_box(self.photo, "center", shape=size)
        found = word_mask(model, image_tensor([Crop(self.photo, box)], size)[0], prompt, self.word)[0]
        part = Image.fromarray((found * 255).byte().numpy()).resize(
            (box[2] - box[0], box[3] - box[1]), Image.Resampling.NEAREST
        )
        mask = Image.new("L", self.photo.size)
        mask.paste(part, box[:2])
        return replace(self, photo=replace(self.photo, mask=mask, mask_sha256=hashlib.sha256(mask.tobytes()).hexdigest()))

    def canvas(self, size: int | Size) -> Canvas:
        """The middle at this size. UserError where its mask leaves nothing to paint, or nothing to keep."""
        crop = Crop(self.photo, fixed_box(self.photo, "center", shape=size))
        pixels, mask = image_tensor([crop], size)[0], None
        if self.photo.mask is not None:
            mask = (mask_tensor([crop], size)[0] >= 0.5).float()
            part = "square" if len(set(as_size(size))) == 1 else f"{in_words(size)} px"
            share = mask.mean(dtype=torch.float64).item()
            _require_two_parts(share, self.photo.name, f" in its middle {part}, which is drawn")
        return Canvas(pixels, mask, self.strength, self.visits)


def read_image_to_edit(image: Path | None, mask: Path | str | None, strength: float | None, careful: int) -> ImageToEdit | None:
    """The files and options of `generate`; None without an image. UserError names what is wrong in them."""
    if image is None:
        given = {"--mask": mask is not None, "--strength": strength is not None, "--careful": careful != 1}
        if option := next((name for name, is_given in given.items() if is_given), ""):
            raise UserError(f"{option} is about an image to begin with. Give it, as in: --image FILE")
        return None
    if strength is None:
        strength = STRENGTH if mask is None else 1.0
    if not 0 <= strength <= 1:
        raise UserError(f"--strength {strength:g} is not between 0, which keeps the image, and 1, which keeps nothing of it.")
    if careful < 1:
        raise UserError(f"--careful {careful} is how often each step is made. Give 1 or more.")
    if careful > 1 and mask is None:
        raise UserError(f"--careful {careful} brings what is painted in line with what is kept. Give a --mask FILE too.")
    photo, (kind, _, word) = read_image(image), str(mask).partition(":")
    if kind == WORD:
        if not word.strip():
            raise UserError(f"--mask {mask} names no word. Give one of the prompt, as in: --mask word:hat")
        return ImageToEdit(photo, strength, careful, word.strip())
    if mask is not None:
        photo = _with_mask(photo, Path(mask))
    return ImageToEdit(photo, strength, careful)


def read_image(path: Path) -> Photo:
    """One image, without a caption or a mask. UserError names a file that cannot be used."""
    data = read_bytes(path, "image")
    decoded = decode(data, str(path))
    if decoded.alpha is not None:
        raise UserError(
            f"{path} is transparent in part, and says nothing there to begin with. Save it on a background without "
            "transparency; to have that part painted, give a --mask FILE that is white there."
        )
    return Photo(str(path), decoded.image, hashlib.sha256(data).hexdigest(), None, decoded.size)


def _with_mask(photo: Photo, path: Path) -> Photo:
    data = read_bytes(path, "mask")
    mask = decode(data, str(path))
    if mask.alpha is not None:
        raise UserError(
            f"{path} is transparent in part, which may mean either. Save it without transparency: white is painted anew, "
            "black is kept."
        )
    if mask.size != photo.size:
        sizes = [f"{width}×{height} px" for width, height in (mask.size, photo.size)]
        raise UserError(f"{path} is {sizes[0]}, but its image {photo.path} is {sizes[1]}. Make the mask from this very image.")
    shades = binary_mask(mask.image.convert("L"))
    _require_two_parts(shades.histogram()[255] / (shades.width * shades.height), photo.name)
    return replace(photo, mask=shades, mask_sha256=hashlib.sha256(data).hexdigest())


def _require_two_parts(white: float, name: str, where: str = "") -> None:
    """UserError where a mask, `white` of which is painted anew, is of one colour."""
    if white == 0:
        raise UserError(
            f"the mask of {name} is black{where}, so that nothing is painted. Make what is to be painted white, from half "
            "brightness up."
        )
    if white == 1:
        raise UserError(
            f"the mask of {name} is white{where}, so that nothing of the image is kept. Leave --mask out; --strength says then "
            "how much changes."
        )
