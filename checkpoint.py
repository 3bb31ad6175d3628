"""Checkpoints: written aside and renamed, read without running any code in them.

latest.pth has the keys config, step, ema, model, optimizer, scaler, sums; a kept checkpoint only config, step, ema.
"""

import pickle
from pathlib import Path
from typing import Any

import torch

from config import Config, UserError
from data import atomic_write
from model import UNet


def latest_path(config: Config) -> Path:
    return Path(config.run_dir) / "checkpoints" / "latest.pth"


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Raises OSError where the disk does not take it; what was at path before is then still there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch's word for a failed write
            raise OSError(str(error).splitlines()[0]) from error


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The dict in the file.  Raises UserError where it is missing, damaged, not a checkpoint, or would run code."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: train first, or name another file") from error
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error) or "GLOBAL" in str(error):
            raise UserError(f"{path} is refused: it holds a pickle that could run code") from error
        raise UserError(f"{path} is not a checkpoint of this project") from error
    except Exception as error:  # of what a damaged file may raise there is no list
        raise UserError(f"{path} cannot be read, it is truncated or damaged: {str(error).split(chr(10))[0]}") from error
    if not isinstance(state, dict) or not {"config", "step", "ema"} <= state.keys():
        raise UserError(f"{path} is not a checkpoint of this project (it lacks config, step or ema)")
    return state


def load_network(path: Path, device: torch.device, weights: str = "ema") -> tuple[UNet, Config, int]:
    """The network of a checkpoint, with its config and its training steps.  weights: ema, or model (the raw ones)."""
    state = load_checkpoint(path, device)
    config = read_config(state, path)
    if weights not in state:
        raise UserError(f"{path} holds no raw weights, only the averaged ones: latest.pth has both")
    model = UNet(config).to(device).eval()
    load_weights(model, state[weights], path)
    return model, config, state["step"]


def read_config(state: dict[str, Any], path: Path) -> Config:
    try:
        return Config(**state["config"])
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} has a config that this version cannot use: {error}") from error


def load_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor], path: Path) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path} holds the weights of another network than its config says: {reason}") from error


def newest_checkpoint(run_dir: Path) -> Path:
    """The checkpoint in run_dir/checkpoints that was written last.  Raises UserError where there is none."""
    paths = (run_dir / "checkpoints").glob("*.pth")
    newest = max(paths, key=lambda path: path.stat().st_mtime_ns, default=None)
    if newest is None:
        raise UserError(f"no checkpoint in {run_dir / 'checkpoints'}: train first, or name one with --checkpoint FILE")
    return newest
