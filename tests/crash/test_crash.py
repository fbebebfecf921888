"""A command that was killed at any of its writes, or refused by the disk, is repeated: the same files, the same bits.

The default suite takes a few points of each command, spread over it; the slow one takes all.
"""

import errno
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import write_points
from bases import packable

import personalize
from personalize import models
from personalize.commands.export import hub
from personalize.common import run_folder
from personalize.common.recipe_sections import ADAPTERS, METHODS
from personalize.evaluation import encoders

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs fork and /proc")
PHOTOS = Path(__file__).parents[2] / "data_examples" / "dog"
TINY = ["device=cpu", "dtype=float32", "photos.min_size=16", "draw.size=32", "draw.steps=1", "draw.sampler=ddim"]
TINY += ["train.steps=2", "train.checkpoint_every=1", "train.keep=1", "prior.count=0", "lora.rank=1", "photos.hold_out=0"]
CHOOSE = ["choose.every=1", "choose.count=1", "choose.strengths=[0.5, 1.5]"]
CHOOSE += ["choose.class_count=2", "choose.prompts=a {token} {class}", "choose.steps=1"]
PRIOR = ["prior.count=3", "prior.steps=1", "prior.batch=2"]
EVALUATE = ["evaluate.prompts=a {token} {class} in the snow", "evaluate.count=2", "evaluate.class_count=2"]
MORE = {
    **dict.fromkeys(ADAPTERS, ["train.steps=1"]),
    "full": ["train.ema=0.9"],
    "lora": [*CHOOSE, *PRIOR, "train.sample_every=1"],
    "textual-inversion": ["token=<zqv>", "embedding.vectors=2"],
    "custom-diffusion": ["token=<zqv>", "prior.count=2", "prior.steps=1"],
}
EXPORTS = {
    "diffusers": ("lora", {"to": "diffusers"}),
    "diffusers-full": ("full", {"to": "diffusers"}),
    "kohya": ("lora", {"to": "kohya"}),
    "embedding": ("textual-inversion", {"to": "a1111-embedding"}),
    "single-file": ("full", {"to": "single-file"}),
    "push": ("lora", {"to": "single-file", "fuse": True, "push": "owner/name"}),
    "elsewhere": ("full", {"to": "single-file", "out": "out/dog.safetensors"}),
}
COMMANDS = [*(f"train {name}" for name in METHODS), "prior", "generate", "evaluate", *(f"export {name}" for name in EXPORTS)]
STOPS = 2  # of a command in the default suite
FAULTS = {errno.ENOSPC: False, errno.EFBIG: False, errno.EIO: False, errno.EROFS: True}  # errno -> for all writes from then on


class Bench:
    """Every command on one base, in the folder `root`; what each leaves undisturbed, made once."""

    def __init__(self, base: Path, eyes: Path, root: Path):
        torch.set_num_threads(1)
        self.root, self.kept = root / "now", root / "kept"
        judges = [f"evaluate.dino={eyes}/encoders/identity", f"evaluate.clip={eyes}/encoders/clip"]
        self.settings = [f"base={base}", *TINY, *judges]
        self.loaded = models.load_model(str(base), device="cpu", dtype="float32", say=print)
        self.judges = encoders.load_encoders(base, "cpu", dino=f"{eyes}/encoders/identity", clip=f"{eyes}/encoders/clip")
        self.whole: dict[str, tuple[Path | None, dict, list]] = {}
        self._warm(base)

    def _warm(self, base: Path) -> None:
        """Imports all that the commands import, for every child."""
        own = [*self.settings, "train.methods=lora", *MORE["lora"], "train.steps=1"]
        folder = personalize.train(PHOTOS, class_word="dog", settings=own, runs=self.kept, priors=self.kept).folder
        personalize.evaluate(folder, settings=EVALUATE)
        personalize.export(folder, to="single-file", fuse=True, check=False)

    def command(self, name: str) -> Callable[[], None]:
        """What a child runs. It has its parent's base and encoders to itself."""
        what, _, which = name.partition(" ")
        runs, priors = self.root / "runs", self.root / "priors"
        if what == "train":
            settings = [*self.settings, f"train.methods={which}", *MORE.get(which, [])]
            call = partial(personalize.train, PHOTOS, class_word="dog", settings=settings, runs=runs, priors=priors)
        elif what == "prior":
            call = partial(personalize.prior, "dog", settings=[*self.settings, *PRIOR], root=priors)
        elif what == "generate":
            call = partial(personalize.generate, ["a {token} {class}", "a {class}"], runs=runs, settings=["draw.count=2"])
        elif what == "evaluate":
            call = partial(personalize.evaluate, runs=runs, settings=EVALUATE)
        else:
            options = EXPORTS[which][1]
            options = options | ({"out": self.root / options["out"]} if "out" in options else {})
            call = partial(personalize.export, runs=runs, **options, check=False)

        def run() -> None:
            models.load_model = lambda *a, **k: self.loaded
            encoders.load_encoders = lambda *a, **k: self.judges
            hub.upload = lambda *a: "address"
            call()

        return run

    def undisturbed(self, name: str) -> tuple[Path | None, dict, list]:
        """The folder from which a command starts, what is there afterwards, and its writes."""
        if name not in self.whole:
            what, _, which = name.partition(" ")
            start = (
                self._trained(EXPORTS[which][0] if which else "lora") if what in ("generate", "evaluate", "export") else None
            )
            write_points.fresh(self.root, start)
            outcome = write_points.run(self.command(name), self.root)
            assert outcome.kind == "done", outcome.text
            self.whole[name] = start, write_points.state(self.root), outcome.points
            assert not any(".tmp-" in path for path in self.whole[name][1])
            if what == "train":
                shutil.copytree(self.root, self.kept / which)
        return self.whole[name]

    def _trained(self, method: str) -> Path:
        self.undisturbed(f"train {method}")
        return self.kept / method


@pytest.fixture(scope="module")
def bench(tiny_sd, eyes, tmp_path_factory):
    root = tmp_path_factory.mktemp("crash")
    return Bench(packable(tiny_sd, root / "base"), eyes, root)


def killed(bench: Bench, name: str, *, stride: int = 1) -> list[str]:
    """What does not hold after a kill at a point and a repetition, a line each."""
    start, whole, writes = bench.undisturbed(name)
    faults = []
    for n in range(1, len(writes) + 1, stride):
        write_points.fresh(bench.root, start)
        stopped = write_points.run(bench.command(name), bench.root, write_points.kill_at(n))
        if stopped.kind != "killed":
            faults.append(f"{n} {writes[n - 1]}: was not reached: {stopped.kind} {stopped.text}")
        again = write_points.run(bench.command(name), bench.root)
        wrong = write_points.differences(write_points.state(bench.root), whole)
        if again.kind != "done" or wrong:
            faults.append(f"{n} {writes[n - 1]}: {again.kind} {again.text} {wrong}")
    return faults


def refused(bench: Bench, name: str, *, stride: int = 1) -> list[str]:
    """What does not hold where the disk refuses a write, and after a repetition on a good disk."""
    start, whole, writes = bench.undisturbed(name)
    faults = []
    for n in range(1, len(writes) + 1, stride):
        number = list(FAULTS)[n // stride % len(FAULTS)]
        write_points.fresh(bench.root, start)
        act = write_points.refuse_at(n, number, forever=FAULTS[number])
        outcome = write_points.run(bench.command(name), bench.root, act)
        wrong = "" if outcome.kind == "done" else _told(outcome, n, number)
        if not FAULTS[number] and (left := _running(bench.root)):
            wrong += f" {left} is left running"
        again = write_points.run(bench.command(name), bench.root)
        left = write_points.differences(write_points.state(bench.root), whole)
        if wrong or again.kind != "done" or left:
            faults.append(f"{n} {writes[n - 1]} {errno.errorcode[number]}: {wrong}; {again.kind} {again.text} {left}")
    return faults


def _told(outcome: write_points.Outcome, n: int, number: int) -> str:
    """What is wrong with the words about the writes refused from the N-th on. Of refused removals nobody speaks."""
    if outcome.kind != "UserError":
        return f"{outcome.kind}: {outcome.text}"
    refused = outcome.points[n - 1 :]
    path = Path(next((path for event, path in refused if event not in write_points.CLEANING), refused[0][1]))
    while ".tmp-" in str(path.parent):  # a temporary folder stands for what lies beside it
        path = path.parent
    return "" if str(path.parent) in outcome.text and os.strerror(number) in outcome.text else f"told: {outcome.text}"


def _running(root: Path) -> str:
    """A run whose manifest says that it goes on."""
    states = {path.parent: run_folder.read_manifest(path.parent)["status"] for path in root.glob("runs/*/manifest.json")}
    return ", ".join(folder.name for folder, status in states.items() if status == "running")


def stopped_again_and_again(bench: Bench, name: str) -> list[str]:
    """One command in attempts that are by turns killed and refused a write, each later in its work, until one ends."""
    start, whole, writes = bench.undisturbed(name)
    write_points.fresh(bench.root, start)
    faults, stride = [], len(writes) / STOPS
    for k in range(STOPS):
        n, number = 1 + int(stride * (k + 0.5)), list(FAULTS)[k // 2 % 2]
        act = write_points.refuse_at(n, number) if k % 2 else write_points.kill_at(n)
        outcome = write_points.run(bench.command(name), bench.root, act)
        if outcome.kind == "UserError":
            faults += [wrong for wrong in [_told(outcome, n, number), _running(bench.root)] if wrong]
        elif outcome.kind not in ("done", "killed"):
            faults.append(outcome.text)
    outcome = write_points.run(bench.command(name), bench.root)
    left = write_points.differences(write_points.state(bench.root), whole)
    return faults + [f"{outcome.kind} {outcome.text} {left}"] * bool(outcome.kind != "done" or left)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_stopped_at_some_of_its_writes_is_repeated_to_the_same_bits(bench, name):
    assert stopped_again_and_again(bench, name) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_killed_at_every_write_is_repeated_to_the_same_bits(bench, name):
    assert killed(bench, name) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_disk_that_refuses_any_write_is_told_in_one_line(bench, name):
    assert refused(bench, name) == []
