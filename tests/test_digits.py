"""docs/digits.py: the distance is the formula, and noise is no digit."""

import sys

import numpy as np
import pytest
import torch
from helpers import ROOT
from PIL import Image


@pytest.fixture
def digits(monkeypatch):
    """The script as a module: it stands in no package."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    import digits
    yield digits
    del sys.modules["digits"]


def test_the_distance_of_what_is_moved_or_stretched(digits):
    a = torch.randn(500, 6)
    assert digits.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert digits.frechet_distance(a, a + 2) == pytest.approx(6 * 2**2, rel=1e-5)
    # |m|^2 + trace(S + 9 S - 2 sqrt(9 S S))
    expected = (2 * a.mean(dim=0)).square().sum() + 4 * torch.cov(a.T).trace()
    assert digits.frechet_distance(a, 3 * a) == pytest.approx(expected.item(), rel=1e-4)


def test_noise_is_told_from_pictures(digits, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(digits, "HELD_OUT", 40)
    rng = np.random.default_rng(0)
    for name, column in (("left", 4), ("right", 18)):
        (tmp_path / name).mkdir()
        for i in range(120):
            pixels = np.zeros((28, 28), np.uint8)
            row = rng.integers(2, 18)
            pixels[row:row + 8, column:column + 6] = rng.integers(180, 256)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    noise = rng.integers(0, 256, (40, 28, 28, 1)).astype(np.uint8)
    np.savez(tmp_path / "noise.npz", noise)
    digits.main([str(tmp_path / "noise.npz"), "--data", str(tmp_path)])
    right, real, samples = capsys.readouterr().out.splitlines()
    assert right.startswith("100.0% of 40")
    assert float(real.split()[-1]) * 20 < float(samples.split()[-1])
