"""A sheet of heat maps: an image, and beside it how much each place attends to each word of its prompt."""

from collections.abc import Mapping

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import interpolate

from personalize.data.image_grid import grid
from personalize.generation.attention_maps import normalised

COLUMNS = 6
CELL = 160  # px, least width: smaller images are enlarged, so that a word fits above them
SHADE = 0.55  # brightness of an image under its map


def map_sheet(image: Image.Image, maps: Mapping[str, Tensor]) -> Image.Image:
    """maps: for each word (side,side), shown by its own least and largest value, from dark over red to yellow."""
    times = -(-CELL // image.width)
    image = image.convert("RGB").resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    cells = [_titled(image, ""), *(_titled(heated(image, each), word) for word, each in maps.items())]
    return grid(cells, COLUMNS)


def heated(image: Image.Image, words: Tensor) -> Image.Image:
    """The image in grey, with the colours of its map (side,side) on top."""
    size = (image.height, image.width)
    heat = normalised(interpolate(words[None, None].float().cpu(), size=size, mode="bicubic")[0, 0])
    colours = torch.stack([(3 * heat - k).clamp(0, 1) for k in (0, 1, 2)], -1)
    grey = torch.frombuffer(bytearray(image.convert("L").tobytes()), dtype=torch.uint8).view(*size, 1) / 255
    mixed = torch.lerp(SHADE * grey, colours, (0.8 * heat.sqrt())[..., None])
    return Image.fromarray((mixed * 255).round().byte().numpy())


def _titled(image: Image.Image, title: str) -> Image.Image:
    """With a line of text above it, in smaller letters where it is long."""
    height = image.width // 9
    page = Image.new("RGB", (image.width, image.height + height + 4), "white")
    page.paste(image, (0, height + 4))
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(height)
    if (width := draw.textlength(title, font)) > image.width:
        font = ImageFont.load_default(max(6, height * image.width / width))
    draw.text((image.width / 2, height / 2), title, "black", font, anchor="mm")
    return page
