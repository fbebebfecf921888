"""`personalize generate`: pictures of prompts, by a run or by its bare base."""

from dataclasses import dataclass
from pathlib import Path

from PIL.PngImagePlugin import PngInfo

from personalize import latent, rundir
from personalize.config import Draw
from personalize.models.base import LatentModel
from personalize.sheet import grid
from personalize.terminal import SILENT, Terminal


@dataclass(frozen=True)
class GenerateResult:
    """files: the pictures, prompt by prompt; grid: all of them on one picture, a prompt a row."""

    files: list[Path]
    grid: Path


def run(
    model: LatentModel, prompts: list[str], draw: Draw, *, seed: int, out: Path, origin: dict, screen: Terminal = SILENT
) -> GenerateResult:
    """`draw.count` pictures of each prompt into `out`, with a row each in images.jsonl. `origin`: run and checkpoint.

    Picture i of a seed starts from the same noise for every prompt.
    """
    how = latent.Drawing(
        draw.sampler, draw.steps, draw.guidance, draw.rescale, draw.interval, draw.negative, draw.size, draw.batch
    )
    latent.sampler_named(how.sampler)
    for prompt in prompts:
        if rest := model.overlong(prompt):
            screen.say(f"prompt {prompt!r} is too long for this base; it does not see: {rest!r}")
    jobs = [(prompt, i) for prompt in prompts for i in range(draw.count)]
    out.mkdir(parents=True, exist_ok=True)
    rows = rundir.read_jsonl(out / "images.jsonl") if (out / "images.jsonl").exists() else []
    known = {row["file"]: row for row in rows}
    files, pictures = [], []
    with screen.progress("drawing", len(jobs), unit="pictures") as advance:
        for part in latent.batches(model, len(jobs), how):
            texts, numbers = zip(*(jobs[k] for k in part))
            z0 = latent.draw(model, list(texts), latent.image_generators(seed, list(numbers)), how)
            for picture, prompt, i in zip(latent.to_pil(model.decode_latents(z0)), texts, numbers, strict=True):
                row = _row(model, how, prompt, origin=origin, seed=seed, index=i, size=picture.size)
                files.append(out / row["file"])
                pictures.append(picture)
                with rundir.writing(files[-1]) as temporary:
                    picture.save(temporary, pnginfo=_metadata(row))
                if known.get(row["file"]) != row:
                    rundir.append_jsonl(out / "images.jsonl", row)
            advance(len(part))
    with rundir.writing(out / "grid.png") as temporary:
        grid(pictures, draw.count if len(prompts) > 1 else min(4, draw.count)).save(temporary)
    return GenerateResult(files, out / "grid.png")


def _row(
    model: LatentModel, how: latent.Drawing, prompt: str, *, origin: dict, seed: int, index: int, size: tuple[int, int]
) -> dict:
    """All that decides a picture, and its file, whose name changes with any of it but the place of the run."""
    settings = {
        "prompt": prompt, "negative": how.negative, "sampler": how.sampler, "steps": how.steps, "guidance": how.guidance,
        "rescale": how.rescale, "interval": list(how.interval), "seed": seed, "index": index,
        "width": size[0], "height": size[1], "base": model.name, "fingerprint": model.fingerprint,
    }  # fmt: skip
    key = rundir.key_of(settings | origin | {"run": Path(origin["run"]).name})[:6]
    return origin | {"file": f"{rundir.slug(prompt)[:60]}-{key}-{seed}-{index:03d}.png", **settings}


def _metadata(row: dict) -> PngInfo:
    """The text chunk `parameters`, as AUTOMATIC1111 writes and reads it."""
    lines = [row["prompt"]] + ([f"Negative prompt: {row['negative']}"] if row["negative"] else [])
    lines.append(
        f"Steps: {row['steps']}, Sampler: {row['sampler']}, CFG scale: {row['guidance']:g}, Seed: {row['seed']}, "
        f"Size: {row['width']}x{row['height']}, Model: {row['base']}, Run: {row['run'] or 'none'}, Image: {row['index']}"
    )
    info = PngInfo()
    info.add_text("parameters", "\n".join(lines))
    return info
