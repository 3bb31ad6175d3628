"""Files that are written whole or not at all."""

import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image
from tqdm import tqdm

from utils.cli import UserError


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A file that becomes path only when it is complete and on the disk.

    After an error, or a power cut, path is as it was.
    """
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


def remove_left_overs(folder: Path, seconds: float = 0) -> None:
    """The temporary files that killed processes left behind, where they are older than that."""
    for path in folder.glob("*.tmp"):
        if time.time() - path.stat().st_mtime >= seconds:
            path.unlink(missing_ok=True)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Raises UserError where path cannot be written."""
    text = json.dumps(values, indent=2) + "\n"
    try:
        with atomic_write(path) as file:
            file.write(text.encode())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}") from error


def save_png(picture: Image.Image, path: Path) -> None:
    with atomic_write(path) as file:
        picture.save(file, "PNG")


class PatientWriter:
    """Writes what a run writes.

    Where the disk refuses it warns, goes on, and leaves what was there before; the next write of
    that path is the next try.
    """

    def __init__(self) -> None:
        self.unwritten: set[Path] = set()

    def write(self, path: Path, save: Callable[[Path], None]) -> None:
        try:
            save(path)
        except OSError as error:
            self.unwritten.add(path)
            tqdm.write(f"warning: {path} could not be written ({error}); what was there before is "
                       "still there", file=sys.stderr)
        else:
            self.unwritten.discard(path)
