"""Truth probes: a small network that reads what a Toyland image shows; it learns from rendered images only.

B images, N scenes, K kinds of a table. It is no part of the base and trains on no generated image, nor on the VAE's:
it judges those by the world alone, not by the model.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from personalize.common.errors import UserError
from personalize.common.files import read_json, write_json, writing
from personalize.common.untrusted import OBJECT, Many, Number, Table, require_regular
from personalize.core import rng
from personalize.toyland.pretraining.stages import loss_logger, pixels, sample_rows
from personalize.toyland.pretraining.trainer import train_stage
from personalize.toyland.world.scenes import (
    ACCESSORIES,
    ACTIONS,
    CLASSES,
    COLOURS,
    EARS,
    PATTERNS,
    PLACES,
    PROBE_SEED,
    PROPORTIONS,
    TAILS,
    Scene,
    Subject,
    colour_word,
    opponent,
    sample_scene,
)

SIZE = 64  # px of what is read
NOTHING = "none"  # worn
TABLES = {
    "class": CLASSES,
    "place": tuple(PLACES),
    "action": tuple(ACTIONS),
    "accessory": (NOTHING, *ACCESSORIES),
    "accessory_colour": tuple(COLOURS),
    "colour": tuple(COLOURS),  # the word for the body's
    "pattern": PATTERNS,
    "ear": EARS,
    "tail": TAILS,
}
COLOUR_FIELDS = ("body", "second", "detail")
VALUES = {name: 3 for name in COLOUR_FIELDS} | {"proportions": len(PROPORTIONS)}
CHANNELS = (32, 64, 128, 160)  # at 32, 16, 8 and 4 px
BATCH = 64
COLOUR_UNIT = 0.2  # of the opponent axes, so that colours weigh like the rest
IGNORE_INDEX = -100  # the colour of no accessory; cross_entropy leaves it out
# No config.json: a base's fingerprint takes in every one of its folders', and the base is the same with or without this.
SIZES = "probes.json"


class Residual(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        parts = [(nn.GroupNorm(8, channels), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)) for _ in range(2)]
        self.body = nn.Sequential(*parts[0], *parts[1])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Probe(nn.Module):
    """(B,3,64,64) in [-1,1] -> the logits (B,K) of each table, body, second and detail (B,3) in opponent axes,
    and the proportions (B,4) in standard units."""

    def __init__(self, channels: Sequence[int] = CHANNELS):
        super().__init__()
        a, b, c, d = self.channels = tuple(channels)
        self.sizes = {name: len(table) for name, table in TABLES.items()} | VALUES
        self.see = nn.Sequential(
            nn.PixelUnshuffle(2), nn.Conv2d(12, a, 3, padding=1), nn.GroupNorm(8, a), nn.ReLU(),
            nn.Conv2d(a, b, 3, 2, 1), Residual(b),
            nn.Conv2d(b, c, 3, 2, 1), Residual(c), nn.GroupNorm(8, c), nn.ReLU(),
            nn.Conv2d(c, d, 3, 2, 1), nn.GroupNorm(8, d), nn.ReLU(), nn.Conv2d(d, 32, 1), nn.Flatten(),
        )  # fmt: skip
        self.tell = nn.Sequential(nn.Linear(32 * (SIZE // 16) ** 2, 256), nn.ReLU(), nn.Linear(256, sum(self.sizes.values())))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        parts = self.tell(self.see(x)).float().split(list(self.sizes.values()), dim=1)
        out = dict(zip(self.sizes, parts, strict=True))
        return out | {name: COLOUR_UNIT * out[name] for name in COLOUR_FIELDS}


def kinds(subject: Subject) -> dict[str, int]:
    """The row of the subject's pattern, ear and tail in their tables."""
    return {name: TABLES[name].index(getattr(subject, name)) for name in ("pattern", "ear", "tail")}


def values(subject: Subject) -> dict[str, list[float]]:
    """The three colours (3,) in opponent axes, and the proportions (4,) less their mean over their deviation."""
    standardized = [
        (getattr(subject, name) - (low + high) / 2) / ((high - low) / 12**0.5) for name, (low, high) in PROPORTIONS.items()
    ]
    return {name: list(opponent(getattr(subject, name))) for name in COLOUR_FIELDS} | {"proportions": standardized}


def scene_truth(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """N scenes -> (N,) rows of each table, (N,3) and (N,4) values."""
    rows = []
    for s in scenes:
        words = {"class": s.subject.class_word, "place": s.place, "action": s.action}
        words["colour"] = colour_word(s.subject.body)
        words["accessory"] = s.accessory.kind if s.accessory else NOTHING
        if s.accessory:
            words["accessory_colour"] = s.accessory.colour
        indices = {name: TABLES[name].index(word) for name, word in words.items()}
        rows.append({"accessory_colour": IGNORE_INDEX} | indices | kinds(s.subject) | values(s.subject))
    return {name: torch.tensor([row[name] for row in rows]) for name in (*TABLES, *VALUES)}


def probe_loss(out: dict[str, Tensor], target: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of every table, the colour of no accessory left out, plus the squared error of every value."""
    total = sum(F.cross_entropy(out[name], target[name], ignore_index=IGNORE_INDEX) for name in TABLES)
    for name in VALUES:
        unit = 1.0 if name == "proportions" else COLOUR_UNIT
        total = total + ((out[name] - target[name]) / unit).flatten().square().mean()
    return total


def augment(x: Tensor, g: torch.Generator) -> Tensor:
    """(B,3,64,64) -> the same as a generator might have made it: shifted, coarse, blurred, noisy, its colours a little off.

    Shift, coarseness and blur are drawn for quarters of the batch, the rest for each image.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape or (1,), generator=g)

    x = torch.cat([_blur(_downscale(_shift(part, g), uniform(-24, 24)), uniform(-1, 1)) for part in x.chunk(4)])
    count = len(x)
    x = x * uniform(0.92, 1.06, count, 1, 1, 1) + uniform(-0.06, 0.06, count, 1, 1, 1) + uniform(-0.03, 0.03, count, 3, 1, 1)
    patches = F.interpolate(torch.randn((count, 3, 16, 16), generator=g), x.shape[-1], mode="bilinear")
    grain = torch.randn(x.shape, generator=g)
    x = x + uniform(0, 0.06, count, 1, 1, 1) * patches + uniform(0, 0.06, count, 1, 1, 1) * grain
    return x.clamp(-1, 1)


def _shift(x: Tensor, g: torch.Generator, max_shift: int = 3) -> Tensor:
    dx, dy = torch.randint(0, 2 * max_shift + 1, (2,), generator=g).tolist()
    return F.pad(x, (max_shift,) * 4, mode="replicate")[..., dy : dy + x.shape[-2], dx : dx + x.shape[-1]]


def _downscale(x: Tensor, reduction: Tensor) -> Tensor:
    """Made `reduction` px smaller and brought back; as it is where that is not positive."""
    if reduction <= 0:
        return x
    small = F.interpolate(x, x.shape[-1] - int(reduction), mode="bilinear", antialias=True)
    return F.interpolate(small, x.shape[-1], mode="bicubic")


def _blur(x: Tensor, sigma: Tensor) -> Tensor:
    """A Gaussian of that many px; as it is where that is not positive."""
    if sigma <= 0:
        return x
    taps = torch.exp(-torch.arange(-3, 4).square() / (2 * sigma.square()))
    taps = (taps / taps.sum()).repeat(3, 1, 1, 1)
    x = F.conv2d(F.pad(x, (3, 3, 0, 0), mode="replicate"), taps, groups=3)
    return F.conv2d(F.pad(x, (0, 0, 3, 3), mode="replicate"), taps.transpose(2, 3), groups=3)


def train_probe(work: Path, images: np.ndarray, settings, device: torch.device, say: Callable[[str], None]) -> Probe:
    """The stage: `images` (N,64,64,3) uint8 are the drawn scenes of the seeds from PROBES on."""
    torch.manual_seed(settings.seed)
    model = Probe().to(device)
    truth = scene_truth([sample_scene(PROBE_SEED + k) for k in range(len(images))])

    def loss(step: int) -> Tensor:
        rows = sample_rows(step, BATCH, len(images), seed=settings.seed, purpose="probes")
        with torch.autocast(device.type, enabled=False):
            x = augment(pixels(images, rows, torch.device("cpu")), rng.generator(settings.seed, "probes", step))
        return probe_loss(model(x.to(device)), {name: value[rows].to(device) for name, value in truth.items()})

    train_stage(model, loss, work / "probes.safetensors", steps=settings.probe_steps, lr=6e-3, ema_decay=0.998,
        weight_decay=0.02, say=loss_logger("probes", settings.probe_steps, say))  # fmt: skip
    return model.eval()


def export(out: Path, model: Probe) -> None:
    """model.safetensors in half precision, and the sizes and tables that it was made for."""
    from safetensors.torch import save_file

    with writing(out / "model.safetensors") as temporary:
        save_file({name: v.detach().cpu().half().contiguous() for name, v in model.state_dict().items()}, temporary)
    write_json(out / SIZES, {"channels": model.channels, "tables": TABLES, "values": VALUES})


def load_probe(out: Path) -> Probe:
    """What `export` wrote, in float32. UserError where it is missing, damaged or of another Toyland."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    remedy = "Make it again: personalize pretrain"
    sizes = read_json(
        out / SIZES,
        Table({"channels": Many(Number(1, 4096), 1, 16), "tables": OBJECT}, ("channels", "tables", "values"), remedy),
    )
    require_regular(out / "model.safetensors", "probe")
    if {k: tuple(v) for k, v in sizes["tables"].items()} != TABLES or sizes["values"] != VALUES:
        raise UserError(f"{out} reads another Toyland than the one drawn here. {remedy}")
    model = Probe(sizes["channels"])
    try:
        model.load_state_dict(load_file(out / "model.safetensors"))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{out} holds no probe that can be read: {error}. {remedy}") from error
    return model.eval().requires_grad_(False)
