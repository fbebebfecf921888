"""A rehearsal of a training run, phase by phase in the order of `commands.train`: on fake tensors, what a device needs."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from personalize import methods, models
from personalize.common.recipe import Recipe, needs_class_images
from personalize.core.guidance import GUIDANCE
from personalize.data import training_set
from personalize.data.subjects import Subject
from personalize.generation import sampling
from personalize.methods import quantization
from personalize.models import devices
from personalize.models.interface import LatentModel
from personalize.training.engine import Engine
from personalize.training.memory import fake_networks
from personalize.training.memory.counter import Counter, MemoryEstimate, estimate_memory


@dataclass
class Rehearsal:
    """The phases of a run as functions; each leaves its results for the next. Outside `counting` they are real."""

    recipe: Recipe
    subjects: list[Subject]
    make_network: Callable | None = None  # None: the networks' own weights are loaded
    quantize: Callable[[torch.nn.Module, str], None] = quantization.quantize
    model: LatentModel = field(init=False)
    groups: list[dict] = field(init=False)
    data: training_set.TrainingSet = field(init=False)
    engine: Engine = field(init=False)
    ema: list[torch.Tensor] = field(default_factory=list)

    def phases(self) -> dict[str, Callable[[Counter | None], None]]:
        """load; prior: sampling class images; attach; cache; first: a step that makes the optimizer's state; step; sample."""
        steps = {"load": self.load, "prior": self.prior, "attach": self.attach, "cache": self.cache}
        steps |= {"first": self.step, "step": self.step, "sample": self.sample}
        if not needs_class_images(self.recipe):
            del steps["prior"]
        if not self.recipe.train.sample_every:
            del steps["sample"]
        return steps

    def load(self, counter: Counter | None) -> None:
        r = self.recipe
        self.model = models.load_model(
            r.base, device=r.device, dtype=r.dtype, vae=r.vae, prediction=r.prediction, base_vae=r.base_vae,
            say=lambda line: None, make_network=self.make_network,
        )  # fmt: skip

    def prior(self, counter: Counter | None) -> None:
        size = self.recipe.draw.size or self.model.size
        count = self.recipe.prior.batch or sampling.default_batch_size(self.model, size)
        self._sample(min(count, self.recipe.prior.count), size)

    def attach(self, counter: Counter | None) -> None:
        self.groups = methods.attach(self.model, self.recipe, quantize=self.quantize)

    def cache(self, counter: Counter | None) -> None:
        """Encodes the photos, and decodes one as `preflight.representable` does."""
        text_trains = any(group["name"] != "unet" for group in self.groups)
        priors = {}
        if needs_class_images(self.recipe):
            shape = self.recipe.prior.count, self.model.latent_channels, *(self._side(self._size()),) * 2
            priors = {subject.class_word: torch.zeros(shape) for subject in self.subjects}
        self.data = training_set.build_training_set(
            self.model, self.recipe, self.subjects, priors=priors, text_trains=text_trains
        )
        self.model.decode_latents(torch.zeros(1, *self.data.at(0).z0.shape[1:]))
        eager = replace(self.recipe.train, engine="eager")  # fakes cannot be captured, and a graph holds the same tensors
        self.engine = Engine(self.model, replace(self.recipe, train=eager), self.groups)
        if counter is not None:
            counter.watch(self.engine.optimizer, self.engine.params)
        self.data.release()
        if self.recipe.train.ema:
            self.ema = [p.detach().clone() for p in self.engine.params]

    def step(self, counter: Counter | None) -> None:
        self.engine.step(self.data.at(0), scale=1.0)

    def sample(self, counter: Counter | None) -> None:
        self._sample(8, self.recipe.draw.size or self.model.size)

    def _size(self) -> int:
        return self.recipe.photos.size or self.model.size

    def _side(self, size: int) -> int:
        return size // self.model.downscale

    @torch.inference_mode()
    def _sample(self, count: int, size: int) -> None:
        """Takes the memory of sampling `count` images at once: one guided evaluation, then all through the VAE."""
        z = torch.zeros(count, self.model.latent_channels, self._side(size), self._side(size), device=self.model.device)
        cond = sampling.encode_texts(self.model, ["a"] * count)
        guided = GUIDANCE["cfg"](self.model.predict, cond, cond, 5.0)
        with torch.autocast(z.device.type, self.model.dtype, enabled=self.model.dtype != torch.float32):
            guided(z, 1)
        self.model.decode_latents(z)


def rehearse(recipe: Recipe, subjects: list[Subject]) -> MemoryEstimate:
    """The memory estimate of a run of the recipe on these photos. UserError as from the run itself."""
    device = devices.choose_device(recipe.device).type
    # a single file is unpacked here, with real tensors
    models.locate_base(recipe.base, lambda line: None, prediction=recipe.prediction, base_vae=recipe.base_vae)
    run = Rehearsal(recipe, subjects, make_network=fake_networks.fake_network, quantize=fake_networks.fake_quantize)
    return estimate_memory(run.phases(), device=device)
