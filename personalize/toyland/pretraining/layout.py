"""The part `layout`: boxes of the subject and of its accessory as further channels, with a LoRA of the U-Net.

B images, K classes. The scenes are the world's with subjects of other sizes at other places than the base has seen.
"""

import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from personalize.common.files import make_folder, write_json, writing
from personalize.common.settings import setting
from personalize.core import losses, rng
from personalize.formats import lora
from personalize.models.interface import LAYOUT
from personalize.models.layout import CONV_IN, LORA, PLANES, Box, planes, widen
from personalize.toyland.pretraining import networks, stages
from personalize.toyland.pretraining.trainer import train_stage
from personalize.toyland.world.render import draw_scene
from personalize.toyland.world.scenes import ACCESSORIES, CLASSES, Scene, caption, sample_scene

SEED = 1 << 29  # of the first scene
NAMES = (*CLASSES, *ACCESSORIES)
SEEN = 128  # of 255, from which a pixel of a mask is in the box
SPANS = {"x": (-0.35, 0.35), "y": (-0.3, 0.06), "scale": (0.5, 1.2)}
TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2",
    "conv_shortcut", "time_emb_proj",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    pictures: int = setting(12_000, "scenes drawn")
    steps: int = setting(900, "steps")
    batch: int = setting(24, "latents of a step")
    rank: int = setting(24, "of the LoRA")
    lr: float = setting(1e-3, "learning rate", least=0)
    dropout: float = setting(0.1, "of the boxes", least=0, most=1)
    caption_dropout: float = setting(0.1, "of the captions", least=0, most=1)
    subject_weight: float = setting(4.0, "by how much more than the backdrop the subject counts; its accessory thrice")
    ema: float = setting(0.995, "decay of the EMA, which is what ships")
    seed: int = setting(0, "seed of all randomness")


def scene_of(k: int) -> Scene:
    """A scene of the world whose subject may be half as large, and almost anywhere."""
    g = rng.generator(0, "layout/scene", k)
    values = torch.rand(len(SPANS), generator=g).tolist()
    moved = {name: low + (high - low) * u for (name, (low, high)), u in zip(SPANS.items(), values, strict=True)}
    return replace(sample_scene(SEED + k), **moved)


def draw_with_boxes(scene: Scene, size: int) -> tuple[np.ndarray, list[Box]]:
    """The image (size,size,4) uint8, as of `stages`, and the boxes of what shows of the subject and of its accessory."""
    image, both = draw_scene(scene, size)
    worn = np.asarray(draw_scene(scene, size, body=0)[1]) >= SEEN
    seen = np.asarray(both) >= SEEN
    weight = np.where(worn, 255, np.where(seen, stages.BODY, 0)).astype(np.uint8)
    boxes = _box(scene.subject.class_word, seen & ~worn)
    boxes += _box(scene.accessory.kind, worn) if scene.accessory else []
    return np.dstack([np.asarray(image), weight]), boxes


def _box(name: str, mask: np.ndarray) -> list[Box]:
    if not mask.any():
        return []
    (top, bottom), (left, right) = (np.flatnonzero(mask.any(axis))[[0, -1]] for axis in (1, 0))
    size = len(mask)
    return [Box(name, left / size, top / size, (right + 1) / size, (bottom + 1) / size)]


def _row(size: int, k: int) -> tuple[bytes, list[Box]]:
    image, boxes = draw_with_boxes(scene_of(k), size)
    return image.tobytes(), boxes


def _render(work: Path, count: int, size: int, say: Callable[[str], None]) -> tuple[np.ndarray, np.ndarray]:
    """Images (N,size,size,4) and planes (N,K,cells,cells), both uint8, kept in `work`."""
    paths = work / "images.npy", work / "planes.npy"
    if not all(path.exists() for path in paths):
        with multiprocessing.Pool() as pool:
            rows = pool.starmap(_row, ((size, k) for k in range(count)), chunksize=200)
        images = np.stack([np.frombuffer(row, np.uint8).reshape(size, size, 4) for row, _ in rows])
        cells = (networks.LATENT,) * 2
        of_boxes = np.stack([(255 * planes(boxes, NAMES, cells)).round().byte().numpy() for _, boxes in rows])
        for path, array in zip(paths, (images, of_boxes), strict=True):
            with writing(path) as temporary:
                np.save(temporary, array)
        say(f"drew {count} scenes")
    return tuple(np.load(path, mmap_mode="r") for path in paths)


def train(model, out: Path, work: Path, settings: Settings, say: Callable[[str], None]) -> None:
    """Draws, encodes, trains what is added to the U-Net of the base `model`, and writes it to `out`."""
    torch.manual_seed(settings.seed)
    images, of_boxes = _render(work, settings.pictures, model.size, say)
    moments = _moments(work / "latents.npy", images, model)
    trained = attach(model.unet, settings.rank)

    def loss(step: int) -> Tensor:
        rows = stages.sample_rows(step, settings.batch, len(images), seed=settings.seed, purpose="layout")
        return batch_loss(model, images, of_boxes, moments, rows, settings, step).mean()

    log = stages.loss_logger("layout", settings.steps, say)
    options = {
        "steps": settings.steps,
        "lr": settings.lr,
        "ema_decay": settings.ema,
        "muon": False,
        "weight_decay": 0.0,
        "save_seconds": 60.0,
    }
    train_stage(trained, loss, work / "layout.safetensors", **options, say=log)
    export(out, model.unet)


def attach(unet, rank: int) -> nn.ParameterList:
    """Further channels of zeros and a fresh LoRA, which leave the U-Net what it is -> what trains."""
    from peft import LoraConfig, inject_adapter_in_model

    zeros = torch.zeros(unet.conv_in.out_channels, len(NAMES), 3, 3)
    unet.requires_grad_(False)
    unet.conv_in = widen(unet.conv_in, zeros)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS)), unet)
    base, C = unet.conv_in.weight.detach().clone(), unet.conv_in.in_channels - len(NAMES)
    unet.conv_in.weight.requires_grad_(True)
    unet.conv_in.weight.register_hook(lambda grad: torch.cat([torch.zeros_like(base[:, :C]), grad[:, C:]], 1))
    return nn.ParameterList([p for p in unet.parameters() if p.requires_grad])


def batch_loss(model, images, of_boxes, moments, rows: Tensor, settings: Settings, step: int) -> Tensor:
    """Rows (B,) of the scenes -> (B,)."""
    g, B, schedule = rng.generator(settings.seed, "layout/noise", step), len(rows), model.schedule
    mean, std = torch.from_numpy(moments[rows.numpy()]).float().unbind(1)
    z0 = mean + std * torch.randn(mean.shape, generator=g)
    eps, t = torch.randn(mean.shape, generator=g), stages.stratified_timesteps(B, schedule.T, g)
    boxed = torch.rand(B, generator=g) >= settings.dropout
    told = torch.rand(B, generator=g) >= settings.caption_dropout
    shown = torch.from_numpy(of_boxes[rows.numpy()]).float() / 255 * boxed.view(-1, 1, 1, 1)
    weight = 1 + settings.subject_weight * stages.masks(images, rows, networks.LATENT)
    with torch.no_grad():
        cond = model.encode_prompts(_captions(rows.tolist(), told.tolist(), step))
    device = model.device
    cond[LAYOUT] = shown.to(device)
    out = model.predict(schedule.add_noise(z0, eps, t).to(device), t.to(device), cond)
    return losses.denoising_loss(out, schedule.target(z0, eps, t).to(device), weight.to(device))


def _captions(rows: Sequence[int], told: Sequence[bool], step: int) -> list[str]:
    pairs = enumerate(zip(rows, told, strict=True))
    return [caption(scene_of(k), (step << 8) + i) if says else "" for i, (k, says) in pairs]


@torch.no_grad()
def _moments(path: Path, images: np.ndarray, model) -> np.ndarray:
    """Mean and deviation of the scaled latents, (N,2,C,h,w) float16, kept in `path`."""
    if not path.exists():
        parts = [
            torch.stack(model.encode_images(stages.pixels(images, rows, torch.device("cpu"))), 1).half().cpu().numpy()
            for rows in torch.arange(len(images)).split(128)
        ]
        with writing(path) as temporary:
            np.save(temporary, np.concatenate(parts))
    return np.load(path, mmap_mode="r")


def export(out: Path, unet) -> None:
    """The weights of the planes, and a LoRA file of diffusers' form; in half precision."""
    from safetensors.torch import save_file

    make_folder(out)
    weight = unet.conv_in.weight.detach()[:, -len(NAMES) :]
    with writing(out / CONV_IN) as temporary:
        save_file({"weight": weight.cpu().half().contiguous()}, temporary)
    write_json(out / PLANES, {"classes": list(NAMES)})
    state = {name.replace(".default.", "."): value for name, value in unet.state_dict().items() if ".lora_" in name}
    tensors = {f"unet.{name}": value.detach().cpu().half().contiguous() for name, value in state.items()}
    ranks = {name.removesuffix(".lora_A.weight"): len(v) for name, v in tensors.items() if name.endswith(".lora_A.weight")}
    lora.write_diffusers(out / LORA, lora.Adapter(tensors, ranks, dict(ranks)))
