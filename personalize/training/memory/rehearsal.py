"""A rehearsal of a training run, phase by phase in the order of `commands.train`: on fake tensors, what a device needs."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from personalize import methods, models
from personalize.common.image_size import Size, as_size
from personalize.common.recipe import Recipe, needs_class_images
from personalize.common.tensor_file import on_host
from personalize.core.guidance import GUIDANCE
from personalize.data import inpainting_masks
from personalize.data.bucketed_set import BucketedSet, build_data
from personalize.data.class_images import class_image_dtype
from personalize.data.subjects import Subject
from personalize.data.training_set import TrainingSet
from personalize.evaluation import encoders
from personalize.evaluation.protocols import dev_templates
from personalize.generation import sampling
from personalize.methods import quantization
from personalize.models import devices
from personalize.models.interface import LatentModel
from personalize.training import validation
from personalize.training.engine import Engine
from personalize.training.manifest import run_class_sets
from personalize.training.memory import fake_networks
from personalize.training.memory.counter import Counter, MemoryEstimate, estimate_memory
from personalize.training.run import checkpoint_parts


@dataclass
class Rehearsal:
    """The phases of a run as functions; each leaves its results for the next. Outside `counting` they are real."""

    recipe: Recipe
    subjects: list[Subject]
    make_network: Callable | None = None  # None: the networks' own weights are loaded
    quantize: Callable[[torch.nn.Module, str], None] = quantization.quantize
    make_encoder: Callable | None = None  # of those that score; None as above
    encode_masked: Callable = inpainting_masks.encode_versions
    model: LatentModel = field(init=False)
    groups: list[dict] = field(init=False)
    data: TrainingSet | BucketedSet = field(init=False)
    engine: Engine = field(init=False)
    ema: list[torch.Tensor] = field(default_factory=list)
    judges: encoders.Encoders | None = None

    def phases(self) -> dict[str, Callable[[Counter | None], None]]:
        """load; prior: sampling class images; base: scoring the base; attach; cache; first: a step that makes the optimizer's
        state; step; save: a checkpoint; sample; score: scoring a checkpoint.
        """
        steps = {"load": self.load, "prior": self.prior, "base": self.score, "attach": self.attach, "cache": self.cache}
        steps |= {"first": self.step, "step": self.step, "save": self.save, "sample": self.sample, "score": self.score}
        if not needs_class_images(self.recipe):
            del steps["prior"]
        if not self.recipe.train.sample_every:
            del steps["sample"]
        if not self.recipe.choose.every:
            del steps["base"], steps["score"]
        return steps

    def load(self, counter: Counter | None) -> None:
        r = self.recipe
        self.model = models.load_model(
            r.base, device=r.device, dtype=r.dtype, vae=r.vae, prediction=r.prediction, base_vae=r.base_vae,
            zero_snr=r.zero_snr, offload=r.train.offload, chunks=r.prompt.chunks, weighting=r.prompt.weighting,
            say=lambda line: None, make_network=self.make_network,
        )  # fmt: skip
        for p in self.model.waiting if counter is not None else ():  # counted on a CPU only, whose memory is the host's
            counter.rename(p, "waiting")

    def prior(self, counter: Counter | None) -> None:
        with self.model.computing_in(class_image_dtype(self.model, self.recipe)):
            self._sample(self.recipe.prior.count, self._size(), self.recipe.prior.batch)

    def attach(self, counter: Counter | None) -> None:
        self.groups = methods.attach(self.model, self.recipe, quantize=self.quantize)

    def cache(self, counter: Counter | None) -> None:
        """Encodes the photos, and decodes one as `preflight.representable` does."""
        text_trains = any(group["name"] != "unet" for group in self.groups)
        priors = {}
        sets = run_class_sets(self.model, self.recipe, self.subjects)
        if needs_class_images(self.recipe):
            priors = {name: torch.zeros(one.count, *sampling.latent_shape(self.model, one.size)) for name, one in sets.items()}
        self.data = build_data(
            self.model, self.recipe, self.subjects, priors=priors, text_trains=text_trains, encode=self.encode_masked,
            class_pixels=lambda name, i: torch.zeros(1, 3, *sets[name].size[::-1]),
        )  # fmt: skip
        self.model.decode_latents(torch.zeros(1, *self.data.at(self.data.largest_step).z0.shape[1:]))
        eager = replace(self.recipe.train, engine="eager")  # fakes cannot be captured, and a graph holds the same tensors
        self.engine = Engine(self.model, replace(self.recipe, train=eager), self.groups)
        if counter is not None:
            counter.watch(self.engine.optimizer, self.engine.params)
        self.data.release()
        if self.recipe.train.ema:
            self.ema = [p.detach().clone() for p in self.engine.params]

    def step(self, counter: Counter | None) -> None:
        self.engine.step(self.data.at(self.data.largest_step), scale=1.0)

    def save(self, counter: Counter | None) -> None:
        for tensors in checkpoint_parts(self.engine, self.ema).values():
            for tensor in tensors.values():
                on_host(tensor)

    def sample(self, counter: Counter | None) -> None:
        self._sample(validation.SAMPLES, self.recipe.draw.size or self.model.size, validation.SAMPLES)
        self.data.release()

    def score(self, counter: Counter | None) -> None:
        """Draws the dev split's images and shows them to the encoders, which are on the device from the first time on."""
        choose, evaluate, size = self.recipe.choose, self.recipe.evaluate, self.recipe.draw.size or self.model.size
        if self.judges is None:
            make = encoders.load_encoders.__wrapped__ if self.make_encoder else encoders.load_encoders
            options = {"dino": evaluate.dino, "clip": evaluate.clip, "make_network": self.make_encoder}
            self.judges = make(self.model.folder, self.model.device, **options)
        count = len(dev_templates(choose.prompts, self.model.has_world)) * choose.count + choose.class_count
        self._sample(count, size, self.recipe.draw.batch)
        images = torch.zeros(min(encoders.BATCH, count), 3, *as_size(size)[::-1])
        self.judges.dino(images), self.judges.clip_image(images)
        if hasattr(self, "data"):
            self.data.release()

    def _size(self) -> int:
        return self.recipe.photos.size or self.model.size

    @torch.inference_mode()
    def _sample(self, count: int, size: int | str | Size, batch: int) -> None:
        """Takes the memory of sampling `count` images, `batch` (0: the device's) at once: one guided pass, then the VAE."""
        count = min(count, batch or sampling.default_batch_size(self.model, size))
        z = torch.zeros(count, *sampling.latent_shape(self.model, size), device=self.model.device)
        cond = sampling.encode_texts(self.model, ["a"] * count)
        guided = GUIDANCE["cfg"](self.model.predict, cond, cond, 5.0)
        with torch.autocast(z.device.type, self.model.dtype, enabled=self.model.dtype != torch.float32):
            guided(z, 1)
        self.model.decode_latents(z)


def rehearse(recipe: Recipe, subjects: list[Subject]) -> MemoryEstimate:
    """The memory estimate of a run of the recipe on these photos. UserError as from the run itself."""
    return faked(recipe, subjects)[1]


def faked(recipe: Recipe, subjects: list[Subject]) -> tuple[Rehearsal, MemoryEstimate]:
    """As `rehearse`, with the rehearsal, whose tensors have sizes but no values."""
    methods.check_offload(recipe)
    device = devices.choose_device(recipe.device).type
    # a single file is unpacked here, with real tensors
    own = {"prediction": recipe.prediction, "base_vae": recipe.base_vae, "zero_snr": recipe.zero_snr}
    models.locate_base(recipe.base, lambda line: None, **own)
    run = Rehearsal(recipe, subjects, make_network=fake_networks.fake_network, quantize=fake_networks.fake_quantize)
    run.make_encoder, run.encode_masked = fake_networks.fake_encoder, fake_networks.fake_versions
    return run, estimate_memory(run.phases(), device=device)
