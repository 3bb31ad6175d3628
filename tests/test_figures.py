"""docs/figures.py: the figures are drawn from what training leaves behind."""

import os

import numpy as np
import pytest
from helpers import coloured_pictures, save_network, script, succeeded, tiny
from PIL import Image

from utils.metrics import COLUMNS, MetricsFile

pytest.importorskip("matplotlib")


def test_every_figure_is_drawn(tmp_path):
    checkpoints = [
        save_network(tmp_path / f"{step}.pth", tiny(timesteps=60), step=step) for step in (1, 2)]
    metrics = MetricsFile(tmp_path / "metrics.csv", 0, tensorboard=False)
    for step in (100, 200):
        losses = {f"loss_q{i}": 1 / (step * i) for i in range(1, 5)}
        row = dict.fromkeys(COLUMNS, 0.5)
        metrics.add({**row, "step": step, "loss": 1 / step, **losses})
    metrics.save(tmp_path / "metrics.csv")
    picture = min(coloured_pictures(tmp_path / "pictures").iterdir())

    out = tmp_path / "assets"
    without_path = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    succeeded(script(
        "docs/figures.py", "--picture", str(picture), "--metrics", str(tmp_path / "metrics.csv"),
        "--checkpoints", *map(str, checkpoints), "--num_samples", "2", "--output_dir", str(out),
        "--device", "cpu", env=without_path, cwd=tmp_path))
    sizes = {}
    for path in out.iterdir():
        with Image.open(path) as image:
            sizes[path.name] = image.size
            assert len(np.unique(np.asarray(image))) > 50
    assert sizes.keys() == {"forward.png", "loss.png", "training.png", "steps.png", "clip.png"}
    assert sizes["steps.png"][1] > sizes["clip.png"][1]  # four rows, and two
