"""`personalize generate`: images of prompts, by a run or by its bare base, and by LoRA and embedding files on top."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL.PngImagePlugin import PngInfo

from personalize.commands.session import IMAGE_ROW, PRIORS, RUNS, open_base, open_run, resolve
from personalize.common.errors import UserError
from personalize.common.files import append_jsonl, explained, key_of, make_folder, read_jsonl, slug, sweep, writing
from personalize.common.prompts import fill
from personalize.common.recipe import Recipe
from personalize.common.terminal import SILENT, Terminal
from personalize.data.image_grid import grid
from personalize.generation.sampling import image_generators, require_images, sample_latents, sampling_batches, to_pil
from personalize.models.interface import LatentModel
from personalize.models.locate import public_name

A1111_SAMPLERS = {
    "dpm++2m": "DPM++ 2M", "dpm++2m-karras": "DPM++ 2M Karras", "ddim": "DDIM", "ddpm": "DDPM", "euler": "Euler",
    "euler-a": "Euler a", "heun": "Heun", "unipc": "UniPC", "pndm": "PLMS", "lcm": "LCM",
}  # fmt: skip
SYNTAX = re.compile(r"<lora:[^>]*>|\([^()]*:\s*[\d.]+\)|\bBREAK\b|\bAND\b")  # of other programs
# what draws, prompts, the run and checkpoint as images.jsonl names them, and the folder for images
Source = tuple[LatentModel, Recipe, list[str], dict, Path]
WEIGHT = re.compile(r"(.+):([+-]?(?:\d+(?:\.\d*)?|\.\d+))")


@dataclass(frozen=True)
class GenerateResult:
    """files: the images, prompt by prompt; grid: all of them as one image, a prompt a row."""

    files: list[Path]
    grid: Path


def generate(
    prompts: Sequence[str],
    *,
    run: Path | str | None = None,
    base: str = "",
    checkpoint: str = "",
    loras: Sequence[str] = (),
    embeddings: Sequence[str] = (),
    photos: Path | str = "",
    class_word: str = "",
    settings: Sequence[str] = (),
    runs: Path = RUNS,
    priors: Path = PRIORS,
    out: Path | None = None,
    screen: Terminal = SILENT,
) -> GenerateResult:
    """`draw.count` images of each prompt by a run (the newest finished one in `runs`), or by a bare base.

    {token} and {class} in a prompt are filled in with the run's. loras ("FILE" or "FILE:weight") and embeddings ("FILE" or
    "FILE:word") are files of any program, put on top. photos, class_word: whom draw.like draws a bare base to; priors: where
    its class images lie. out: a folder, where images.jsonl gets a row an image. Image i of a seed starts from the same noise
    for every prompt. UserError names what is wrong.
    """
    if (photos or class_word) and (run or not base):
        raise UserError("--photos and --class tell a bare base, --base, whom --like means. A run has photos of its own.")
    steered = {"photos": photos, "class_word": class_word, "settings": settings, "priors": Path(priors), "screen": screen}
    if base and not run:
        model, recipe, prompts, origin, home = _bare_base(list(prompts), base, settings, screen)
        steer = _steering(model, recipe, **steered)
    else:
        opened = open_run(run, runs=runs, base=base, settings=settings, screen=screen)
        steer = _steering(opened[1], opened[2], run=(opened[0], opened[3]), **steered)
        model, recipe, prompts, origin, home = _loaded_run(list(prompts), *opened, at=checkpoint, screen=screen)
    origin |= steer.record if steer else {}
    origin |= _put_files(model, loras=loras, embeddings=embeddings, screen=screen)
    folder = Path(out or home)
    if folder.is_file():
        raise UserError(f"--out {folder} is a file, and images go into a folder. Give another name.")
    for line in _remarks(model, prompts, recipe.draw.negative, origin):
        screen.say(line)
    return _write_images(model, recipe, prompts, out=folder, origin=origin, screen=screen, steer=steer)


def _bare_base(prompts: list[str], base: str, settings: Sequence[str], screen: Terminal) -> Source:
    if any("{" in prompt for prompt in prompts):
        raise UserError("{token} and {class} stand for a run's: name one with --run, or write the words out.")
    recipe = resolve(None, [*settings, f"base={base}"])
    return open_base(recipe, screen), recipe, prompts, {"run": "", "checkpoint": ""}, Path("images")


def _steering(
    model: LatentModel, recipe: Recipe, *, photos: Path | str, class_word: str, settings: Sequence[str], priors: Path, screen,
    run: tuple[Path, dict] | None = None,
):  # fmt: skip
    """What is drawn towards besides the prompt -> steering.Steering, or None. `model` is still the bare base.

    On a bare base photos are cut, and class images drawn, as `train` and `prior` do it, whatever is drawn then.
    """
    draw, subject, tokens = recipe.draw, None, [entry["token"] for entry in run[1]["subjects"]] if run else []
    if not run and not bool(draw.like) == bool(photos) == bool(photos or class_word):
        raise UserError("--like on a bare base needs --photos and --class, and they are for nothing else: give all, or none.")
    if not (draw.like or draw.guide_clip or draw.guide_image):
        return None
    from personalize.training import steering  # encoders and training with it

    if draw.like and run:
        subject = steering.of_run(*run)
    elif draw.like:
        own = [text for text in settings if not text.strip().startswith(("draw.", "seed"))]
        own = resolve(None, [*own, f"base={recipe.base}"])
        subject = steering.of_photos(photos, class_word, own, own.photos.size or model.size)
    return steering.prepare(model, recipe, subject, tokens=tokens, priors=priors, screen=screen)


def _loaded_run(
    prompts: list[str], folder: Path, model: LatentModel, recipe: Recipe, manifest: dict, *, at: str, screen: Terminal
) -> Source:
    from personalize.training import load_run  # methods with it, which a bare base does without

    name, subjects = load_run.load_run(model, folder, manifest, at=at), manifest["subjects"]
    token, word = subjects[0]["token"], subjects[0]["class"]
    prompts = [fill(prompt, token, word) for prompt in prompts]
    if not any(model.says(text, subject["token"]) for text in (*prompts, recipe.draw.negative) for subject in subjects):
        screen.say(f"no prompt says {token!r}, the word for the subject: these images show any {word}.")
    return model, recipe, prompts, {"run": str(folder), "checkpoint": name}, folder / "images"


def _write_images(
    model: LatentModel, recipe: Recipe, prompts: list[str], *, out: Path, origin: dict, screen: Terminal,
    steer=None,
) -> GenerateResult:  # fmt: skip
    config, seed = recipe.draw, recipe.seed
    jobs = [(prompt, i) for prompt in prompts for i in range(config.count)]
    with explained(out):
        make_folder(out)
    sweep(out)
    rows_by_file = {row["file"]: row for row in read_jsonl(out / "images.jsonl", IMAGE_ROW)}
    files, images = [], []
    with screen.progress("drawing", len(jobs), unit="images") as advance:
        for part in sampling_batches(model, len(jobs), config):
            texts, numbers = zip(*(jobs[k] for k in part))
            steered = steer and steer.of(texts)
            z0 = sample_latents(model, list(texts), image_generators(seed, list(numbers)), config, steer=steered)
            for image, prompt, i in zip(to_pil(require_images(model.decode_latents(z0), model)), texts, numbers, strict=True):
                row = _row(model, recipe, prompt, origin=origin, index=i, size=image.size)
                files.append(out / row["file"])
                images.append(image)
                with writing(files[-1]) as temporary:
                    image.save(temporary, pnginfo=_metadata(row))
                if rows_by_file.get(row["file"]) != row:
                    append_jsonl(out / "images.jsonl", row)
            advance(len(part))
    with writing(out / "grid.png") as temporary:
        grid(images, config.count if len(prompts) > 1 else min(4, config.count)).save(temporary)
    return GenerateResult(files, out / "grid.png")


def _put_files(model: LatentModel, *, loras: Sequence[str], embeddings: Sequence[str], screen: Terminal) -> dict:
    """LoRAs as FILE or FILE:weight and embeddings as FILE or FILE:word into a model -> {} or their names, hashes and weights.

    Embeddings that are in a LoRA's file are loaded too. UserError for one that is missing, damaged, a pickle, or made for
    another base.
    """
    if not (loras or embeddings):
        return {}
    from personalize.common.files import content_hash
    from personalize.methods import lora, textual_inversion

    entries: dict[str, list[dict]] = {}
    for path, word in map(_embedding_argument, embeddings):
        token = textual_inversion.load_embedding(model, path, word)
        entries.setdefault("embeddings", []).append({"file": path.name, "sha256": content_hash(path), "token": token})
    for path, _ in map(_lora_argument, loras):  # before any LoRA is in the text encoders
        for token, line in textual_inversion.load_bundled(model, path):
            screen.say(line)
            if token:
                entries.setdefault("embeddings", []).append({"file": path.name, "sha256": content_hash(path), "token": token})
    for i, (path, weight) in enumerate(map(_lora_argument, loras)):
        lora.load_adapter(model, path, name=f"file{i}", weight=weight)
        inside = path / "model" if (path / "model").is_dir() else path  # of a run, whose other files may change
        entries.setdefault("loras", []).append({"file": path.name, "sha256": content_hash(inside), "weight": weight})
    return entries


def _lora_argument(text: str) -> tuple[Path, float]:
    """A LoRA as the terminal takes it: FILE, or FILE:weight where a number stands after the last colon."""
    weighted = WEIGHT.fullmatch(text)
    if not weighted or Path(text).exists():
        return Path(text), 1.0
    return Path(weighted[1]), float(weighted[2])


def _embedding_argument(text: str) -> tuple[Path, str]:
    """An embedding as the terminal takes it: FILE, or FILE:word where what stands before the last colon is a file."""
    path, _, word = text.rpartition(":")
    if Path(text).exists() or not path or not Path(path).exists():
        return Path(text), ""
    return Path(path), word


def _remarks(model: LatentModel, prompts: list[str], negative: str, origin: dict) -> Iterator[str]:
    texts = {**{prompt: "prompt" for prompt in prompts}, **({negative: "the negative prompt"} if negative else {})}
    for text, what in texts.items():
        if rest := model.truncated_words(text):
            yield f"{what} {text!r} is too long for this base; it does not see: {rest!r}"
    if marks := [match[0] for text in texts for match in SYNTAX.finditer(text)]:
        yield f"{marks[0]!r} is read as letters: prompts have no weights or commands here. A LoRA is given by --lora FILE:0.8."
    loras = {entry["file"] for entry in origin.get("loras", [])}  # what is in them was told already
    for entry in origin.get("embeddings", []):
        if entry["file"] not in loras and not any(model.says(text, entry["token"]) for text in texts):
            yield f"no prompt says {entry['token']!r}, the word of {entry['file']}, which does nothing then."


def _row(model: LatentModel, recipe: Recipe, prompt: str, *, origin: dict, index: int, size: tuple[int, int]) -> dict:
    """All that decides an image, and its file, whose name changes with any of it but the place of the run."""
    config, (width, height) = asdict(recipe.draw), size
    settings = {"prompt": prompt} | {name: config[name] for name in ("negative", "sampler", "steps", "guidance", "rescale")}
    settings |= {"interval": list(recipe.draw.interval), "seed": recipe.seed, "index": index, "width": width, "height": height}
    settings |= {"base": model.name, "fingerprint": model.fingerprint}
    key = key_of(settings | origin | {"run": Path(origin["run"]).name})[:6]
    return origin | {"file": f"{slug(prompt)[:60]}-{key}-{recipe.seed}-{index:03d}.png", **settings}


def _metadata(row: dict) -> PngInfo:
    """The text chunk `parameters`, as AUTOMATIC1111 writes and reads it."""
    lines = [row["prompt"]] + ([f"Negative prompt: {row['negative']}"] if row["negative"] else [])
    fields = {
        "Steps": row["steps"],
        "Sampler": A1111_SAMPLERS[row["sampler"]],
        "CFG scale": f"{row['guidance']:g}",
        "Seed": row["seed"],
    }
    fields |= {"Size": f"{row['width']}x{row['height']}", "Model": _plain(public_name(row["base"]))}
    fields |= {"Run": _plain(Path(row["run"]).name or "none"), "Image": row["index"]}
    loras, embeddings = [(Path(e["file"]).stem, e) for e in row.get("loras", [])], row.get("embeddings", [])
    if loras:
        fields["Lora hashes"] = _quoted(f"{name}: {entry['sha256'][:12]}" for name, entry in loras)
        fields["Lora weights"] = _quoted(f"{name}: {entry['weight']:g}" for name, entry in loras)
    if embeddings:
        fields["TI hashes"] = _quoted(f"{entry['token']}: {entry['sha256'][:12]}" for entry in embeddings)
    fields |= _steering_fields(row)
    lines.append(", ".join(f"{key}: {value}" for key, value in fields.items()))
    info = PngInfo()
    info.add_text("parameters", "\n".join(lines))
    return info


def _steering_fields(row: dict) -> dict[str, str]:
    """What the image was drawn towards; "No score" names the metric that such an image is no score of any more."""
    fields = {"Like": f"{row['like']:g}"} if "like" in row else {}
    if "guide_clip" in row:
        image = row.get("guide_image")
        fields |= {"CLIP guidance": f"{row['guide_clip']:g}", "CLIP guidance every": str(row["guide_every"])}
        fields |= {"CLIP guidance image": image["sha256"][:12]} if image else {}
        fields["No score"] = "CLIP-I" if image else "CLIP-T"
    return fields


def _plain(text: str) -> str:
    """As it is, or quoted where commas or colons would end the value."""
    return json.dumps(text, ensure_ascii=False) if set(text) & set(',:"\n') else text


def _quoted(parts: Iterable[str]) -> str:
    """A value with commas and colons in it."""
    return json.dumps(", ".join(parts), ensure_ascii=False)
