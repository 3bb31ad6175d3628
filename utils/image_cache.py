"""Any folder of any pictures, decoded once: uint8 [N, C, H, W], memory-mapped from a file.

    images = load_folder(folder, data_dir, size, channels)
"""

import glob
import hashlib
import io
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from utils.cli import UserError, brief, progress_bar, warn
from utils.files import atomic_write, remove_left_overs

EXTENSIONS = (
    ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
CACHE_FORMAT = b"2"
AT_A_TIME = 256  # pictures
FEW_LEVELS = 32
NOT_READ = (  # but pictures
    ".apng", ".arw", ".avif", ".cr2", ".dib", ".dng", ".exr", ".heic", ".heif", ".ico", ".j2k",
    ".jp2", ".jpe", ".jpx", ".jxl", ".mpo", ".nef", ".pbm", ".pcx", ".pnm", ".psd", ".svg", ".tga")
SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")


def load_folder(folder: Path, data_dir: Path, size: int, channels: int) -> np.ndarray:
    """All images below folder, decoded once into a file in data_dir, memory-mapped from there."""
    paths = images_below(folder)
    start, key = cache_name(folder, paths, size, channels)
    cache = data_dir / f"{start}-{key}.images"
    try:
        images, low, high = read_cache(cache, len(paths), size, channels)
    except (OSError, ValueError):  # not there, or truncated
        decode_folder(paths, cache, size, channels)
        images, low, high = read_cache(cache, len(paths), size, channels)
        caches = data_dir.glob(f"{glob.escape(start)}-*.images")
        earlier = [str(path) for path in caches if path != cache]
        if earlier:
            warn(f"{folder} has changed; what was decoded of it before can be deleted: "
                 f"{' '.join(sorted(earlier))}")
    unreadable = len(paths) - len(images)
    if unreadable:
        warn(f"{unreadable} of {len(paths)} images in {folder} cannot be read and are left out")
    levels = round(high / 257) - round(low / 257) + 1
    if low <= high and levels < FEW_LEVELS:
        warn(f"the 16-bit images in {folder} use only the values from {low} to {high} of 0 to "
             f"65535, of which {levels} of 256 levels are left: stretch them over the whole range "
             "first")
    return images


def cache_name(folder: Path, paths: list[Path], size: int, channels: int) -> tuple[str, str]:
    """Name the cache after all that it is made of: the folder and the settings; the pictures."""
    settings = repr((str(folder.resolve()), size, channels)).encode()
    key = hashlib.sha256(CACHE_FORMAT)
    for path in paths:
        stat = path.stat()
        name = str(path.relative_to(folder))
        # A picture that is replaced may keep its size, and programs give it the time of the old.
        changed = (stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
        key.update(repr((name, stat.st_size, changed)).encode())
    start = folder.resolve().name[:50]  # a file's name may have 255 bytes
    return f"{start}-{hashlib.sha256(settings).hexdigest()[:8]}", key.hexdigest()[:16]


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
    """The image files in folder and its sub-folders, also linked ones, but no hidden ones.

    Raises UserError if there are none.
    """
    paths, not_read, entered = [], [], set()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=raise_error):
        real = os.path.realpath(parent)
        if real in entered:  # a link that leads back
            folders.clear()
            continue
        entered.add(real)
        folders[:] = [name for name in folders if not is_hidden(name)]
        for name in files:
            path = Path(parent, name)
            if is_hidden(name) or not path.is_file():
                continue
            if path.suffix.lower() in EXTENSIONS:
                paths.append(path)
            elif path.suffix.lower() in NOT_READ:
                not_read.append(path)
    if not_read:
        warn(f"{len(not_read)} images in {folder}, such as {min(not_read)}, are left out: convert "
             "them to PNG or JPEG")
    if not paths:
        raise UserError(f"{folder} and its sub-folders hold no image ({' '.join(EXTENSIONS)})")
    return sorted(paths)


def is_hidden(name: str) -> bool:
    """Whether a system or an editor keeps it for itself: copies, thumbnails, the waste."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def raise_error(error: OSError) -> NoReturn:
    """Raise the error: os.walk would leave out a sub-folder that it cannot read without a word."""
    raise error


def read_cache(
    cache: Path, num_paths: int, size: int, channels: int
) -> tuple[np.ndarray, int, int]:
    """Read what decode_folder wrote: the images, and the least and largest value of 16 bits."""
    content = np.memmap(cache, np.uint8, "r")
    pixels, readable, extremes = np.split(content, [-num_paths - 4, -4])
    images = pixels.reshape(-1, channels, size, size)
    if len(images) == 0 or len(images) != readable.sum():
        raise ValueError(f"{cache} is not whole")
    low, high = extremes.view("<u2")
    return images, int(low), int(high)


def decode_folder(paths: list[Path], cache: Path, size: int, channels: int) -> None:
    """Write the images of paths to cache, and name those that cannot be read.

    After the pixels come a byte per path, 1 if it could be read, and the least and largest value
    of the pictures of 16 bits.  Raises OSError if a file cannot be opened: unlike damage that may
    pass, so no cache is made.
    """
    problems, of_several, extremes = [], [], [(65535, 0)]

    def decode(path: Path) -> bytes:
        content = path.read_bytes()
        try:
            with Image.open(io.BytesIO(content)) as image:
                with suppress(Exception):  # the pages after the first may be damaged
                    # A phone's photo (MPO) may hold a second one, and is one picture all the same.
                    if image.n_frames > 1 and image.format != "MPO":
                        of_several.append(path)
                if is_deep(image):
                    values = values_of_16_bits(image, image)
                    extremes.append((values.min(), values.max()))
                return to_square(image, size, channels).tobytes()
        except MemoryError:
            raise
        except Exception as error:  # a damaged file can raise anything; it is reported, not fatal
            reason = "not an image" if isinstance(error, UnidentifiedImageError) else error
            problems.append(f"{path} ({reason})")
            return b""

    def decoded() -> Iterator[bytes]:
        # Piece by piece: what is decoded waits in memory while the disk is slow.
        for first in range(0, len(paths), AT_A_TIME):
            yield from pool.map(decode, paths[first:first + AT_A_TIME])

    cache.parent.mkdir(parents=True, exist_ok=True)
    remove_left_overs(cache.parent, re.escape(cache.name), seconds=3600)
    readable = bytearray()
    pool = ThreadPoolExecutor()
    try:
        with atomic_write(cache) as file:
            for pixels in progress_bar(decoded(), "decoding images", len(paths), unit="image"):
                file.write(pixels)
                readable.append(len(pixels) > 0)
            file.write(readable)
            lows, highs = zip(*extremes, strict=True)
            file.write(np.array([min(lows), max(highs)], "<u2").tobytes())
            if not any(readable):
                some = "; ".join(problems[:10])
                raise UserError(f"none of {len(paths)} images could be read: {some}")
    finally:
        pool.shutdown(cancel_futures=True)  # after a signal too: what waits is not decoded
    for problem in sorted(problems):
        warn(problem)
    if of_several:
        warn(f"{len(of_several)} images, such as {min(of_several)}, have several pages or frames: "
             "the first one counts")


def to_square(image: Image.Image, size: int, channels: int) -> np.ndarray:
    """Any picture -> uint8 [channels, size, size].

    It is turned upright, put on white if it is transparent, resized and centre-cropped.
    """
    original = image
    with suppress(Exception):  # what is said of the picture may be damaged, and the picture whole
        image = ImageOps.exif_transpose(image)
    if is_deep(image):
        values = values_of_16_bits(image, original)
        transparent_value = original.info.get("transparency")
        if transparent_value is not None:
            values[values == transparent_value] = 65535
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


def is_deep(image: Image.Image) -> bool:
    """Whether it has more than 8 bits per pixel: Pillow's conversion would clip them at 255."""
    return image.mode.startswith("I")


def values_of_16_bits(image: Image.Image, original: Image.Image) -> np.ndarray:
    """The values of a deep picture in 0 to 65535, by what the file it comes from says of them.

    Raises ValueError if they are not within its range.
    """
    values = np.array(image).astype(np.int64)
    most, is_inverted = 65535, False
    if original.format == "TIFF":
        bits = original.tag_v2[BITS_PER_SAMPLE][0]
        if original.tag_v2.get(SAMPLE_FORMAT, (1,))[0] == 2:  # signed
            bits -= 1
        most = min(most, 2**bits - 1)  # 32 bits are taken for 16: nobody uses all of them
        is_inverted = original.tag_v2.get(PHOTOMETRIC) == 0
    if values.min() < 0:
        raise ValueError("negative values have no known range")
    if values.max() > most:
        raise ValueError("more than 16 bits per pixel")
    if is_inverted:
        values = most - values
    return values * 65535 // most


def read_picture(path: Path, size: int, channels: int) -> np.ndarray:
    """One picture as uint8 [channels, size, size].  Raises UserError if it cannot be read."""
    try:
        with Image.open(path) as image:
            if image.size != (size, size):
                print(f"{path}: {image.width} x {image.height}, resized to {size} x {size}")
            return to_square(image, size, channels)
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"{path} cannot be read as an image: {error}") from error
