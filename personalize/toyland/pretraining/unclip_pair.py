"""The first stage of the part "unclip": an embedding space that images and texts share, and that knows what is to be seen.

The base's CLIP was taught with batches whose places and actions differ, and its image embedding hardly tells the classes apart:
a classifier finds 55 % of them in it, and 86 % in the U-Net's features (docs/log/2026-11-29-unclip.md). So the heads of a new
pair, on frozen towers, are taught by batches of one place and one action, where class, colours and accessory have to tell.

N scenes, B of a step; F features of an image, W of a token, D dimensions.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from personalize.common.files import writing
from personalize.core import rng
from personalize.models import unclip
from personalize.models.interface import LatentModel
from personalize.toyland.pretraining import stages
from personalize.toyland.pretraining.image_adapter import read_rows
from personalize.toyland.pretraining.trainer import train_stage
from personalize.toyland.world.scenes import Scene, caption

AT_ONCE = 250  # images or texts
BATCH = 192
LR = 1e-3


@torch.no_grad()
def read_images(model: LatentModel, images: np.ndarray, latents: np.ndarray, work: Path) -> Tensor:
    """Features (N,F) of images, half precision, kept in `work`."""
    from transformers import CLIPModel

    clip = CLIPModel.from_pretrained(model.folder / unclip.CLIP, dtype=torch.float32).to(model.device).eval()

    def embed(x: Tensor) -> Tensor:
        return clip.visual_projection(clip.vision_model(pixel_values=x.to(model.device)).pooler_output)

    embeddings = torch.from_numpy(read_rows(work / "embeddings.npy", images, embed))
    path = work / "features.npy"
    if not path.exists():
        parts = torch.arange(len(latents)).split(AT_ONCE)
        rows = [unclip.unet_features(model, torch.from_numpy(latents[k.numpy(), 0]).float().to(model.device)) for k in parts]
        with writing(path) as temporary:
            np.save(temporary, torch.cat(rows).half().cpu().numpy())
    return torch.cat([torch.from_numpy(np.load(path)), unclip.scaled(embeddings[: len(latents)].float()).half()], 1)


@torch.no_grad()
def read_captions(model: LatentModel, scene_of: Callable[[int], Scene], count: int, work: Path) -> tuple[Tensor, Tensor]:
    """Hidden states (N,L,W) of a caption of each scene, half precision, and where its tokens are (N,L), kept in `work`."""
    paths = [work / f"captions_{name}.npy" for name in ("hidden", "said")]
    if not all(path.exists() for path in paths):
        parts = [unclip.hidden_states(model, [caption(scene_of(k), k) for k in rows.tolist()])
                 for rows in torch.arange(count).split(AT_ONCE)]  # fmt: skip
        for path, columns in zip(paths, zip(*parts), strict=True):
            array = torch.cat(columns).cpu()
            with writing(path) as temporary:
                np.save(temporary, (array.half() if array.is_floating_point() else array).numpy())
    hidden, said = (torch.from_numpy(np.load(path)) for path in paths)
    return hidden, said


def train_pair(
    features: Tensor, hidden: Tensor, said: Tensor, scene_of: Callable[[int], Scene], work: Path, *, steps: int, seed: int,
    say: Callable[[str], None],
) -> unclip.Pair:  # fmt: skip
    """The heads, contrastively (Radford et al. 2103.00020); of two batches of three all have one place and one action."""
    torch.manual_seed(seed)
    pair = unclip.Pair(features.shape[1], hidden.shape[2])
    pair.mean.copy_(features.float().mean(0))
    pair.deviation.copy_(features.float().std(0).clamp(min=1e-3))
    pooled = unclip.mean_of_tokens(hidden.float(), said)
    groups: dict[tuple, list[int]] = {}
    for k in range(len(features)):
        scene = scene_of(k)
        groups.setdefault((scene.place, scene.action), []).append(k)
    alike = [torch.tensor(rows) for rows in groups.values()]

    def loss(step: int) -> Tensor:
        g = rng.generator(seed, "unclip/pair", step)
        rows = torch.randint(len(features), (BATCH,), generator=g)
        if step % 3:
            members = alike[int(torch.randint(len(alike), (1,), generator=g))]
            rows = members[torch.randperm(len(members), generator=g)[:BATCH]]
        image, text = pair.image_head(features[rows].float()), pair.text(pooled[rows])
        return stages.contrastive_loss(image, text, pair.scale.exp())

    train_stage(pair, loss, work / "pair.safetensors", steps=steps, lr=LR, muon=False, weight_decay=0.1, ema_decay=0.995,
        say=stages.loss_logger("unclip, pair", steps, say, every=250))  # fmt: skip
    return pair.eval()
