"""The figures of the docs, drawn with the project's own functions into assets/.

    python docs/figures.py --picture PICTURE                       forward.png
    python docs/figures.py --metrics runs/demo/metrics.csv         loss.png
    python docs/figures.py --checkpoints A.pth B.pth C.pth         training.png, steps.png, clip.png

The checkpoints are of one run, the least trained first; the last one draws
steps.png and clip.png.
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # this file is run from the project's folder

from config import Config
from data import to_float, to_uint8
from ddpm import DDPM, at
from utils.cli import CommandLine
from utils.image_cache import to_square
from utils.pictures import grid
from utils.process import run_script
from utils.sampler import Sampler, add_sampler_flags

EVALUATIONS = (10, 20, 50)  # of steps.png, beside the whole chain


def main(argv: list[str] | None = None) -> int:
    usage = "python docs/figures.py [--picture FILE] [--metrics FILE] [--checkpoints FILE ...]"
    parser = CommandLine(__doc__, usage)
    add = parser.add_argument
    add("--picture", metavar="FILE", type=Path, help="what forward.png spoils")
    add("--metrics", metavar="FILE", type=Path, help="the metrics.csv of loss.png")
    add("--checkpoints", metavar="FILE", type=Path, nargs="+", help="of one run, in order")
    add("--output_dir", metavar="DIR", type=Path, default=Path("assets"), help="default: ./assets")
    parser.add_number("--num_samples", int, "images per row (default: 8)", least=1, default=8)
    add_sampler_flags(parser)
    args = parser.parse_args(argv)

    args.output_dir.mkdir(parents=True, exist_ok=True)
    if args.picture:
        save(forward(args.picture), args.output_dir / "forward.png")
    if args.metrics:
        save(loss(args.metrics), args.output_dir / "loss.png")
    if args.checkpoints:
        samplers = [sampler_of(args, path) for path in args.checkpoints]
        columns = [samples(sampler, args.num_samples) for sampler in samplers]
        training_steps = [sampler.training_steps for sampler in samplers]
        save(training(columns, training_steps), args.output_dir / "training.png")
        save(steps(args, columns[-1]), args.output_dir / "steps.png")
        save(clip(samplers[-1], columns[-1]), args.output_dir / "clip.png")
    return 0


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=100, bbox_inches="tight")
    plt.close(figure)
    print(path)


def show(axes: Axes, rows: Sequence[Tensor], row_labels: Sequence[str],
         column_labels: Sequence[str] = ()) -> None:
    """A grid of images; each of rows is [columns, C, S, S] in [-1, 1]."""
    columns, _, size, _ = rows[0].shape
    axes.imshow(grid(to_uint8(torch.cat(list(rows))), columns), interpolation="nearest")
    centre, cell = 2 + size / 2, size + 2  # grid leaves 2 pixels between images
    axes.set_yticks([centre + cell * i for i in range(len(rows))], row_labels)
    axes.set_xticks([centre + cell * i for i in range(len(column_labels))], column_labels)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


# The forward process

def forward(path: Path, T: int = 1000) -> Figure:
    """One picture and one noise under both schedules, and alphas_cumprod below."""
    with Image.open(path) as picture:
        pixels = to_square(picture, 32, 3)
    x_start = to_float(torch.tensor(pixels))[None]
    noise = torch.randn(x_start.shape, generator=torch.Generator().manual_seed(0))
    shown = [0, 50, 100, 200, 300, 400, 500, 600, 800, T - 1]
    t = torch.tensor(shown)

    figure, (above, below) = plt.subplots(
        2, figsize=(8, 4.4), height_ratios=[2, 2.2], layout="constrained")
    rows = []
    for schedule in ("linear", "cosine"):
        ddpm = DDPM(nn.Identity(), Config(beta_schedule=schedule, timesteps=T))
        many = x_start.expand(len(t), -1, -1, -1)
        rows.append(ddpm.q_sample(many, t, noise))
        below.plot(ddpm.alphas_cumprod, label=schedule)
    show(above, rows, ["linear", "cosine"], [f"t={n}" for n in shown])
    below.set(xlabel="t", ylabel="alphas_cumprod", xlim=(0, T - 1), ylim=(0, 1))
    below.grid(alpha=0.3)
    below.legend()
    return figure


# Training

def loss(path: Path) -> Figure:
    """The loss, and that of each quarter of t, over the steps of a run."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    step = [int(row["step"]) for row in rows]
    labels = {
        "loss": "all t",
        "loss_q1": "lowest quarter of t (little noise)",
        "loss_q2": "second quarter",
        "loss_q3": "third quarter",
        "loss_q4": "highest quarter (almost only noise)",
    }
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for name, label in labels.items():
        values = [float(row[name]) for row in rows]
        color = "black" if name == "loss" else None
        axes.plot(step, values, label=label, color=color)
    axes.set(xlabel="training step", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return figure


# Samples

def sampler_of(args: argparse.Namespace, path: Path, steps: int | None = None) -> Sampler:
    return Sampler(argparse.Namespace(**{**vars(args), "checkpoint": path, "steps": steps}))


def samples(sampler: Sampler, count: int) -> Tensor:
    """The first images of the seed, [count, C, S, S] in [-1, 1]: image i always has noise i."""
    with sampler.running(count, sampler.steps):
        return to_float(sampler.images(count))


def training(columns: list[Tensor], training_steps: list[int]) -> Figure:
    """One column per checkpoint, one noise per row."""
    rows = torch.stack(columns, dim=1)  # [num_samples, checkpoints, C, S, S]
    height, width = rows.shape[:2]
    figure, axes = plt.subplots(figsize=(0.8 * width, 0.8 * height), layout="constrained")
    show(axes, rows, [""] * height, [f"{step:,}" for step in training_steps])
    axes.set_xlabel("training steps")
    axes.xaxis.set_label_position("top")
    return figure


def steps(args: argparse.Namespace, whole_chain: Tensor) -> Figure:
    """One column per noise, one row per number of evaluations."""
    rows, labels = [], []
    for count in EVALUATIONS:
        sampler = sampler_of(args, args.checkpoints[-1], count)
        rows.append(samples(sampler, args.num_samples))
        labels.append(f"{count} evaluations")
    rows.append(whole_chain)
    labels.append(f"all {sampler.config.timesteps}")
    figure, axes = plt.subplots(
        figsize=(0.8 * args.num_samples + 1.2, 0.8 * len(rows)), layout="constrained")
    show(axes, rows, labels)
    return figure


class Unclipped(DDPM):
    """DDPM without the clip of x_0."""

    def predict_x_start(self, x_t: Tensor, t: Tensor) -> Tensor:
        pred_noise = self.model(x_t, t).float()
        x_t_scale = at(self.sqrt_recip_alphas_cumprod, t, x_t)
        noise_scale = at(self.sqrt_recipm1_alphas_cumprod, t, x_t)
        return x_t_scale * x_t - noise_scale * pred_noise


def clip(sampler: Sampler, clipped: Tensor) -> Figure:
    """The whole chain with and without the clip, from the same noise."""
    sampler.ddpm = Unclipped(sampler.ddpm.model, sampler.config).to(sampler.device)
    unclipped = samples(sampler, len(clipped))
    figure, axes = plt.subplots(figsize=(0.8 * len(clipped) + 1.2, 1.6), layout="constrained")
    show(axes, [clipped, unclipped], ["x_0 clipped", "not clipped"])
    return figure


if __name__ == "__main__":
    run_script(main)
