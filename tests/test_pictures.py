"""utils/pictures.py: the grid, the table with labels, the GIF."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from utils.pictures import grid, save_gif, save_png, table


def random_images(*shape: int) -> Tensor:
    return torch.randint(256, shape, dtype=torch.uint8)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("count", "columns"), [(5, 0), (5, 2), (7, 7), (2, 3)])
def test_a_picture_is_the_grid_of_torchvision(count, columns, channels):
    images = random_images(count, channels, 6, 8)
    columns_of_grid = columns or math.ceil(math.sqrt(count))
    expected = make_grid(images, nrow=columns_of_grid, padding=2)
    assert np.array_equal(np.asarray(grid(images, columns)), expected.permute(1, 2, 0))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("size", "zoom"), [(8, 5), (46, 1), (64, 1)])
def test_a_table_is_a_grid_with_labels_above(size, zoom, channels):
    images = random_images(2, 3, channels, size, size)
    pixels = np.asarray(table(images, ["t=9", "t=0", "image"]))
    labels, below = pixels[:14], pixels[14:]
    whole = np.asarray(grid(images.flatten(0, 1), columns=3))
    assert np.array_equal(below[::zoom, ::zoom], whole)
    assert np.array_equal(below, whole.repeat(zoom, 0).repeat(zoom, 1))
    width = (size + 2) * zoom
    for column in range(3):
        assert labels[:, column * width:(column + 1) * width].any()


def test_a_png_is_saved_as_it_is(tmp_path):
    picture = grid(random_images(3, 3, 8, 8))
    save_png(picture, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG"
        assert np.array_equal(np.asarray(image), np.asarray(picture))


def frames_of(path: Path) -> tuple[list[list[int]], list[int]]:
    """Return the colour of each frame of a GIF, and for how long it is shown."""
    colours, milliseconds = [], []
    with Image.open(path) as image:
        for frame in range(image.n_frames):
            image.seek(frame)
            colours.append(np.asarray(image.convert("RGB"))[0, 0].tolist())
            milliseconds.append(image.info["duration"])
    return colours, milliseconds


def test_a_gif_is_endless_and_rests_at_its_end(tmp_path):
    colours = [[250, 0, 0], [0, 250, 0], [0, 0, 250]]
    frames = [Image.new("RGB", (8, 8), tuple(colour)) for colour in colours]
    save_gif(frames, tmp_path / "a.gif", milliseconds=100)
    assert frames_of(tmp_path / "a.gif") == (colours, [100, 100, 500])
    with Image.open(tmp_path / "a.gif") as image:
        assert image.info["loop"] == 0
