"""What a run can be exported to, under which names, and the writing of it.

An export is one to three files or folders that belong together, such as a LoRA and the embedding of the word it was
trained with. The first of these products is the main one.
"""

import dataclasses
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from personalize import methods
from personalize.commands.export.verify import Files
from personalize.common.errors import UserError, nearest
from personalize.common.files import read_json, slug, write_json
from personalize.common.recipe import Recipe
from personalize.formats import embedding, lora, lycoris, single_file
from personalize.formats.clip_tokenizer import VOCABULARY_SIZE
from personalize.methods import ADAPTERS, WITH_A_WORD, adapter_files, full, peft_layers, textual_inversion
from personalize.methods.lora import fuse_adapters, save
from personalize.models.interface import LatentModel

TARGETS = ("diffusers", "single-file", "kohya", "a1111-embedding")
# what trained -> targets of it alone, and targets of it baked into its base
POSSIBLE = {
    "full": (("diffusers", "single-file"), ()),
    "lora": (("diffusers", "kohya"), ("diffusers", "single-file")),
    "lokr or loha": (("kohya",), ("diffusers", "single-file")),
    "another adapter": ((), ("diffusers", "single-file")),
    "textual-inversion": (("diffusers", "a1111-embedding"), ()),
    "textual-inversion + lora": (("diffusers", "kohya"), ("diffusers", "single-file")),
    "textual-inversion + lokr or loha": (("kohya",), ("diffusers", "single-file")),
    "textual-inversion + another adapter": ((), ("diffusers", "single-file")),
    "custom-diffusion": ((), ("diffusers", "single-file")),
}
BASE, LORA, WORD, FOLDER, VOCABULARY = "base", "LoRA", "embedding", "folder", "tokenizer"


@dataclass(frozen=True)
class Form:
    """to: one of TARGETS; fuse: baked into the base; half: in half precision."""

    to: str
    fuse: bool
    half: bool


@dataclass(frozen=True)
class Product:
    """A file or folder. kind: BASE, LORA, WORD with its token, FOLDER of a LoRA, words or both, or VOCABULARY."""

    name: str
    kind: str
    token: str = ""


def require_possible(trained: Sequence[str], form: Form, *, dora: bool = False) -> None:
    """UserError, which says what works, where a run of these methods cannot be exported to this form."""
    if dora and form.to == "kohya":
        raise UserError(
            "a LoRA with lora.dora = true has no form of kohya's that programs agree on: some read dora_scale along the "
            "inputs, some along the outputs. What works: --to diffusers, --to single-file --fuse, --to diffusers --fuse."
        )
    if form.to not in TARGETS:
        raise UserError(f"unknown format --to {form.to!r}{nearest(form.to, TARGETS) or '.'} Known: {', '.join(TARGETS)}.")
    named = dict.fromkeys(ADAPTERS, "another adapter") | {"lora": "lora"} | dict.fromkeys(lycoris.KINDS, "lokr or loha")
    kinds = [named.get(name, name) for name in trained]
    plain, fused = POSSIBLE[" + ".join(sorted(kinds, key=lambda name: name not in WITH_A_WORD))]
    if form.to in (fused if form.fuse else plain):
        return
    works = [f"--to {name}" for name in plain] + [f"--to {name} --fuse" for name in fused]
    options = f"--to {form.to}{' --fuse' if form.fuse else ''}"
    raise UserError(f"a run of {' and '.join(trained)} cannot be exported {options}. What works: {', '.join(works)}.")


def stem(trained: Sequence[str], form: Form, *, subjects: Sequence[dict], run: str) -> str:
    """Name of the main file or folder without its ending, of a run in the folder `run`."""
    if form.to == "a1111-embedding":
        return _word(subjects[0])
    if form.to == "kohya" and len(trained) > 1:
        return f"{run}-lora"
    return f"{run}-fused" if form.fuse else run


def products_of(
    model: LatentModel, trained: Sequence[str], form: Form, *, subjects: Sequence[dict], stem: str
) -> list[Product]:
    """What will be written, the main one first."""
    with_words = subjects if set(trained) & set(WITH_A_WORD) else []
    words = [Product(f"{_word(subject)}.safetensors", WORD, subject["token"]) for subject in with_words]
    if form.to == "diffusers":
        return [Product(stem, BASE if form.fuse or "full" in trained else FOLDER)]
    if form.to == "a1111-embedding":
        return [dataclasses.replace(words[0], name=f"{stem}.safetensors"), *words[1:]]
    if form.to == "kohya":
        return [Product(f"{stem}.safetensors", LORA), *words]
    unusual = any(len(tokenizer) != VOCABULARY_SIZE for tokenizer in model.tokenizers.values())
    return [Product(f"{stem}.safetensors", BASE), *words, *([Product(VOCABULARY, VOCABULARY)] if unusual else [])]


def write(model: LatentModel, recipe: Recipe, form: Form, *, products: Sequence[Product], stage: Path) -> Files:
    """Write the products of a model with its run loaded into the folder `stage` -> what a fresh process draws with.

    A single file always gets its tokenizer beside it.
    """
    main, kind, embeddings = stage / products[0].name, products[0].kind, []
    for product in products:
        if product.kind == WORD:
            tables = {part: encoder.get_input_embeddings() for part, encoder in model.text_encoders.items()}
            rows = {part: table.of(product.token).detach() for part, table in tables.items()}  # (n,D) each
            embedding.write_a1111(stage / product.name, rows)
            embeddings.append((stage / product.name, product.token))
    if kind == BASE:
        _write_base(model, recipe, form, main)
        return Files(main, embeddings=embeddings)
    if kind == WORD:
        return Files(model.folder, embeddings=embeddings)
    if kind == LORA:
        _write_kohya(model, recipe, form, main)
        return Files(model.folder, loras=[main], embeddings=embeddings)
    methods.save(model, main, recipe)
    file = main / adapter_files.FILE
    if file.exists():
        lora.write_diffusers(file, _in_dtype(lora.with_scale_in_weights(_read_adapter(model, file)), form))
    endings = {token: f"-{slug(token)}" if len(recipe.token) > 1 else "" for token in recipe.token}
    words = [(main / f"{textual_inversion.FILE}{ending}.safetensors", token) for token, ending in endings.items()]
    return Files(model.folder, loras=[file] if file.exists() else [], embeddings=[word for word in words if word[0].exists()])


def bakes_words(trained: Sequence[str], form: Form) -> bool:
    """Whether the run's words are written into the base."""
    return form.fuse and form.to == "diffusers" and bool(set(trained) & set(WITH_A_WORD))


def family(model: LatentModel) -> str:
    """ "sd" or "sdxl"."""
    return model.family.__name__.rpartition(".")[2]


def _word(subject: dict) -> str:
    """The name of an embedding's file, which is its word in AUTOMATIC1111 and ComfyUI; just "subject" would be too common."""
    word, kind = slug(subject["token"]), slug(subject["class"])
    return word if word.endswith(kind) else f"{word}-{kind}"


def _write_kohya(model: LatentModel, recipe: Recipe, form: Form, path: Path) -> None:
    folder, metadata = path.with_name(".own"), {"ss_output_name": path.stem}
    save(model, folder, recipe)
    if kind := next((name for name in recipe.train.methods if name in lycoris.KINDS), ""):
        parts, shapes = adapter_files.read_adapter(folder, model), adapter_files.layer_shapes(model)
        shutil.rmtree(folder)
        layers = {}
        for name, part in parts.items():
            scale = part.alpha / part.config.r
            layers |= {key: lycoris.scaled(made, scale) for key, made in adapter_files.layers_of({name: part}).items()}
        made = lycoris.Adapter(kind, layers)
        lycoris.write_kohya(path, made, shapes, family=family(model), half=form.half, metadata=metadata)
        return
    adapter = _in_dtype(_read_adapter(model, folder / adapter_files.FILE), form)
    shutil.rmtree(folder)
    layers = set(peft_layers.adaptable_layers(model.unet))
    lora.write_kohya(path, adapter, family=family(model), metadata=metadata, unet=layers)


def _read_adapter(model: LatentModel, file: Path) -> lora.Adapter:
    networks = adapter_files.adapted_networks(model).items()
    return lora.read_lora(file, {name: set(peft_layers.adaptable_layers(net)) for name, net in networks}, model.name)


def _in_dtype(adapter: lora.Adapter, form: Form) -> lora.Adapter:
    tensors = {key: value.half() if form.half else value for key, value in adapter.tensors.items()}
    return dataclasses.replace(adapter, tensors=tensors)


def _write_base(model: LatentModel, recipe: Recipe, form: Form, main: Path) -> None:
    """A whole base, as a folder or in one file."""
    fuse_adapters(model)
    baked = bakes_words(recipe.train.methods, form)
    for encoder in model.text_encoders.values():
        table = encoder.get_input_embeddings()
        if isinstance(table, textual_inversion.Words) and not baked:
            encoder.set_input_embeddings(table.known)
    if baked:
        textual_inversion.fuse_embeddings(model)
    with_texts = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, text_encoder=True))
    if form.to == "single-file":
        folder = main.with_name(".own")
        full.save(model, folder, with_texts)
        single_file.pack_single_file(folder, main, half=form.half)
        shutil.rmtree(folder)
        shutil.copytree(model.folder / "tokenizer", main.with_name(VOCABULARY))
        return
    if form.half:
        _halve(model)
    full.save(model, main, with_texts)
    for part, (_, vocabulary) in model.family.TEXT.items():
        if form.half:  # else `from_pretrained` without a dtype loads it in half, and the U-Net in full precision
            settings = main / part / "config.json"
            write_json(settings, read_json(settings) | {"dtype": "float32"})
        if baked:
            _write_tokenizer(model, part, main / vocabulary)


def _halve(model: LatentModel) -> None:
    """U-Net and text encoders. UserError where a weight is too large for it."""
    for part, network in model.networks.items():
        for name, p in network.half().named_parameters():
            if not p.isfinite().all():
                raise UserError(f"{part}.{name} has values too large for half precision. Export it without --half.")


def _write_tokenizer(model: LatentModel, part: str, folder: Path) -> None:
    """Put a tokenizer with the learned words in place of the base's, whose files may be links to the base's own."""
    vocabulary = {name: (folder / name).read_bytes() for name in ("vocab.json", "merges.txt") if (folder / name).exists()}
    shutil.rmtree(folder)
    model.tokenizers[part].save_pretrained(folder)
    for name, content in vocabulary.items():
        (folder / name).write_bytes(content)
    write_json(folder / "added_tokens.json", model.tokenizers[part].get_added_vocab())
