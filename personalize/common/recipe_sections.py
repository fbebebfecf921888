"""The sections of a recipe: each setting written once, as a field with its unit and meaning."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from personalize.common.optimizers import OPTIMIZERS
from personalize.common.settings import Edges, setting

ADAPTERS = ("lora", "lokr", "loha", "oft", "boft")
# ours, then diffusers' schedulers: the tables are core.samplers.SAMPLERS and generation.diffusers_samplers.DIFFUSERS
SAMPLERS = ("dpm++2m", "ddim", "ddpm", "dpm++2m-karras", "euler", "euler-a", "heun", "unipc", "pndm", "lcm")
MOST_CHUNKS = 8
METHODS = ("full", *ADAPTERS, "textual-inversion", "custom-diffusion")


@dataclass(frozen=True)
class Prompt:
    """How every prompt is read: of photos, of class images, and of what is drawn."""

    chunks: int = setting(
        1, "chunks of 75 tokens (of the base's length less 2) that every prompt has: 2 and 3 are kohya's 150 and 225",
        least=1, most=MOST_CHUNKS,
    )  # fmt: skip
    weighting: str = setting(
        "", "compel: (hat:1.3) scales what the text encoder says of a word, where --weight scales the image's attention to it",
        choices=("", "compel"),
    )  # fmt: skip


@dataclass(frozen=True)
class Photos:
    """The subject's photos."""

    size: int = setting(0, "edge of the square a photo is cut to, px; 0: what the base trains at", least=0, most=8192)
    shape: str = setting(
        "square", "what a photo is cut to; buckets: the rectangle of at most that area that cuts least off it",
        choices=("square", "buckets"),
    )  # fmt: skip
    min_size: int = setting(0, "smallest edge a photo may have, px; 0: what it is cut to", least=0)
    crop: str = setting(
        "center", "where it is cut; subject: centred on the mask; random: anew each step",
        choices=("center", "subject", "random"),
    )  # fmt: skip
    flip: bool = setting(False, "mirror photos at random; harms subjects with text or asymmetry")
    hold_out: int = setting(1, "photos kept from training to judge by, where there are five or more", least=0)
    background: float = setting(
        1.0, "weight of the background in the loss, where photos carry alpha or a mask file; 1: masks are not used",
        least=0, most=1,
    )  # fmt: skip


@dataclass(frozen=True)
class Captions:
    """The photos' captions, as they are trained on."""

    add_token: bool = setting(True, "the token is put into a caption that does not say it; false: such a caption is refused")


@dataclass(frozen=True)
class Prior:
    """Class images drawn by the frozen base, for prior preservation."""

    kind: str = setting(
        "pictures", "what is preserved: class images, or without any the frozen base's predictions for the class prompt",
        choices=("pictures", "predictions"),
    )  # fmt: skip
    count: int = setting(100, "class images, or predictions; 0: no prior preservation", least=0, most=100_000)
    prompt: str = setting("a {class}", "prompt of the class images")
    negative: str = setting("", "negative prompt of the class images")
    steps: int = setting(0, "sampling steps; 0: the same as draw.steps", least=0, most=1000)
    guidance: float = setting(5.0, "guidance scale; 1: plain conditional", least=0)
    batch: int = setting(0, "images drawn at once; 0: chosen for the device", least=0, most=1024)


@dataclass(frozen=True)
class Train:
    """What is trained, and how."""

    methods: tuple[str, ...] = setting(("full",), "which parameters train; several compose", choices=METHODS)
    text_encoder: bool = setting(False, "train the text encoder too")
    prompt: str = setting("a {token} {class}", "prompt of the photos")
    caption_dropout: float = setting(
        0.0, "share of steps in which a photo is seen without its prompt; never class images", least=0, most=1
    )
    caption_shuffle: bool = setting(
        False, "the parts of a photo's prompt between commas in another order each pass; what says the token stays first"
    )
    steps: int = setting(800, "optimizer steps", least=1, most=100_000_000)
    batch: int = setting(1, "photos in a step", least=1, most=4096)
    prior_batch: int = setting(0, "class images in a step; 0: the same as batch", least=0, most=4096)
    prior_weight: float = setting(1.0, "weight of the class images' mean loss against the photos'", least=0)
    lr: float = setting(5e-6, "learning rate", least=0)
    text_lr: float = setting(0.0, "learning rate of the text encoder; 0: the same as lr", least=0)
    lr_schedule: str = setting(
        "constant", "schedule of lr after warm-up",
        choices=("constant", "cosine", "linear", "cosine-restarts", "polynomial"),
    )  # fmt: skip
    lr_cycles: int = setting(1, "cosine-restarts: how often the rate falls to 0", least=1, most=100_000)
    lr_power: float = setting(1.0, "polynomial: power of the share of steps that is left; it falls to 1e-7", least=0, most=100)
    warmup: int = setting(0, "steps over which the learning rate rises from 0", least=0)
    optimizer: str = setting(
        "adamw",
        "what turns gradients into steps; prodigy and lion8bit start from rates of their own",
        choices=tuple(OPTIMIZERS),
    )
    weight_decay: float = setting(1e-2, "decoupled weight decay", least=0)
    beta1: float = setting(0.9, "decay of the gradient mean, a step", least=0, most=0.999999)
    beta2: float = setting(0.999, "decay of the squared gradient mean, a step; of Lion's mean", least=0, most=0.999999)
    clip: float = setting(1.0, "largest joint norm of all gradients; 0: no clipping", least=0)
    engine: str = setting(
        "eager", "how a step runs; graph: recorded once and replayed, on CUDA (not yet tried on one); compiled: torch.compile",
        choices=("eager", "graph", "compiled"),
    )  # fmt: skip
    accumulate: int = setting(1, "parts a step's batch is computed in, to save memory", least=1, most=4096)
    masters: str = setting(
        "float32", "weights that full trains; split: bfloat16 and the 16 bits it lacks, exact, with adamw8bit a fifth less",
        choices=("float32", "split"),
    )  # fmt: skip
    gradient_checkpointing: bool = setting(False, "recompute activations: less memory, about a third slower")
    offload: bool = setting(
        False, "the U-Net's frozen blocks wait in the host's memory, each is fetched for its turn: SDXL adapters on 8 GB"
    )
    ema: float = setting(0.0, "decay of the EMA of the weights, a step; 0: none", least=0, most=0.999999)
    quantize: str = setting("", "the frozen base under adapters in 8 or 4 bits, by bitsandbytes", choices=("", "8bit", "4bit"))
    init_from: str = setting("", "adapter or embedding to go on from: a file, or a folder of diffusers or PEFT")
    cut_mix: float = setting(
        0.0,
        "share of the photos of a run of several subjects that show two side by side, so that words stay apart",
        least=0,
        most=1,
    )
    snr_gamma: float = setting(0.0, "gamma of the min-SNR loss weights, 5 is usual; 0: unweighted", least=0)
    timesteps: str = setting(
        "uniform", "density of the noise levels", choices=("uniform", "stratified", "low", "high", "mode", "logit-normal"),
    )  # fmt: skip
    noise_offset: float = setting(
        0.0, "offset noise: strength of a shift of each channel's noise as a whole, 0.1 is usual; 0: none", least=0, most=1
    )
    input_perturbation: float = setting(
        0.0, "noise added to the noise of the input alone, as a share of it, 0.1 is usual (Ning et al. 2301.11706); 0: none",
        least=0, most=1,
    )  # fmt: skip
    sample_every: int = setting(0, "steps between sample images; 0: none", least=0)
    held_out_every: int = setting(
        0, "steps between losses on fixed noise, of photos held out, of photos and of class images; 0: none", least=0
    )
    stop: str = setting(
        "", "dvar: end when the photos' loss on fixed noise hardly varies any more (Voronov et al. 2302.04841)",
        choices=("", "dvar"),
    )  # fmt: skip
    stop_window: int = setting(200, "steps in which it varies by less than 0.15 of its variance so far", least=1)
    checkpoint_every: int = setting(0, "steps between checkpoints that stay; 0: at the end only", least=0)
    checkpoint_minutes: float = setting(
        5.0, "minutes between checkpoints to go on from after a kill, the newest two of them until the run ends; 0: none",
        least=0, most=100_000,
    )  # fmt: skip
    keep: int = setting(2, "newest checkpoints kept, besides the best", least=1)
    trackers: tuple[str, ...] = setting((), "accelerate's trackers by name, such as tensorboard or wandb")


@dataclass(frozen=True)
class Lora:
    """Adapters: lora, lokr, loha, oft, boft."""

    rank: int = setting(4, "rank of the update", least=1, most=8192)
    alpha: float = setting(0.0, "the update is scaled by alpha / rank; 0: the same as rank", least=0)
    targets: tuple[str, ...] = setting(("to_q", "to_k", "to_v", "to_out.0"), "layers adapted, by the end of the name")
    conv: bool = setting(False, "adapt the convolutions of the U-Net's blocks too")
    dora: bool = setting(False, "lora: magnitude and direction apart (Liu et al. 2402.09353)")
    rslora: bool = setting(False, "lora: scale by alpha / sqrt(rank) (Kalajdzievski 2312.03732)")
    plus_ratio: float = setting(
        1.0, "lora: rate of B over that of A, which is train.lr; LoRA+ (Hayou et al. 2402.12354) has 16", least=0.01, most=1000
    )
    block: int = setting(4, "edge of the orthogonal blocks of oft and boft", least=2, most=8192)


@dataclass(frozen=True)
class Embedding:
    """The words that textual inversion and custom diffusion learn."""

    vectors: int = setting(1, "vectors of the token", least=1, most=64)
    init: str = setting("", "word the vectors start from; empty: the class word")
    lr: float = setting(0.0, "learning rate of the vectors; 0: the same as train.lr", least=0)


@dataclass(frozen=True)
class Distill:
    """Students, which draw in few steps what a run or a base draws in many: `personalize distill`."""

    method: str = setting(
        "progressive", "progressive: a step lands where the teacher's two do (2202.00512); lcm: consistency (2310.04378)",
        choices=("progressive", "lcm"),
    )  # fmt: skip
    steps: int = setting(2, "sampling steps of the student", least=1, most=50)
    teacher: int = setting(
        8, "progressive: DDIM steps of the first teacher, which are halved until they are the student's", least=2, most=256
    )  # fmt: skip
    updates: int = setting(400, "training steps of each student; progressive has one for each halving", least=1)
    batch: int = setting(8, "images of a training step", least=1, most=4096)
    lr: float = setting(0.0, "learning rate; 0: what the base's recipes have for the method", least=0)
    rank: int = setting(64, "of the student's LoRA, beside what the run has", least=1, most=8192)
    prompts: tuple[str, ...] = setting((), "prompt templates that it learns by; empty: the base's own")


@dataclass(frozen=True)
class SamplingConfig:
    """How an image is sampled from its prompt and noise."""

    sampler: str = setting("dpm++2m", "sampler of images and class images", choices=SAMPLERS)
    steps: int = setting(25, "sampling steps", least=1, most=1000)
    guidance: float = setting(5.0, "guidance scale; 1: plain conditional", least=0)
    rescale: float = setting(0.0, "share of guidance rescaling (Lin et al. 2023); 0: off", least=0, most=1)
    interval: tuple[float, ...] = setting((), "low, high t / T that guidance acts in; empty: all", least=0, most=1)
    negative: str = setting("", "negative prompt")
    size: Edges = setting(
        0, "edge of an image, px, or width x height such as 512x768; 0: what the base trains at", least=0, most=8192
    )
    count: int = setting(4, "images of a prompt", least=1, most=100_000)
    batch: int = setting(0, "images drawn at once; 0: chosen for the device", least=0, most=1024)
    like: float = setting(0.0, "scale at which generate and evaluate draw like the photos, by a classifier; 0: off", least=0)
    guide_clip: float = setting(0.0, "scale at which generate and evaluate draw towards the prompt by CLIP; 0: off", least=0)
    guide_image: str = setting("", "image that CLIP draws towards in place of the prompt, at scale 1 without draw.guide_clip")
    guide_every: int = setting(1, "CLIP guides each so-many-th evaluation of the network", least=1, most=1000)

    def decisive(self) -> dict[str, Any]:
        """What decides the images: all but their number, how many are drawn at once, and what `training.steering` records."""
        own = {k: v for k, v in dataclasses.asdict(self).items() if not k.startswith(("count", "like", "guide_"))}
        return own | {"batch": 0}


@dataclass(frozen=True)
class Evaluate:
    """What a trained subject is scored on."""

    protocol: str = setting(
        "", "prompts and counts: quick 8 × 2, standard DreamBench's 25 × 4, toyland 8 × 4; empty: by the base",
        choices=("", "quick", "standard", "toyland"),
    )  # fmt: skip
    prompts: tuple[str, ...] = setting((), "prompt templates; empty: the protocol's")
    count: int = setting(0, "images of a prompt; 0: the protocol's", least=0, most=100_000)
    class_count: int = setting(-1, "images of the class prompt, for drift of the prior; 0: none; -1: the protocol's", least=-1)
    dino: str = setting("", "identity encoder: a ViT's folder or hub id; empty: the base's own, or DINO ViT-S/16")
    clip: str = setting("", "CLIP encoder: a folder or hub id; empty: the base's own, or CLIP ViT-B/32")
    lpips: str = setting("", "LPIPS weights, a .safetensors file; empty: DIV is the patch distance")


@dataclass(frozen=True)
class Choose:
    """Scoring checkpoints on a dev split while training, and keeping the best of those within limits."""

    every: int = setting(0, "steps between scored checkpoints; 0: none is scored, and the last is the result", least=0)
    prompts: tuple[str, ...] = setting((), "prompt templates; empty: 8 that no protocol has")
    count: int = setting(2, "images of a prompt", least=1, most=100_000)
    class_count: int = setting(4, "images of the class prompt; 0: its drift is not limited", least=0)
    steps: int = setting(0, "sampling steps; 0: the same as draw.steps", least=0, most=1000)
    obedience: float = setting(0.05, "largest share of the base's CLIP-T that may be lost", least=0)
    drift: float = setting(0.25, "largest share of the way to the photos that class images may move", least=0)
    copying: float = setting(0.25, "largest share of images nearer to a photo than photos are to each other", least=0)
    bleed: float = setting(
        1.0, "of several subjects: largest share of the way to another's photos that a subject's images may be", least=0
    )
    strengths: tuple[float, ...] = setting(
        (), "strengths besides 1 that the best checkpoint is scored at: an adapter's scale, or how far from the base",
        least=0.05, most=2,
    )  # fmt: skip
    patience: int = setting(
        3, "scored checkpoints without a gain in identity, with more drift, that end the run; 0: never", least=0
    )
