"""The same job as each program's own command line, run in a process of its own."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOKEN, CLASS = "sks", "dog"


@dataclass(frozen=True)
class Job:
    """base: as `personalize` takes it; folder: the same base for the peers; photos: five files and nothing else."""

    base: str
    folder: Path
    photos: Path
    size: int  # px
    device: str = "cpu"
    steps: int = 300
    class_images: int = 100
    batch: int = 1  # photos in a step, and class pictures
    lr: float = 5e-6
    sampler: str = "ddim"  # the one that the base's scheduler config names, as ours is called

    @property
    def prompts(self) -> tuple[str, str]:
        return f"a {TOKEN} {CLASS}", f"a {CLASS}"

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.device == "cuda" else "float32"


@dataclass(frozen=True)
class FinishedRun:
    """A program that ran: when it was started and when it had ended, s, and the events of `arm`."""

    start: float
    end: float
    events: dict


class Failed(Exception):
    """A program that did not end well, in its own last words."""


def ours(job: Job, method: str, work: Path, *, own_drawing: bool = False) -> list[str]:
    """`personalize train` that does what `theirs` does; with own_drawing class pictures are drawn as its recipe says."""
    dtype = "auto" if own_drawing else job.dtype  # on a CPU both train in float32, and with auto class pictures may be bfloat16
    settings = [
        f"dtype={dtype}", f"device={job.device}", "seed=0", "photos.hold_out=0", f"prior.count={job.class_images}",
        f"train.steps={job.steps}", f"train.batch={job.batch}", "train.prior_batch=0", f"train.lr={job.lr}",
        "train.text_encoder=false", "train.snr_gamma=0", "train.clip=1", "train.lr_schedule=constant", "train.warmup=0",
        "train.checkpoint_every=0", "train.checkpoint_minutes=0", "train.sample_every=0", "choose.every=0",
        f"train.engine={'graph' if job.device == 'cuda' else 'eager'}",
    ]  # fmt: skip
    if method == "lora":
        settings += ["lora.rank=4", "lora.alpha=0", "lora.targets=to_q,to_k,to_v,to_out.0", "lora.conv=false"]
    if not own_drawing:
        settings += [f"draw.sampler={job.sampler}", "prior.steps=50", "prior.guidance=7.5"]
    return [
        "personalize", "train", str(job.photos), "--class", CLASS, "--token", TOKEN, "--base", job.base, "--method", method,
        "--runs", str(work / "runs"), "--priors", str(work / "priors"), *(x for s in settings for x in ("--set", s)),
    ]  # fmt: skip


def theirs(job: Job, script: Path, work: Path) -> list[str]:
    """The command of a peer by the name of its script. ValueError for one whose flags nobody has told us."""
    if script.name == "train_db.py":
        return [str(script), *_kohya(job, work)]
    if script.name not in METHODS:
        raise ValueError(f"{script.name} is none of {', '.join(METHODS)}")
    # No checkpoint on the way: we write none, and that one costs the peer time.
    return [
        str(script), f"--pretrained_model_name_or_path={job.folder}", f"--instance_data_dir={job.photos}",
        f"--class_data_dir={work / 'class'}", f"--output_dir={work / 'out'}", f"--instance_prompt={job.prompts[0]}",
        f"--class_prompt={job.prompts[1]}", "--with_prior_preservation", "--prior_loss_weight=1", f"--resolution={job.size}",
        f"--num_class_images={job.class_images}", "--center_crop", f"--train_batch_size={job.batch}",
        f"--max_train_steps={job.steps}", f"--learning_rate={job.lr}", "--lr_scheduler=constant", "--lr_warmup_steps=0",
        "--max_grad_norm=1", "--seed=0", f"--mixed_precision={'bf16' if job.device == 'cuda' else 'no'}",
        f"--checkpointing_steps={job.steps + 1}",
    ]  # fmt: skip


METHODS = {"train_dreambooth.py": "full", "train_dreambooth_lora.py": "lora", "train_db.py": "full"}


def _kohya(job: Job, work: Path) -> list[str]:
    """Its folders say repeats, prompt and kind. It draws no class pictures: photos stand in for them, its steps are timed."""
    for kind, words in (("train", job.prompts[0]), ("reg", job.prompts[1])):
        place = work / kind / f"1_{words.removeprefix('a ')}"
        place.mkdir(parents=True)
        for photo in job.photos.iterdir():
            shutil.copy(photo, place)
    return [
        f"--pretrained_model_name_or_path={job.folder}", f"--train_data_dir={work / 'train'}",
        f"--reg_data_dir={work / 'reg'}", f"--output_dir={work / 'out'}", f"--resolution={job.size}",
        f"--train_batch_size={2 * job.batch}", f"--max_train_steps={job.steps}", f"--learning_rate={job.lr}",
        "--lr_scheduler=constant", "--max_grad_norm=1", "--seed=0", "--stop_text_encoder_training=-1", "--sdpa",
        "--cache_latents", f"--mixed_precision={'bf16' if job.device == 'cuda' else 'no'}", "--save_model_as=diffusers",
    ]  # fmt: skip


def run(command: list[str], work: Path, *, transforms: Path | None = None, record: Path | None = None) -> FinishedRun:
    """A command of `ours` or `theirs` through `arm`. Failed with the program's last words."""
    work.mkdir(parents=True, exist_ok=True)
    events = work / "events.json"
    options = [*(["--transforms", str(transforms)] if transforms and command[0] != "personalize" else [])]
    options += ["--record", str(record)] if record else []
    arm = [sys.executable, "-m", "benchmarks.arm", str(events), *options, "--", *command]
    start, end = spawn(arm, work / "log.txt")
    return FinishedRun(start, end, json.loads(events.read_text()))


def spawn(command: list[str], log: Path) -> tuple[float, float]:
    """A process -> when it was started and when it had ended. Failed if it did not end well."""
    with log.open("w") as out:
        start = time.monotonic()
        process = subprocess.run(
            command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}
        )
        end = time.monotonic()
    if process.returncode:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] or ["no output"]
        raise Failed(f"exit status {process.returncode}: {without_paths(lines[-1])}")
    return start, end


def without_paths(message: str) -> str:
    """A message that may be published: paths of this machine tell nobody anything."""
    return re.sub(r" ?\(?/[^\s)]+\)?", "", message)
