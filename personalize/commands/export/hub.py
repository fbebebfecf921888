"""A run on the Hugging Face hub: sample pictures, the folder that is uploaded with its model card, and the upload."""

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from personalize.commands.export import model_card
from personalize.common import prompts, run_folder
from personalize.common.errors import UserError
from personalize.common.files import link_or_copy
from personalize.common.recipe import SamplingConfig
from personalize.common.terminal import Terminal
from personalize.generation import sampling
from personalize.models.interface import LatentModel

SAMPLES = 4
REPO = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)
PHOTOS = "photos.png"  # squares as they were trained on, without the files' metadata


@dataclass(frozen=True)
class Push:
    """repo: owner/name; public: for everyone to see; with_photos: with a picture of the photos, which stay here otherwise."""

    repo: str
    public: bool = False
    with_photos: bool = False


def require_possible(push: Push, run: Path) -> None:
    """UserError for a name that is none, and for photos that are not there."""
    if not REPO.fullmatch(push.repo):
        raise UserError(f"--push {push.repo!r} is no name of a repository. Give owner/name, such as me/sks-dog.")
    if push.with_photos and not (run / PHOTOS).exists():
        raise UserError(f"--with-photos: {run} has no {PHOTOS}. Leave --with-photos out.")


def samples(
    model: LatentModel, run: Path, manifest: dict, draw: SamplingConfig, *, seed: int, checkpoint: str, screen: Terminal
) -> list[tuple[str, Image.Image]]:  # fmt: skip
    """Up to four prompts with a picture: the newest of different prompts that lie in the run's images/, else fresh ones."""
    place = run / "images"
    rows = run_folder.read_jsonl(place / "images.jsonl") if (place / "images.jsonl").exists() else []
    own = [row for row in rows if row.get("checkpoint") == checkpoint and not row.get("loras") and not row.get("embeddings")]
    found = {row["prompt"]: place / row["file"] for row in own if (place / row["file"]).exists()}
    if found:
        screen.say(f"sample pictures for the card: the newest in {os.path.relpath(place)}")
        return [(prompt, Image.open(path)) for prompt, path in list(found.items())[-SAMPLES:]]
    subject = manifest["subjects"][0]
    templates = prompts.TOYLAND if model.has_world else prompts.dreambench(subject["class"])
    wanted = [prompts.fill(template, subject["token"], subject["class"]) for template in templates[:SAMPLES]]
    drawn = []
    with screen.progress("drawing samples for the card", len(wanted), unit="pictures") as advance:
        for prompt in wanted:
            z0 = sampling.sample_latents(model, [prompt], sampling.image_generators(seed, range(1)), draw)
            drawn += sampling.to_pil(model.decode_latents(z0))
            advance()
    return list(zip(wanted, drawn, strict=True))


def folder(
    place: Path, card: model_card.Card, *, files: Sequence[Path], pictures: Sequence[Image.Image], photos: Path | None
) -> Path:  # fmt: skip
    """What is uploaded, at `place`: a single folder's content or the files, sample pictures, README.md."""
    with run_folder.writing(place) as temporary:
        temporary.mkdir()
        for file in files:
            if file.is_dir():
                inside = temporary if len(files) == 1 else temporary / file.name
                shutil.copytree(file, inside, copy_function=link_or_copy, dirs_exist_ok=True)
            else:
                link_or_copy(file, temporary / file.name)
        for (_, name), picture in zip(card.samples, pictures, strict=True):
            (temporary / name).parent.mkdir(exist_ok=True)
            _bare(picture).save(temporary / name)
        if photos:
            _bare(Image.open(photos)).save(temporary / card.photos)
        (temporary / "README.md").write_text(model_card.text(card), encoding="utf-8")
    return place


def push(place: Path, push: Push) -> str:
    """Uploads a folder -> the repository's address. UserError says what failed; the folder stays."""
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, HTTPError

    hub = huggingface_hub.HfApi()
    try:
        address = hub.create_repo(push.repo, exist_ok=True, private=not push.public)
        if not push.public and not hub.model_info(push.repo).private:
            raise UserError(f"{push.repo} is there and for everyone to see. Push to another, or say that it may be: --public.")
        hub.upload_folder(repo_id=push.repo, folder_path=place, commit_message="Upload by personalize export")
    except (HTTPError, HFValidationError, OSError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"the export was written, but not pushed to {push.repo}: {said}. What would have been uploaded, with its card, is "
            f"in {os.path.relpath(place)}; with a connection and a login (HF_TOKEN) the same command pushes it."
        ) from error
    return str(address)


def _bare(picture: Image.Image) -> Image.Image:
    """Less the text chunk of a PNG, which names folders of this machine."""
    bare = picture.convert("RGB")
    bare.info = {}
    return bare
