"""Is the subject where the layout puts it?    python -m benchmarks.layout WORK [--base BASE] [--images N]

Boxes and captions are of held-out scenes of the part `layout`. A reader, trained here on rendered scenes as the VAE shows
them, says of each pixel of an image whether it shows the subject or its accessory. IoU is of the box that was asked for and
the box of what the reader sees; `box` of the base's own images is by chance. The truth probe reads the place from the whole
image; class, action and accessory after the subject was brought to the place and size that the probe knows.
"""

from pathlib import Path

import numpy as np
import torch
import typer
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn import functional as F

from personalize.commands.image_source import put_planes_of
from personalize.commands.session import open_base, resolve
from personalize.common.bases import TOYLAND
from personalize.common.files import make_folder, write_json, writing
from personalize.common.terminal import SILENT
from personalize.core import rng
from personalize.data.image_grid import grid
from personalize.generation.sampling import image_generators, sample_latents, to_pil
from personalize.models.layout import Box, planes
from personalize.toyland.pretraining import layout as part
from personalize.toyland.pretraining import stages
from personalize.toyland.pretraining.trainer import train_stage
from personalize.toyland.probes import load_probe, scene_truth
from personalize.toyland.world.scenes import ACCESSORIES, ACTIONS, PLACES, Scene, accessory_words, with_article

HELD_OUT = 1 << 24  # added to the number of a scene of the part
READ_STEPS, READ_BATCH, READ_SCENES, JUDGED = 4000, 16, 4000, 200  # scenes beside them, for the reader's own IoU
FIELDS, OF_THE_WHOLE = ("class", "place", "action", "accessory"), ("place",)
USUAL = (0.2, 0.25, 0.78, 0.77)  # the mean box of a subject in the world's own scenes, which the probe knows


class Reader(nn.Module):
    """(B,3,64,64) -> logits (B,3,64,64) of backdrop, subject and accessory."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.head = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, width, 3, padding=1), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), *(Dilated(2 * width, d) for d in (1, 2, 4, 2, 1)))
        self.up = nn.Conv2d(2 * width, width, 1)
        self.tail = nn.Sequential(Dilated(width, 1), Dilated(width, 1), nn.Conv2d(width, 12, 1), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.head(x)
        return self.tail(h + F.interpolate(self.up(self.down(h)), scale_factor=2, mode="bilinear"))


class Dilated(nn.Module):
    def __init__(self, width: int, dilation: int):
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(8, width), nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.conv(self.norm(x)))


def scenes(model, first: int, count: int):
    """Scenes, images (N,3,H,W) as the VAE shows them, labels (N,H,W) and boxes."""
    drawn = [part.scene_of(first + k) for k in range(count)]
    images, boxes = zip(*(part.draw_with_boxes(scene, model.size) for scene in drawn), strict=True)
    array = np.stack(images)
    labels = torch.from_numpy(np.select([array[..., 3] == 255, array[..., 3] == stages.BODY], [2, 1], 0))
    return drawn, as_shown(model, array), labels, boxes


@torch.no_grad()
def as_shown(model, images: np.ndarray) -> Tensor:
    parts = (stages.pixels(images, rows, torch.device("cpu")) for rows in torch.arange(len(images)).split(32))
    return torch.cat([model.decode_latents(model.encode_images(part)[0]) for part in parts])


def read_scenes(work: Path, model) -> tuple[Tensor, Tensor]:
    """Images (N,3,H,W) and labels (N,H,W) that the reader learns from; kept in `work`."""
    paths = work / "reader-images.npy", work / "reader-labels.npy"
    if not all(path.exists() for path in paths):
        _, x, labels, _ = scenes(model, HELD_OUT, READ_SCENES + JUDGED)
        for path, array in zip(paths, (x.half(), labels.byte()), strict=True):
            with writing(path) as temporary:
                np.save(temporary, array.numpy())
    x, labels = (torch.from_numpy(np.load(path)) for path in paths)
    return x.float(), labels.long()


def reader(work: Path, model) -> tuple[Reader, list[float]]:
    """A trained reader, and its IoU of subject and accessory on scenes that it has not seen."""
    torch.manual_seed(0)
    net, (x, labels) = Reader(), read_scenes(work, model)
    weight = torch.tensor([1.0, 1.0, 2.0])

    def loss(step: int) -> Tensor:
        g = rng.generator(0, "reader", step)
        rows, flipped = torch.randint(0, READ_SCENES, (READ_BATCH,), generator=g), bool(step % 2)
        shown, truth = ((v[rows].flip(-1) if flipped else v[rows]) for v in (x, labels))
        return F.cross_entropy(net(shown + 0.05 * torch.randn(shown.shape, generator=g)), truth, weight)

    options = {"muon": False, "ema_decay": 0.99, "weight_decay": 0.0, "say": stages.loss_logger("reader", READ_STEPS, print)}
    train_stage(net, loss, work / "reader.safetensors", steps=READ_STEPS, lr=3e-3, **options)
    with torch.no_grad():
        out = torch.cat([net(some) for some in x[READ_SCENES:].split(50)]).argmax(1)
    truth = labels[READ_SCENES:]
    masks = [(out == k, truth == k) for k in (1, 2)]
    return net.eval(), [round(((a & b).sum() / (a | b).sum()).item(), 3) for a, b in masks]


def seen_box(mask: Tensor) -> tuple[float, ...] | None:
    """(H,W) -> its edges, of rows and columns with at least two pixels."""
    ys, xs = ((mask.sum(axis) >= 2).nonzero().flatten() for axis in (1, 0))
    if not len(ys) or not len(xs):
        return None
    return tuple(v.item() / len(mask) for v in (xs[0], ys[0], xs[-1] + 1, ys[-1] + 1))


def centred(x: Tensor, box: tuple[float, ...]) -> Tensor:
    """(3,H,W) -> the same, moved and scaled so that what is in the box has its usual place and size."""
    (x0, y0, x1, y1), (u0, v0, u1, v1) = box, USUAL
    s = max(x1 - x0, y1 - y0) / max(u1 - u0, v1 - v0)
    moved = [x0 + x1 - 1 - s * (u0 + u1 - 1), y0 + y1 - 1 - s * (v0 + v1 - 1)]
    grid = F.affine_grid(torch.tensor([[[s, 0, moved[0]], [0, s, moved[1]]]]), (1, *x.shape), align_corners=False)
    return F.grid_sample(x[None], grid, mode="bicubic", padding_mode="border", align_corners=False)[0].clamp(-1, 1)


def iou(a, b) -> float:
    if b is None:
        return 0.0
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inter = max(width, 0) * max(height, 0)
    return inter / (sum((e[2] - e[0]) * (e[3] - e[1]) for e in (a, b)) - inter)


def said(scene: Scene) -> str:
    """A caption that says all that a scene's words can."""
    worn = scene.accessory and accessory_words(scene.accessory)
    parts = (with_article(scene.subject.class_word), worn, ACTIONS[scene.action], PLACES[scene.place])
    return " ".join(part for part in parts if part)


def drawn_by(model, prompts: list[str], layouts: list[Tensor] | None, config) -> Tensor:
    images = []
    for k, prompt in enumerate(prompts):
        beside = {} if layouts is None else {"layout": layouts[k]}
        z0 = sample_latents(model, [prompt], image_generators(0, [k], "layout"), config, **beside)
        images.append(model.decode_latents(z0))
    return torch.cat(images)


@torch.no_grad()
def score(net: Reader, probe, images: Tensor, asked: list[list[Box]], truth: dict) -> dict:
    labels = net(images).argmax(1)
    rows: dict[str, list[float]] = {"box": [], "accessory's box": []}
    for label, boxes in zip(labels, asked, strict=True):
        for box in boxes:
            worn = box.name in ACCESSORIES
            rows["accessory's box" if worn else "box"].append(iou(box[1:], seen_box(label == 1 + worn)))
    out, boxes = probe(images), torch.tensor(rows["box"])
    near = probe(torch.stack([centred(x, seen_box(label == 1) or USUAL) for x, label in zip(images, labels, strict=True)]))
    read = {name: (out if name in OF_THE_WHOLE else near)[name].argmax(1) for name in FIELDS}
    right = {name: round((row == truth[name]).float().mean().item(), 2) for name, row in read.items()}
    means = {name: round(float(np.mean(values)), 3) for name, values in rows.items()}
    return means | {"box over 0.5": round((boxes > 0.5).float().mean().item(), 2)} | right


def main(work: Path, base: Path = TOYLAND, images: int = 48, steps: int = 12) -> None:
    make_folder(work)
    recipe = resolve(None, [f"base={base}", f"draw.steps={steps}"])
    model = open_base(recipe, SILENT)
    net, agreement = reader(work, model)
    chosen, rendered, _, asked = scenes(model, 2 * HELD_OUT, images)
    prompts, truth = [said(scene) for scene in chosen], scene_truth(chosen)
    plain = drawn_by(model, prompts, None, recipe.draw)
    classes = put_planes_of(model)
    cells = (model.size // model.downscale,) * 2
    ours = drawn_by(model, prompts, [planes(boxes, classes, cells) for boxes in asked], recipe.draw)
    table = {"rendered": rendered, "with the layout": ours, "the base": plain}
    rows = {name: score(net, load_probe(TOYLAND / "probes"), x, asked, truth) for name, x in table.items()}
    write_json(work / "layout.json", {"reader": agreement, "rows": rows})
    print(f"reader: IoU of subject and accessory {agreement}", *(f"{name:20} {row}" for name, row in rows.items()), sep="\n")
    with writing(work / "layout.png") as temporary:
        grid([with_boxes(image, boxes) for x in (plain, ours) for image, boxes in zip(to_pil(x[:8]), asked)], 8).save(temporary)


def with_boxes(image: Image.Image, boxes: list[Box], times: int = 3) -> Image.Image:
    image = image.resize((times * image.width, times * image.height), Image.Resampling.NEAREST)
    for box in boxes:
        edges = [round(share * image.width) for share in box[1:]]
        colour = (0, 220, 255) if box.name in ACCESSORIES else (255, 0, 0)
        ImageDraw.Draw(image).rectangle((edges[0], edges[1], edges[2] - 1, edges[3] - 1), outline=colour)
    return image


if __name__ == "__main__":
    typer.run(main)
