"""Checkpoints: written whole or not at all, read without running any code in them; and resuming.

latest.pth holds config, step, images_seen, model, ema, optimizer, scaler and the sums for the next
row of metrics.csv; a kept checkpoint only config, step and ema: all that sampling needs.
"""

import copy
import hashlib
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from config import Config, level_sizes
from model import UNet
from utils.cli import UserError, brief
from utils.device import memory_format
from utils.files import atomic_write, locked, remove_left_overs
from utils.randomness import derive_seed

# What the weights and the diffusion are made of: a resumed run cannot change it.
FIXED = (
    "image_size", "channels", "dim", "dim_mults", "num_res_blocks", "attn_resolutions",
    "timesteps", "beta_schedule", "beta_start", "beta_end",
)
TRAINING_STATE = ("model", "optimizer", "scaler", "sums")


def checkpoints_of(run_dir: str | Path) -> Path:
    return Path(run_dir) / "checkpoints"


def latest_path(run_dir: str | Path) -> Path:
    return checkpoints_of(run_dir) / "latest.pth"


def save_checkpoint(content: dict[str, Any], path: Path) -> None:
    """Raises OSError where the disk does not take it; what was at path before is still there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch's word for a failed write
            raise OSError(brief(error)) from error


def load_checkpoint(
    path: Path, device: torch.device | str = "cpu", mmap: bool = False
) -> dict[str, Any]:
    """The dict in the file; mmap: its tensors are read when they are used.

    Raises UserError where it is missing, damaged, not a checkpoint, or would run code.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist: train first, or name another file")
    if not path.is_file():  # opening a pipe would wait for ever
        raise UserError(f"{path} is not a file")
    with open(path, "rb") as file:  # torch itself opens only names that are text
        if not zipfile.is_zipfile(file):  # which torch.save makes
            raise UserError(f"{path} is truncated, or not a checkpoint of this project")
        try:
            check_sums(file, of_tensors=not mmap)
            file.seek(0)
            source = path if mmap else file
            content = torch.load(source, map_location=device, weights_only=True, mmap=mmap)
        except pickle.UnpicklingError as error:
            raise UserError(f"{path} is refused: it holds a pickle that could run code") from error
        except Exception as error:  # a damaged file can raise anything
            raise UserError(f"{path} cannot be read, it is damaged: {brief(error)}") from error
    if not isinstance(content, dict) or not {"config", "step", "ema"} <= content.keys():
        raise UserError(f"{path} is not a checkpoint of this project "
                        "(it lacks config, step or ema)")
    return content


def check_sums(file: BinaryIO, of_tensors: bool) -> None:
    """Raises BadZipFile where a byte has changed: torch.load does not notice.

    of_tensors: check the tensors too, for which the whole file is read.
    """
    with zipfile.ZipFile(file) as archive:
        for name in archive.namelist():
            if of_tensors or name.endswith("data.pkl"):
                archive.read(name)


def load_network(path: Path, device: torch.device) -> tuple[UNet, Config, int]:
    """The network of a checkpoint with its EMA weights, its config and its training steps.

    Raises UserError where the weights do not fit the config or are not finite.
    """
    content = load_checkpoint(path, device)
    config = read_config(content, path)
    model = UNet(config).to(device).eval()
    check_alike(content["ema"], model.state_dict(), "ema", path)
    check_alike(content["step"], 0, "step", path)
    if not is_finite(content["ema"]):
        raise UserError(f"{path} holds weights that are not finite: take an earlier checkpoint")
    model.load_state_dict(content["ema"])
    return model, config, content["step"]


def is_of_step(path: Path, step: int) -> bool:
    """Whether it is a checkpoint of this step, whole as far as that can be seen at once."""
    try:
        return load_checkpoint(path, mmap=True)["step"] == step
    except UserError:
        return False


def read_config(content: dict[str, Any], path: Path) -> Config:
    """The Config in a checkpoint's content; UserError where this version cannot use it."""
    try:
        values = dict(content["config"])
        # It may name sizes that no level has: no attention was built for them.
        if "attn_resolutions" in values:
            sizes = level_sizes(values["image_size"], values["dim_mults"])
            known = [size for size in values["attn_resolutions"] if size in sizes]
            values["attn_resolutions"] = known
        config = Config(**values)
        missing = [name for name in FIXED if name not in values]
        if missing:
            raise ValueError(f"it lacks {', '.join(missing)}")
        return config
    except Exception as error:  # of what a damaged one may raise there is no list
        reason = brief(error)
        raise UserError(f"{path} has a config that this version cannot use: {reason}") from error


def check_alike(value: Any, expected: Any, name: str, path: Path) -> None:
    """Raises UserError where value, read from path, has another structure than expected.

    Dicts must have the same keys, tensors the same shape and dtype, all else the same type; a whole
    number may not be negative.
    """
    if isinstance(expected, dict) and isinstance(value, dict):
        if value.keys() != expected.keys():
            differing = sorted(map(str, value.keys() ^ expected.keys()))
            problem = f"it lacks, or has too many of: {', '.join(differing)[:200]}"
            raise UserError(f"{path} holds {NOT_OF_CONFIG}: {name}: {problem}")
        for key in expected:
            check_alike(value[key], expected[key], f"{name}.{key}", path)
    elif isinstance(expected, Tensor) and isinstance(value, Tensor):
        is_plain = value.layout == torch.strided and not value.is_meta and not value.is_nested
        if not is_plain:
            raise UserError(f"{path} holds {NOT_OF_CONFIG}: {name} is a tensor of another kind")
        if value.shape != expected.shape or value.dtype != expected.dtype:
            problem = f"{tuple(value.shape)} {value.dtype} instead of {tuple(expected.shape)} "
            raise UserError(f"{path} holds {NOT_OF_CONFIG}: {name}: {problem}{expected.dtype}")
    elif type(value) is not type(expected) or (type(value) is int and value < 0):
        raise UserError(f"{path} holds {NOT_OF_CONFIG}: {name} is {str(value)[:50]!r}")


NOT_OF_CONFIG = "another network or state than its config says"


def is_finite(content: Any) -> bool:
    """Whether no tensor in the nested dicts has an infinity or a NaN."""
    if isinstance(content, dict):
        return all(is_finite(value) for value in content.values())
    if isinstance(content, Tensor) and content.is_floating_point():
        return bool(content.isfinite().all())
    return True


def network_digest(model: UNet, config: Config) -> str:
    """What tells one network from another: its weights, and what they are the weights of."""
    digest = hashlib.sha256(repr([getattr(config, name) for name in FIXED]).encode())
    for weights in model.state_dict().values():
        digest.update(weights.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def newest_checkpoint(run_dir: Path) -> Path:
    """The checkpoint in run_dir/checkpoints with the most steps; UserError if there is none.

    By the step inside, since copying changes a file's date.  Of equal ones final_model.pth.
    """
    folder = checkpoints_of(run_dir)
    paths = [path for path in folder.glob("*.pth") if path.is_file()]
    if not paths:
        raise UserError(f"no checkpoint in {folder}: train first, or name one with "
                        "--checkpoint FILE")

    def newness(path: Path) -> tuple[int, bool]:
        step = load_checkpoint(path, mmap=True)["step"]
        check_alike(step, 0, "step", path)
        return step, path.name == "final_model.pth"

    return max(sorted(paths), key=newness)


# Resuming

class TrainingState:
    """All that training changes: what latest.pth holds, besides the config and the metrics."""

    def __init__(self, config: Config, device: torch.device, precision: str) -> None:
        torch.manual_seed(derive_seed("weights", config.seed))
        model = UNet(config).to(device, memory_format=memory_format(device, precision))
        self.model = model
        self.ema = copy.deepcopy(model).eval()
        self.optimizer = torch.optim.Adam(model.parameters(), fused=True)
        for p in model.parameters():  # as Adam's first step would: so the state is always whole
            count = torch.zeros((), device=device)
            moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            self.optimizer.state[p] = {"step": count, **moments}
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.step = 0  # updates done
        self.images_seen = 0  # the position in the data

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "images_seen": self.images_seen,
            "ema": self.ema.state_dict(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, content: dict[str, Any], path: Path) -> None:
        """From the content of the latest.pth at path.

        Raises UserError, before any of it is used, where it is not what this network trains.
        """
        content = dict(content)
        check_alike(content["step"], 0, "step", path)
        if content["step"] == 0:
            return  # nothing is trained yet, and the first weights follow from the seed
        if "images_seen" not in content:  # not counted yet: the batch size has never changed
            content["images_seen"] = content["step"] * read_config(content, path).batch_size
        expected = self.state_dict()
        if not content["scaler"] or not self.scaler.is_enabled():
            content["scaler"] = expected["scaler"]  # the precision has changed
        for key, value in expected.items():
            check_alike(content[key], value, key, path)
            if not is_finite(content[key]):
                raise UserError(f"{path} holds numbers in {key} that are not finite: start anew in "
                                "another --run_dir")

        self.model.load_state_dict(content["model"])
        self.ema.load_state_dict(content["ema"])
        # Copied into Adam's own tensors, which lie in memory as the weights do: the fused Adam
        # relies on that, and another precision has another layout.
        for i, moments in expected["optimizer"]["state"].items():
            for name, moment in moments.items():
                moment.copy_(content["optimizer"]["state"][i][name])
        self.scaler.load_state_dict(content["scaler"])
        self.step = content["step"]
        self.images_seen = content["images_seen"]


def open_run(run_dir: str, resume: bool) -> dict[str, Any]:
    """The content of latest.pth to go on from, {} to start anew.

    Raises UserError where starting would write over a run.
    """
    latest = latest_path(run_dir)
    if resume and latest.exists():
        content = load_checkpoint(latest)
        missing = [key for key in TRAINING_STATE if key not in content]
        if missing:
            raise UserError(f"{latest} cannot be resumed from: it lacks {', '.join(missing)}")
        return content
    if any(latest.parent.glob("*.pth")) and resume:
        raise UserError(f"{latest.parent} holds checkpoints but no latest.pth to resume from: "
                        "choose another --run_dir")
    if any(latest.parent.glob("*.pth")):
        raise UserError(f"{run_dir} already holds a run: go on with --resume, or choose another "
                        "--run_dir")
    if (Path(run_dir) / "metrics.csv").exists():
        raise UserError(f"{run_dir} holds a metrics.csv but no run to resume: move it away, or "
                        "choose another --run_dir")
    return {}


@contextmanager
def claimed(run_dir: Path, saved: dict[str, Any]) -> Iterator[None]:
    """The folders of a run, held for this process inside, without what a killed one left behind.

    saved: what open_run read.  UserError where another process holds them or has changed that.
    """
    checkpoints, samples = checkpoints_of(run_dir), run_dir / "samples"
    for folder in (checkpoints, samples):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(checkpoints):
        latest = latest_path(run_dir)
        if latest.exists() and load_checkpoint(latest, mmap=True)["step"] != saved.get("step"):
            raise UserError(f"another process has gone on with {latest} since: start again")
        names = r"latest\.pth|final_model\.pth|checkpoint_epoch_\d+\.pth"
        remove_left_overs(checkpoints, names)
        remove_left_overs(samples, r"sample_step_\d+\.png")
        remove_left_overs(run_dir, r"metrics\.csv")
        yield


def resumed_config(
    given: dict[str, Any], run_dir: str, content: dict[str, Any], say: bool
) -> Config:
    """The settings of latest.pth, changed by the flags given; say: print the changes.

    A preset counts for a new run only.

    Raises UserError where that cannot be.
    """
    saved = read_config(content, latest_path(run_dir))
    try:
        config = Config(**{**asdict(saved), **given, "run_dir": run_dir})
    except ValueError as error:
        raise UserError(f"with the settings of the checkpoint, {error}") from error
    before, after = asdict(saved), asdict(config)
    changed = [name for name in before if before[name] != after[name] and name != "run_dir"]
    changes = {name: f"{name} {before[name]} -> {after[name]}" for name in changed}
    refused = [changes[name] for name in changed if name in FIXED]
    if refused:
        raise UserError(f"the checkpoint is of another network or diffusion: {'; '.join(refused)}; "
                        "leave these flags out, or choose another --run_dir")
    if changes and say:
        print(f"resuming with changed settings: {'; '.join(changes.values())}")
    return config
