"""The whole of DDPM on points in the plane: a spiral becomes noise, and noise a spiral.

    python examples/points.py                       seconds on one core; writes points.png
    python examples/points.py --output other.png

The diffusion is that of ddpm.py, unchanged: x_start, x_t and noise are [B, 2] here.
"""

import argparse
import math
import sys
from pathlib import Path

import matplotlib
import torch
from torch import Tensor, nn
from tqdm import trange

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import Config
from ddpm import DDPM

matplotlib.use("Agg")  # no window
import matplotlib.pyplot as plt

# DDPM needs no more of a Config than this.
CONFIG = Config(timesteps=200, beta_schedule="cosine", variance="fixed_small")
STEPS, BATCH_SIZE, LEARNING_RATE = 4000, 512, 1e-2
SHOWN = [0, 10, 25, 50, 100, 199]  # timesteps in the picture
TURNS = 1.5


def spiral(count: int) -> Tensor:
    """The data: points [count, 2] on a spiral, within the [-1, 1] to which DDPM clips."""
    along = torch.rand(count).sqrt()  # evenly, although the spiral is longer further out
    angle = 2 * math.pi * TURNS * along
    points = torch.stack([angle.cos(), angle.sin()], dim=1)
    return 0.9 * along[:, None] * points


class Network(nn.Module):
    """eps_theta(x_t, t): x_t [B, 2], t [B] -> the predicted noise [B, 2].

    It is given sines and cosines of its inputs, without which it would see no detail.
    """

    def __init__(self, width: int = 128, octaves: int = 4) -> None:
        super().__init__()
        self.register_buffer("frequencies", math.pi / 2 * 2.0 ** torch.arange(octaves))
        self.layers = nn.Sequential(
            nn.Linear(3 * 2 * octaves, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, 2))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        inputs = torch.cat([x_t, t[:, None] / CONFIG.timesteps], dim=1)  # [B, 3]
        angles = (inputs[:, :, None] * self.frequencies).flatten(1)      # [B, 3 octaves]
        return self.layers(torch.cat([angles.sin(), angles.cos()], dim=1))


def train() -> DDPM:
    """Algorithm 1, with a learning rate that falls to 0."""
    ddpm = DDPM(Network(), CONFIG)
    optimizer = torch.optim.Adam(ddpm.parameters())
    for step in trange(STEPS, desc="training", unit="step"):
        loss = ddpm.training_loss(spiral(BATCH_SIZE))  # it draws t and the noise
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 - step / STEPS)
        optimizer.step()
    return ddpm


def forward_process(ddpm: DDPM, x_start: Tensor) -> list[Tensor]:
    """x_start, and x_t at the timesteps shown, each noised at once by Eq. 4."""
    noise = torch.randn_like(x_start)
    noised = [ddpm.q_sample(x_start, torch.full([len(x_start)], t), noise) for t in SHOWN]
    return [x_start, *noised]


def reverse_process(ddpm: DDPM, x_T: Tensor) -> list[Tensor]:
    """Algorithm 2: the samples, and x_t at the timesteps shown."""
    x_at = {ddpm.timesteps - 1: x_T}
    for t, x in ddpm.p_sample_loop(x_T):
        x_at[t - 1] = x  # after the step at t it is x_{t-1}; the samples are at -1
    return [x_at[t] for t in [-1, *SHOWN]]


def draw(rows: list[list[Tensor]], path: Path) -> None:
    """Draw the forward process above and the reverse process below."""
    titles = [["data", *SHOWN], ["samples", *SHOWN]]
    figure, axes = plt.subplots(2, len(rows[0]), figsize=(14, 4.4), layout="constrained")
    for row, points in enumerate(rows):
        for column, x in enumerate(points):
            ax, title = axes[row][column], titles[row][column]
            ax.plot(*x.T, ".", markersize=1.2, color=("tab:blue", "tab:orange")[row])
            ax.set(xlim=(-1.7, 1.7), ylim=(-1.7, 1.7), xticks=[], yticks=[], aspect="equal",
                   title=title if column == 0 else f"t = {title}")
    axes[0][0].set_ylabel("forward: noise added  →")
    axes[1][0].set_ylabel("←  reverse: Algorithm 2")
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> Tensor:
    """Train, draw the picture, and return the samples [2000, 2]."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("points.png"))
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    ddpm = train()
    forward = forward_process(ddpm, spiral(2000))
    reverse = reverse_process(ddpm, torch.randn(2000, 2))
    draw([forward, reverse], args.output)
    print(args.output)
    return reverse[0]


if __name__ == "__main__":
    main()
