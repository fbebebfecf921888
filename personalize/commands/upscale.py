"""`personalize upscale`: images twice as large, by the upscaler of a base."""

from collections.abc import Sequence
from pathlib import Path

from personalize.commands.session import resolve
from personalize.common.bases import folder_of
from personalize.common.errors import UserError
from personalize.common.files import key_of, make_folder, sha256, slug, writing
from personalize.common.terminal import SILENT, Terminal
from personalize.common.untrusted import read_bytes
from personalize.data.decode import decode
from personalize.generation.image_files import out_folder, upscale_fields


def upscale(
    images: Sequence[Path | str],
    *,
    base: str = "toyland",
    settings: Sequence[str] = (),
    out: Path = Path("upscaled"),
    screen: Terminal = SILENT,
) -> list[Path]:
    """Files of images -> files in `out`, whose names and parameters say from which and how.

    base: a folder with an upscaler in it. Of the settings, seed and device count. UserError for what is no image, or one of
    another size than the upscaler's.
    """
    from personalize.generation.sampling import image_generators, to_pil
    from personalize.generation.upscaling import PURPOSE, Upscaling
    from personalize.models import devices, lazy_imports
    from personalize.models.upscaler import load_upscaler

    if not images:
        raise UserError("which images? Give files, as in: personalize upscale dog.png")
    lazy_imports.quiet_libraries()
    recipe, out = resolve(None, [*settings, f"base={base}"]), out_folder(out)
    device = devices.choose_device(recipe.device)
    upscaling = Upscaling(*load_upscaler(folder_of(base), base, device))
    read = [_read(path, upscaling, screen) for path in images]
    make_folder(out)
    files = []
    with screen.progress("upscaling", len(read), unit="images") as advance:
        for path, (pixels, digest) in zip(images, read, strict=True):
            image = to_pil(upscaling.enlarge(pixels, image_generators(recipe.seed, [0], PURPOSE)))[0]
            entry = upscaling.identity | {"image": digest, "seed": recipe.seed}
            files.append(out / f"{slug(Path(path).stem)[:60]}-{image.width}px-{key_of(entry)[:6]}.png")
            with writing(files[-1]) as temporary:
                image.save(temporary, pnginfo=_metadata(entry))
            advance(1)
    return files


def _read(path: Path | str, upscaling, screen: Terminal):
    """A file -> pixels (1,3,h,w), and its hash."""
    import numpy as np
    import torch

    data = read_bytes(path, "image")
    decoded = decode(data, str(path))
    upscaling.require_size(decoded.size, str(path))
    if decoded.alpha is not None:
        screen.say(f"{path} is transparent in part, which becomes white")
    return torch.from_numpy(np.array(decoded.image)).permute(2, 0, 1)[None].float() / 127.5 - 1, sha256(data)


def _metadata(entry: dict):
    from PIL.PngImagePlugin import PngInfo

    fields = upscale_fields(entry["upscale"]) | {"Seed": entry["seed"], "Image hash": entry["image"][:12]}
    info = PngInfo()
    info.add_text("parameters", ", ".join(f"{key}: {value}" for key, value in fields.items()))
    return info
