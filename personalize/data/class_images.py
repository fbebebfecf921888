"""A prior folder: class pictures drawn by the frozen base, as a `datasets` imagefolder, with their latents.

Picture i has its own seed, so any count goes on from what is there; a picture counts once its latents are written,
which happens after its file. The key is all that decides what the pictures look like.
"""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from personalize.common import distributed
from personalize.common.errors import UserError
from personalize.common.files import key_of, read_json, write_text, writing
from personalize.common.prompts import fill
from personalize.common.recipe import Recipe, SamplingConfig
from personalize.common.run_folder import library_versions, lock, read_manifest, write_manifest
from personalize.common.terminal import Terminal
from personalize.generation import sampling
from personalize.models.interface import LatentModel


def class_image_settings(model: LatentModel, recipe: Recipe, class_word: str) -> dict:
    """Everything that the pictures of a class depend on, but their number."""
    prior, draw = recipe.prior, recipe.draw
    return {
        "base": model.name,
        "fingerprint": model.fingerprint,
        "prompt": fill(prior.prompt, "", class_word),
        "negative": prior.negative,
        "sampler": draw.sampler,
        "steps": prior.steps or draw.steps,
        "guidance": prior.guidance,
        "size": recipe.photos.size or model.size,
        "dtype": str(model.dtype).removeprefix("torch."),
        "seed": recipe.seed,
    }


def folder_for(root: Path, wanted: dict) -> Path:
    return root / key_of({k: v for k, v in wanted.items() if k != "base"})


def check_folder(folder: Path, wanted: dict) -> None:
    """UserError, with the reason, where a prior folder holds other pictures than the wanted ones."""
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if "manifest.json" not in there:
        # A lock and temporary files are ours: of another process that begins, or of one that was killed.
        if foreign := sorted(n for n in there if not n.startswith((".tmp-", "lock"))):
            raise UserError(f"{folder} holds files that personalize did not make, {foreign[0]}. Give an empty or a new folder.")
        return
    found = read_manifest(folder).get("settings", {})
    differing = [k for k in wanted if k != "base" and found.get(k) != wanted[k]]
    if differing:
        what = "; ".join(f"{k} is {found.get(k)!r} there, {wanted[k]!r} here" for k in differing)
        raise UserError(f"the class pictures in {folder} do not fit this run: {what}. Give another folder, or none.")


def present_images(folder: Path) -> dict[int, Path]:
    """Picture number -> the latents file it is in, for pictures that are wholly there."""
    found = {}
    for part in sorted(folder.glob("latents-*.safetensors")):
        first, last = (int(n) for n in part.stem.removeprefix("latents-").split("-"))
        found |= {i: part for i in range(first, last + 1) if (folder / name(i)).exists()}
    return found


def name(i: int) -> str:
    return f"{i:05d}.png"


def generate_missing(model: LatentModel, folder: Path, wanted: dict, count: int, *, batch: int, progress: Callable) -> int:
    """Draw the pictures 0…count-1 that are missing; returns how many. Several processes share the work."""
    check_folder(folder, wanted)
    rank, world = distributed.rank(), distributed.world_size()
    how = SamplingConfig(
        wanted["sampler"],
        wanted["steps"],
        wanted["guidance"],
        negative=wanted["negative"],
        size=wanted["size"],
        batch=batch,
    )
    with lock(folder) if rank == 0 else nullcontext():
        there = present_images(folder)
        if not set(range(count)) <= there.keys():
            _write_manifest(folder, wanted, "running", len(there))
        todo = [[i for i in part if i not in there] for part in sampling.sampling_batches(model, count, how)]
        todo = [part for k, part in enumerate(todo) if k % world == rank and part]
        with progress("class pictures", count, done=count - sum(map(len, todo)), unit="pictures") as advance:
            for part in todo:
                _draw_part(model, folder, part, wanted=wanted, how=how)
                advance(len(part))
        _describe(folder, wanted, count)
    return sum(map(len, todo))


def complete_set(
    model: LatentModel, recipe: Recipe, class_word: str, *, root: Path, folder: Path | None, screen: Terminal
) -> tuple[Path, int]:
    """The `recipe.prior.count` class images in `folder`, or in the one of `root` that their key names -> (folder, drawn).

    Of several processes each calls it. UserError for an empty class word and for a folder of other images.
    """
    if not class_word:
        raise UserError("which class? Give one, as in: personalize prior dog")
    wanted = class_image_settings(model, recipe, class_word)
    folder = Path(folder) if folder else folder_for(root, wanted)
    drawn = generate_missing(model, folder, wanted, recipe.prior.count, batch=recipe.prior.batch, progress=screen.progress)
    if not drawn:
        screen.say(f"{recipe.prior.count} class images of {wanted['prompt']!r} are there already: {folder}")
    return folder, drawn


def class_latents(folder: Path, count: int) -> Tensor:
    """The first `count` pictures as latents (count,C,h,w) float32."""
    from safetensors.torch import load_file

    there = present_images(folder)
    missing = [i for i in range(count) if i not in there]
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing)} of {count} class pictures, such as {name(missing[0])}. Run: personalize prior."
        )
    loaded = {part: load_file(part) for part in set(there.values())}
    return torch.stack([loaded[there[i]][str(i)] for i in range(count)]).float()


def load_class_images(folder: Path, count: int) -> list:
    """The first `count` pictures, PIL RGB."""
    from PIL import Image

    return [Image.open(folder / name(i)).convert("RGB") for i in range(count)]


def _draw_part(model: LatentModel, folder: Path, part: list[int], *, wanted: dict, how: SamplingConfig) -> None:
    from safetensors.torch import save_file

    generators = sampling.image_generators(wanted["seed"], part, "prior")
    z0 = sampling.sample_latents(model, [wanted["prompt"]] * len(part), generators, how)
    if not z0.isfinite().all():
        raise UserError(f"{model.name!r} draws pictures that are not numbers in {model.dtype}. Use --dtype float32.")
    for i, picture in zip(part, sampling.to_pil(model.decode_latents(z0)), strict=True):
        with writing(folder / name(i)) as temporary:
            picture.save(temporary)
    for run in _consecutive(part):
        with writing(folder / f"latents-{run[0]:05d}-{run[-1]:05d}.safetensors") as temporary:
            save_file({str(i): z0[part.index(i)].cpu().contiguous() for i in run}, temporary)


def _consecutive(numbers: list[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return runs


def _describe(folder: Path, wanted: dict, count: int) -> None:
    """metadata.jsonl and manifest of what is there. Each process looks again after writing, so the last one is right."""
    written = None
    while (numbers := sorted(present_images(folder))) != written:
        rows = [{"file_name": name(i), "text": wanted["prompt"], "seed": wanted["seed"], "index": i} for i in numbers]
        text, path = "".join(json.dumps(row) + "\n" for row in rows), folder / "metadata.jsonl"
        if not path.exists() or path.read_text() != text:
            write_text(path, text)
        status = "finished" if set(range(count)) <= set(numbers) else "running"
        _write_manifest(folder, wanted, status, len(numbers))
        written = numbers


def _write_manifest(folder: Path, wanted: dict, status: str, count: int) -> None:
    manifest = {"kind": "prior", "status": status, "settings": wanted, "count": count, "versions": library_versions()}
    path = folder / "manifest.json"
    if not path.exists() or {k: v for k, v in read_json(path).items() if k != "schema"} != manifest:
        write_manifest(folder, manifest)
