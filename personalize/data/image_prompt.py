"""Photos as a prompt: what of them an adapter tells the base beside the words, and how images drawn so are known again."""

from pathlib import Path

from personalize.common.errors import UserError
from personalize.data.photos import load_photos
from personalize.models.image_adapter import ImagePrompt, load_image_adapter
from personalize.models.interface import LatentModel

SCALE, MOST_SCALE, MOST_IMAGES = 0.7, 10.0, 16


def read_image_prompt(
    model: LatentModel, source: Path | str, *, scale: float | None = None, adapter: Path | None = None
) -> tuple[ImagePrompt | None, dict]:
    """A photo or a folder of them -> the prompt for `sample_latents`, None at scale 0; and its record.

    adapter: a file for a base without one of its own. UserError for what is missing, damaged, or made for another base.
    """
    if not str(source):
        if scale is not None or adapter:
            raise UserError("--image-scale and --adapter are for an image prompt. Give one: --image-prompt PHOTOS.")
        return None, {}
    scale = SCALE if scale is None else scale
    if not 0 <= scale <= MOST_SCALE:
        raise UserError(f"--image-scale {scale:g} is not from 0 (as without images) to {MOST_SCALE:g}; 1 is as trained.")
    photos, _ = load_photos(source, min_size=1)
    if len(photos) > MOST_IMAGES:
        raise UserError(
            f"{source} has {len(photos)} photos, and an image prompt {MOST_IMAGES} at most. Give a folder of fewer."
        )
    read, record = load_image_adapter(model, adapter)
    images = [{"file": photo.name, "sha256": photo.sha256} for photo in photos]
    prompt = read.prompt([photo.image for photo in photos], scale) if scale else None
    return prompt, {"image_prompt": {"scale": scale, "images": images, "adapter": record}}
