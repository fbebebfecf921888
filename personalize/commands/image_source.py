"""What draws images: a run in its base, or a bare base, with LoRA and embedding files on top."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from torch import Tensor

from personalize.commands.session import open_base, resolve
from personalize.common.errors import UserError
from personalize.common.image_size import Size
from personalize.common.prompts import fill, without_weights
from personalize.common.recipe import Recipe, load_recipe
from personalize.common.terminal import Terminal
from personalize.models.interface import LatentModel
from personalize.models.prompt_chunks import longer

SYNTAX = re.compile(r"<lora:[^>]*>|\([^()]*:\s*[\d.]+\)|\bBREAK\b|\bAND\b")  # of other programs
WEIGHT = re.compile(r"(.+):([+-]?(?:\d+(?:\.\d*)?|\.\d+))")
# what draws, prompts, the run and checkpoint as images.jsonl names them, and the folder for images
Source = tuple[LatentModel, Recipe, list[str], dict, Path]


def bare_base(prompts: list[str], base: str, settings: Sequence[str], screen: Terminal) -> Source:
    require_words_alone(prompts)
    recipe = resolve(None, [*settings, f"base={base}"])
    return open_base(recipe, screen), recipe, prompts, {"run": "", "checkpoint": ""}, Path("images")


def require_words_alone(prompts: list[str]) -> None:
    if any("{" in prompt for prompt in prompts):
        raise UserError("{token} and {class} stand for a run's: name one with --run, or write the words out.")


def put_base_student(model: LatentModel, recipe: Recipe, settings: Sequence[str]) -> tuple[Recipe, dict]:
    """The base's own student into a model -> the recipe that draws with it, and what the images' rows say.

    UserError where the base has none, or `settings` ask for another way of drawing than the student's.
    """
    from personalize.generation import students

    folder = students.base_student(model)
    student = students.read_student(folder)
    own = students.own_sampling(recipe.draw, student)
    asked = [text for text in settings if text.strip().startswith("draw.")]
    draw = load_recipe(None, asked, defaults={"draw": asdict(own)}).draw
    students.require_own_sampling(draw, student, f"the student of base {model.name!r}")
    return replace(recipe, draw=draw), students.put_student(model, folder, student)


def loaded_run(
    prompts: list[str], folder: Path, model: LatentModel, recipe: Recipe, manifest: dict, *, at: str, screen: Terminal
) -> Source:
    from personalize.training import load_run  # methods with it, which a bare base does without

    name, subjects = load_run.load_run(model, folder, manifest, at=at), manifest["subjects"]
    if not subjects:
        require_words_alone(prompts)
        return model, recipe, prompts, {"run": str(folder), "checkpoint": name}, folder / "images"
    token, word = subjects[0]["token"], subjects[0]["class"]
    prompts = [fill(prompt, token, word) for prompt in prompts]
    if not any(model.says(text, subject["token"]) for text in (*prompts, recipe.draw.negative) for subject in subjects):
        screen.say(f"no prompt says {token!r}, the word for the subject: these images show any {word}.")
    return model, recipe, prompts, {"run": str(folder), "checkpoint": name}, folder / "images"


def put_files(model: LatentModel, *, loras: Sequence[str], embeddings: Sequence[str], screen: Terminal) -> dict:
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


def put_layout(model: LatentModel, file: Path, size: Size) -> tuple[Tensor, dict]:
    """Boxes in a JSON file -> their planes (K,h,w) for images of this size, with the base's layout part in the model; a record.

    UserError for a base without such a part, and for a file with unknown classes or boxes outside of the image.
    """
    from personalize.data.layout import read_layout
    from personalize.models.layout import open_layout, planes

    _, classes, digest = open_layout(model)
    boxes = read_layout(file, classes)
    put_planes_of(model)
    width, height = size
    cells = height // model.downscale, width // model.downscale
    return planes(boxes, classes, cells), {"layout": {"boxes": [list(box) for box in boxes], "sha256": digest}}


def put_planes_of(model: LatentModel) -> list[str]:
    """The base's own layout part into its U-Net -> the classes of its planes, in their order."""
    from personalize.methods import lora
    from personalize.models.layout import LORA, open_layout, put_planes

    folder, classes, _ = open_layout(model)
    put_planes(model, folder, classes)
    lora.load_adapter(model, folder / LORA, name="layout", weight=1.0)
    return classes


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
            yield f"{what} {text!r} is too long for this base; it does not see: {rest!r} ({longer(model)})"
    plain = (without_weights(text, model.weighting) for text in texts)
    if marks := [match[0] for text in plain for match in SYNTAX.finditer(text)]:
        yield (
            f"{marks[0]!r} is read as letters: prompts have no commands in them here, and weights such as (red:1.2) with --set "
            "prompt.weighting=compel alone. --weight red=1.2 weights a word without it, and --lora FILE:0.8 gives a LoRA."
        )
    loras = {entry["file"] for entry in origin.get("loras", [])}  # what is in them was told already
    for entry in origin.get("embeddings", []):
        if entry["file"] not in loras and not any(model.says(text, entry["token"]) for text in texts):
            yield f"no prompt says {entry['token']!r}, the word of {entry['file']}, which does nothing then."
