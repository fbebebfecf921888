"""CLIP embeddings that images are drawn from: of a text by the prior, of photos, between two, moved by a text difference."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from personalize.common.errors import UserError
from personalize.core import rng
from personalize.data.crops import Crop, Photo, image_tensor, largest_box
from personalize.data.photos import load_photos
from personalize.evaluation.encoders import Clip, load_clip
from personalize.generation.unclip import MOST_DIFFERENCE, Embedded, between
from personalize.methods import lora
from personalize.models.interface import LatentModel
from personalize.models.unclip import FOLDER, LORA, read_unclip, scaled

AT_ONCE = 64  # texts


class Drawn(NamedTuple):
    """embedded: P·count rows, prompt by prompt. one_noise: whether all images begin at the noise of the first."""

    embedded: Embedded
    one_noise: bool
    record: dict


def is_embedded(*, unclip: bool, vary: Sequence[Path | str], was: str | None, bare: bool, others: dict[str, object]) -> bool:
    """Whether --unclip or --vary is asked for. UserError where it is with what it does not go with; others: by option."""
    if was is not None and not vary:
        raise UserError("--was is what a photo showed before the prompt changes it. Give the photo too: --vary PHOTO.")
    if not (unclip or vary):
        return False
    if unclip and vary:
        raise UserError("--unclip draws from a text's embedding and --vary from a photo's. Give one of them.")
    if len(vary) > 2:
        raise UserError(f"--vary is given {len(vary)} times. Give one photo for variations, or two for what lies between.")
    if was is not None and len(vary) == 2:
        raise UserError("--was changes one photo, and --vary is given twice. Give one of the photos.")
    name = "--unclip" if unclip else "--vary"
    if not bare:
        raise UserError(f"{name} draws by a bare base, not by a run: add --base toyland, and leave out --run.")
    if clash := next((option for option, value in others.items() if value), ""):
        raise UserError(f"{name} does not go with {clash}: leave out one of the two.")
    return True


def embed(
    model: LatentModel, prompts: Sequence[str], *, vary: Sequence[Path | str], was: str | None, count: int, seed: int
) -> Drawn:
    """The part's LoRA into the model -> what `count` images of each prompt are drawn from; without `vary` by the prior.

    vary: a photo, whose embedding all images share; two, between which they lie; one and `was`, then it moves by what tells
    the prompt from that text. UserError for photos or a part that are missing or damaged.
    """
    decoder, prior, record = read_unclip(model)
    clip = load_clip(model.folder, model.device)
    lora.load_adapter(model, model.folder / FOLDER / LORA, name="unclip", weight=1.0)
    lora.fuse_adapters(model)
    if not vary:
        parts = []
        for prompt in prompts:
            for some in torch.arange(count).split(AT_ONCE):
                generators = [rng.generator(seed, "prior", i) for i in some.tolist()]
                parts.append(prior.sample(clip.read([prompt] * len(some)), generators))
        return Drawn(Embedded(decoder, torch.cat(parts)), False, {"unclip": record})
    photos = [_photo(path) for path in vary]
    record |= {"images": [{"file": photo.name, "sha256": photo.sha256} for photo in photos]}
    with torch.no_grad():
        pixels = image_tensor([Crop(photo, largest_box(photo)) for photo in photos], model.size)
        first, *others = scaled(clip.image(pixels))
        if was is None and not others:
            rows = first.expand(count * len(prompts), -1)
        else:
            if count < 2:
                raise UserError("--vary with two photos or with --was goes from one end to another: give --count 2 or more.")
            ends = others * len(prompts) or text_differences(clip, prompts, was)
            rows = torch.cat([between(first, end, count, 1.0 if others else MOST_DIFFERENCE) for end in ends])
            record |= {"of": count} | ({} if was is None else {"was": was})
    return Drawn(Embedded(decoder, rows), was is not None or bool(others), {"unclip": record})


def text_differences(clip: Clip, prompts: Sequence[str], was: str) -> Tensor:
    """What tells each of P prompts from one text, (P,D) of length 1 (2204.06125, section 3.3)."""
    *texts, before = F.normalize(clip.text([*prompts, was]), dim=-1)
    return F.normalize(torch.stack(texts) - before, dim=-1)


def _photo(path: Path | str) -> Photo:
    photos, _ = load_photos(path, min_size=1)
    if len(photos) > 1:
        raise UserError(f"--vary {path} has {len(photos)} photos. Give one of them; a second --vary is for what lies between.")
    return photos[0]
