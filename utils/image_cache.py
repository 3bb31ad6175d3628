"""Any folder of any pictures, decoded once: uint8 [N, C, H, W], memory-mapped from a file.

    images = load_folder(folder, data_dir, size, channels)
"""

import hashlib
import io
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from utils.cli import UserError, brief, progress_bar, warn
from utils.files import atomic_write, remove_left_overs

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def load_folder(folder: Path, data_dir: Path, size: int, channels: int) -> np.ndarray:
    """All images below folder, decoded once into a file in data_dir, memory-mapped from there."""
    paths = images_below(folder)
    cache = data_dir / cache_name(folder, paths, size, channels)
    try:
        images = read_cache(cache, len(paths), size, channels)
    except (OSError, ValueError):  # not there, or truncated
        decode_folder(paths, cache, size, channels)
        images = read_cache(cache, len(paths), size, channels)
    damaged = len(paths) - len(images)
    if damaged:
        warn(f"{damaged} of {len(paths)} images in {folder} are damaged and left out")
    return images


def cache_name(folder: Path, paths: list[Path], size: int, channels: int) -> str:
    """Name the cache after all that it is made of, by which it is found again."""
    key = hashlib.sha256(repr((str(folder.resolve()), size, channels)).encode())
    for path in paths:
        stat = path.stat()
        name = str(path.relative_to(folder))
        key.update(repr((name, stat.st_size, stat.st_mtime_ns)).encode())
    start = folder.resolve().name[:50]  # a file's name may have 255 bytes
    return f"{start}-{key.hexdigest()[:16]}.images"


def refuse_other_sizes(folder: Path, size: int) -> None:
    """Raise UserError for an image below folder that load_folder would resize."""
    for path in images_below(folder):
        try:
            with Image.open(path) as image:
                width, height = image.size
        except Exception as error:  # a damaged file can raise anything
            raise UserError(f"{path} cannot be read as an image: {brief(error)}") from error
        if (width, height) != (size, size):
            raise UserError(f"{path} is {width} x {height}, not {size} x {size} as what it is "
                            "compared with")


def images_below(folder: Path) -> list[Path]:
    """The image files in folder and its sub-folders, also linked ones.

    Raises UserError if there are none.
    """
    paths, entered = [], set()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=raise_error):
        real = os.path.realpath(parent)
        if real in entered:  # a link that leads back
            folders.clear()
            continue
        entered.add(real)
        for name in files:
            path = Path(parent, name)
            if path.suffix.lower() in EXTENSIONS and path.is_file():
                paths.append(path)
    if not paths:
        raise UserError(f"{folder} and its sub-folders hold no image ({' '.join(EXTENSIONS)})")
    return sorted(paths)


def raise_error(error: OSError) -> NoReturn:
    """Raise the error: os.walk would leave out a sub-folder that it cannot read without a word."""
    raise error


def read_cache(cache: Path, num_paths: int, size: int, channels: int) -> np.ndarray:
    """Read what decode_folder wrote: the pixels, then a byte per path, 1 if it could be read."""
    content = np.memmap(cache, np.uint8, "r")
    pixels, readable = content[:-num_paths], content[-num_paths:]
    images = pixels.reshape(-1, channels, size, size)
    if len(images) == 0 or len(images) != readable.sum():
        raise ValueError(f"{cache} is not whole")
    return images


def decode_folder(paths: list[Path], cache: Path, size: int, channels: int) -> None:
    """Write the images of paths to cache, and which of them could be read; name the damaged ones.

    Raises OSError if a file cannot be opened: unlike damage that may pass, so no cache is made.
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

    It is turned upright, put on white if it is transparent, resized and centre-cropped.
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


def read_picture(path: Path, size: int, channels: int) -> np.ndarray:
    """One picture as uint8 [channels, size, size].  Raises UserError if it cannot be read."""
    try:
        with Image.open(path) as image:
            if image.size != (size, size):
                print(f"{path}: {image.width} x {image.height}, resized to {size} x {size}")
            return to_square(image, size, channels)
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"{path} cannot be read as an image: {error}") from error
