"""`personalize generate`: images of prompts, by a run or by its bare base, and by LoRA and embedding files on top."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL.PngImagePlugin import PngInfo

from personalize.commands.session import IMAGE_ROW, RUNS, open_base, open_run, resolve
from personalize.common.errors import UserError
from personalize.common.files import append_jsonl, explained, key_of, make_folder, read_jsonl, slug, sweep, writing
from personalize.common.prompts import fill
from personalize.common.recipe import Recipe
from personalize.common.terminal import SILENT, Terminal
from personalize.data.image_grid import grid
from personalize.generation.sampling import image_generators, require_images, sample_latents, sampling_batches, to_pil
from personalize.generation.words import PLAIN, Emphasis, read_emphasis, require_words
from personalize.models.interface import LatentModel
from personalize.models.locate import public_name

A1111_SAMPLERS = {
    "dpm++2m": "DPM++ 2M", "dpm++2m-karras": "DPM++ 2M Karras", "ddim": "DDIM", "ddpm": "DDPM", "euler": "Euler",
    "euler-a": "Euler a", "heun": "Heun", "unipc": "UniPC", "pndm": "PLMS", "lcm": "LCM",
}  # fmt: skip
SYNTAX = re.compile(r"<lora:[^>]*>|\([^()]*:\s*[\d.]+\)|\bBREAK\b|\bAND\b")  # of other programs
# what draws, prompts, the run and checkpoint as images.jsonl names them, and the folder that folders of images belong into
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
    weights: Sequence[str] = (),
    ignore: Sequence[str] = (),
    settings: Sequence[str] = (),
    runs: Path = RUNS,
    out: Path | None = None,
    screen: Terminal = SILENT,
) -> GenerateResult:
    """`draw.count` images of each prompt by a run (the newest finished one in `runs`), or by a bare base.

    {token} and {class} in a prompt are filled in with the run's. loras ("FILE" or "FILE:weight") and embeddings ("FILE" or
    "FILE:word") are files of any program, put on top. weights ("hat=1.5") and ignore: words that count more or less, and words
    that do not count; each belongs to the prompts that say it. out: a folder, where images.jsonl gets a row an image. Image i
    of a seed starts from the same noise for every prompt. UserError names what is wrong.
    """
    emphasis, source = read_emphasis(weights, ignore), {"run": run, "base": base, "checkpoint": checkpoint, "loras": loras}
    model, recipe, prompts, origin, home = open_source(
        list(prompts), **source, embeddings=embeddings, settings=settings, runs=runs, screen=screen
    )
    require_words(model, prompts, emphasis)
    folder = out_folder(out or home / "images")
    for line in remarks(model, prompts, recipe.draw.negative, origin):
        screen.say(line)
    return _write_images(model, recipe, prompts, out=folder, origin=origin, emphasis=emphasis, screen=screen)


def open_source(
    prompts: list[str], *, run: Path | str | None, base: str, checkpoint: str, loras: Sequence[str], embeddings: Sequence[str],
    settings: Sequence[str], runs: Path, screen: Terminal,
) -> Source:  # fmt: skip
    """What draws: the base of a run with all that is put into it, its recipe, the prompts filled in, and where it belongs."""
    if base and not run:
        model, recipe, prompts, origin, home = _bare_base(prompts, base, settings, screen)
    else:
        opened = open_run(run, runs=runs, base=base, settings=settings, screen=screen)
        model, recipe, prompts, origin, home = _loaded_run(prompts, *opened, at=checkpoint, screen=screen)
    origin |= _put_files(model, loras=loras, embeddings=embeddings, screen=screen)
    return model, recipe, prompts, origin, home


def _bare_base(prompts: list[str], base: str, settings: Sequence[str], screen: Terminal) -> Source:
    if any("{" in prompt for prompt in prompts):
        raise UserError("{token} and {class} stand for a run's: name one with --run, or write the words out.")
    recipe = resolve(None, [*settings, f"base={base}"])
    return open_base(recipe, screen), recipe, prompts, {"run": "", "checkpoint": ""}, Path()


def _loaded_run(
    prompts: list[str], folder: Path, model: LatentModel, recipe: Recipe, manifest: dict, *, at: str, screen: Terminal
) -> Source:
    from personalize.training import load_run  # methods with it, which a bare base does without

    name, subjects = load_run.load_run(model, folder, manifest, at=at), manifest["subjects"]
    token, word = subjects[0]["token"], subjects[0]["class"]
    prompts = [fill(prompt, token, word) for prompt in prompts]
    if not any(model.says(text, subject["token"]) for text in (*prompts, recipe.draw.negative) for subject in subjects):
        screen.say(f"no prompt says {token!r}, the word for the subject: these images show any {word}.")
    return model, recipe, prompts, {"run": str(folder), "checkpoint": name}, folder


def out_folder(out: Path | str) -> Path:
    """A folder for images. UserError for a file."""
    if Path(out).is_file():
        raise UserError(f"--out {out} is a file, and images go into a folder. Give another name.")
    return Path(out)


def _write_images(
    model: LatentModel, recipe: Recipe, prompts: list[str], *, out: Path, origin: dict, emphasis: Emphasis = PLAIN,
    screen: Terminal,
) -> GenerateResult:  # fmt: skip
    config, seed = recipe.draw, recipe.seed
    jobs = [(prompt, i) for prompt in prompts for i in range(config.count)]
    rows_by_file = open_folder(out)
    files, images = [], []
    with screen.progress("drawing", len(jobs), unit="images") as advance:
        for part in sampling_batches(model, len(jobs), config):
            texts, numbers = zip(*(jobs[k] for k in part))
            z0 = sample_latents(model, list(texts), image_generators(seed, list(numbers)), config, emphasis=emphasis)
            for image, prompt, i in zip(to_pil(require_images(model.decode_latents(z0), model)), texts, numbers, strict=True):
                row = image_row(model, recipe, prompt, origin=origin | said(emphasis), index=i, size=image.size)
                files.append(write_image(out, image, row, rows_by_file))
                images.append(image)
            advance(len(part))
    with writing(out / "grid.png") as temporary:
        grid(images, config.count if len(prompts) > 1 else min(4, config.count)).save(temporary)
    return GenerateResult(files, out / "grid.png")


def open_folder(out: Path) -> dict[str, dict]:
    """Makes a folder of images, without leftovers of what was stopped -> its rows by their files."""
    with explained(out):
        make_folder(out)
    sweep(out)
    return {row["file"]: row for row in read_jsonl(out / "images.jsonl", IMAGE_ROW)}


def write_image(out: Path, image, row: dict, rows_by_file: dict[str, dict]) -> Path:
    """An image with its parameters inside, and its row in images.jsonl where it has none yet -> its file."""
    with writing(out / row["file"]) as temporary:
        image.save(temporary, pnginfo=_metadata(row))
    if rows_by_file.get(row["file"]) != row:
        append_jsonl(out / "images.jsonl", row)
    return out / row["file"]


def said(emphasis: Emphasis) -> dict:
    """An emphasis as rows say it: nothing where there is none, so that plain images keep their names."""
    return {"weights": dict(emphasis.weights)} | {"ignored": list(emphasis.ignored)} if emphasis else {}


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


def remarks(model: LatentModel, prompts: list[str], negative: str, origin: dict) -> Iterator[str]:
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


def image_row(model: LatentModel, recipe: Recipe, prompt: str, *, origin: dict, index: int, size: tuple[int, int]) -> dict:
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
    if row.get("weights"):
        fields["Word weights"] = _quoted(f"{word}: {weight:g}" for word, weight in row["weights"].items())
    if row.get("ignored"):
        fields["Ignored words"] = _quoted(row["ignored"])
    if "edit" in row:
        fields["Edit"] = json.dumps(row["edit"], ensure_ascii=False)
    lines.append(", ".join(f"{key}: {value}" for key, value in fields.items()))
    info = PngInfo()
    info.add_text("parameters", "\n".join(lines))
    return info


def _plain(text: str) -> str:
    """As it is, or quoted where commas or colons would end the value."""
    return json.dumps(text, ensure_ascii=False) if set(text) & set(',:"\n') else text


def _quoted(parts: Iterable[str]) -> str:
    """A value with commas and colons in it."""
    return json.dumps(", ".join(parts), ensure_ascii=False)
