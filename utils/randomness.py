"""Where every random number comes from.

No generator's state is ever saved.  Instead, whatever is drawn is drawn from a
seed that can be computed again:

    the first weights       derive_seed("weights", seed)
    training step k         derive_seed("step", seed, k, rank)
    the order of an epoch   derive_seed("epoch", seed, epoch)
    the noise of image i    derive_seed("image", seed) + i
    the t of bits/dim       derive_seed("timesteps", seed, i), for image i
    the built-in shapes     derive_seed("shapes", 0 or 1), whatever the seed

At the start of step k torch is seeded for that step; flips, t, noise and
dropout follow from it.  So a run that is stopped and resumed draws what it would
have drawn without the stop: on a CPU, with the same settings and number of
threads, not a bit differs.  Image i draws everything from (seed, i), so but for
rounding it comes out the same for every batch size, number of processes and
number of images.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# A seed depends on the place of its use here: new ones go to the end.
USES = ("weights", "step", "epoch", "image", "shapes", "timesteps")


def derive_seed(use: str, *numbers: int) -> int:
    """A 64-bit seed; different uses, or different numbers, give unrelated streams."""
    # The length, since SeedSequence takes (5,) and (5, 0) for the same.
    entropy = (USES.index(use), len(numbers), *numbers)
    (seed,) = np.random.SeedSequence(entropy).generate_state(1, np.uint64)
    return int(seed)


class ImageNoise:
    """Standard normal noise for a batch of images, each from a generator of its own.

    randn_like = ImageNoise(seed, range(8), (3, 32, 32), device)
    x_T = randn_like()                            # [8, 3, 32, 32]
    ddpm.sample(x_T, randn_like=randn_like)       # one draw more in each step

    An image's draws do not depend on the batch around it.  Equal indices share
    all their noise.
    """

    def __init__(
        self, seed: int, indices: Sequence[int], shape: Sequence[int], device: torch.device | str
    ) -> None:
        # Hashed once per seed, then counted up: on a CPU torch keeps 32 bits of a seed,
        # and among 50,000 hashes of 32 bits two are equal with a chance of 1 in 4.
        base = derive_seed("image", seed)
        seeds = [(base + index) % 2**64 for index in indices]
        self.generators = [torch.Generator(device).manual_seed(s) for s in seeds]
        self.shape = tuple(shape)
        self.device = device
        # One draw serves many steps.  Its size depends on the shape of an image only,
        # so that the stream is the same for every batch.
        self.steps_per_draw = max(1, min(32, 2**20 // math.prod(shape)))
        self.buffer: list[Tensor] = []

    def __call__(self, x_t: Tensor | None = None) -> Tensor:
        """The next draw of every image [B, C, H, W]: like x_t, which is not looked at."""
        if not self.buffer:
            size = (self.steps_per_draw, *self.shape)
            draws = [torch.randn(size, generator=g, device=self.device) for g in self.generators]
            self.buffer = list(torch.stack(draws, dim=1))[::-1]
        return self.buffer.pop()
