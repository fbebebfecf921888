"""Estimated and measured peak memory of training runs on this CPU, above the memory after imports.

    python -m benchmarks.memory                the small cases
    python -m benchmarks.memory --all          full-size Stable Diffusion 1.5 too: 12 GB of memory, 4.5 GB of disk, minutes

Each run is a child process that loads a base, encodes, and takes two steps; its peak is the kernel's (VmHWM). Bases are
random. Linux only.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PHOTOS = Path(__file__).parents[1] / "data_examples" / "dog"
CASES = {  # name: (base, settings)
    "tiny, full": ("tiny", ["train.methods=full", "train.text_encoder=true"]),
    "Toyland, full and text encoder, 2 + 2": ("toyland", []),
    "Toyland, LoRA, 2 + 2": ("toyland", ["train.methods=lora"]),
    "SD1.5 512 px, LoRA": ("sd15", ["train.methods=lora"]),
    "SD1.5 512 px, LoRA, checkpointing": ("sd15", ["train.methods=lora", "train.gradient_checkpointing=true"]),
    "SD1.5 512 px, full, 8-bit AdamW, checkpointing": (
        "sd15", ["train.optimizer=adamw8bit", "train.gradient_checkpointing=true"],
    ),
    "SD1.5 512 px, full, 8-bit AdamW, checkpointing, bf16, split masters": (
        "sd15", ["train.optimizer=adamw8bit", "train.gradient_checkpointing=true", "dtype=bfloat16", "train.masters=split"],
    ),
}  # fmt: skip
CONFIGS = {
    "tiny": {
        "unet": {"sample_size": 16, "layers_per_block": 1, "block_out_channels": (16, 32), "norm_num_groups": 8,
                 "attention_head_dim": 4, "cross_attention_dim": 32,
                 "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
                 "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")},
        "vae": {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 32},
        "text": {"vocab_size": 1000, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                 "num_attention_heads": 2, "max_position_embeddings": 32},
    },
    "sd15": {
        "unet": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        "vae": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 512},
        "text": {"vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
                 "num_attention_heads": 12, "max_position_embeddings": 77, "hidden_act": "quick_gelu"},
    },
}  # fmt: skip


def base(kind: str, folder: Path) -> str:
    """The name of a base of random weights, made in `folder` unless it is there."""
    if kind == "toyland":
        return kind
    place = folder / kind
    if not (place / "model_index.json").exists():
        from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel

        from personalize.toyland.pretraining import networks, stages

        configs = CONFIGS[kind]
        words = networks.tokenizer(["a photo of a dog", "a cat in the snow", "a dog sks"] * 5)
        words.model_max_length = configs["text"]["max_position_embeddings"]
        ids = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
        blocks = len(configs["vae"]["block_out_channels"])
        types = {"down_block_types": ("DownEncoderBlock2D",) * blocks, "up_block_types": ("UpDecoderBlock2D",) * blocks}
        random_network(lambda: AutoencoderKL(latent_channels=4, **types, **configs["vae"])).save_pretrained(place / "vae")
        random_network(lambda: CLIPTextModel(CLIPTextConfig(**ids, **configs["text"]))).save_pretrained(place / "text_encoder")
        random_network(lambda: UNet2DConditionModel(**configs["unet"])).save_pretrained(place / "unet")
        words.save_pretrained(place / "tokenizer")
        stages.tokenizer_files(place / "tokenizer", words)
        PNDMScheduler(beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1).save_pretrained(place / "scheduler")
        (place / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    return str(place)


def random_network(make: Callable):
    """A network with small random weights, without the minutes that its own initialization takes."""
    import torch

    with torch.device("meta"):
        network = make()
    network = network.to_empty(device="cpu")
    some = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 0.02
    for name, p in network.named_parameters():
        if p.ndim == 1:
            torch.nn.init.constant_(p, float(name.endswith("weight")))
        else:
            p.data.copy_(some.repeat(-(-p.numel() // 4096))[: p.numel()].view(p.shape))
    for name, b in network.named_buffers():
        assert name.endswith("position_ids"), name
        b.copy_(torch.arange(b.shape[-1])[None])
    return network


def case(base: str, settings: list[str]):
    """The recipe of a case and its subject: two photos at the size of the base, four for small ones."""
    import personalize
    from personalize.data import photos
    from personalize.data.crops import Photo
    from personalize.data.subjects import Subject

    big = "sd15" in base
    common = [f"base={base}", "class_word=dog", "token=sks", "device=cpu", "dtype=float32"]
    recipe = personalize.resolve(None, [*common, *([] if base == "toyland" else ["prior.count=0"]), *settings])
    subject_photos = photos.load_photos(PHOTOS, min_size=64)[0][: 2 if big else 4]
    if big:
        subject_photos = [Photo(p.path, p.image.resize((512, 512)), p.sha256, p.caption, (512, 512)) for p in subject_photos]
    return recipe, [Subject("sks", "dog", subject_photos)]


def measure(base: str, settings: list[str]) -> dict[str, int]:
    """Bytes at most in each phase of a real run in this process: above those after imports, or of torch's on a GPU."""
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import torch

    from personalize.common import malloc
    from personalize.models import latent_diffusion, sd  # noqa: F401
    from personalize.training.memory.rehearsal import Rehearsal

    # Freed blocks of 2 MB and more leave the process at once. Otherwise glibc keeps them in pieces that rarely fit again,
    # and a run at full size holds 15 to 25 % more than its tensors.
    malloc.set_malloc({malloc.MMAP_THRESHOLD: 2 * malloc.MB, malloc.TRIM_THRESHOLD: 64 * malloc.MB})
    run = Rehearsal(*case(base, settings))
    on_gpu, before, peaks = run.recipe.device == "cuda", status("VmRSS"), {}
    for name, phase in run.phases().items():
        restart(on_gpu)
        start = time.monotonic()
        phase(None)
        peaks[name] = torch.cuda.max_memory_allocated() if on_gpu else status("VmHWM") - before
        print(f"  {name} {peaks[name] / 1e9:.2f} GB, {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
    return peaks


def restart(on_gpu: bool) -> None:
    """From here on the peak is a new one."""
    import torch

    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def status(field: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def child(task: str, base: str, settings: list[str]) -> dict[str, int]:
    """`what` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory", "--child", task, base, *settings]
    process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    return json.loads(process.stdout.splitlines()[-1])


def in_child(task: str, base: str, settings: list[str]) -> dict[str, int]:
    if task == "measure":
        peaks = measure(base, settings)
        return {**peaks, "peak": max(peaks.values())}
    from personalize.training.memory.rehearsal import rehearse

    counted = rehearse(*case(base, settings))
    return {**{name: phase.peak for name, phase in counted.phases.items()}, "peak": counted.peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--folder", type=Path, help="where bases are kept; else a temporary one")
    parser.add_argument("--only", default="", help="cases whose name has this")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        task, name, *settings = options.child
        print(json.dumps(in_child(task, name, settings)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        print("| run | estimated, GB | measured, GB | ratio |\n|---|---|---|---|")
        for name, (kind, settings) in CASES.items():
            if (options.all or kind != "sd15") and options.only in name:
                where = base(kind, options.folder or Path(temporary))
                estimated, measured = (child(task, where, settings)["peak"] for task in ("estimate", "measure"))
                print(f"| {name} | {estimated / 1e9:.2f} | {measured / 1e9:.2f} | {estimated / measured:.2f} |", flush=True)


if __name__ == "__main__":
    main()
