"""The cases that every method is tested by, and trained models of them, made once and shared by all tests here.

A new row of METHODS is tested the day it appears, alone and with the text encoder where `check` allows it.
"""

import copy
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from personalize import methods, models
from personalize.common import checkpoint
from personalize.common.errors import UserError
from personalize.common.optimizers import OPTIMIZERS
from personalize.common.recipe import Recipe, load_recipe
from personalize.common.recipe_sections import SamplingConfig
from personalize.core import rng
from personalize.data.batch import Batch
from personalize.generation import sampling
from personalize.training.engine import Engine

STEPS, SIDE = 2, 8  # of sampling; of latents, smaller than the base was made for, which is fast
RANK, ALPHA = 3, 7.5
MARKS = (2, 6, 7)  # steps of training at which the state is kept; the last ends it
LR = {"full": 1e-3, "custom-diffusion": 1e-2, "textual-inversion": 3e-2, "boft": 3e-2, "oft": 3e-2}
LORA = "pytorch_lora_weights.safetensors"
NOISE = rng.normal(sampling.image_generators(3, [0, 1]), (4, SIDE, SIDE))


class Learned(NamedTuple):
    """A trained model; losses by step; its frozen parameters before; by step its state and its optimizer's, 0 untrained."""

    model: object
    recipe: Recipe
    losses: list[float]
    before: dict
    kept: dict


class Case(NamedTuple):
    """Methods, and further settings as the command line takes them; an SDXL base where `xl`."""

    methods: tuple[str, ...]
    settings: tuple[str, ...] = ()
    xl: bool = False

    @property
    def words(self):
        learns = set(self.methods) & set(methods.WITH_A_WORD)
        given = next((s.partition("=")[2] for s in self.settings if s.startswith("token=")), "")
        return given.split(",") if given else ["<zqv>" if learns else "zqv"]

    def recipe(self, *more):
        texts = [f"train.methods={','.join(self.methods)}", f"train.lr={LR.get(self.methods[-1], 1e-2)}", "class_word=dog"]
        texts += ["train.weight_decay=0", f"token={','.join(self.words)}", f"lora.rank={RANK}", f"lora.alpha={ALPHA}"]
        return load_recipe(None, [*texts, *self.settings, *more])

    def prompts(self):
        return [f"a {self.words[0]} dog", f"a {self.words[-1]} dog", "a dog", "a dog"]


def allowed(name):
    try:
        methods.check_methods([name], text_encoder=True)
    except UserError:
        return False
    return True


TEXT, CONV = "train.text_encoder=true", "lora.conv=true"
ROWS = [Case((name,)) for name in methods.METHODS] + [Case((name,), (TEXT,)) for name in methods.METHODS if allowed(name)]
PIVOTAL = [
    Case(("textual-inversion", "lora"), (TEXT, "embedding.vectors=2", "embedding.lr=0.03")),
    Case(("lora", "textual-inversion")),
]
OPTIONS = [
    *(Case((name,), (CONV,)) for name in ("lora", "lokr", "loha")),
    Case(("lora",), ("lora.dora=true", CONV, TEXT)),
    Case(("lora",), ("lora.rslora=true", "lora.alpha=0")),
    Case(("textual-inversion",), ("embedding.vectors=3", "embedding.init=a photo of dog")),
    Case(("textual-inversion",), ("token=<zqv>,<abc>", "class_word=dog,cat", "embedding.vectors=2")),
    Case(("custom-diffusion",), ("embedding.vectors=2",)),
    *PIVOTAL,
]
QUANTIZED = [
    Case((name,), (f"train.quantize={how}",))
    for name, how in (("lora", "8bit"), ("lora", "4bit"), ("lokr", "8bit"), ("oft", "4bit"), ("boft", "8bit"))
] + [Case(("lora",), ("train.quantize=4bit", "lora.dora=true"))]
XL = [
    Case(("full",), (TEXT,), True), Case(("lora",), (TEXT, CONV), True),
    Case(("textual-inversion",), ("embedding.vectors=2",), True),
]  # fmt: skip
HAVE = {name for name, row in OPTIMIZERS.items() if find_spec(row.place.partition(":")[0].partition(".")[0])}
OPTIMIZED = [
    Case((method,), (f"train.optimizer={name}", *["train.lr=1"] * (name == "prodigy")))
    for method, name in [
        *(("lora", name) for name, row in OPTIMIZERS.items() if not name.startswith("adamw") or row.averages),
        ("full", "adafactor"),
    ]
    if name in HAVE
]
PLAIN = ROWS + OPTIONS + XL  # a quantized base is another base, so its results draw something else on the plain one
CASES = PLAIN + QUANTIZED


def name_of(case):
    return "+".join([*case.methods, *(s.partition(".")[2] or s for s in case.settings), *["xl"] * case.xl])


def battery(cases):
    return pytest.mark.parametrize("case", cases, ids=name_of)


@cache
def read(folder, dtype):
    return models.load_model(str(folder), device="cpu", dtype=dtype, say=lambda line: None)


def base(folder, dtype="float32"):
    model = read(folder, dtype)
    return copy.deepcopy(model, {id(model.family): model.family})  # a module is not copied


def one_batch(model, case):
    """Two photos and two class images with noise and timesteps that never change."""
    g = rng.generator(0, "test")
    z0, eps = (torch.randn(4, 4, SIDE, SIDE, generator=g) for _ in range(2))
    is_prior, prompts = torch.tensor([False, False, True, True]), case.prompts()
    return Batch(z0, eps, torch.tensor([50, 300, 600, 900]), is_prior, lambda rows: sampling.encode_texts(model, prompts[rows]))


def attached(model, recipe):
    torch.manual_seed(0)
    return Engine(model, recipe, methods.attach(model, recipe))


def trained(folder, case, *more, marks=MARKS, start=None):
    """A base after some steps. start: the state that it goes on from, by its step."""
    model, recipe, losses, first = base(folder), case.recipe(*more), [], 0
    engine = attached(model, recipe)
    before, kept = frozen(model), {0: state(engine)}
    if start is not None:
        first, (tensors, optimizer) = start
        methods.restore(model, recipe, tensors)
        checkpoint.restore_optimizer(engine.optimizer, {k: v.clone() for k, v in optimizer.items()})
    batch = one_batch(model, case)
    for step in range(first + 1, marks[-1] + 1):
        losses.append(float(engine.step(batch, scale=1.0)["loss"]))
        if step in marks:
            kept[step] = state(engine)
    return Learned(model, recipe, losses, before, kept)


def state(engine):
    parts = methods.state(engine.model, engine.recipe), checkpoint.optimizer_tensors(engine.optimizer)
    return tuple({k: v.clone() for k, v in part.items()} for part in parts)


@cache
def learned(folder, case):
    """What `trained` gives, once for all tests, which leave it as it is."""
    return trained(folder, case)


def frozen(model):
    """Every parameter and buffer that does not train, by its name without an adapter."""
    named = {
        f"{part}.{k}".replace(".base_layer", "").replace(".known.", "."): v
        for part, network in [*model.networks.items(), ("vae", model.vae)]
        for k, v in [*network.named_parameters(), *network.named_buffers()]
        if not v.requires_grad and "boft_P" not in k and "oft_R" not in k
    }
    return {k: v.detach().clone() for k, v in named.items()}


@cache
def images(folder, case, *, taught):
    """What the trained model of a case draws, or its bare base."""
    return drawn(learned(folder, case).model if taught else base(folder), case)


def drawn(model, case):
    for network in model.networks.values():
        network.eval()
    how = SamplingConfig("ddim", STEPS, 3.0, size=2 * SIDE)
    return sampling.sample_latents(model, [case.prompts()[1], "a red hat"], sampling.image_generators(3, [0, 1]), how).clone()


def predicted(model, prompts):
    for network in model.networks.values():
        network.eval()
    with torch.no_grad():
        return model.predict(NOISE, torch.tensor([40, 700]), model.encode_prompts(prompts))


def saved(folder, case, place):
    """A case's result in a folder, and its recipe."""
    model, recipe = learned(folder, case)[:2]
    methods.save(model, place, recipe)
    return recipe


def altered(path, change):
    """Rewrites a safetensors file with other tensors, under the same header."""
    with safe_open(path, "pt") as file:
        header = file.metadata()
    save_file({k: v.contiguous() for k, v in change(load_file(path)).items()}, path, metadata=header)
