"""uint8 images as a picture: side by side, as a table with labels, as a GIF."""

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw
from torch import Tensor

from utils.files import atomic_write

EDGE = 2  # pixels of black around every image


def grid(images: Tensor, columns: int = 0) -> Image.Image:
    """images [N, C, H, W] side by side, in so many columns (0: about a square)."""
    count, _, height, width = images.shape
    columns = min(count, columns or math.ceil(math.sqrt(count)))
    rows = math.ceil(count / columns)
    size = (EDGE + columns * (width + EDGE), EDGE + rows * (height + EDGE))
    picture = Image.new("RGB", size)
    pixels = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()
    for i, image in enumerate(pixels):
        row, column = divmod(i, columns)
        corner = (EDGE + column * (width + EDGE), EDGE + row * (height + EDGE))
        picture.paste(Image.fromarray(image), corner)
    return picture


def table(images: Tensor, labels: Sequence[str]) -> Image.Image:
    """images [rows, columns, C, H, W], enlarged if small; labels above the columns."""
    cell = images.shape[-1] + EDGE
    zoom = math.ceil(48 / cell)
    picture = grid(images.flatten(0, 1), images.shape[1])
    size = (picture.width * zoom, picture.height * zoom)
    picture = picture.resize(size, Image.Resampling.NEAREST)
    page = Image.new("RGB", (picture.width, picture.height + 14))
    page.paste(picture, (0, 14))
    draw = ImageDraw.Draw(page)
    for column, label in enumerate(labels):
        draw.text((column * cell * zoom + 4, 1), label, "white")
    return page


def save_png(picture: Image.Image, path: Path) -> None:
    with atomic_write(path) as file:
        picture.save(file, "PNG")


def save_gif(frames: list[Image.Image], path: Path, milliseconds: int) -> None:
    """Save an endless GIF; each frame is shown so long, the last one five times as long."""
    durations = [milliseconds] * len(frames)
    durations[-1] *= 5
    with atomic_write(path) as file:
        frames[0].save(
            file, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)


def save_table_and_film(
    rows: Tensor, columns: Sequence[Tensor], labels: Sequence[str], path: Path, milliseconds: int,
    back: bool = False,
) -> None:
    """rows [rows, columns, C, H, W] as a table, and column after column, and back, as a film."""
    save_png(table(rows, labels), path.with_suffix(".png"))
    frames = [table(column, [label]) for column, label in zip(columns, labels, strict=True)]
    if back:
        frames += frames[-2::-1]
    save_gif(frames, path.with_suffix(".gif"), milliseconds)
    print(path.with_suffix(".png"), path.with_suffix(".gif"), sep="\n")
