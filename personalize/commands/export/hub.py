"""A run on the Hugging Face hub: sample images, the folder that is uploaded with its model card, and the upload."""

import io
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from personalize.commands.export import model_card, verify
from personalize.common import prompts
from personalize.common.errors import UserError
from personalize.common.files import link_or_copy, read_jsonl, writing
from personalize.common.recipe_sections import SamplingConfig
from personalize.common.terminal import Terminal
from personalize.common.untrusted import read_bytes
from personalize.generation.image_files import IMAGE_ROW
from personalize.models.interface import LatentModel

SAMPLES = 4
REPO = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)
PHOTOS = "photos.png"  # the squares that were trained on, without the files' metadata


@dataclass(frozen=True)
class Push:
    """repo: owner/name; public: for everyone to see; with_photos: with an image of the photos, which else stay here."""

    repo: str
    public: bool
    with_photos: bool


def require_possible(push: Push, run: Path) -> None:
    """UserError for an invalid name, and for photos that the run does not have."""
    if not REPO.fullmatch(push.repo):
        raise UserError(f"--push {push.repo!r} is not the name of a repository. Give owner/name, such as me/sks-dog.")
    if push.with_photos and not _drawn_here(run.resolve(), PHOTOS):
        raise UserError(f"--with-photos: {run} has no {PHOTOS} of its own. Leave --with-photos out.")


def sample_images(
    model: LatentModel, run: Path, manifest: dict, draw: SamplingConfig, *, seed: int, checkpoint: str, screen: Terminal
) -> list[tuple[str, Image.Image]]:
    """Up to four prompts with an image each: the newest of different prompts in the run's images/, else fresh ones."""
    place = run / "images"
    rows = read_jsonl(place / "images.jsonl", IMAGE_ROW)
    rows = [row for row in rows if row.get("checkpoint") == checkpoint and not row.get("loras") and not row.get("embeddings")]
    files = {row["prompt"]: place / row["file"] for row in rows if _drawn_here(place, row["file"])}
    if files:
        screen.say(f"sample images for the card: the newest in {os.path.relpath(place)}")
        return [(prompt, _opened(path)) for prompt, path in list(files.items())[-SAMPLES:]]
    subject = manifest["subjects"][0]
    templates = prompts.TOYLAND if model.has_world else prompts.dreambench(subject["class"])
    filled = [prompts.fill(template, subject["token"], subject["class"]) for template in templates[:SAMPLES]]
    images = []
    with screen.progress("drawing samples for the card", len(filled), unit="images") as advance:
        for prompt in filled:
            images.append(verify.draw(model, prompt, draw, seed))
            advance()
    return list(zip(filled, images, strict=True))


def _drawn_here(place: Path, name: str) -> bool:
    """Whether a file of a run's record is a PNG in its own folder: a stranger's run could name any file of yours."""
    path = place / name
    is_bare = Path(name).name == name and path.suffix == ".png"
    return is_bare and not place.is_symlink() and not path.is_symlink() and path.is_file()


def _opened(path: Path) -> Image.Image:
    """A PNG. UserError for anything else."""
    try:
        return Image.open(io.BytesIO(read_bytes(path, "image")), formats=("PNG",)).convert("RGB")
    except (OSError, SyntaxError) as error:
        raise UserError(f"{path} is no PNG: {error}. Delete it.") from None


def prepare_upload(
    place: Path, card: model_card.Card, *, files: Sequence[Path], images: Sequence[Image.Image], photos: Path | None
) -> Path:
    """Write the folder `place` that is uploaded: a single folder's content or the files, sample images, README.md."""
    with writing(place) as temporary:
        temporary.mkdir()
        for file in files:
            if file.is_dir():
                target = temporary if len(files) == 1 else temporary / file.name
                shutil.copytree(file, target, copy_function=link_or_copy, dirs_exist_ok=True)
            else:
                link_or_copy(file, temporary / file.name)
        for (_, name), image in zip(card.samples, images, strict=True):
            (temporary / name).parent.mkdir(exist_ok=True)
            _without_metadata(image).save(temporary / name)
        if photos:
            _without_metadata(_opened(photos)).save(temporary / card.photos)
        (temporary / "README.md").write_text(model_card.text(card), encoding="utf-8")
    return place


def upload(place: Path, push: Push) -> str:
    """Upload a folder -> the repository's address. UserError says what failed; the folder stays."""
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, HTTPError

    hub = huggingface_hub.HfApi()
    try:
        address = hub.create_repo(push.repo, exist_ok=True, private=not push.public)
        if not push.public and not hub.model_info(push.repo).private:
            raise UserError(f"{push.repo} is there and for everyone to see. Push to another, or say that it may be: --public.")
        hub.upload_folder(repo_id=push.repo, folder_path=place, commit_message="Upload by personalize export")
    except (HTTPError, HFValidationError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"the export was written, but not pushed to {push.repo}: {reason}. "
            f"What would have been uploaded, with its card, is in {os.path.relpath(place)}; "
            "with a connection and a login (HF_TOKEN) the same command pushes it."
        ) from error
    return str(address)


def _without_metadata(image: Image.Image) -> Image.Image:
    """A PNG's text chunk names folders of this machine."""
    bare = image.convert("RGB")
    bare.info = {}
    return bare
