"""Files of images: the row that says all that decides one, its name, and the parameters inside it."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from personalize.common.errors import UserError
from personalize.common.files import append_jsonl, explained, key_of, make_folder, read_jsonl, slug, sweep, writing
from personalize.common.recipe import Recipe
from personalize.common.untrusted import Table, Text
from personalize.models.interface import LatentModel
from personalize.models.locate import public_name

IMAGE_ROW = Table({"file": Text(most=255), "prompt": Text()}, needs=("file", "prompt"))  # of images.jsonl
A1111_SAMPLERS = {
    "dpm++2m": "DPM++ 2M", "dpm++2m-karras": "DPM++ 2M Karras", "ddim": "DDIM", "ddpm": "DDPM", "euler": "Euler",
    "euler-a": "Euler a", "heun": "Heun", "unipc": "UniPC", "pndm": "PLMS", "lcm": "LCM",
}  # fmt: skip


def out_folder(out: Path | str) -> Path:
    """A folder for images. UserError for a file."""
    if Path(out).is_file():
        raise UserError(f"--out {out} is a file, and images go into a folder. Give another name.")
    return Path(out)


def open_folder(out: Path) -> dict[str, dict]:
    """Makes a folder of images, without leftovers of what was stopped -> its rows by their files."""
    with explained(out):
        make_folder(out)
    sweep(out)
    return {row["file"]: row for row in read_jsonl(out / "images.jsonl", IMAGE_ROW)}


def write_image(out: Path, image: Image.Image, row: dict, rows_by_file: dict[str, dict]) -> Path:
    """An image with its parameters inside, and its row in images.jsonl where it has none yet -> its file."""
    with writing(out / row["file"]) as temporary:
        image.save(temporary, pnginfo=_metadata(row))
    if rows_by_file.get(row["file"]) != row:
        append_jsonl(out / "images.jsonl", row)
    return out / row["file"]


def write_beside(out: Path, image: Image.Image, row: dict, kind: str) -> Path:
    """What is about an image, such as its maps, beside it and with its parameters -> its file. It is no row of images.jsonl."""
    path = out / f"{Path(row['file']).stem}-{kind}.png"
    with writing(path) as temporary:
        image.save(temporary, pnginfo=_metadata(row))
    return path


def image_row(model: LatentModel, recipe: Recipe, prompt: str, *, origin: dict, index: int, size: tuple[int, int]) -> dict:
    """All that decides an image, and its file, whose name changes with any of it but the place of the run."""
    config, (width, height) = asdict(recipe.draw), size
    settings = {"prompt": prompt} | {name: config[name] for name in ("negative", "sampler", "steps", "guidance", "rescale")}
    settings |= {"interval": list(recipe.draw.interval), "seed": recipe.seed, "index": index, "width": width, "height": height}
    settings |= {"base": model.name, "fingerprint": model.fingerprint} | model.prompt_record
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
    fields |= {"Prompt chunks": row["prompt_chunks"]} if "prompt_chunks" in row else {}
    fields |= {"Prompt weighting": row["prompt_weighting"]} if "prompt_weighting" in row else {}
    loras, embeddings = [(Path(e["file"]).stem, e) for e in row.get("loras", [])], row.get("embeddings", [])
    if loras:
        fields["Lora hashes"] = _quoted(f"{name}: {entry['sha256'][:12]}" for name, entry in loras)
        fields["Lora weights"] = _quoted(f"{name}: {entry['weight']:g}" for name, entry in loras)
    if embeddings:
        fields["TI hashes"] = _quoted(f"{entry['token']}: {entry['sha256'][:12]}" for entry in embeddings)
    if row.get("weights"):
        fields["Word weights"] = _quoted(f"{word}: {weight:g}" for word, weight in row["weights"])
    if row.get("ignored"):
        fields["Ignored words"] = _quoted(row["ignored"])
    if "strength" in row:
        fields["Denoising strength"] = f"{row['strength']:g}"
    if "image" in row:
        fields["Image hash"] = row["image"]["sha256"][:12]
    if told := row.get("image_prompt"):
        fields["Image prompt"] = _quoted(f"{Path(image['file']).stem}: {image['sha256'][:12]}" for image in told["images"])
        fields |= {"Image prompt scale": f"{told['scale']:g}", "Image adapter": told["adapter"]["sha256"][:12]}
    fields |= _embedding_fields(row["unclip"]) if "unclip" in row else {}
    if "mask" in row:
        fields |= {"Mask word": _plain(row["mask"]["word"])} if "word" in row["mask"] else {}
        fields |= {"Mask hash": row["mask"]["sha256"][:12], "Careful": row["careful"]}
    fields |= _steering_fields(row)
    if "layout" in row:
        boxes = ("{} {:g} {:g} {:g} {:g}".format(*box) for box in row["layout"]["boxes"])
        fields |= {"Layout": _quoted(boxes), "Layout part": row["layout"]["sha256"][:12]}
    fields |= upscale_fields(row["upscale"]) if "upscale" in row else {}
    if "edit" in row:
        fields["Edit"] = json.dumps(row["edit"], ensure_ascii=False)
    lines.append(", ".join(f"{key}: {value}" for key, value in fields.items()))
    info = PngInfo()
    info.add_text("parameters", "\n".join(lines))
    return info


def _embedding_fields(told: dict) -> dict[str, str]:
    """Of an image that is drawn from a CLIP embedding: whose it is, and by which decoder."""
    fields = {"unCLIP": told["decoder"][:12]}
    if "images" in told:
        fields["Variation of"] = _quoted(f"{Path(image['file']).stem}: {image['sha256'][:12]}" for image in told["images"])
    fields |= {"Variation to": str(told["of"])} if "of" in told else {}
    return fields | ({"Variation was": _quoted([told["was"]])} if "was" in told else {})


def _steering_fields(row: dict) -> dict[str, str]:
    """What the image was drawn towards; "No score" names the metric that such an image is no score of any more."""
    fields = {"Like": f"{row['like']:g}"} if "like" in row else {}
    if "guide_clip" in row:
        image = row.get("guide_image")
        fields |= {"CLIP guidance": f"{row['guide_clip']:g}", "CLIP guidance every": str(row["guide_every"])}
        fields |= {"CLIP guidance image": image["sha256"][:12]} if image else {}
        fields["No score"] = "CLIP-I" if image else "CLIP-T"
    return fields


def upscale_fields(entry: dict) -> dict[str, str]:
    """Of the record of an `Upscaling`, as AUTOMATIC1111 names an image that was made larger afterwards."""
    fields = {"Postprocess upscale by": str(entry["factor"]), "Postprocess upscaler": entry["sha256"][:12]}
    return fields | {"Postprocess steps": str(entry["steps"])}


def _plain(text: str) -> str:
    """As it is, or quoted where commas or colons would end the value."""
    return json.dumps(text, ensure_ascii=False) if set(text) & set(',:"\n') else text


def _quoted(parts: Iterable[str]) -> str:
    """A value with commas and colons in it."""
    return json.dumps(", ".join(parts), ensure_ascii=False)
