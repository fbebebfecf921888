"""The README.md of an exported run on the hub: base, token, prompt, scores, sample images, recipe.

Written for strangers: it names no folder of the user's machine.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from personalize.common.recipe import Recipe, flat_settings, recipe_from_dict
from personalize.common.settings import Value, to_toml_value
from personalize.formats import reference_configs
from personalize.models.locate import public_name

LICENSES = {  # of the bases on the hub, which what is made from them inherits
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
    "stable-diffusion-v1-5/stable-diffusion-inpainting": "creativeml-openrail-m",
    "CompVis/stable-diffusion-v1-4": "creativeml-openrail-m",
    "stabilityai/stable-diffusion-2-1-base": "openrail++",
    "stabilityai/stable-diffusion-2-1": "openrail++",
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
}
FAMILIES = {"sd": "stable-diffusion", "sdxl": "stable-diffusion-xl"}
PLACES = ("base_vae", "train.init_from", "evaluate.dino", "evaluate.clip")  # settings that may hold a path
UNSAID = ("base", "token", "class_word", "device", "vae")  # said elsewhere on the card, or of the machine only
PRETRAINED = """from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{source}")
"""
SINGLE_FILE = """from diffusers import {pipeline}

pipeline = {pipeline}.from_single_file("{file}")  # the file of this repository
"""
STUDENT = {  # sampler of a student -> how diffusers is given it
    "ddim": """from diffusers import DDIMScheduler

pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
""",
    "lcm": """from diffusers import LCMScheduler

pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
""",
}
ONE_ROW = 'pipeline.load_textual_inversion("{repo}", weight_name="{name}", token="{token}")\n'
TWO_ROWS = """from huggingface_hub import hf_hub_download
from safetensors.torch import load_file

rows = load_file(hf_hub_download("{repo}", "{name}"))
for part, encoder, tokenizer in (
    ("clip_l", pipeline.text_encoder, pipeline.tokenizer), ("clip_g", pipeline.text_encoder_2, pipeline.tokenizer_2)
):
    pipeline.load_textual_inversion(rows[part], token="{token}", text_encoder=encoder, tokenizer=tokenizer)
"""


@dataclass(frozen=True)
class Card:
    """What a card is made of."""

    repo: str  # owner/name on the hub
    manifest: dict
    family: str  # "sd" or "sdxl"
    to: str  # the format, as in `export --to`
    fused: bool  # whether an adapter was baked into the base
    files: dict[str, str]  # {name: "base", "LoRA" or "embedding"} of what is loaded
    samples: Sequence[tuple[str, str]]  # (prompt, path within the repository) of sample images
    scores: dict  # what "scores" in evaluation/metrics.json holds, or {}
    photos: str = ""  # path of the image of the user's photos; by default they are nobody's business
    inpaints: bool = False  # whether the base paints into an image


def text(card: Card) -> str:
    """The whole README.md."""
    manifest, subjects = card.manifest, card.manifest["subjects"]
    recipe = recipe_from_dict(manifest["recipe"], "the run")
    words = ", ".join(f"`{subject['token']}`" for subject in subjects)
    count = sum(not photo.get("held_out") for subject in subjects for photo in subject["photos"])
    rows = [
        ("base", _base(manifest["base"])), ("token", words), ("class", ", ".join(s["class"] for s in subjects)),
        ("prompt", ", ".join(f"`{subject['prompt']}`" for subject in subjects)), ("method", ", ".join(manifest["methods"])),
        ("trained on", f"{count} photos, which are {'in photos.png' if card.photos else 'not in this repository'}"),
    ]  # fmt: skip
    if recipe.prompt.chunks > 1:
        rows.append(
            ("prompts", f"encoded in {recipe.prompt.chunks} chunks of 75 tokens, also short ones; diffusers cuts at 77")
        )
    parts = [
        _header(card),
        f"# {card.repo.rpartition('/')[2]}",
        f"{_base(manifest['base'])}, taught {words} by [DreamBooth](https://arxiv.org/abs/2208.12242). "
        f"Say `{subjects[0]['prompt']}` in a prompt.",
        _table(("", ""), rows),
        *_samples(card.samples),
        "## Use", _use(card),
        *_scores(card.scores),
        *_recipe(recipe),
        *(["## Photos", f"![The photos]({card.photos})"] if card.photos else []),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _header(card: Card) -> str:
    """The YAML that the hub reads."""
    from huggingface_hub import ModelCardData

    base, methods = card.manifest["base"], card.manifest["methods"]
    origin = {}
    if _is_hub_id(base):
        relation = "finetune" if "full" in methods or card.fused else "adapter"
        origin = {"base_model": base, "base_model_relation": relation, "license": LICENSES.get(base)}
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=[
            "text-to-image",
            FAMILIES[card.family],
            *["inpainting"] * card.inpaints,
            "dreambooth",
            *(name.replace("-", "_") for name in methods),
        ],
        instance_prompt=card.manifest["subjects"][0]["prompt"],
        widget=[{"text": prompt, "output": {"url": path}} for prompt, path in card.samples] or None,
        **origin,
    )
    return f"---\n{data.to_yaml()}\n---"


def _is_hub_id(base: str) -> bool:
    return base.count("/") == 1 and public_name(base) == base


def _base(base: str) -> str:
    return f"[{base}](https://huggingface.co/{base})" if _is_hub_id(base) else f"`{public_name(base)}`"


def _use(card: Card) -> str:
    prompt, base, student = card.manifest["subjects"][0]["prompt"], card.manifest["base"], card.manifest.get("student")
    if card.to in ("kohya", "a1111-embedding"):
        files = " and ".join(f"`{name}` ({what})" for name, what in card.files.items())
        words = [Path(name).stem for name, what in card.files.items() if what == "embedding"]
        for subject, word in zip(card.manifest["subjects"], words):  # there a file's name is its word
            prompt = prompt.replace(subject["token"], word)
        how = f" Draw by {student['sampler'].upper()} in {student['steps']} steps at a CFG scale of 1." if student else ""
        return f"In AUTOMATIC1111 and ComfyUI: put {files} where such files lie, and say `{prompt}` in a prompt.{how}"
    if card.to == "single-file":
        kinds = reference_configs.INPAINTING if card.inpaints else reference_configs.PIPELINES
        kind = kinds["sdxl" if card.family == "sdxl" else "sd1"]
        lines = SINGLE_FILE.format(pipeline=kind, file=next(iter(card.files)))
    else:
        lines = PRETRAINED.format(source=card.repo if "base" in card.files.values() else public_name(base))
    for name, what in card.files.items():
        if what == "LoRA":
            lines += f'pipeline.load_lora_weights("{card.repo}", weight_name="{name}")\n'
        if what == "embedding":
            token = card.manifest["subjects"][0]["token"]
            lines += (TWO_ROWS if card.family == "sdxl" else ONE_ROW).format(repo=card.repo, name=name, token=token)
    lines += STUDENT[student["sampler"]] if student else ""
    few = f", num_inference_steps={student['steps']}, guidance_scale=1.0" if student else ""
    said = json.dumps(prompt, ensure_ascii=False) + few + ", image=image, mask_image=mask" * card.inpaints
    about = "  # PIL images; the mask is white where it is painted" * card.inpaints
    return f"```python\n{lines}pipeline({said}).images[0]{about}\n```"


def _samples(samples: Sequence[tuple[str, str]]) -> list[str]:
    rows = [(f"![{_plain(prompt).replace('<', '&lt;')}]({path})", f"`{_plain(prompt)}`") for prompt, path in samples]
    return ["## Samples", _table(("image", "prompt"), rows)] if rows else []


def _scores(scores: dict) -> list[str]:
    """A table of means; base: the same prompts without the token, photos: the photos against each other."""
    means = [(score["title"], *map(score.get, ("floor", "score", "ceiling"))) for score in scores.values()]
    rows = [(title, *("-" if mean is None else f"{mean:.3f}" for mean in values)) for title, *values in means]
    return ["## Scores", _table(("", "base", "this", "photos"), rows)] if rows else []


def _recipe(recipe: Recipe) -> list[str]:
    plain, own = flat_settings(Recipe()), flat_settings(recipe)
    names = [key for key in own if own[key] != plain[key] and key not in UNSAID]
    rows = [(f"`{key}`", *(f"`{_shown(key, settings[key])}`" for settings in (own, plain))) for key in names]
    if not rows:
        return ["## Recipe", "The defaults of `personalize train`."]
    return ["## Recipe", "What differs from the defaults of `personalize train`:", _table(("setting", "here", "default"), rows)]


def _shown(key: str, value: Value) -> str:
    return _plain(to_toml_value(public_name(value) if key in PLACES and value else value))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _plain(text: str) -> str:
    """A text that ends no cell and no image's caption."""
    return text.replace("|", "\\|").replace("\n", " ")
