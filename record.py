"""What a run writes: metrics.csv, sample grids, checkpoints; and what it does when the disk refuses.

    metrics.add(step, losses, t, grad_norm)       each step, without waiting for the device
    files.write_row(metrics.row(step, ...))       each log_every steps
"""

import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from checkpoint import latest_path, save_checkpoint
from config import Config, UserError
from data import remove_left_overs, save_grid
from ddpm import DDPM, ImageNoise


class Metrics:
    """Sums over the steps since the last row of metrics.csv, kept on the device so that no step waits for them."""

    def __init__(self, timesteps: int, device: torch.device) -> None:
        self.timesteps = timesteps
        self.sums = torch.zeros(10, device=device)  # steps, grad_norm, loss in each quarter of t, images in each
        self.smoothed = torch.zeros((), device=device)
        self.first_bad = torch.full((), math.inf, device=device)  # the first step that was not finite
        self.added, self.clock = 0, time.perf_counter()

    def add(self, step: int, losses: Tensor, t: Tensor, grad_norm: Tensor) -> None:
        """The losses [B] at timesteps t [B] of the step just done."""
        quarter = t * 4 // self.timesteps
        self.sums[0] += 1
        self.sums[1] += grad_norm
        self.sums[2:6].index_add_(0, quarter, losses)
        self.sums[6:10].index_add_(0, quarter, torch.ones_like(losses))
        self.added += 1
        self.smoothed.lerp_(losses.mean(), max(0.02, 1 / self.added))
        finite = torch.isfinite(losses.sum() + grad_norm)
        self.first_bad.copy_(torch.where(finite, self.first_bad, self.first_bad.clamp(max=step)))

    def row(self, step: int, epoch: int, lr: float, batch_size: int) -> dict[str, float]:
        """The next row of metrics.csv, over all processes; starts the sums anew."""
        if dist.is_initialized():
            dist.all_reduce(self.sums)
            dist.all_reduce(self.first_bad, dist.ReduceOp.MIN)
        self.check_finite()
        steps, grad_norm, *quarters = self.sums.tolist()
        losses, counts = quarters[:4], quarters[4:]
        now = time.perf_counter()
        images_per_sec = self.added * batch_size / (now - self.clock)
        self.sums.zero_()
        self.added, self.clock = 0, now
        return {"step": step, "epoch": epoch, "loss": sum(losses) / sum(counts),
                **{f"loss_q{i + 1}": losses[i] / counts[i] if counts[i] else math.nan for i in range(4)},
                "lr": lr, "grad_norm": grad_norm / steps, "images_per_sec": images_per_sec}

    def check_finite(self) -> None:
        """Called before anything is written, so that what is on the disk is always good."""
        if math.isfinite(first_bad := self.first_bad.item()):
            raise UserError(f"the loss or its gradient is not finite at step {int(first_bad)}: try a lower "
                            "--learning_rate, --grad_clip 1, or --precision fp32; latest.pth is as it was before")


class RunFiles:
    """What a run writes.  Where the disk refuses, it warns and goes on, and tries again when the file is next due."""

    def __init__(self, config: Config, step: int, tensorboard: bool) -> None:
        self.config, self.run_dir = config, Path(config.run_dir)
        self.checkpoints, self.samples = self.run_dir / "checkpoints", self.run_dir / "samples"
        self.latest, self.final = latest_path(config), self.checkpoints / "final_model.pth"
        self.metrics, self.rows, self.rows_end = self.run_dir / "metrics.csv", "", 0
        self.unwritten: set[Path] = set()
        self.last_save = time.monotonic()
        try:
            for folder in (self.checkpoints, self.samples):
                folder.mkdir(parents=True, exist_ok=True)
                remove_left_overs(folder)
            self.cut_metrics(step)
        except OSError as error:
            raise UserError(f"run_dir={config.run_dir!r} cannot be written: {error}") from error
        self.tensorboard = open_tensorboard(self.run_dir, step) if tensorboard else None

    def attempt(self, path: Path, write: Callable[[], None]) -> None:
        try:
            write()
            self.unwritten.discard(path)
        except OSError as error:
            self.unwritten.add(path)
            tqdm.write(f"warning: {path} could not be written ({error}); what was there before is still there",
                       file=sys.stderr)

    def status(self) -> int:
        return 1 if self.unwritten else 0

    def latest_is_due(self) -> bool:
        return time.monotonic() - self.last_save >= 60 * self.config.save_minutes

    def save(self, path: Path, state: dict[str, Any]) -> None:
        self.attempt(path, lambda: save_checkpoint(state, path))
        if path == self.latest:
            self.last_save = time.monotonic()

    def grid_path(self, step: int) -> Path:
        return self.samples / f"sample_step_{step}.png"

    def grid_is_due(self, step: int) -> bool:
        """Also after a stop in the middle of drawing it."""
        every = self.config.sample_every
        return bool(step and every) and step % every == 0 and not self.grid_path(step).exists()

    def save_grid(self, step: int, ddpm: DDPM, precision: AbstractContextManager,
                  stopped: Callable[[], bool]) -> None:
        """Samples from the same starting noise at every step, with the EMA weights; none where it is stopped."""
        config, device = self.config, ddpm.betas.device
        noise = ImageNoise(config.seed, range(config.num_samples),
                           (config.channels, config.image_size, config.image_size), device)
        with precision:
            for _, x, _ in ddpm.sample_loop(noise(), min(config.sample_steps, config.timesteps), noise=noise):
                if stopped():
                    return
        self.attempt(self.grid_path(step), lambda: save_grid(x, self.grid_path(step)))

    def write_row(self, row: dict[str, float]) -> None:
        def append() -> None:  # over what a failed attempt may have left behind
            with open(self.metrics, "r+" if self.metrics.exists() else "w+") as file:
                file.seek(self.rows_end)
                file.write(("" if self.rows_end else ",".join(row) + "\n") + self.rows)
                file.flush()
                os.fsync(file.fileno())
                self.rows, self.rows_end = "", file.tell()

        self.rows += ",".join(f"{v:.6g}" if isinstance(v, float) else str(v) for v in row.values()) + "\n"
        self.attempt(self.metrics, append)
        if self.tensorboard:
            for name in row.keys() - {"step"}:
                self.tensorboard.add_scalar(name, row[name], row["step"])

    def cut_metrics(self, step: int) -> None:
        """Drop the rows after step, and half a row at the end: a resumed run writes them again."""
        if not self.metrics.exists():
            return
        text = self.metrics.read_text()
        for line in text.splitlines(keepends=True):
            number = line.split(",")[0]
            if not line.endswith("\n") or (number.isdigit() and int(number) > step):
                break
            self.rows_end += len(line)
        if self.rows_end < len(text):
            os.truncate(self.metrics, self.rows_end)


def open_tensorboard(run_dir: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--tensorboard needs a package that is not installed: pip install tensorboard") from error
    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)
