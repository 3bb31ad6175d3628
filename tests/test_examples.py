"""examples/: each does what it shows."""

import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

pytest.importorskip("matplotlib")

from examples import points


def distance_to_the_spiral(x: Tensor) -> Tensor:
    """Of each point [N, 2] to the nearest point of the curve."""
    along = torch.linspace(0, 1, 4000)
    angle = 2 * math.pi * 1.5 * along
    curve = torch.stack([angle.cos(), angle.sin()], dim=1) * 0.9 * along[:, None]
    return torch.cdist(x, curve).min(dim=1).values


def test_points_drawn_from_noise_lie_on_the_spiral(tmp_path: Path):
    samples = points.main(["--output", str(tmp_path / "points.png")])
    assert samples.shape == (2000, 2)
    assert (distance_to_the_spiral(samples) < 0.03).float().mean() > 0.95
    assert (distance_to_the_spiral(points.spiral(2000)) < 0.002).all()
    # They are spread over all of it: the square root makes the outer half hold three quarters.
    assert (samples.norm(dim=1) > 0.45).float().mean() == pytest.approx(0.75, abs=0.05)
    assert Image.open(tmp_path / "points.png").size[0] > 1000
