"""A checkpoint ready to sample, and the flags that say which one and how.

    sampler = Sampler(args)                        args: of add_sampler_flags
    with sampler.running(16, sampler.steps):       compiled if that pays, in its precision
        images = sampler.images(16)                uint8 [16, C, H, W]
"""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ddim
from data import to_uint8
from ddim import ETA, ORDER, SPACING
from ddpm import DDPM, RandnLike
from utils.checkpoint import load_network, network_digest, newest_checkpoint
from utils.cli import CommandLine, UserError, progress_bar, under_torchrun
from utils.device import autocast, maybe_compile, memory_format, select_device, select_precision
from utils.randomness import ImageNoise


def add_sampler_flags(parser: CommandLine) -> None:
    add, add_number, add_setting = parser.add_argument, parser.add_number, parser.add_setting
    add("--checkpoint", metavar="FILE", type=Path, help="default: the newest one of --run_dir")
    add("--run_dir", metavar="DIR", type=Path, default=Path("."),
        help="where checkpoints/ is (default: .)")
    add_setting("batch_size", default=64, help="images at a time, per process (default: 64)")
    add_number("--steps", int, "network evaluations per image (default: T, the whole chain)",
               least=1)
    add_number("--eta", float, f"noise of fewer steps, from 0 to 1 (default: {ETA:g})", least=0,
               most=1)
    add("--order", type=int, choices=[1, 2],
        help=f"fewer steps: 1 as DDIM, 2 as DPM-Solver++(2M) (default: {ORDER})")
    add("--spacing", choices=["quadratic", "uniform"],
        help=f"fewer steps: where they are closer (default: {SPACING})")
    add_setting("variance", default=None,
                help="in Algorithm 2 and bits/dim (default: as in the checkpoint)")
    add_setting("seed", help="image i is drawn from (seed, i) (default: 0)")
    for name in ("device", "precision", "compile"):
        add_setting(name)


class Sampler:
    """A checkpoint's diffusion, and the command line's choices of how to sample from it."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Raises UserError if the flags do not fit the checkpoint."""
        self.device = select_device(args.device)
        self.path = args.checkpoint or newest_checkpoint(args.run_dir)
        model, config, self.training_steps = load_network(self.path, self.device)
        self.config = replace(config, variance=args.variance or config.variance)
        self.precision = select_precision(args.precision, self.device)
        model.to(memory_format=memory_format(self.device, self.precision))
        self.ddpm = DDPM(model, self.config).to(self.device)
        self.shape = (config.channels, config.image_size, config.image_size)
        self.seed, self.batch_size, self.compile = args.seed, args.batch_size, args.compile
        self.fills_up = False

        T = config.timesteps
        self.steps = args.steps or T
        if self.steps > T:
            raise UserError(f"steps={self.steps} is impossible: this checkpoint's chain has 1 to "
                            f"{T}")
        self.is_algorithm_2 = ddim.is_algorithm_2(T, args.steps, args.eta)
        self.eta = args.eta  # None for Algorithm 2
        if self.eta is None and not self.is_algorithm_2:
            self.eta = ETA
        self.spacing = args.spacing or SPACING
        self.order = args.order or ORDER
        where, unused = "in fewer steps", ("variance",)
        if self.is_algorithm_2:
            where, unused = f"in Algorithm 2, all {T} steps", ("order", "spacing")
        for name in unused:
            if getattr(args, name) is not None:
                raise UserError(f"--{name} has no effect {where}")

    @contextmanager
    def running(self, images: int, evaluations: int) -> Iterator[None]:
        """Inside, the network runs in its precision, compiled if the evaluations pay for it.

        evaluations: of each image.  No gradient is taken.
        """
        calls = images / self.batch_size * evaluations
        is_compiled = maybe_compile(self.compile, self.device, calls, self.ddpm.model)
        self.fills_up = is_compiled and images > self.batch_size
        with torch.no_grad(), autocast(self.device, self.precision):
            yield

    def filled_up(self, indices: Sequence[int]) -> Sequence[int]:
        """The indices of a batch; the last one's are repeated if the network is compiled.

        It would be compiled again for a smaller batch.
        """
        missing = self.batch_size - len(indices)
        return [*indices, *[indices[-1]] * missing] if self.fills_up else indices

    def noise(self, seed: int, indices: Sequence[int]) -> ImageNoise:
        return ImageNoise(seed, indices, self.shape, self.device)

    def chain(
        self, x_t: Tensor, randn_like: RandnLike, t_start: int | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """From x_t at t_start (T - 1 if None) to the image: yields (t, x after the step at t).

        Raises UserError if the image is not finite.
        """
        # eta is None for Algorithm 2 alone, so sample_loop decides as __init__ did.
        steps = self.steps if t_start is None else min(self.steps, t_start + 1)
        chain = ddim.sample_loop(
            self.ddpm, x_t, steps, self.eta, self.spacing, self.order, randn_like, t_start)
        for t, x in chain:
            yield t, x
        if not x.isfinite().all():
            remedy = "" if self.precision == "fp32" else ": use --precision fp32"
            raise UserError(f"the network overflows in {self.precision}{remedy}")

    def batches(self, indices: Sequence[int]) -> Iterator[tuple[Sequence[int], Tensor]]:
        """The images of these indices, batch by batch: (indices, uint8 [B, C, H, W] on the CPU).

        Image i is drawn from (seed, i) alone.
        """
        evaluations = len(indices) * self.steps
        name = "share of process 0" if under_torchrun() else None
        bar = progress_bar(desc=name, total=evaluations, unit=" evaluations", unit_scale=True)
        with bar:
            for first in range(0, len(indices), self.batch_size):
                batch = indices[first:first + self.batch_size]
                randn_like = self.noise(self.seed, self.filled_up(batch))
                x_T = randn_like()
                for _, x in self.chain(x_T, randn_like):
                    bar.update(len(batch))
                done = first + len(batch)
                bar.set_postfix_str(f"{done:,}/{len(indices):,} images", refresh=False)
                yield batch, to_uint8(x[:len(batch)]).cpu()

    def images(self, count: int) -> Tensor:
        """The first so many images, uint8 [count, C, H, W] on the CPU."""
        return torch.cat([images for _, images in self.batches(range(count))])

    def describe(self) -> str:
        if self.is_algorithm_2:
            name = f"Algorithm 2, {self.config.variance}"
        else:
            name = f"order {self.order}, eta {self.eta:g}, {self.spacing} spacing"
        return f"{name}, {self.steps} of {self.config.timesteps} steps"

    def origin(self) -> dict[str, Any]:
        """All that decides what image i looks like, on one kind of device."""
        return {
            "network": network_digest(self.ddpm.model, self.config),
            "step": self.training_steps,
            "seed": self.seed,
            "sampler": self.describe(),
            "precision": self.precision,
        }
