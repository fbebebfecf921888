"""`personalize generate`: pictures of prompts, by a run or by its bare base, and by LoRA and embedding files on top."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL.PngImagePlugin import PngInfo

from personalize.common import run_folder
from personalize.common.errors import UserError
from personalize.common.recipe import SamplingConfig
from personalize.common.terminal import SILENT, Terminal
from personalize.data.image_grid import grid
from personalize.generation import sampling
from personalize.models.interface import LatentModel

WEIGHT = re.compile(r"(.+):([+-]?(?:\d+(?:\.\d*)?|\.\d+))")


@dataclass(frozen=True)
class GenerateResult:
    """files: the pictures, prompt by prompt; grid: all of them on one picture, a prompt a row."""

    files: list[Path]
    grid: Path


def run(
    model: LatentModel,
    prompts: list[str],
    draw: SamplingConfig,
    *,
    seed: int,
    out: Path,
    origin: dict,
    screen: Terminal = SILENT,
) -> GenerateResult:
    """`draw.count` pictures of each prompt into `out`, with a row each in images.jsonl.

    origin: run, checkpoint, and what `put_files` gave. Picture i of a seed starts from the same noise for every prompt.
    """
    sampling.sampler_named(draw.sampler)
    if out.is_file():
        raise UserError(f"--out {out} is a file, and pictures go into a folder. Give another name.")
    for line in _remarks(model, prompts, origin):
        screen.say(line)
    jobs = [(prompt, i) for prompt in prompts for i in range(draw.count)]
    out.mkdir(parents=True, exist_ok=True)
    rows = run_folder.read_jsonl(out / "images.jsonl") if (out / "images.jsonl").exists() else []
    known = {row["file"]: row for row in rows}
    files, pictures = [], []
    with screen.progress("drawing", len(jobs), unit="pictures") as advance:
        for part in sampling.sampling_batches(model, len(jobs), draw):
            texts, numbers = zip(*(jobs[k] for k in part))
            z0 = sampling.sample_latents(model, list(texts), sampling.image_generators(seed, list(numbers)), draw)
            for picture, prompt, i in zip(sampling.to_pil(model.decode_latents(z0)), texts, numbers, strict=True):
                row = _row(model, draw, prompt, origin=origin, seed=seed, index=i, size=picture.size)
                files.append(out / row["file"])
                pictures.append(picture)
                with run_folder.writing(files[-1]) as temporary:
                    picture.save(temporary, pnginfo=_metadata(row))
                if known.get(row["file"]) != row:
                    run_folder.append_jsonl(out / "images.jsonl", row)
            advance(len(part))
    with run_folder.writing(out / "grid.png") as temporary:
        grid(pictures, draw.count if len(prompts) > 1 else min(4, draw.count)).save(temporary)
    return GenerateResult(files, out / "grid.png")


def put_files(model: LatentModel, *, loras: Sequence[str], embeddings: Sequence[str]) -> dict:
    """LoRAs as FILE or FILE:weight and embeddings as FILE or FILE:word into a model -> {} or their names, hashes and weights.

    UserError for one that is missing, damaged, a pickle, or made for another base.
    """
    if not (loras or embeddings):
        return {}
    from personalize.common.files import content_hash
    from personalize.methods import lora, textual_inversion

    said: dict[str, list[dict]] = {}
    for path, word in map(worded, embeddings):
        token = textual_inversion.load_embedding(model, path, word)
        said.setdefault("embeddings", []).append({"file": path.name, "sha256": content_hash(path), "token": token})
    for i, (path, weight) in enumerate(map(weighted, loras)):
        lora.load_adapter(model, path, name=f"file{i}", weight=weight)
        inside = path / "model" if (path / "model").is_dir() else path  # of a run, whose other files may change
        said.setdefault("loras", []).append({"file": path.name, "sha256": content_hash(inside), "weight": weight})
    return said


def weighted(text: str) -> tuple[Path, float]:
    """A LoRA as the terminal takes it: FILE, or FILE:weight where a number stands after the last colon."""
    found = WEIGHT.fullmatch(text)
    if not found or Path(text).exists():
        return Path(text), 1.0
    return Path(found[1]), float(found[2])


def worded(text: str) -> tuple[Path, str]:
    """An embedding as the terminal takes it: FILE, or FILE:word where what stands before the last colon is a file."""
    path, _, word = text.rpartition(":")
    if Path(text).exists() or not path or not Path(path).exists():
        return Path(text), ""
    return Path(path), word


def _remarks(model: LatentModel, prompts: list[str], origin: dict) -> Iterator[str]:
    for prompt in prompts:
        if rest := model.overlong(prompt):
            yield f"prompt {prompt!r} is too long for this base; it does not see: {rest!r}"
    for entry in origin.get("embeddings", []):
        if not any(entry["token"].lower() in prompt.lower() for prompt in prompts):
            yield f"no prompt says {entry['token']!r}, the word of {entry['file']}, which does nothing then."


def _row(
    model: LatentModel, how: SamplingConfig, prompt: str, *, origin: dict, seed: int, index: int, size: tuple[int, int]
) -> dict:
    """All that decides a picture, and its file, whose name changes with any of it but the place of the run."""
    settings = {
        "prompt": prompt, "negative": how.negative, "sampler": how.sampler, "steps": how.steps, "guidance": how.guidance,
        "rescale": how.rescale, "interval": list(how.interval), "seed": seed, "index": index,
        "width": size[0], "height": size[1], "base": model.name, "fingerprint": model.fingerprint,
    }  # fmt: skip
    key = run_folder.key_of(settings | origin | {"run": Path(origin["run"]).name})[:6]
    return origin | {"file": f"{run_folder.slug(prompt)[:60]}-{key}-{seed}-{index:03d}.png", **settings}


def _metadata(row: dict) -> PngInfo:
    """The text chunk `parameters`, as AUTOMATIC1111 writes and reads it."""
    lines = [row["prompt"]] + ([f"Negative prompt: {row['negative']}"] if row["negative"] else [])
    fields = {
        "Steps": row["steps"], "Sampler": row["sampler"], "CFG scale": f"{row['guidance']:g}", "Seed": row["seed"],
        "Size": f"{row['width']}x{row['height']}", "Model": row["base"], "Run": row["run"] or "none", "Image": row["index"],
    }  # fmt: skip
    loras, embeddings = row.get("loras", []), row.get("embeddings", [])
    if loras:
        fields["Lora hashes"] = _quoted(f"{_stem(entry)}: {entry['sha256'][:12]}" for entry in loras)
        fields["Lora weights"] = _quoted(f"{_stem(entry)}: {entry['weight']:g}" for entry in loras)
    if embeddings:
        fields["TI hashes"] = _quoted(f"{entry['token']}: {entry['sha256'][:12]}" for entry in embeddings)
    lines.append(", ".join(f"{key}: {value}" for key, value in fields.items()))
    info = PngInfo()
    info.add_text("parameters", "\n".join(lines))
    return info


def _stem(entry: dict) -> str:
    return Path(entry["file"]).stem


def _quoted(parts: Iterable[str]) -> str:
    """A value with commas and colons in it."""
    return json.dumps(", ".join(parts), ensure_ascii=False)
