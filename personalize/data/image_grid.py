"""Images beside each other as one image."""

from collections.abc import Sequence

from PIL import Image

LINE = 4  # px between images


def grid(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Images, row by row  ->  one RGB image at full size with white lines between, in cells of the largest."""
    assert images and columns > 0, (len(images), columns)
    width, height = max(image.width for image in images), max(image.height for image in images)
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    page = Image.new("RGB", (columns * (width + LINE) - LINE, rows * (height + LINE) - LINE), "white")
    for k, image in enumerate(images):
        left, top = k % columns * (width + LINE), k // columns * (height + LINE)
        page.paste(image.convert("RGB"), (left + (width - image.width) // 2, top + (height - image.height) // 2))
    return page
