"""How close an upscaled image is to the scene at 128 px, and what can be read of it.    python -m benchmarks.upscaling OUT

Scenes are held out. PSNR in dB is the mean over images; `accessory` is over the pixels of an accessory alone; `input` is by how
much of 255 the halved result differs from what it was made of. Nothing in Toyland reads 128 px, so the second table halves the
sizes: scenes of 32 px are made 64 px large, which the truth probe reads.
"""

from pathlib import Path

import numpy as np
import torch
import typer
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from personalize.commands.session import open_base, resolve
from personalize.common.bases import TOYLAND
from personalize.common.files import make_folder, write_json, writing
from personalize.common.terminal import SILENT
from personalize.core import rng
from personalize.data.image_grid import grid
from personalize.generation.sampling import to_pil
from personalize.generation.upscaling import Upscaling
from personalize.models.upscaler import bicubic, load_upscaler
from personalize.toyland.probes import load_probe, scene_truth
from personalize.toyland.world.render import draw_scene
from personalize.toyland.world.scenes import HELD_OUT, Scene, sample_scene

SEED = HELD_OUT + 7_000_000
STEPS, LEVELS = (1, 2, 4, 8), (30, 60)
SHOWN = ["truth", "small", "as drawn, bicubic", "as drawn, 1", "as drawn, 8", "through the VAE, bicubic", "through the VAE, 1"]
READ = ("class", "place", "action", "accessory", "accessory_colour")


def scenes(count: int) -> list[Scene]:
    """Every one with an accessory."""
    drawn = (sample_scene(SEED + k) for k in range(10 * count))
    return [scene for scene in drawn if scene.accessory][:count]


def pixels(images: list[Image.Image]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 127.5 - 1


def rounded(x: Tensor) -> Tensor:
    """As a file has it."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def psnr(x: Tensor, truth: Tensor, mask: Tensor | None = None) -> float:
    error = (rounded(x) - truth).square().mean(1, keepdim=True)
    mask = torch.ones_like(error) if mask is None else mask
    mean = (error * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3)).clamp(min=1)
    seen = mask.sum((1, 2, 3)) > 0
    return round((10 * (4 / mean[seen]).log10()).mean().item(), 2)


def enlarged(upscaling: Upscaling, x: Tensor) -> Tensor:
    return upscaling.enlarge(x, [rng.generator(0, "benchmark", k) for k in range(len(x))])


def fidelity(model, upscaler, record: dict, chosen: list[Scene]) -> tuple[dict, dict]:
    """The first table, and the images of it by name."""
    large, small = (pixels([draw_scene(s, size)[0] for s in chosen]) for size in (128, 64))
    worn = torch.stack([torch.from_numpy(np.array(draw_scene(s, 128, body=0)[1])) for s in chosen])[:, None] >= 128
    shown = rounded(through_vae(model, small))
    noisy = rounded(small + 0.15 * torch.randn(small.shape, generator=torch.Generator().manual_seed(0)))
    rows, kept = {}, {"truth": large, "small": small}
    rows["the base's VAE at 128 px"] = both(through_vae(model, large), large, worn)
    for name, x in {"as drawn": small, "through the VAE": shown, "with noise": noisy}.items():
        kept[f"{name}, bicubic"] = bicubic(x)
        rows[f"{name}: bicubic"] = both(bicubic(x), large, worn)
        tried = [(0, steps) for steps in (STEPS if x is small else STEPS[:1])]
        tried += [(level, 1) for level in LEVELS if name == "with noise"]
        for level, steps in tried:
            out = enlarged(Upscaling(upscaler, record, level=level, steps=steps), x)
            label = f"{name}, {steps}" + (f", --noise {level}" if level else "")
            kept[label] = out
            rows[label] = both(out, large, worn) | {"input": round((F.avg_pool2d(out, 2) - x).abs().mean().item() * 127.5, 2)}
    return rows, kept


def through_vae(model, x: Tensor) -> Tensor:
    return torch.cat([model.decode_latents(model.encode_images(part)[0]) for part in x.split(16)])


def both(x: Tensor, truth: Tensor, worn: Tensor) -> dict:
    return {"psnr": psnr(x, truth), "accessory": psnr(x, truth, worn.float())}


@torch.no_grad()
def readable(upscaler, record: dict, chosen: list[Scene]) -> dict:
    """The second table: what the probe reads right of 64 px, made of 32 px."""
    probe, truth = load_probe(TOYLAND / "probes"), scene_truth(chosen)
    large = pixels([draw_scene(s, 64)[0] for s in chosen])
    small = rounded(F.avg_pool2d(large, 2))
    images = {"drawn at 64 px": large, "bicubic": bicubic(small)}
    images |= {f"upscaled, {k} steps": enlarged(Upscaling(upscaler, record, steps=k), small) for k in STEPS}
    rows = {}
    for name, x in images.items():
        out = probe(rounded(x))
        right = {field: (out[field].argmax(1) == truth[field]).float().mean().item() for field in READ}
        rows[name] = {field: round(value, 3) for field, value in right.items()} | {
            "psnr": psnr(x, large) if x is not large else None
        }
    return rows


def sheet(kept: dict, rows: range, names: list[str]) -> Image.Image:
    """A scene a row: each of these, the small one with its pixels as they are."""
    columns = [kept[name] for name in names]
    columns = [F.interpolate(x, 128, mode="nearest") if x.shape[-1] == 64 else x for x in columns]
    return grid([image for k in rows for image in to_pil(torch.stack([x[k].clamp(-1, 1) for x in columns]))], len(names))


def main(out: Path, base: Path = TOYLAND, images: int = 48) -> None:
    make_folder(out)
    model, chosen = open_base(resolve(None, ()), SILENT), scenes(images)
    upscaler, record = load_upscaler(base, str(base), torch.device("cpu"))
    table, kept = fidelity(model, upscaler, record, chosen)
    result = {"64 to 128 px": table, "32 to 64 px": readable(upscaler, record, chosen)}
    write_json(out / "upscaling.json", result)
    for title, rows in result.items():
        print(title, *(f"  {name:40} {row}" for name, row in rows.items()), sep="\n")
    with writing(out / "upscaling.png") as temporary:
        sheet(kept, range(6), SHOWN).save(temporary)


if __name__ == "__main__":
    typer.run(main)
