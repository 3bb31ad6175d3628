"""Checkpoints: written whole or not at all, read without running any code in them; and resuming.

latest.pth holds config, step, images_seen, model, ema, optimizer, scaler and the sums for the next
row of metrics.csv; a kept checkpoint only config, step and ema: all that sampling needs.
"""

import pickle
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from config import Config, level_sizes
from model import UNet
from utils.cli import UserError
from utils.files import atomic_write

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
            raise OSError(str(error).splitlines()[0]) from error


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The dict in the file.

    Raises UserError where it is missing, damaged, not a checkpoint, or would run code.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist: train first, or name another file")
    if not zipfile.is_zipfile(path):  # which torch.save makes
        raise UserError(f"{path} is truncated, or not a checkpoint of this project")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is refused: it holds a pickle that could run code") from error
    except Exception as error:  # a damaged file can raise anything
        reason = str(error).split("\n")[0]
        raise UserError(f"{path} cannot be read, it is damaged: {reason}") from error
    if not isinstance(content, dict) or not {"config", "step", "ema"} <= content.keys():
        raise UserError(f"{path} is not a checkpoint of this project "
                        "(it lacks config, step or ema)")
    return content


def load_network(path: Path, device: torch.device) -> tuple[UNet, Config, int]:
    """The network of a checkpoint with its EMA weights, its config and its training steps."""
    content = load_checkpoint(path, device)
    config = read_config(content, path)
    model = UNet(config).to(device).eval()
    load_weights(model, content["ema"], path)
    return model, config, content["step"]


def read_config(content: dict[str, Any], path: Path) -> Config:
    """The Config in a checkpoint's content; UserError where this version cannot use it."""
    try:
        values = dict(content["config"])
        # Earlier versions took sizes that no level has, and built no attention for them.
        if "attn_resolutions" in values:
            sizes = level_sizes(values["image_size"], values["dim_mults"])
            known = [size for size in values["attn_resolutions"] if size in sizes]
            values["attn_resolutions"] = known
        return Config(**values)
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"{path} has a config that this version cannot use: {error}") from error


def load_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor], path: Path) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{path} holds the weights of another network than its config says: {reason}"
        ) from error


def newest_checkpoint(run_dir: Path) -> Path:
    """The checkpoint in run_dir/checkpoints that was written last; UserError if there is none."""
    folder = checkpoints_of(run_dir)
    paths = folder.glob("*.pth")
    newest = max(paths, key=lambda path: path.stat().st_mtime_ns, default=None)
    if newest is None:
        raise UserError(f"no checkpoint in {folder}: train first, or name one with "
                        "--checkpoint FILE")
    return newest


# Resuming

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
    holds_checkpoints = any(latest.parent.glob("*.pth"))
    holds_metrics = (Path(run_dir) / "metrics.csv").exists()
    if resume and holds_checkpoints:
        raise UserError(f"{latest.parent} holds checkpoints but no latest.pth to resume from: "
                        "choose another --run_dir")
    if not resume and (holds_checkpoints or holds_metrics):
        raise UserError(f"{run_dir} already holds a run: go on with --resume, or choose another "
                        "--run_dir")
    return {}


def resumed_config(
    given: dict[str, Any], run_dir: str, content: dict[str, Any], say: bool
) -> Config:
    """The settings of latest.pth, changed by those that the command line gives; say: print them.

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
