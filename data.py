"""Images in: every data set becomes one uint8 array [N, C, H, W]; batches are cut from it by index.

    images = load_images(Config(data="shapes"))
    batches = Batches(images, config, device)
    x_start = batches(images_seen)                # float [B, C, H, W] in [-1, 1]
"""

import colorsys
import hashlib
import io
import math
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from torch import Tensor

from config import Config
from utils.cli import UserError, brief, progress_bar, warn
from utils.files import atomic_write, remove_left_overs
from utils.randomness import derive_seed

DOWNLOADS = {  # name: (torchvision's class, where the archive goes by hand)
    "cifar10": ("CIFAR10", "cifar-10-python.tar.gz"),
    "mnist": ("MNIST", "MNIST/raw/*-ubyte.gz"),
    "fashion_mnist": ("FashionMNIST", "FashionMNIST/raw/*-ubyte.gz"),
}
EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def to_float(images: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """float, clamped to [-1, 1] -> uint8 0..255, rounded: all 256 values survive the round trip."""
    from_0_to_2 = images.float().clamp(-1, 1) + 1
    return (from_0_to_2 * 127.5).round().to(torch.uint8)


def to_picture(images: Tensor, columns: int = 0) -> Image.Image:
    """images [N, C, H, W] in [-1, 1] side by side, in so many columns (0: about a square)."""
    count, _, height, width = images.shape
    columns = min(count, columns or math.ceil(math.sqrt(count)))
    rows = math.ceil(count / columns)
    edge = 2
    size = (edge + columns * (width + edge), edge + rows * (height + edge))
    picture = Image.new("RGB", size)
    pixels = to_uint8(images).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()
    for i, image in enumerate(pixels):
        row, column = divmod(i, columns)
        corner = (edge + column * (width + edge), edge + row * (height + edge))
        picture.paste(Image.fromarray(image), corner)
    return picture


class Batches:
    """batches(images_seen): the next images of this rank, float [B, C, H, W] in [-1, 1].

    B is batch_size / world_size.  The order is one permutation of the data after another, each
    drawn from (seed, epoch); a step takes the next batch_size images, rank r its slice of them.
    No step waits for a GPU.
    """

    def __init__(
        self, images: np.ndarray, config: Config, device: torch.device, rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.images = images
        self.seed = config.seed
        self.batch_size = config.batch_size // world_size  # of this process
        self.device = device
        self.rank = rank
        # The indices that are on the GPU: one epoch of the stream, from this position on.
        self.order, self.order_start = torch.empty(0), 0
        if device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info(device)[0] / 4:
            self.images = torch.tensor(images, device=device)

    def __call__(self, images_seen: int) -> Tensor:
        first = images_seen + self.rank * self.batch_size
        if isinstance(self.images, Tensor):
            return to_float(self.images[self.order_on_device(first)])
        indices = data_order(self.seed, first, self.batch_size, len(self.images))
        batch = torch.from_numpy(np.asarray(self.images[indices]))
        return to_float(to_device(batch, self.device))

    def order_on_device(self, first: int) -> Tensor:
        """Image indices [B] at positions first, first + 1, ...: copied once per epoch."""
        end = self.order_start + len(self.order)
        if not self.order_start <= first <= end - self.batch_size:
            count = max(len(self.images), self.batch_size)
            order = data_order(self.seed, first, count, len(self.images))
            self.order, self.order_start = to_device(torch.from_numpy(order), self.device), first
        offset = first - self.order_start
        return self.order[offset:offset + self.batch_size]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor there.  From pinned memory it is copied without waiting for the GPU."""
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

    A folder has no splits: either one is all of it.  Raises UserError where there is nothing to
    load or to download.
    """
    size, channels = config.image_size, config.channels
    if config.data == "shapes":
        count = 10_000 if split == "train" else 1_000
        return draw_shapes(count, size, channels, split)
    if config.data in DOWNLOADS:
        return download(config.data, config.data_dir, size, channels, split)
    return load_folder(Path(config.data), Path(config.data_dir), size, channels)


def download(name: str, data_dir: str, size: int, channels: int, split: str) -> np.ndarray:
    """A data set of torchvision, downloaded into data_dir where it is not there yet."""
    from torchvision import datasets  # here, since importing it takes longer than torch itself

    kind, archive = DOWNLOADS[name]
    try:
        dataset = getattr(datasets, kind)(data_dir, train=split == "train", download=True)
    except (OSError, RuntimeError) as error:
        reason = brief(error)
        raise UserError(
            f"{name} could not be downloaded ({reason}): put {archive} into {data_dir} by hand, "
            "or use --data shapes, which needs no download") from error
    pictures = (Image.fromarray(np.asarray(pixels)) for pixels in dataset.data)
    squares = (to_square(picture, size, channels) for picture in pictures)
    return stack(squares, len(dataset.data), size, channels)


def stack(images: Iterator[np.ndarray], count: int, size: int, channels: int) -> np.ndarray:
    """[count, channels, size, size], filled one by one.

    np.stack of thousands of small arrays fragments the heap and slows training by a quarter.
    """
    return np.fromiter(images, np.dtype((np.uint8, (channels, size, size))), count)


# Folders

def load_folder(folder: Path, data_dir: Path, size: int, channels: int) -> np.ndarray:
    """All images below folder, decoded once into a file in data_dir, memory-mapped from there."""
    if not folder.is_dir():
        known = ", ".join([*DOWNLOADS, "shapes"])
        raise UserError(f"data={str(folder)!r} is neither a folder nor one of {known}")
    paths = sorted(images_below(folder))
    if not paths:
        raise UserError(f"{folder} and its sub-folders hold no image ({' '.join(EXTENSIONS)})")

    # The cache is found again by what it was made of.
    key = hashlib.sha256(repr((str(folder.resolve()), size, channels)).encode())
    for path in paths:
        stat = path.stat()
        name = str(path.relative_to(folder))
        key.update(repr((name, stat.st_size, stat.st_mtime_ns)).encode())
    start = folder.resolve().name[:50]  # a file's name may have 255 bytes
    cache = data_dir / f"{start}-{key.hexdigest()[:16]}.images"

    try:
        images = read_cache(cache, len(paths), size, channels)
    except (OSError, ValueError):  # not there, or truncated
        decode_folder(paths, cache, size, channels)
        images = read_cache(cache, len(paths), size, channels)
    damaged = len(paths) - len(images)
    if damaged:
        warn(f"{damaged} of {len(paths)} images in {folder} are damaged and left out")
    return images


def images_below(folder: Path) -> Iterator[Path]:
    """The image files in folder and its sub-folders, links to folders too."""
    entered = set()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=raise_error):
        real = os.path.realpath(parent)
        if real in entered:  # a link that leads back
            folders.clear()
            continue
        entered.add(real)
        for name in files:
            path = Path(parent, name)
            if path.suffix.lower() in EXTENSIONS and path.is_file():
                yield path


def raise_error(error: OSError) -> NoReturn:
    """Of a sub-folder that cannot be read, which os.walk would leave out without a word."""
    raise error


def read_cache(cache: Path, num_paths: int, size: int, channels: int) -> np.ndarray:
    """What decode_folder wrote: the pixels, then a byte per path, 1 where it could be read."""
    if not cache.is_file():  # opening a pipe would wait for ever
        raise FileNotFoundError(cache)
    content = np.memmap(cache, np.uint8, "r")
    pixels, readable = content[:-num_paths], content[-num_paths:]
    images = pixels.reshape(-1, channels, size, size)
    if len(images) == 0 or len(images) != readable.sum():
        raise ValueError(f"{cache} is not whole")
    return images


def decode_folder(paths: list[Path], cache: Path, size: int, channels: int) -> None:
    """Write the images of paths to cache, and which of them could be read; name the damaged ones.

    Raises OSError where a file cannot be opened: unlike damage that may pass, so no cache is made.
    """
    problems = []

    def decode(path: Path) -> bytes:
        content = path.read_bytes()
        try:
            with Image.open(io.BytesIO(content)) as image:
                return to_square(image, size, channels).tobytes()
        except MemoryError:
            raise
        except Exception as error:  # a damaged file can raise anything; it is reported, not fatal
            reason = "not an image" if isinstance(error, UnidentifiedImageError) else error
            problems.append(f"{path} ({reason})")
            return b""

    cache.parent.mkdir(parents=True, exist_ok=True)
    remove_left_overs(cache.parent, re.escape(cache.name), seconds=3600)
    readable = bytearray()
    pool = ThreadPoolExecutor()
    try:
        with atomic_write(cache) as file:
            decoded = pool.map(decode, paths)
            for pixels in progress_bar(decoded, "decoding images", len(paths), unit="image"):
                file.write(pixels)
                readable.append(len(pixels) > 0)
            file.write(readable)
            if not any(readable):
                some = "; ".join(problems[:10])
                raise UserError(f"none of {len(paths)} images could be read: {some}")
    finally:
        pool.shutdown(cancel_futures=True)  # after a signal too: what waits is not decoded
    for problem in sorted(problems):
        warn(problem)


def to_square(image: Image.Image, size: int, channels: int) -> np.ndarray:
    """Any picture -> uint8 [channels, size, size].

    Turned upright, put on white where transparent, resized, centre-cropped.
    """
    transparent_value = image.info.get("transparency")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits per pixel: Pillow's conversion would clip them at 255
        values = np.array(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("more than 16 bits per pixel")
        if transparent_value is not None:
            values[values == transparent_value] = 65535
        if image.mode == "I" and values.max() <= 255:  # 8 bits in the space of 32
            values = values * 257
        image = Image.fromarray((values / 257).round().astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    image = image.convert("RGB" if channels == 3 else "L")
    image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(size, size, channels).transpose(2, 0, 1)


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
