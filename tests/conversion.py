"""What the tests of parity and of conversion share: diffusers, and tools.convert there and back."""

import os
from pathlib import Path

import pytest
import torch
from helpers import called, save_network, succeeded

from config import PRESETS, Config
from model import UNet

if "CI" in os.environ:  # there, without diffusers, these tests fail
    import diffusers
else:
    diffusers = pytest.importorskip("diffusers")

# Each with several channels per group: with one, group norm leaves the layers before it no gradient
# to compare.
CONFIGS = {
    "paper": Config(**PRESETS["paper"]),
    "two levels attend": Config(
        image_size=16,
        dim=48,
        dim_mults=(1, 2, 3),
        num_res_blocks=1,
        attn_resolutions=(16, 4),
        timesteps=200,
        beta_schedule="cosine",
        variance="fixed_small",
    ),
    "greyscale": Config(
        image_size=16,
        channels=1,
        dim=40,
        dim_mults=(1, 2),
        attn_resolutions=(),
        dropout=0.0,
    ),
}


def to_diffusers(cwd: Path, source: str = "ours.pth", target: str = "theirs"):
    return called("tools.convert", "to_diffusers", source, target, cwd=cwd)


def from_diffusers(cwd: Path, source: str = "theirs", target: str = "back.pth"):
    return called("tools.convert", "from_diffusers", source, target, cwd=cwd)


def exported(model: UNet, config: Config, tmp_path: Path) -> Path:
    """Return the folder that to_diffusers makes."""
    save_network(tmp_path / "ours.pth", config, model)
    result = succeeded(to_diffusers(tmp_path))
    said = result.stderr.splitlines()
    if torch.__version__.startswith("2.4."):  # it warns of the missing GPU
        said = [line for line in said if "CUDA is not available" not in line]
    assert said == []
    return tmp_path / "theirs"
