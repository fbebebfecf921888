"""Captions written for photos: what the subject does, where it is and how it is seen; never what it looks like.

A caption takes the background out of what the token comes to mean; words for the subject itself would take the subject out.
CLIP chooses from lists of phrases (zero-shot, Radford et al. 2103.00020 §3.1); `image_to_text` has models that write freely.
B photos, K phrases of a list.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from personalize.common.bases import folder_of, has_world
from personalize.common.errors import UserError
from personalize.evaluation.encoders import Clip, load_clip
from personalize.evaluation.image_to_text import load_image_to_text, model_type, without_subject
from personalize.models.devices import choose_device

PHRASES = Path(__file__).parent / "scene_phrases.txt"
KINDS = ("action", "place", "view")  # in the order that a caption says them
# Share of a list's probability from which on its best phrase is said. On Toyland 0.5 says the place in 9 of 10 scenes, and 39
# of 40 are right; of scenes whose place is not in the list, 3 of 10 get a wrong one (docs/log/2026-11-28-captions.md).
SURE = 0.5


def captioner_of(base: str, class_word: str, captioner: str | Path = "") -> Callable[[list[Image.Image]], list[str]]:
    """B square images -> B captions, templates with {token} and {class}.

    captioner: a folder of CLIP, which chooses phrases, or of BLIP or Florence-2, whose words for the subject are left out;
    without one the base's own CLIP. UserError for a folder that is none of these.
    """
    device, kind = choose_device("auto"), model_type(Path(captioner).expanduser()) if captioner else "clip"
    if kind != "clip":
        describe = load_image_to_text(Path(captioner).expanduser(), device)
        return lambda images: [without_subject(describe(image), class_word) for image in images]
    try:
        clip, lists = load_clip(folder_of(base), device, clip=str(captioner)), phrase_lists(base)
    except UserError as error:
        why = str(error).partition(" Give ")[0]
        raise UserError(f"{why} Give a folder of CLIP, BLIP or Florence-2: --captioner FOLDER.") from None

    def choose(images: list[Image.Image]) -> list[str]:
        pixels = (torch.from_numpy(np.asarray(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1 for image in images)
        return [caption_of(choose_phrases(clip, one[None], class_word, lists)[0]) for one in pixels]

    return choose


def phrase_lists(base: str) -> dict[str, tuple[str, ...]]:
    """Phrases by kind: a Toyland's world has its own, other bases share 200 of photos."""
    if has_world(base):
        from personalize.toyland.world.scenes import ACTIONS, PLACES

        return {"action": tuple(ACTIONS.values()), "place": tuple(PLACES.values())}
    lists: dict[str, list[str]] = {}
    lines = [line.strip() for line in PHRASES.read_text(encoding="utf-8").splitlines()]
    for line in lines:
        if line.startswith("["):
            lists[line.strip("[]")] = phrases = []
        elif line and not line.startswith("#"):
            phrases.append(line)
    return {kind: tuple(lists[kind]) for kind in KINDS}


@torch.inference_mode()
def choose_phrases(
    clip: Clip, images: Tensor, class_word: str, lists: Mapping[str, Sequence[str]], *, sure: float = SURE
) -> list[dict[str, str]]:
    """(B,3,H,W) in [-1,1] -> of each photo the phrase of each kind that is most likely, where it has `sure` of its list."""
    seen = normalize(clip.image(images), dim=-1)
    chosen: list[dict[str, str]] = [{} for _ in images]
    for kind, phrases in lists.items():
        said = normalize(clip.text([f"a photo of {with_article(class_word)} {phrase}" for phrase in phrases]), dim=-1)
        shares, best = (clip.scale * seen @ said.T).softmax(-1).max(-1)  # (B,)
        for row, share, k in zip(chosen, shares.tolist(), best.tolist(), strict=True):
            if share >= sure:
                row[kind] = phrases[k]
    return chosen


def caption_of(phrases: Mapping[str, str]) -> str:
    """{"action": "asleep", "place": "in the snow", "view": "seen from above"} -> a template, the view behind a comma."""
    view = f", {phrases['view']}" if "view" in phrases else ""
    return " ".join(["a {token} {class}", *(phrases[kind] for kind in KINDS[:2] if kind in phrases)]) + view


def with_article(word: str) -> str:
    return f"{'an' if word[:1].lower() in 'aeiou' else 'a'} {word}"
