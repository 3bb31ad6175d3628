"""examples/: each does what it shows."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny
from PIL import Image
from torch import Tensor

pytest.importorskip("matplotlib")

from examples import guided, points


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


def dark_and_bright(folder: Path) -> Path:
    """Two classes of ten pictures."""
    for name, grey in (("dark", 40), ("light", 210)):
        (folder / name).mkdir(parents=True)
        for i in range(10):
            Image.new("L", (28, 28), grey + i).save(folder / name / f"{i}.png")
    return folder


def test_a_picture_is_of_the_class_asked_for():
    greys = torch.cat([torch.arange(40, 50), torch.arange(210, 220)])
    images = greys.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    labels = torch.tensor([0] * 10 + [1] * 10)
    config = tiny(channels=1, dim=16, batch_size=16, learning_rate=3e-3)
    model = guided.train(config, images, labels, 300, torch.device("cpu"), "fp32")
    wanted = torch.tensor([0, 1]).repeat(16)
    difference = {}
    for guidance in (0, 2):
        pictures = guided.sample(model, config, wanted, guidance, "fp32", steps=10).float()
        difference[guidance] = (pictures[1::2].mean() - pictures[::2].mean()).item()
    assert difference[2] > 100
    assert abs(difference[0]) < 60


def test_dropout_is_off_while_sampling_with_guidance():
    config = tiny(dropout=0.9)
    model = guided.Guided(config, classes=2).train()
    labels, x_T = torch.tensor([0, 1]), torch.randn(2, 3, 8, 8)
    torch.nn.init.normal_(model.unet.conv_out.weight)
    model.labels = labels
    ddpm = guided.DDPM(model, config)
    once, again = (guided.ddim.sample(ddpm, x_T, 3, eta=0.0) for _ in range(2))
    assert torch.equal(once, again)
    assert model.training


def test_guided_draws_a_row_per_class(tmp_path: Path):
    folder = dark_and_bright(tmp_path / "pictures")
    images, labels = guided.load(folder)
    assert images.shape == (20, 1, 28, 28)
    assert labels.tolist() == [0] * 10 + [1] * 10
    output = tmp_path / "guided.png"
    guided.main(["--data", str(folder), "--steps", "1", "--output", str(output)])
    width, height = Image.open(output).size
    columns = len(guided.GUIDANCE) * guided.COLUMNS
    assert np.isclose(width / (height - 14), columns / 2, rtol=0.05)
