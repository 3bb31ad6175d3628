"""One .pth: written whole or not at all, read without running any code in it, a network from it.

latest.pth holds config, step, images_seen, model, ema, optimizer, scaler and the sums for the next
row of metrics.csv; a kept checkpoint only config, step and ema: all that sampling needs.
"""

import errno
import hashlib
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from config import FIXED, Config, largest_divisor, level_sizes
from model import UNet
from utils.cli import UserError, brief, warn
from utils.files import atomic_write

# The checkpoints of a run: only files of these names are looked at in its folder.
NAMES = r"(latest|final_model|checkpoint_epoch_\d+)\.pth"


def save_checkpoint(content: dict[str, Any], path: Path) -> None:
    """Save content at path.  Raises OSError if the disk refuses; what was there before stays."""
    with atomic_write(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch's word for a failed write
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise OSError(errno.EIO, brief(error)) from error


def load_checkpoint(
    path: Path, device: torch.device | str = "cpu", mmap: bool = False
) -> dict[str, Any]:
    """The dict in the file; mmap: its tensors are read when they are used, and not checked.

    Raises UserError if it is missing, damaged, not a checkpoint, not finite, or would run code.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist: train first, or name another file")
    if not path.is_file():
        raise UserError(f"{path} is not a file")
    mmap = mmap and not has_surrogates(path)
    with open(path, "rb") as file:
        if not zipfile.is_zipfile(file):  # which torch.save makes
            raise UserError(f"{path} is truncated, or not a checkpoint of this project")
        try:
            check_crcs(file, of_tensors=not mmap)
            file.seek(0)
            source = path if mmap else file
            content = torch.load(source, map_location=device, weights_only=True, mmap=mmap)
            finite = mmap or is_finite(content)
        except pickle.UnpicklingError as error:
            raise UserError(f"{path} is refused: it holds a pickle that could run code") from error
        except Exception as error:  # a damaged file can raise anything
            raise UserError(f"{path} cannot be read, it is damaged: {brief(error)}") from error
    if not isinstance(content, dict) or not {"config", "step", "ema"} <= content.keys():
        raise UserError(f"{path} is not a checkpoint of this project "
                        "(it lacks config, step or ema)")
    for name in ("step", "images_seen"):
        count = content.get(name, 0)
        if type(count) is not int or count < 0:
            raise UserError(f"{path} is damaged: {name} is {str(count)[:50]!r}")
    if not finite:
        raise UserError(f"{path} holds numbers that are not finite: take an earlier checkpoint")
    return content


def has_surrogates(path: Path) -> bool:
    """Whether its name is not text: PyTorch maps no such file into memory."""
    return any("\ud800" <= letter <= "\udfff" for letter in str(path))


def check_crcs(file: BinaryIO, of_tensors: bool) -> None:
    """Raise BadZipFile if a byte has changed: torch.load does not notice.

    of_tensors: check the tensors too, for which the whole file is read.
    """
    with zipfile.ZipFile(file) as archive:
        for name in archive.namelist():
            if of_tensors or name.endswith("data.pkl"):
                archive.read(name)


def tensors_of(content: Any) -> Iterator[Tensor]:
    """The tensors in nested dicts."""
    if isinstance(content, dict):
        for value in content.values():
            yield from tensors_of(value)
    elif isinstance(content, Tensor):
        yield content


def is_finite(content: dict[str, Any]) -> bool:
    """Whether no tensor in it has an infinity or a NaN."""
    return all(tensor.isfinite().all() for tensor in tensors_of(content))


def is_of_step(path: Path, step: int) -> bool:
    """Whether it is a checkpoint of this step, whole as far as that can be seen at once."""
    try:
        return load_checkpoint(path, mmap=True)["step"] == step
    except UserError:
        return False


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints that training has written there: a folder may hold others' files too."""
    return [path for path in folder.glob("*.pth") if re.fullmatch(NAMES, path.name)]


def newest_checkpoint(run_dir: Path) -> Path:
    """The checkpoint in run_dir/checkpoints with the most steps.  Raises UserError without one.

    It goes by the step inside, since copying changes a file's date.  Of equal ones final_model.pth.
    """
    folder = run_dir / "checkpoints"
    paths = checkpoints_in(folder)
    if not paths:
        raise UserError(f"no checkpoint in {folder}: train first, or name one with "
                        "--checkpoint FILE")

    def newness(path: Path) -> tuple[int, bool]:
        return load_checkpoint(path, mmap=True)["step"], path.name == "final_model.pth"

    return max(sorted(paths), key=newness)


# What is made of it

def load_network(path: Path, device: torch.device) -> tuple[UNet, Config, int]:
    """The network of a checkpoint with its EMA weights, its config and its training steps."""
    content = load_checkpoint(path, device)
    config = read_config(content, path)
    model = UNet(config).to(device).eval()
    try:
        model.load_state_dict(content["ema"])
    except Exception as error:  # what does not fit can raise anything
        raise does_not_fit_error(path, error) from error
    return model, config, content["step"]


def does_not_fit_error(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} does not fit this network: {brief(error)}")


def read_config(content: dict[str, Any], path: Path) -> Config:
    """The Config in a checkpoint's content.  Raises UserError if this version cannot use it."""
    try:
        values = dict(content["config"])
        # It may name sizes that no level has: no attention was built for them.
        if "attn_resolutions" in values:
            sizes = level_sizes(values["image_size"], values["dim_mults"])
            known = [size for size in values["attn_resolutions"] if size in sizes]
            values["attn_resolutions"] = known
        if "norm_groups" not in values:  # older ones had groups of a single channel too
            values["norm_groups"] = largest_divisor(values.get("dim", Config.dim), most=32)
        config = Config(**values)
    except Exception as error:  # of what a damaged one may raise there is no list
        raise UserError(f"{path} has a config that this version cannot use: "
                        f"{brief(error)}") from error
    if missing := [name for name in FIXED if name not in values]:
        warn(f"{path} does not say {', '.join(missing)}: the default is taken")
    return config


def network_digest(model: UNet, config: Config) -> str:
    """What tells one network from another: its weights, and what they are the weights of."""
    digest = hashlib.sha256(repr([getattr(config, name) for name in FIXED]).encode())
    for weights in model.state_dict().values():
        digest.update(weights.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
