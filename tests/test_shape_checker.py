"""tools/shape_checker.py: it accepts the built-in shapes, and nothing else."""

import numpy as np
import pytest
from helpers import called, refused, succeeded, tiny

from data import load_images
from tools.shape_checker import find_shape, share_of_shapes


@pytest.fixture(params=[16, 32])
def shapes(request) -> np.ndarray:
    return load_images(tiny(image_size=request.param, attn_resolutions=()), "test")


def test_the_checker_accepts_the_shapes(shapes):
    assert share_of_shapes(shapes[:400]) > 0.99
    assert {find_shape(image) for image in shapes[:50]} == {"circle", "square", "triangle"}


def test_the_checker_accepts_nothing_else(shapes):
    rng = np.random.default_rng(0)
    size = shapes.shape[-1]
    random = rng.integers(0, 256, (200, 3, size, size), np.uint8)
    assert share_of_shapes(random) == 0
    blank = np.full((2, 3, size, size), 20, np.uint8)
    assert share_of_shapes(blank) == 0
    blends = (shapes[:500].astype(int) + shapes[500:]) // 2
    assert share_of_shapes(blends.astype(np.uint8)) < 0.06  # some pairs are nearly the same
    noisy = (shapes[:200] + rng.normal(0, 40, (200, 3, size, size))).clip(0, 255)
    assert share_of_shapes(noisy.astype(np.uint8)) < 0.02
    two = np.maximum(shapes[:500], shapes[500:])
    assert share_of_shapes(two) < 0.1


def test_the_share_of_an_array_of_samples(tmp_path):
    shapes = load_images(tiny(image_size=16, attn_resolutions=()), "test")[:4]
    blank = np.full_like(shapes[:1], 20)
    images = np.concatenate([shapes[:3], blank]).transpose(0, 2, 3, 1)
    np.savez(tmp_path / "samples.npz", images)
    result = succeeded(called("tools.shape_checker", "samples.npz", cwd=tmp_path))
    assert result.stdout == "75.0% of 4 images show a shape\n"


def test_a_file_without_samples(tmp_path):
    (tmp_path / "text.npz").write_text("no array")
    np.savez(tmp_path / "grey.npz", np.zeros((2, 8, 8), np.uint8))
    for name in ("text.npz", "grey.npz", "missing.npz"):
        result = called("tools.shape_checker", name, cwd=tmp_path)
        refused(result, 1, f"{name} holds no colour images")
