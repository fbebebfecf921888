"""A folder of photos as a person changes it: photos added, captions written, photos cropped, masks painted."""

from contextlib import suppress
from pathlib import Path

from PIL import Image

from personalize.common.errors import UserError
from personalize.common.files import slug, write_bytes, writing
from personalize.common.untrusted import read_bytes
from personalize.data.captions import read_caption, write_caption
from personalize.data.crops import Photo
from personalize.data.decode import decode
from personalize.data.mask_files import write_mask
from personalize.data.photos import ACCEPTED, SUFFIXES, find_photos, read_photo

MOST_PHOTOS = 60  # of a subject


def add_photos(folder: Path, paths: list[Path]) -> list[str]:
    """Copies what the decoder of `train` reads into the folder -> why the others are not there. UserError for too many."""
    count = sum(path.suffix.lower() in SUFFIXES for path in folder.iterdir())
    if count + len(paths) > MOST_PHOTOS:
        raise UserError(f"{count + len(paths)} photos are more than the {MOST_PHOTOS} of a subject. Choose the best 3 to 5.")
    refused = []
    for path in paths:
        name, suffix = slug(path.stem), path.suffix.lower()
        try:
            if suffix not in SUFFIXES:
                raise UserError(f"{path.name} is no photo by its name. Photos are {ACCEPTED}.")
            data = read_bytes(path, "photo")
            decode(data, path.name)
        except UserError as error:
            refused.append(str(error))
            continue
        target = folder / f"{name}{suffix}"
        for number in range(2, MOST_PHOTOS + 2):  # a stem is of one photo, whose caption and mask have it too
            if any(other.stem == target.stem for other in folder.iterdir()):
                target = folder / f"{name}-{number}{suffix}"
        write_bytes(target, data)
    return refused


def captions_of(folder: Path) -> list[list[str]]:
    """The name and the caption, perhaps "", of each photo."""
    with suppress(UserError):
        return [[path.name, read_caption(path) or ""] for path in find_photos(folder)[0]]
    return []


def write_captions(folder: Path, rows: list[list[str]]) -> None:
    """Writes a .txt beside each photo whose caption differs. UserError for a name that is no photo of the folder."""
    before = dict(captions_of(folder))
    for name, caption in rows:
        if name not in before:
            raise UserError(f"there is no photo {name!r} here.")
        if (caption := " ".join(str(caption or "").split())) == before[name]:
            continue
        for own in (folder / name).with_suffix(".txt"), folder / f"{name}.txt":
            own.unlink(missing_ok=True)
        if caption and not write_caption(folder / name, caption, others=list(before)):
            raise UserError(f"the caption of {name} is in a table or a .caption file: change it there.")


def photo_of(folder: Path, name: str) -> Photo:
    """The photo of this name. UserError where there is none."""
    if name not in dict(captions_of(folder)):
        raise UserError("choose a photo first.")
    return read_photo(folder / name)


def keep_photo_crop(folder: Path, name: str, edited: dict | None) -> None:
    """Puts the cropped photo in the photo's place; the original goes to originals/, its mask, which fits no more, too."""
    photo = photo_of(folder, name)
    if not edited or edited["background"] is None or edited["background"].size == photo.image.size:
        raise UserError("nothing is cropped yet: draw the frame in the photo first.")
    aside = folder / "originals"
    aside.mkdir(exist_ok=True)
    for path in [folder / name, *folder.glob(f"masks/{Path(name).stem}.*")]:
        path.rename(aside / f"{path.parent.name if path.parent != folder else ''}{path.name}")
    _save(edited["background"].convert("RGB"), (folder / name).with_suffix(".png"))


def keep_photo_mask(folder: Path, name: str, edited: dict | None) -> None:
    """What is painted on a photo as its mask, in place of an earlier one."""
    photo = photo_of(folder, name)
    layers = [layer.getchannel("A") for layer in (edited or {}).get("layers", []) if layer is not None]
    if not layers or not layers[0].getbbox() or layers[0].size != photo.image.size:
        raise UserError("nothing is painted yet: paint over the subject of the whole photo, without a crop.")
    for old in folder.glob(f"masks/{Path(name).stem}.*"):
        old.unlink()
    write_mask(layers[0], folder / name, photo.orientation)


def _save(image: Image.Image, path: Path) -> None:
    with writing(path) as temporary:
        image.save(temporary)
