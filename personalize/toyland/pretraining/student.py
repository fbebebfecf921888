"""Part "student": a LoRA with which Toyland draws in two steps, by progressive distillation (Salimans & Ho 2202.00512).

The student follows its own path from noise to data. From each of its stops the teacher makes some DDIM steps, and the student
learns to land there in one; then it may teach a student with still fewer steps. The teacher costs three quarters of the time,
so what it says is learned some times over. No scene is rendered: the teacher is what is learned, and it needs captions alone.
The first teacher is the base with its guidance, which the student has inside.

B images; z (B,4,16,16); W + up down is a layer of the student, down (r,in,...), up (out,r,...).
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call

from personalize.common.files import write_json
from personalize.common.settings import setting
from personalize.core import rng
from personalize.core.distillation import lessons_loss, path_lessons, student_paths
from personalize.core.guidance import GUIDANCE, Cond, Predict
from personalize.formats import lora
from personalize.formats.safetensors_io import load_tensors, save_tensors
from personalize.models import fast_unet
from personalize.models.interface import LatentModel
from personalize.toyland.pretraining.stages import loss_logger
from personalize.toyland.pretraining.trainer import train_stage
from personalize.toyland.world.scenes import caption, sample_scene

BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.")
AT_ONCE = 16  # training steps for which the teacher is asked at once
SEED = 20_000_000  # of the scenes whose captions are learned, which no other part uses


@dataclass(frozen=True)
class Settings:
    """How the student learns; the defaults take 80 minutes of one CPU core."""

    teacher: int = setting(8, "DDIM steps of the first teacher", choices=(4, 8, 16, 32))
    steps: int = setting(2, "steps of the student", choices=(1, 2, 4))
    guidance: float = setting(2.2, "guidance of the first teacher, which the student has inside", least=0)
    rank: int = setting(64, "of the LoRA")
    at_once: int = setting(4, "steps of a teacher that a student makes in one: 2 halves as the paper does", choices=(2, 4, 8))
    rows: int = setting(16, "rows of a training step: images times steps of the student")
    replays: int = setting(3, "how often an image of the teacher is learned")
    updates: int = setting(4_000, "training steps of each student")
    lr: float = setting(1e-3, "of AdamW, cosine to zero for each student")
    ema: float = setting(0.99, "decay of the EMA")
    seed: int = setting(0, "of all randomness")


class Student(nn.Module):
    """A frozen U-Net with a LoRA in every layer of its blocks, in the weights themselves: no operator more than the U-Net's."""

    def __init__(self, unet: nn.Module, rank: int, seed: int):
        super().__init__()
        self.frozen = (_Forward(unet.requires_grad_(False)),)  # in a tuple: no parameters of the student
        layers = {n: m for n, m in unet.named_modules() if n.startswith(BLOCKS) and isinstance(m, nn.Linear | nn.Conv2d)}
        self.weights = {name: m.weight.detach() for name, m in layers.items()}
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        g = rng.generator(seed, "student/init", 0)
        for name, weight in self.weights.items():
            key, width = name.replace(".", ":"), weight[0].numel()
            down = (2 * torch.rand(rank, *weight.shape[1:], generator=g) - 1) / math.sqrt(width)
            self.down[key], self.up[key] = (
                nn.Parameter(down),
                nn.Parameter(torch.zeros(len(weight), rank, *(1,) * (weight.ndim - 2))),
            )

    def forward(self) -> Predict:
        """The student's predictions with the weights as they are now, which are put together once."""
        weights = {f"unet.{name}.weight": weight for name, weight in self.merged().items()}
        return lambda z, t, cond: functional_call(self.frozen[0], weights, (z, t, cond))

    def merged(self) -> dict[str, Tensor]:
        return {
            name: weight + (self.up[key].flatten(1) @ self.down[key].flatten(1)).view(weight.shape)
            for name, weight in self.weights.items()
            for key in [name.replace(".", ":")]
        }

    def as_teacher(self) -> nn.Module:
        """A frozen U-Net that answers as the student does now."""
        unet = copy.deepcopy(self.frozen[0].unet)
        with torch.no_grad():
            for name, weight in self.merged().items():
                unet.get_submodule(name).weight.copy_(weight)
        return _Forward(unet)

    def adapter(self) -> lora.Adapter:
        names = {key: f"unet.{key.replace(':', '.')}" for key in self.down}
        tensors = {f"{name}.lora_A.weight": self.down[key].detach() for key, name in names.items()}
        tensors |= {f"{name}.lora_B.weight": self.up[key].detach() for key, name in names.items()}
        ranks = {name: len(self.down[key]) for key, name in names.items()}
        tensors = {key: value.half() for key, value in tensors.items()}
        return lora.Adapter(tensors, ranks, {name: float(r) for name, r in ranks.items()})


class _Forward(nn.Module):
    """The package's own forward pass as a module, which `functional_call` can give other weights."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    def forward(self, z: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return fast_unet.fast_forward(self.unet, z, t, cond["text"])


def train(model: LatentModel, out: Path, work: Path, settings: Settings, say: Callable[[str], None]) -> None:
    """Trains the student of a Toyland and writes its LoRA, as diffusers reads it, and what it is to `out`."""
    student, first = Student(model.unet, settings.rank, settings.seed), _Forward(copy.deepcopy(model.unet))
    scale, teacher, steps = settings.guidance, first, settings.updates
    for path in student_paths(model.schedule, settings.teacher, settings.steps, at_once=settings.at_once):
        name, batch = f"student{len(path)}", max(1, settings.rows // len(path))
        lessons = Lessons(model, student, (teacher, scale), path, work / name, settings)

        def loss(step: int, lessons=lessons, path=path, batch=batch) -> Tensor:
            stops, targets, cond = lessons.at(step, batch)
            return lessons_loss(model.schedule, student(), stops, targets, cond, path)

        log = loss_logger(name, steps, say)
        train_stage(student, loss, work / f"{name}.safetensors", steps=steps, lr=settings.lr, say=log, muon=False,
            weight_decay=0.0, ema_decay=settings.ema)  # fmt: skip
        teacher, scale = student.as_teacher(), 1.0
        out.mkdir(parents=True, exist_ok=True)
        lora.write_diffusers(out / "pytorch_lora_weights.safetensors", student.adapter())
        write_json(out / "student.json", {"sampler": "ddim", "steps": len(path), "guidance_baked": settings.guidance})


class Lessons:
    """What the teacher says on the student's path, for some steps at a time, in files: a resumed training reads them."""

    def __init__(
        self, model: LatentModel, student: Student, teacher: tuple[Predict, float], path, work: Path, settings: Settings
    ):
        self.model, self.student, self.path, self.work, self.settings = model, student, path, work, settings
        self.teacher, self.scale = teacher
        self.now: tuple[int, dict[str, Tensor]] = (-1, {})

    def at(self, step: int, batch: int) -> tuple[Tensor, Tensor, Cond]:
        """Stops and targets (S,B,4,16,16), and the conditioning of their B captions."""
        chunk, k = divmod(step, AT_ONCE * self.settings.replays)
        if self.now[0] != chunk:
            self.now = chunk, self._chunk(chunk, AT_ONCE * batch)
        g = rng.generator(self.settings.seed, f"student/{self.work.name}/order", step // AT_ONCE)
        rows = torch.randperm(AT_ONCE * batch, generator=g)[k % AT_ONCE * batch :][:batch].to(self.model.device)
        lessons = self.now[1]
        return lessons["stops"][:, rows], lessons["targets"][:, rows], {"text": lessons["text"][rows]}

    @torch.no_grad()
    def _chunk(self, chunk: int, count: int) -> dict[str, Tensor]:
        path = self.work / f"{chunk}.safetensors"
        if not path.exists():
            model, parts, predict = self.model, [], self.student()
            for start in range(0, count, 8):
                noise, cond, uncond = self._prompts_and_noise(chunk * count + start, min(8, count - start))
                guided = GUIDANCE["cfg"](self.teacher, cond, uncond, self.scale)
                stops, targets = path_lessons(model.schedule, predict, guided, noise, cond, self.path)
                parts.append({"stops": stops, "targets": targets, "text": cond["text"]})
            whole = {name: torch.cat([p[name] for p in parts], int(name != "text")) for name in parts[0]}
            path.parent.mkdir(parents=True, exist_ok=True)
            save_tensors(path, {name: value.contiguous() for name, value in whole.items()})
        return {name: value.to(self.model.device) for name, value in load_tensors(path).items()}

    def _prompts_and_noise(self, first: int, count: int) -> tuple[Tensor, Cond, Cond]:
        """Noise (B,4,16,16), and the conditioning of B captions and of none."""
        g = rng.generator(self.settings.seed, f"student/{self.work.name}", first)
        scenes = torch.randint(0, 1_000_000, (count,), generator=g).tolist()
        texts = [caption(sample_scene(SEED + k), (first << 8) + i) for i, k in enumerate(scenes)]
        text, edge = self.model.encode_prompts([*texts, ""])["text"], self.model.size // self.model.downscale
        noise = torch.randn(count, self.model.latent_channels, edge, edge, generator=g)
        return noise.to(self.model.device), {"text": text[:count]}, {"text": text[-1:].expand(count, -1, -1)}
