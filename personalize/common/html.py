"""HTML pages of one family, the report's: Jinja2 templates that escape every value, and images as data URIs."""

import base64
import io
from functools import cache
from pathlib import Path

from PIL import Image

LARGEST = 512  # px, the long side of an image in a page
LOSSLESS = 128  # px: up to here PNG, above JPEG


def render(template: str, **values) -> str:
    """The page of a template, which is named by its path in the package: "data/photo_page.html.j2"."""
    return _environment().get_template(template).render(**values)


def data_uri(image: Image.Image) -> str:
    """An image of at most LARGEST px, without the metadata of its file."""
    copy = image.convert("RGB")
    copy = copy.copy() if copy is image else copy
    copy.info = {}
    copy.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    is_small = max(copy.size) <= LOSSLESS
    buffer = io.BytesIO()
    copy.save(buffer, **({"format": "PNG"} if is_small else {"format": "JPEG", "quality": 88}), optimize=True)
    return f"data:image/{'png' if is_small else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"


@cache
def _environment():
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    package = Path(__file__).parents[1]
    environment = Environment(
        loader=FileSystemLoader(package), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["data_uri"] = data_uri
    return environment
