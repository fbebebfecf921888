"""Runs a training script, or `personalize`, in this process as its users do, and writes down when things happened.

    python -m benchmarks.arm EVENTS.json [--transforms DIR] [--record FILE] -- SCRIPT.py|personalize ARGUMENT…

Nothing is imported early: a function is wrapped when its own module is imported, so the start is the program's own.
Times are seconds of the monotonic clock, which all processes of a machine share. --record keeps each step's batch and loss.
"""

import argparse
import atexit
import functools
import json
import runpy
import sys
import time
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

PIPELINE = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion"


class ImportHook:
    """A finder that calls `then[name](module)` as soon as the module of that name was imported."""

    def __init__(self, then: dict[str, Callable]):
        self.then = dict(then)

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        if name not in self.then:
            return None
        then, spec = self.then.pop(name), PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module

        def and_then(module) -> None:
            execute(module)
            then(module)

        spec.loader.exec_module = and_then
        return spec


class Events:
    """begin: the starts of steps; step: their ends; draw: [start, end] of each call that draws class pictures."""

    def __init__(self):
        self.begin, self.step, self.draw = [], [], []

    def around(self, *, begin: list | None = None, end: list | None = None, span: list | None = None) -> Callable:
        """A wrapper for functions that notes when they are called and when they have returned."""

        def wrap(function: Callable) -> Callable:
            @functools.wraps(function)
            def timed(*args, **named):
                start = time.monotonic()
                if begin is not None:
                    begin.append(start)
                result = function(*args, **named)
                if end is not None:
                    end.append(time.monotonic())
                if span is not None:
                    span.append([start, time.monotonic()])
                return result

            return timed

        return wrap

    def of_peer(self) -> dict[str, Callable]:
        """What to do with each module that a script for diffusers imports."""
        begun, drawn = self.around(begin=self.begin), self.around(span=self.draw)
        return {
            "torch.optim.optimizer": lambda module: module.register_optimizer_step_post_hook(
                lambda *_: self.step.append(time.monotonic())
            ),
            "accelerate.accelerator": lambda module: wrap_function(module.Accelerator, "accumulate", begun),
            PIPELINE: lambda module: wrap_function(module.StableDiffusionPipeline, "__call__", drawn),
        }

    def of_ours(self) -> dict[str, Callable]:
        """The same moments in `personalize`, whose optimizer need not be one of torch's."""
        stepped, drawn = self.around(begin=self.begin, end=self.step), self.around(span=self.draw)
        return {
            "personalize.training.engine": lambda module: wrap_function(module.Engine, "step", stepped),
            "personalize.data.class_images": lambda module: wrap_function(module, "complete_set", drawn),
        }

    def write(self, path: Path) -> None:
        """With the peak of memory, bytes: torch's on a GPU, else this process's own (wait4 counts its parent's too)."""
        from benchmarks.memory import status

        torch = sys.modules.get("torch")
        on_gpu = torch is not None and torch.cuda.is_initialized()
        peak = torch.cuda.max_memory_allocated() if on_gpu else status("VmHWM")
        path.write_text(json.dumps({**vars(self), "peak": peak}))


class Record:
    """What a script trained on, step by step: z0, eps (B,C,h,w), t (B,), the loss; and its adapter before the first step."""

    def __init__(self):
        self.tensors, self.losses = {}, []

    def modules(self) -> dict[str, Callable]:
        return {
            "diffusers.schedulers.scheduling_ddpm": lambda module: wrap_function(
                module.DDPMScheduler, "add_noise", self._batch
            ),
            "diffusers.loaders.peft": lambda module: wrap_function(module.PeftAdapterMixin, "add_adapter", self._adapter),
            "accelerate.accelerator": lambda module: wrap_function(module.Accelerator, "backward", self._loss),
        }

    def write(self, path: Path) -> None:
        import torch
        from safetensors.torch import save_file

        save_file({**self.tensors, "loss": torch.tensor(self.losses, dtype=torch.float64)}, path)

    def _batch(self, add_noise: Callable) -> Callable:
        def recorded(scheduler, z0, eps, t):
            for name, value in (("z0", z0), ("eps", eps), ("t", t)):
                self.tensors[f"{name}.{len(self.losses)}"] = value.detach().cpu().clone()
            return add_noise(scheduler, z0, eps, t)

        return recorded

    def _adapter(self, add_adapter: Callable) -> Callable:
        def recorded(network, *args, **named):
            from peft import get_peft_model_state_dict

            add_adapter(network, *args, **named)
            adapter = get_peft_model_state_dict(network)
            self.tensors |= {f"adapter.{k}": v.detach().cpu().float().clone() for k, v in adapter.items()}

        return recorded

    def _loss(self, backward: Callable) -> Callable:
        def recorded(accelerator, loss, **named):
            self.losses.append(loss.item())
            return backward(accelerator, loss, **named)

        return recorded


def wrap_function(owner, name: str, wrap: Callable) -> None:
    setattr(owner, name, wrap(getattr(owner, name)))


def both(first: dict[str, Callable], second: dict[str, Callable]) -> dict[str, Callable]:
    """Two tables of what to do with modules, where a module may be in each."""

    def one(name: str) -> Callable:
        return lambda module: [table[name](module) for table in (first, second) if name in table]

    return {name: one(name) for name in first | second}


def only_transforms(folder: Path) -> list:
    """torchvision from a folder whose wheel was built for another torch -> what must live as long as it is used.

    Its `transforms`, all that the scripts use, import once two operators of its own are known by name.
    """
    import torch

    sys.path.insert(0, str(folder))
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return [library]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("events", type=Path)
    parser.add_argument("--transforms", type=Path)
    parser.add_argument("--record", type=Path)
    parser.add_argument("program", nargs="+")
    options = parser.parse_args()
    program, *arguments = options.program
    events, ours = Events(), program == "personalize"
    atexit.register(events.write, options.events)
    then = events.of_ours() if ours else events.of_peer()
    if options.record:
        record = Record()
        atexit.register(record.write, options.record)
        then = both(then, record.modules())
    sys.meta_path.insert(0, ImportHook(then))
    sys.argv = [program, *arguments]
    if ours:
        runpy.run_module("personalize", run_name="__main__", alter_sys=True)
        return
    alive = only_transforms(options.transforms) if options.transforms else []
    sys.path.insert(0, str(Path(program).parent))
    runpy.run_path(program, run_name="__main__")
    alive.clear()


if __name__ == "__main__":
    main()
