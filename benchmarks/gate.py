"""The gate: with identical pictures and noise, ours is as near to a float64 reference as the peer's own script is.

The script trains for a few steps and is listened to: its latents, noise, timesteps, losses. Ours and a reference of plain
torch in float64 then take the same steps. B pictures of a step, photos first; z0 eps (B,C,h,w), t (B,).
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import jobs
from personalize.models.locate import weight_files

STEPS, CLASS_IMAGES, LR = 20, 4, 1e-4
SLACK = 1.5  # times the peer's own deviation
FLOORS = {"loss": 1e-5, "weights": 1e-5}  # below them nothing is gained by being nearer
LORA = {"r": 4, "lora_alpha": 4, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}
SCRIPTS = ("train_dreambooth.py", "train_dreambooth_lora.py")
ADAPTER = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class TrainingResult:
    """Loss of each step, and the weights that were trained as they were saved."""

    losses: list[float]
    weights: dict[str, Tensor]


@dataclass(frozen=True)
class Deviation:
    """loss: largest relative one of a step; weights: of the change of all weights, relative in L2."""

    loss: float
    weights: float

    def passes(self, peer: "Deviation") -> bool:
        return all(getattr(self, k) <= max(SLACK * getattr(peer, k), floor) for k, floor in FLOORS.items())


@dataclass(frozen=True)
class Verdict:
    """How far the peer and ours are from the reference."""

    method: str
    peer: Deviation
    ours: Deviation

    @property
    def passed(self) -> bool:
        return self.ours.passes(self.peer)

    def rows(self) -> list[str]:
        return [
            f"| {self.method}, {what} | {getattr(self.peer, key):.1e} | {getattr(self.ours, key):.1e} |"
            for key, what in (("loss", "loss of a step"), ("weights", "change of the weights"))
        ] + [f"| {self.method} | | {'passed' if self.passed else 'FAILED'} |"]


def deviation(result: TrainingResult, reference: TrainingResult, start: dict[str, Tensor]) -> Deviation:
    """AssertionError where the two did not train the same weights."""
    assert result.weights.keys() == reference.weights.keys() <= start.keys(), result.weights.keys() ^ reference.weights.keys()
    assert len(result.losses) == len(reference.losses), (len(result.losses), len(reference.losses))
    loss = max(abs(a - b) / abs(b) for a, b in zip(result.losses, reference.losses))
    change = sum((reference.weights[k] - start[k].double()).square().sum().item() for k in reference.weights)
    error = sum((result.weights[k].double() - reference.weights[k]).square().sum().item() for k in reference.weights)
    finite = all(map(math.isfinite, (*result.losses, error)))
    return Deviation(loss, math.sqrt(error / change)) if finite else Deviation(math.inf, math.inf)


def run(job: jobs.Job, script: Path, work: Path, *, transforms: Path | None) -> Verdict:
    """The gate for one script. Failed where the script does."""
    from safetensors.torch import load_file

    method = jobs.METHODS[script.name]
    job = dataclasses.replace(job, steps=STEPS, class_images=CLASS_IMAGES, lr=LR)
    record = work / "record.safetensors"
    jobs.run(jobs.theirs(job, script, work), work, transforms=transforms, record=record)
    recorded = load_file(record)
    adapter = {k.removeprefix("adapter."): v for k, v in recorded.items() if k.startswith("adapter.")}
    peer = TrainingResult(recorded["loss"].tolist(), load_saved(work / "out", method))
    batches = [tuple(recorded[f"{name}.{step}"] for name in ("z0", "eps", "t")) for step in range(STEPS)]
    start = adapter or load_unet(job.folder)
    exact = reference(job, batches, adapter)
    mine = ours(job, method, batches, adapter=adapter, out=work / "ours")
    return Verdict(method, deviation(peer, exact, start), deviation(mine, exact, start))


def load_unet(folder: Path) -> dict[str, Tensor]:
    """The weights in a diffusers folder, in one file or in several."""
    from safetensors.torch import load_file

    return {name: tensor for file in weight_files(folder / "unet") for name, tensor in load_file(file).items()}


def load_saved(folder: Path, method: str) -> dict[str, Tensor]:
    """What a program saved: a whole U-Net, or an adapter by the names that PEFT gives its tensors."""
    from safetensors.torch import load_file

    if method == "full":
        return load_unet(folder)
    names = {"lora.down": "lora_A", "lora.up": "lora_B"}
    tensors = {k.removeprefix("unet."): v for k, v in load_file(folder / ADAPTER).items()}
    for old, new in names.items():
        tensors = {k.replace(old, new): v for k, v in tensors.items()}
    return tensors


def ours(job: jobs.Job, method: str, batches: list, *, adapter: dict[str, Tensor], out: Path) -> TrainingResult:
    """The batches through `personalize.training.engine`, and what `personalize` saves then."""
    import personalize
    from personalize import methods, models
    from personalize.data.batch import Batch
    from personalize.generation import sampling
    from personalize.training.engine import Engine

    flags = jobs.ours(job, method, out)
    recipe = personalize.resolve(None, [f"base={job.base}", f"train.methods={method}", *flags[flags.index("--set") + 1 :: 2]])
    model = models.load_model(recipe.base, device=recipe.device, dtype=recipe.dtype)
    groups = methods.attach(model, recipe)
    if adapter:
        methods.restore(model, recipe, {f"lora:unet.{k}": v for k, v in adapter.items()})
    with torch.no_grad():
        cond = sampling.encode_texts(model, prompts(job))
    engine, losses = Engine(model, recipe, groups), []
    is_prior = torch.arange(2 * job.batch) >= job.batch
    for z0, eps, t in batches:
        z0, eps, t = z0.float().to(model.device), eps.float().to(model.device), t.to(model.device)
        batch = Batch(z0, eps, t, is_prior, lambda rows: {k: v[rows] for k, v in cond.items()})
        losses.append(float(engine.step(batch, scale=1.0)["loss"]))
    methods.save(model, out, recipe)
    return TrainingResult(losses, load_saved(out, method))


def reference(job: jobs.Job, batches: list, adapter: dict[str, Tensor]) -> TrainingResult:
    """The same steps in float64 with diffusers' U-Net and torch's plain AdamW: as the papers say it, nothing clever."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(job.folder / "unet")
    if adapter:
        _adapt(unet, adapter)
    unet = unet.double().to(job.device).train()
    parameters = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=job.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, foreach=False, fused=False
    )
    cond, config = encoded(job), json.loads((job.folder / "scheduler" / "scheduler_config.json").read_text())
    table, losses = abar(config).to(job.device), []
    for z0, eps, t in batches:
        z0, eps, t = z0.double().to(job.device), eps.double().to(job.device), t.to(job.device)
        alpha, sigma = (x[t].sqrt().view(-1, 1, 1, 1) for x in (table, 1 - table))
        target = alpha * eps - sigma * z0 if config.get("prediction_type") == "v_prediction" else eps
        error = (unet(alpha * z0 + sigma * eps, t, cond, return_dict=False)[0] - target).square()
        loss = error[: job.batch].mean() + error[job.batch :].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    short = {name.replace(".default.", "."): p.detach().cpu() for name, p in parameters.items()}
    return TrainingResult(losses, short)


def prompts(job: jobs.Job) -> list[str]:
    """One text a picture of a batch."""
    return [text for text in job.prompts for _ in range(job.batch)]


@torch.no_grad()
def encoded(job: jobs.Job) -> Tensor:
    """(B,L,D) float64: the prompts, by the base's own text encoder."""
    from transformers import CLIPTextModel, CLIPTokenizer

    words = CLIPTokenizer.from_pretrained(job.folder / "tokenizer")
    text = CLIPTextModel.from_pretrained(job.folder / "text_encoder").double().to(job.device)
    most = min(words.model_max_length, text.config.max_position_embeddings)
    ids = words(prompts(job), padding="max_length", truncation=True, max_length=most, return_tensors="pt").input_ids
    return text(ids.to(job.device))[0]


def abar(config: dict) -> Tensor:
    """(T,) float64 from a scheduler's config, by the papers' formulas (2006.11239; zero terminal SNR: 2305.08891)."""
    low, high, T = config["beta_start"], config["beta_end"], config["num_train_timesteps"]
    assert config["beta_schedule"] in ("linear", "scaled_linear"), config["beta_schedule"]
    power = 2 if config["beta_schedule"] == "scaled_linear" else 1
    betas = torch.linspace(low ** (1 / power), high ** (1 / power), T, dtype=torch.float64) ** power
    alpha = (1 - betas).cumprod(0).sqrt()
    if config.get("rescale_betas_zero_snr"):
        alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    return alpha.square()


def _adapt(unet: nn.Module, adapter: dict[str, Tensor]) -> None:
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    unet.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(**LORA), unet)
    set_peft_model_state_dict(unet, adapter)
