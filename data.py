"""Images in and out.  Every data set becomes one uint8 array [N, C, H, W]; batches are cut from it by index.

    images = load_images(Config(data="shapes"))
    batches = Batches(images, config, device)
    x_start = batches(step)                       # float [B, C, H, W] in [-1, 1]
"""

import colorsys
import hashlib
import json
import math
import os
import secrets
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.utils import make_grid
from tqdm import tqdm

from config import Config, UserError, derive_seed

# Lively on a terminal, sparing in a log file.
progress_bar = partial(tqdm, mininterval=0.5 if sys.stderr.isatty() else 30)

DOWNLOADS = {  # name: (torchvision's class, where the archive goes by hand)
    "cifar10": (datasets.CIFAR10, "cifar-10-python.tar.gz"),
    "mnist": (datasets.MNIST, "MNIST/raw/*-ubyte.gz"),
    "fashion_mnist": (datasets.FashionMNIST, "FashionMNIST/raw/*-ubyte.gz"),
}
EXTENSIONS = (*IMG_EXTENSIONS, ".gif")


def to_float(images: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """float, clamped to [-1, 1] -> uint8 0..255, rounded: all 256 values survive the round trip."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


class Batches:
    """batches(step): this rank's images of that step as float [batch_size / world_size, C, H, W] in [-1, 1].

    The order is one permutation of the data after another, drawn from (seed, epoch); step k takes the positions
    k * batch_size onwards, rank r its slice of them.  Half of the images are mirrored, by torch's own generator.
    """

    def __init__(self, images: np.ndarray, config: Config, device: torch.device, rank: int = 0,
                 world_size: int = 1) -> None:
        self.images, self.config, self.device, self.rank, self.world_size = images, config, device, rank, world_size
        if device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info(device)[0] / 4:
            self.images = torch.tensor(images, device=device)

    def __call__(self, step: int) -> Tensor:
        size = self.config.batch_size // self.world_size
        first = step * self.config.batch_size + self.rank * size
        indices = data_order(self.config.seed, first, size, len(self.images))
        if isinstance(self.images, Tensor):
            batch = self.images[torch.from_numpy(indices).to(self.device)]
        else:
            batch = torch.from_numpy(np.asarray(self.images[indices])).to(self.device)
        x_start = to_float(batch)
        if self.config.horizontal_flip:
            flip = torch.rand(size, 1, 1, 1, device=self.device) < 0.5
            x_start = torch.where(flip, x_start.flip(-1), x_start)
        return x_start


def data_order(seed: int, first: int, count: int, num_images: int) -> np.ndarray:
    """Image indices [count] at positions first, first + 1, ... of the stream of permutations."""
    epochs, offsets = np.divmod(np.arange(first, first + count), num_images)
    return np.concatenate([permutation(seed, int(epoch), num_images)[offsets[epochs == epoch]]
                           for epoch in np.unique(epochs)])


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, num_images: int) -> np.ndarray:
    return np.random.default_rng(derive_seed("epoch", seed, epoch)).permutation(num_images)


def load_images(config: Config, split: str = "train") -> np.ndarray:
    """The images of config.data as uint8 [N, C, H, W].  A folder has no splits: all of it is returned for each.

    Raises UserError where there is nothing to load or to download.
    """
    size, channels = config.image_size, config.channels
    if config.data == "shapes":
        return draw_shapes(10_000 if split == "train" else 1_000, size, channels, split)
    if config.data not in DOWNLOADS:
        return load_folder(Path(config.data), Path(config.data_dir), size, channels)

    dataset_class, archive = DOWNLOADS[config.data]
    try:
        dataset = dataset_class(config.data_dir, train=split == "train", download=True)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{config.data} could not be downloaded ({reason}): put {archive} into {config.data_dir} by "
                        "hand, or use --data shapes, which needs no download") from error
    return stack((to_square(Image.fromarray(np.asarray(picture)), size, channels) for picture in dataset.data),
                 len(dataset.data), size, channels)


def stack(images: Iterator[np.ndarray], count: int, size: int, channels: int) -> np.ndarray:
    """[count, channels, size, size], filled one by one: thousands of small arrays at once leave a heap in tatters."""
    return np.fromiter(images, np.dtype((np.uint8, (channels, size, size))), count)


# Folders

def load_folder(folder: Path, data_dir: Path, size: int, channels: int) -> np.ndarray:
    """All images below folder, decoded once into a .npy file in data_dir and memory-mapped from there."""
    if not folder.is_dir():
        raise UserError(f"data={str(folder)!r} is neither a folder nor one of {', '.join([*DOWNLOADS, 'shapes'])}")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
    if not paths:
        raise UserError(f"{folder} and its sub-folders hold no image ({' '.join(EXTENSIONS)})")
    key = hashlib.sha256(repr((str(folder.resolve()), size, channels)).encode())
    for path in paths:
        stat = path.stat()
        key.update(repr((str(path.relative_to(folder)), stat.st_size, stat.st_mtime_ns)).encode())
    cache = data_dir / f"{folder.resolve().name}-{key.hexdigest()[:16]}.npy"
    try:
        return np.load(cache, mmap_mode="r")
    except (OSError, ValueError, EOFError):  # not there, or truncated: made anew
        decode_folder(paths, cache, size, channels)
        return np.load(cache, mmap_mode="r")


def decode_folder(paths: list[Path], cache: Path, size: int, channels: int) -> None:
    """Write the readable ones of paths to cache as uint8 [N, channels, size, size]; name those that are not."""
    def decode(path: Path) -> np.ndarray | str:
        try:
            with Image.open(path) as image:
                return to_square(image, size, channels)
        except Exception as error:  # a damaged file can raise anything; it is reported, not fatal
            return f"{path} ({error})"

    unreadable, count = [], 0
    cache.parent.mkdir(parents=True, exist_ok=True)
    remove_left_overs(cache.parent, seconds=3600)  # a younger one may be another process's, at work on it
    with ThreadPoolExecutor() as pool, atomic_write(cache) as file:
        def write_header() -> None:  # numpy pads it, so that a second one fits over the first
            np.lib.format.write_array_header_1_0(
                file, {"descr": "|u1", "fortran_order": False, "shape": (count, channels, size, size)})

        write_header()
        for image in progress_bar(pool.map(decode, paths), "decoding images", len(paths), unit="image"):
            if isinstance(image, str):
                unreadable.append(image)
            else:
                file.write(image.tobytes())
                count += 1
        if not count:
            raise UserError(f"none of {len(paths)} images could be read: {'; '.join(unreadable[:10])}")
        file.seek(0)
        write_header()
    for line in unreadable:
        print(f"warning: skipped an image that cannot be read: {line}", file=sys.stderr)


def to_square(image: Image.Image, size: int, channels: int) -> np.ndarray:
    """Any picture -> uint8 [channels, size, size]: upright, on white where transparent, resized, centre-cropped."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits a pixel: Pillow's own conversion would clip them at 255
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("more than 16 bits a pixel")
        image = Image.fromarray((values / 257).round().astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = ImageOps.fit(image.convert("RGB" if channels == 3 else "L"), (size, size), Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(size, size, channels).transpose(2, 0, 1)


# The built-in data set

def draw_shapes(count: int, size: int, channels: int, split: str) -> np.ndarray:
    """Images of one circle, square or triangle of a bright colour on a dark ground, anti-aliased; always the same."""
    rng = np.random.default_rng(derive_seed("shapes", 0 if split == "train" else 1))
    return stack((to_square(draw_shape(rng, size), size, channels) for _ in range(count)), count, size, channels)


def draw_shape(rng: np.random.Generator, size: int, scale: int = 8) -> Image.Image:
    kind = rng.choice(["circle", "square", "triangle"])
    radius = rng.uniform(0.22, 0.36) * size * scale
    x, y = rng.uniform(radius, size * scale - radius, 2)
    hue = rng.integers(6) / 6  # red, yellow, green, cyan, blue, magenta
    color = tuple(round(255 * c) for c in colorsys.hsv_to_rgb(hue, 0.75, 1.0))
    image = Image.new("RGB", (size * scale, size * scale), (20, 20, 30))
    draw = ImageDraw.Draw(image)
    if kind == "circle":
        draw.circle((x, y), radius, color)
    else:
        draw.regular_polygon((x, y, radius), 4 if kind == "square" else 3, fill=color)
    return image.reduce(scale)


# Pictures and files out

def save_grid(images: Tensor, path: Path) -> None:
    """images [N, C, H, W] in [-1, 1] as one PNG, about as wide as it is high."""
    grid = make_grid(to_uint8(images.cpu()), nrow=math.ceil(math.sqrt(len(images))), padding=2)
    with atomic_write(path) as file:
        Image.fromarray(grid.permute(1, 2, 0).numpy()).save(file, "PNG")


def remove_left_overs(folder: Path, seconds: float = 0) -> None:
    """The temporary files that killed processes left behind, where they are older than that."""
    for path in folder.glob("*.tmp"):
        if time.time() - path.stat().st_mtime >= seconds:
            path.unlink(missing_ok=True)


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A file that becomes path only when it is complete and on the disk; after an error path is as it was."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, fields: dict[str, Any]) -> None:
    """Raises UserError where path cannot be written."""
    try:
        with atomic_write(path) as file:
            file.write(f"{json.dumps(fields, indent=2)}\n".encode())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}") from error
