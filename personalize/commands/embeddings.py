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
from personalize.evaluation.encoders import load_clip
from personalize.models.interface import LatentModel
from personalize.models.unclip import Pair, Unclip, hidden_states, read_unclip, slerp

AT_ONCE = 64  # texts
MOST_DIFFERENCE = 0.5  # of the arc from an image's embedding to a text difference (2204.06125, section 3.3)


class Drawn(NamedTuple):
    """states (P·count,L,W): what is read in place of each prompt. one_noise: whether all images begin at the first's noise."""

    states: Tensor
    one_noise: bool
    record: dict


def is_embedded(
    prompts: Sequence[str], *, unclip: bool, vary: Sequence[Path | str], was: str | None, bare: bool, others: dict[str, object]
) -> bool:
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
    if vary and was is None and any(prompts):
        raise UserError("--vary draws from the photo alone. Leave out the prompt, or say what it changes: --was TEXT.")
    name = "--unclip" if unclip else "--vary"
    if not bare:
        raise UserError(f"{name} draws by a bare base, not by a run: add --base toyland, and leave out --run.")
    if clash := next((option for option, value in others.items() if value), ""):
        raise UserError(f"{name} does not go with {clash}: leave out one of the two.")
    return True


@torch.no_grad()
def embed(
    model: LatentModel, prompts: Sequence[str], *, vary: Sequence[Path | str], was: str | None, count: int, seed: int
) -> Drawn:
    """What `count` images of each prompt are drawn from; without `vary` the prior's embeddings.

    vary: a photo, whose embedding all images share; two, between which they lie; one and `was`, then it moves by what tells
    the prompt from that text. UserError for photos or a part that are missing or damaged.
    """
    part = read_unclip(model)
    record = dict(part.record)
    if not vary:
        rows = torch.cat([of_prior(model, part, prompt, count, seed) for prompt in prompts])
        return Drawn(part.decoder(rows), False, {"unclip": record})
    photos = [_photo(path) for path in vary]
    record |= {"images": [{"file": photo.name, "sha256": photo.sha256} for photo in photos]}
    first, *others = _read_photos(model, part.pair, photos)
    if was is None and not others:
        return Drawn(part.decoder(first.expand(count * len(prompts), -1)), False, {"unclip": record})
    if count < 2:
        raise UserError("--vary with two photos or with --was goes from one end to another: give --count 2 or more.")
    ends = others * len(prompts) or text_differences(model, part.pair, prompts, was)
    shares = torch.linspace(0, 1.0 if others else MOST_DIFFERENCE, count)
    rows = torch.cat([slerp(first[None], end[None], shares) for end in ends])
    record |= {"of": count} | ({} if was is None else {"was": was})
    return Drawn(part.decoder(rows), True, {"unclip": record})


@torch.no_grad()
def of_prior(model: LatentModel, part: Unclip, prompt: str, count: int, seed: int) -> Tensor:
    """(count,D): image embeddings that the prior draws of a prompt."""
    rows = []
    for some in torch.arange(count).split(AT_ONCE):
        texts = part.pair.of_texts(*hidden_states(model, [prompt] * len(some)))
        rows.append(part.prior.sample(texts, [rng.generator(seed, "prior", i) for i in some.tolist()]))
    return torch.cat(rows)


@torch.no_grad()
def text_differences(model: LatentModel, pair: Pair, prompts: Sequence[str], was: str) -> Tensor:
    """What tells each of P prompts from one text, (P,D) of length 1 (2204.06125, section 3.3)."""
    *texts, before = F.normalize(pair.of_texts(*hidden_states(model, [*prompts, was])).embeddings, dim=-1)
    return F.normalize(torch.stack(texts) - before, dim=-1)


@torch.no_grad()
def _read_photos(model: LatentModel, pair: Pair, photos: Sequence[Photo]) -> Tensor:
    """The middle squares of P photos -> (P,D)."""
    pixels = image_tensor([Crop(photo, largest_box(photo)) for photo in photos], model.size)
    return pair.of_images(model, pixels, load_clip(model.folder, model.device).image(pixels))


def _photo(path: Path | str) -> Photo:
    photos, _ = load_photos(path, min_size=1)
    if len(photos) > 1:
        raise UserError(f"--vary {path} has {len(photos)} photos. Give one of them; a second --vary is for what lies between.")
    return photos[0]
