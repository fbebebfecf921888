"""The techniques of the league: settings on top of the shipped recipe, and what is no setting as a patch of it."""

import statistics
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from unittest import mock

import torch
from torch import nn

from personalize import methods, models
from personalize.common.bases import TOYLAND
from personalize.core import guidance
from personalize.data import class_images, training_set
from personalize.generation import sampling
from personalize.models import fast_unet
from personalize.models.latent_diffusion import LatentDiffusion
from personalize.toyland.world import scenes
from personalize.training import engine

REFERENCE = "full"
VARIED = scenes.HELD_OUT + 7_700_000  # the first seed of scenes for varied class images


@dataclass(frozen=True)
class Technique:
    """Settings on top of the shipped recipe; captions: of the photos; patch: a context in which it trains and draws."""

    settings: tuple[str, ...] = ()
    captions: bool = False
    patch: Callable = nullcontext
    drawn_from: str = ""  # the technique whose runs it draws from, where it trains nothing itself
    costs_as: str = ""  # the technique whose step computes just as much
    image_scale: float | None = None  # of the photos beside the prompt, where nothing is trained at all


def pull_to_base(share: float) -> Callable:
    """After each step every weight goes `share` of the way back to where it began (L2 pull, decoupled)."""

    def patch():
        step = engine.Engine.step

        def pulled(self, batch, *, scale):
            if not hasattr(self, "began"):
                self.began = [p.detach().clone() for p in self.params]
            values = step(self, batch, scale=scale)
            with torch.no_grad():
                torch._foreach_lerp_(self.params, self.began, share)
            return values

        return mock.patch.object(engine.Engine, "step", pulled)

    return patch


@contextmanager
def varied_class_images():
    """Class images of 100 prompts as Toyland's captions are, and each trains with its own."""
    build = training_set.build_training_set

    def prompt(i: int, word: str) -> str:
        scene = scenes.sample_scene(VARIED + i)
        place, action = scenes.PLACES[scene.place], scenes.ACTIONS[scene.action]
        worn = scene.accessory and scenes.accessory_words(scene.accessory)
        return " ".join(part for part in (scenes.with_article(word), worn, action, place) if part)

    def draw_part(model, folder, part, *, wanted, config):
        word = wanted["prompt"].removeprefix("a ")
        sample = sampling.sample_latents

        def of_its_prompt(model, prompts, generators, config):
            return sample(model, [prompt(i, word) for i in part], generators, config)

        with mock.patch.object(sampling, "sample_latents", of_its_prompt):
            own(model, folder, part, wanted=wanted, config=config)

    def with_prompts(model, recipe, subjects, **options):
        data = build(model, recipe, subjects, **options)
        data.prior.texts = [len(data.prompts) + i for i in range(len(data.prior.z0))]
        data.prompts += [prompt(i, subjects[0].class_word) for i in range(len(data.prior.z0))]
        return data

    own = class_images._draw_part
    with (
        mock.patch.object(class_images, "_draw_part", draw_part),
        mock.patch("personalize.data.bucketed_set.build_training_set", with_prompts),
    ):
        yield


def stops_by_dvar(steps: int = 50, share: float = 0.15) -> Callable:
    """DVAR (Voronov et al. 2302.04841): it trains no further once the loss of one fixed batch, over the last `steps`, varies
    by less than `share` of its variance so far."""

    def patch():
        step = engine.Engine.step

        def watched(self, batch, *, scale):
            if not hasattr(self, "fixed"):
                self.fixed, self.losses, self.last = batch, [], None
            if self.last is None or len(self.losses) < 2 * steps or not self.over:
                self.last = step(self, batch, scale=scale)
                with torch.no_grad():
                    self.losses.append(self._losses(self.fixed, slice(None), self.fixed.is_prior)[0].item())
                recent = statistics.pvariance(self.losses[-steps:])
                self.over = len(self.losses) >= 2 * steps and recent < share * statistics.pvariance(self.losses)
            return self.last

        return mock.patch.object(engine.Engine, "step", watched)

    return patch


def steered(share: float) -> Callable:
    """Guidance away from predictions without a prompt that are the base's by `share` (2508.00319)."""

    @contextmanager
    def patch():
        base = models.load_model(str(TOYLAND), device="cpu", dtype="float32")

        def cfg(predict, cond, uncond, scale, **options):
            if uncond is None:
                return guidance.cfg(predict, cond, uncond, scale, **options)
            empty = sampling.encode_texts(base, [""] * len(next(iter(cond.values()))), draws=True)

            def both(z, t, cond):
                u, c = predict(z, t, cond).chunk(2)
                return torch.cat([torch.lerp(u, base.predict(z, t, empty), share), c])

            return guidance.cfg(both, cond, uncond, scale, **options)

        with mock.patch.dict(guidance.GUIDANCE, {"cfg": cfg}):
            yield

    return patch


@contextmanager
def masked_rank():
    """T-LoRA (Soboleva et al. 2507.05964): at timestep t 1 + (r - 1)(T - t)/T ranks of the U-Net's LoRA act."""
    predict, attach = LatentDiffusion.predict, methods.attach
    now = []

    def of_timestep(self, z, t, cond):
        now[:] = [fast_unet.repeated(t, len(cond["text"])), self.schedule.T]
        return predict(self, z, t, cond)

    def mask(module, inputs, out):
        t, T = now[0][: len(out)], now[1]  # both halves of guidance have one t, and are one until the text enters
        rank = out.shape[-1] if isinstance(module, nn.Linear) else out.shape[1]
        kept = torch.arange(rank) <= ((rank - 1) * (T - t.float()) / T)[:, None]
        return out * (kept[:, None] if out.ndim == 3 else kept if out.ndim == 2 else kept[:, :, None, None])

    def with_masks(model, recipe, **options):
        groups = attach(model, recipe, **options)
        for name, module in model.unet.named_modules():
            if name.endswith("lora_A.default") or ".lora_A." in name:
                nn.init.orthogonal_(module.weight.flatten(1))
                module.register_forward_hook(mask)
        return groups

    with (
        mock.patch.object(LatentDiffusion, "predict", of_timestep),
        mock.patch.object(methods, "attach", with_masks),
        mock.patch.object(fast_unet, "_is_lora", lambda layer, x: False),  # by PEFT's own call, which runs the masks
    ):
        yield


TEXT, THREE = "train.text_encoder=true", ("train.batch=3", "train.prior_batch=1")
DRAW = ("draw.sampler=ddpm", "draw.guidance=2.2", "draw.steps=25")
LORA = ("train.methods=lora", "lora.rank=32", "lora.conv=true", TEXT, "train.lr=1e-3", *THREE, "train.snr_gamma=0", *DRAW)
WORD = (*THREE, "train.snr_gamma=0", *DRAW)
CUSTOM = (*WORD, "train.methods=custom-diffusion")
INVERSION = ("train.methods=textual-inversion", "train.batch=4", "prior.count=0")
TECHNIQUES = {
    REFERENCE: Technique(),
    "no prior": Technique(("prior.count=0", "train.batch=4"), costs_as=REFERENCE),
    "base's predictions": Technique(("prior.kind=predictions",)),
    "varied class images": Technique(patch=varied_class_images, costs_as=REFERENCE),
    "pull to base": Technique(("prior.count=0", "train.batch=4"), patch=pull_to_base(5e-3)),
    "captions": Technique(captions=True, costs_as=REFERENCE),
    "min-SNR": Technique(("train.snr_gamma=5",), costs_as=REFERENCE),
    "high t": Technique(("train.timesteps=high",), costs_as=REFERENCE),
    "low t": Technique(("train.timesteps=low",), costs_as=REFERENCE),
    "mode t": Technique(("train.timesteps=mode",), costs_as=REFERENCE),
    "logit-normal t": Technique(("train.timesteps=logit-normal",), costs_as=REFERENCE),
    "stratified t": Technique(("train.timesteps=stratified",), costs_as=REFERENCE),
    "DVAR's stop": Technique(patch=stops_by_dvar()),
    "photos as a prompt, 0": Technique(image_scale=0.0),
    "photos as a prompt, 0.5": Technique(image_scale=0.5),
    "photos as a prompt, 0.7": Technique(image_scale=0.7),
    "photos as a prompt, 1": Technique(image_scale=1.0),
    "guidance half steered": Technique(patch=steered(0.5), drawn_from=REFERENCE),
    "guidance steered": Technique(patch=steered(1.0), drawn_from=REFERENCE),
    "EMA": Technique(("train.ema=0.98",)),
    "cosine": Technique(("train.lr_schedule=cosine", "train.lr=3e-4"), costs_as=REFERENCE),
    "lr 3e-4": Technique(("train.lr=3e-4",), costs_as=REFERENCE),
    "text rate halved": Technique(("train.text_lr=1e-4",), costs_as=REFERENCE),
    "text encoder frozen": Technique(("train.text_encoder=false",)),
    "lora": Technique(LORA),
    "lora, linear layers only": Technique((*LORA, "lora.conv=false")),
    "lora, rank 8": Technique((*LORA, "lora.rank=8")),
    "lora, rank 64": Technique((*LORA, "lora.rank=64")),
    "lora, alpha 4 × rank": Technique((*LORA, "lora.alpha=128"), costs_as="lora"),
    "lora, rsLoRA": Technique((*LORA, "lora.rslora=true"), costs_as="lora"),
    "lora, text encoder frozen": Technique((*LORA, "train.text_encoder=false")),
    "lora, text encoder at 3e-4": Technique((*LORA, "train.text_lr=3e-4"), costs_as="lora"),
    "lora, text encoder at 1e-4": Technique((*LORA, "train.text_lr=1e-4"), costs_as="lora"),
    "lora, lr 2e-3": Technique((*LORA, "train.lr=2e-3"), costs_as="lora"),
    "T-LoRA": Technique(LORA, patch=masked_rank),
    "DoRA": Technique((*LORA, "lora.dora=true")),
    "lokr": Technique((*LORA, "train.methods=lokr")),
    "lokr, lr 4e-3": Technique((*LORA, "train.methods=lokr", "train.lr=4e-3")),
    "loha": Technique((*LORA, "train.methods=loha")),
    "custom diffusion": Technique((*CUSTOM, "train.lr=3e-4", "embedding.lr=2e-3")),
    "custom diffusion, lr 2e-3": Technique((*CUSTOM, "train.lr=2e-3", "embedding.lr=2e-3")),
    "pivotal": Technique((*LORA, "train.methods=textual-inversion,lora", "embedding.vectors=2", "embedding.lr=2e-3")),
    "inversion, 4 vectors, 5e-4": Technique((*WORD, *INVERSION, "embedding.vectors=4", "train.lr=5e-4")),
    "inversion, 4 vectors, 2e-3": Technique((*WORD, *INVERSION, "embedding.vectors=4", "train.lr=2e-3")),
    "inversion, 4 vectors, 1e-2": Technique((*WORD, *INVERSION, "embedding.vectors=4", "train.lr=1e-2")),
    "inversion, 1 vector, 5e-3": Technique((*WORD, *INVERSION, "embedding.vectors=1", "train.lr=5e-3")),
    "inversion, 4 vectors, 3e-2": Technique((*WORD, *INVERSION, "embedding.vectors=4", "train.lr=3e-2")),
    "inversion, 8 vectors, 2e-2": Technique((*WORD, *INVERSION, "embedding.vectors=8", "train.lr=2e-2")),
    "custom diffusion, lr 2e-3, words 1e-2": Technique((*CUSTOM, "train.lr=2e-3", "embedding.lr=1e-2")),
    "inversion, 8 vectors, 5e-3": Technique((*WORD, *INVERSION, "embedding.vectors=8", "train.lr=5e-3")),
}  # fmt: skip
