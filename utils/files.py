"""Files that are written whole or not at all, and whose they are."""

import errno
import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from utils.cli import UserError

try:
    import fcntl
except ImportError:  # Windows has no such lock
    fcntl = None


def temporary_name(path: Path) -> Path:
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A file that becomes path only when it is complete and on the disk; its folder is made.

    After an error, or a power cut, path is as it was.  A link stays one, and its target is written.
    """
    target = path.resolve()
    temporary = temporary_name(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            error.filename = str(path)  # a write that fails does not know of which file
        raise


def remove_left_overs(folder: Path, pattern: str, seconds: float = 0) -> None:
    """Remove what atomic_write left behind when it was killed: pattern is that of its files' names.

    Others' files are left alone, and those younger than seconds: somebody may be writing them.
    """
    made_here = re.compile(rf"({pattern})\.[0-9a-f]{{8}}\.tmp")
    for path in folder.iterdir():
        if made_here.fullmatch(path.name) and path.is_file():
            with suppress(FileNotFoundError):  # its writer has just finished
                age = time.time() - path.stat().st_mtime
                if age >= seconds:
                    path.unlink()


def make_writable(path: Path) -> None:
    """Make the folder of a file that will be written, and try it; else OSError, before the work."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "Is a directory", str(path))
    if path.exists() and not path.is_file():
        raise FileExistsError(errno.EEXIST, "Is a device", str(path))
    if path.suffix == ".pth" and path.exists():
        raise FileExistsError(errno.EEXIST, "Is a checkpoint", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    trial = temporary_name(path)
    trial.touch()
    trial.unlink()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder inside.  The lock is the system's: it dies with the process.

    Raises UserError if another process holds it.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise UserError(f"another process is at work in {folder}: wait for it, or choose another "
                        "folder") from error
    except OSError:
        pass  # a file system without locks
    try:
        yield
    finally:
        os.close(descriptor)


def write_json(path: Path, values: dict[str, Any]) -> None:
    text = json.dumps(values, indent=2) + "\n"
    with atomic_write(path) as file:
        file.write(text.encode())
