"""utils/randomness.py: every seed, and the noise of an image."""

import torch
from torch import Tensor

from utils.randomness import USES, ImageNoise, derive_seed


def draws(seed: int, indices: list[int] | range, count: int = 70) -> Tensor:
    """Return the first draws of these images, [images, count, 3, 8, 8]."""
    noise = ImageNoise(seed, indices, (3, 8, 8), "cpu")
    return torch.stack([noise() for _ in range(count)], dim=1)


def test_image_noise_depends_on_seed_and_index_alone():
    together = draws(0, range(7))
    assert torch.equal(together[4:6], draws(0, [4, 5]))
    assert torch.equal(together[:, :3], draws(0, range(7), 3))
    assert not torch.equal(together[1], draws(1, [0])[0])  # seed + i would make them equal


def test_image_noise_is_standard_normal_and_never_the_same():
    together = draws(0, range(7))
    assert together.mean().abs() < 0.02
    assert abs(together.std() - 1) < 0.02
    assert len({draw.numpy().tobytes() for draw in together.flatten(0, 1)}) == 7 * 70


def test_image_noise_answers_the_samplers_with_its_next_draw():
    noise = ImageNoise(0, [4], (3, 8, 8), "cpu")
    expected = draws(0, [4], 3)[0]
    x_T = noise()
    got = torch.cat([x_T, noise(x_T), noise(torch.zeros(1, 3, 8, 8))])
    assert torch.equal(got, expected)


def test_seeds_of_different_uses_do_not_meet():
    seeds = set()
    for use in USES:
        for numbers in ((0,), (5,), (0, 5), (5, 0), (0, 5, 1)):
            seeds.add(derive_seed(use, *numbers))
    assert len(seeds) == 5 * len(USES)
    assert derive_seed("step", 3, 4) == derive_seed("step", 3, 4)
