"""Images in: every data set becomes one uint8 array [N, C, H, W]; batches are cut from it by index.

    images = load_images(Config(data="shapes"))
    batches = Batches(images, config, device)
    x_start = batches(images_seen)                # float [B, C, H, W] in [-1, 1]
"""

import colorsys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from config import Config
from utils.cli import UserError, brief, warn
from utils.image_cache import load_folder, to_square
from utils.randomness import derive_seed

DOWNLOADS = {  # name: (torchvision's class, where the archive goes by hand)
    "cifar10": ("CIFAR10", "cifar-10-python.tar.gz"),
    "mnist": ("MNIST", "MNIST/raw/*-ubyte.gz"),
    "fashion_mnist": ("FashionMNIST", "FashionMNIST/raw/*-ubyte.gz"),
}


def to_float(images: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """float, clamped to [-1, 1] -> uint8 0..255, rounded: all 256 values survive the round trip."""
    from_0_to_2 = images.float().clamp(-1, 1) + 1
    return (from_0_to_2 * 127.5).round().to(torch.uint8)


class Batches:
    """batches(images_seen): the next images of this rank, float [B, C, H, W] in [-1, 1].

    B is batch_size / world_size.  The order is one permutation of the data after another, each
    drawn from (seed, epoch); a step takes the next batch_size images, rank r its slice of them.
    """

    def __init__(
        self, images: np.ndarray, config: Config, device: torch.device, rank: int = 0,
        world_size: int = 1,
    ) -> None:
        channels, size = config.channels, config.image_size
        if images.dtype != np.uint8 or images.shape[1:] != (channels, size, size):
            raise TypeError(f"images are uint8 [N, {channels}, {size}, {size}] from 0 to 255, not "
                            f"{images.dtype} {[*images.shape]}")
        self.images = images  # moved to a GPU below if they fit well
        self.seed = config.seed
        self.share = config.batch_size // world_size  # images of this process per step
        self.device = device
        self.rank = rank
        if device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info(device)[0] / 4:
            self.images = torch.tensor(images, device=device)

    def __call__(self, images_seen: int) -> Tensor:
        first = images_seen + self.rank * self.share
        indices = data_order(self.seed, first, self.share, len(self.images))
        if isinstance(self.images, Tensor):
            indices_on_device = to_device(torch.from_numpy(indices), self.device)
            return to_float(self.images[indices_on_device])
        batch = torch.from_numpy(np.asarray(self.images[indices]))
        return to_float(to_device(batch, self.device))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, copied to a GPU from pinned memory, without waiting for it."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def mirror_half(images: Tensor) -> Tensor:
    """Each image mirrored with probability 1/2, by torch's own generator."""
    mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(mirrored, images.flip(-1), images)


def data_order(seed: int, first: int, count: int, num_images: int) -> np.ndarray:
    """Image indices [count] at positions first, first + 1, ... of the stream of permutations."""
    parts, end = [], first + count
    while first < end:
        epoch, offset = divmod(first, num_images)
        part = permutation(seed, epoch, num_images)[offset:offset + end - first]
        parts.append(part)
        first += len(part)
    return np.concatenate(parts)


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, num_images: int) -> np.ndarray:
    """The order of the images [num_images] in an epoch."""
    generator = np.random.default_rng(derive_seed("epoch", seed, epoch))
    return generator.permutation(num_images)


def load_images(config: Config, split: str = "train") -> np.ndarray:
    """The images of config.data as uint8 [N, C, H, W].

    A folder has no splits: either one is all of it.  Raises UserError if there is nothing to load.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r} is impossible: train or test")
    size, channels = config.image_size, config.channels
    if config.data in (*DOWNLOADS, "shapes") and Path(config.data).is_dir():
        warn(f"{config.data} is the data set of that name: for the folder, --data ./{config.data}")
    if config.data == "shapes":
        count = 10_000 if split == "train" else 1_000
        return draw_shapes(count, size, channels, split)
    if config.data in DOWNLOADS:
        return download(config.data, config.data_dir, size, channels, split)
    if not Path(config.data).is_dir():
        known = ", ".join([*DOWNLOADS, "shapes"])
        raise UserError(f"data={config.data!r} is neither a folder nor one of {known}: name "
                        "one with --data")
    return load_folder(Path(config.data), Path(config.data_dir), size, channels)


def download(name: str, data_dir: str, size: int, channels: int, split: str) -> np.ndarray:
    """A data set of torchvision, downloaded into data_dir unless it is there."""
    from torchvision import datasets  # here, since importing it takes longer than torch itself

    kind, archive = DOWNLOADS[name]
    try:
        dataset = getattr(datasets, kind)(data_dir, train=split == "train", download=True)
    except Exception as error:  # a damaged file can raise anything
        raise UserError(
            f"{name} could not be downloaded or read ({brief(error)}): remove what there is of it "
            f"in {data_dir} and put {archive} there by hand, or use --data shapes, which needs no "
            "download") from error
    pictures = (Image.fromarray(np.asarray(pixels)) for pixels in dataset.data)
    squares = (to_square(picture, size, channels) for picture in pictures)
    return stack(squares, len(dataset.data), size, channels)


def stack(images: Iterator[np.ndarray], count: int, size: int, channels: int) -> np.ndarray:
    """[count, channels, size, size], filled one by one.

    np.stack of thousands of small arrays fragments the heap and slows training by a quarter.
    """
    return np.fromiter(images, np.dtype((np.uint8, (channels, size, size))), count)


# The built-in data set

def draw_shapes(count: int, size: int, channels: int, split: str) -> np.ndarray:
    """One bright circle, square or triangle on a dark ground per image; always the same ones."""
    rng = np.random.default_rng(derive_seed("shapes", 0 if split == "train" else 1))
    squares = (to_square(draw_shape(rng, size), size, channels) for _ in range(count))
    return stack(squares, count, size, channels)


def draw_shape(rng: np.random.Generator, size: int, scale: int = 8) -> Image.Image:
    """One shape, drawn scale times as large and reduced, so that its edge is smooth."""
    large = size * scale
    kind = rng.choice(["circle", "square", "triangle"])
    radius = rng.uniform(0.22, 0.36) * large
    x, y = rng.uniform(radius, large - radius, 2)
    hue = rng.integers(6) / 6  # red, yellow, green, cyan, blue, magenta
    color = tuple(round(255 * c) for c in colorsys.hsv_to_rgb(hue, 0.75, 1.0))
    image = Image.new("RGB", (large, large), (20, 20, 30))
    draw = ImageDraw.Draw(image)
    if kind == "circle":
        draw.circle((x, y), radius, color)
    else:
        sides = 4 if kind == "square" else 3
        draw.regular_polygon((x, y, radius), sides, fill=color)
    return image.reduce(scale)
