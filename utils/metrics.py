"""What is measured while training: sums on the device, and metrics.csv made from them.

    metrics.add(losses, t, grad_norm)             each step, without waiting for the device
    file.add(metrics.row(...)); file.save(path)   every log_every steps
"""

import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from utils.cli import UserError, warn
from utils.files import atomic_write

COLUMNS = ("step", "epoch", "loss", "loss_q1", "loss_q2", "loss_q3", "loss_q4", "lr", "grad_norm",
           "images_per_sec")


class Metrics:
    """Sums over the steps since the last row, kept on the device: no step waits for them."""

    def __init__(self, timesteps: int, device: torch.device) -> None:
        self.timesteps = timesteps
        # Views of one tensor, which processes add up and checkpoints hold.  losses and images are
        # by quarter of t, the lowest first.
        self.sums = torch.zeros(10, dtype=torch.float32, device=device)
        self.steps, self.grad_norm, self.losses, self.images = self.sums.split([1, 1, 4, 4])
        # The loss, for the progress bar
        self.smoothed = torch.zeros((), dtype=torch.float32, device=device)
        self.added = 0

    def start_clock(self, images_seen: int) -> None:
        """images_per_sec of the next row counts from here."""
        self.images_before = images_seen
        self.clock = time.perf_counter()

    def add(self, losses: Tensor, t: Tensor, grad_norm: Tensor) -> None:
        """The losses [B] at timesteps t [B] of the step just done, and the norm of its gradient."""
        quarter = t * 4 // self.timesteps
        self.steps += 1
        self.grad_norm += grad_norm
        self.losses.index_add_(0, quarter, losses)
        self.images.index_add_(0, quarter, torch.ones_like(losses))
        self.added += 1
        weight = max(0.02, 1 / self.added)
        self.smoothed.lerp_(losses.mean(), weight)

    def row(self, step: int, images_seen: int, num_images: int, lr: float) -> dict[str, float]:
        """The next row of metrics.csv, over all processes; starts the sums anew."""
        if dist.is_initialized():
            dist.all_reduce(self.sums)
        self.check_finite(step)
        steps, grad_norm = self.steps.item(), self.grad_norm.item()
        losses, counts = self.losses.tolist(), self.images.tolist()
        epoch = images_seen // num_images
        loss = sum(losses) / sum(counts)
        quarters = [losses[i] / counts[i] if counts[i] else math.nan for i in range(4)]
        seconds = time.perf_counter() - self.clock
        images_per_sec = (images_seen - self.images_before) / seconds
        self.sums.zero_()
        self.start_clock(images_seen)
        values = (step, epoch, loss, *quarters, lr, grad_norm / steps, images_per_sec)
        return dict(zip(COLUMNS, values, strict=True))

    def check_finite(self, step: int) -> None:
        """Raise UserError if a loss or a gradient since the last row was not."""
        if not math.isfinite(self.sums.sum().item()):
            raise not_finite_error(step)


def not_finite_error(step: int) -> UserError:
    return UserError(
        f"the loss, its gradient or the weights are not finite at step {step}: try a lower "
        "--learning_rate, --grad_clip 1, or --precision fp32; latest.pth is as it was before")


class MetricsFile:
    """metrics.csv, written anew as a whole for each row; and the same for TensorBoard."""

    def __init__(self, path: Path, step: int, tensorboard: bool) -> None:
        self.lines = read_rows(path, step) if path.is_file() else [",".join(COLUMNS)]
        self.tensorboard = open_tensorboard(path.parent, step) if tensorboard else None

    def add(self, row: dict[str, float]) -> None:
        values = [f"{v:.6g}" if isinstance(v, float) else str(v) for v in row.values()]
        self.lines.append(",".join(values))
        try:
            if self.tensorboard:
                for name in row.keys() - {"step"}:
                    self.tensorboard.add_scalar(name, row[name], row["step"])
        except OSError as error:
            warn(f"TensorBoard gets no more figures ({error})")
            self.tensorboard = None

    def save(self, path: Path) -> None:
        with atomic_write(path) as file:
            file.write("".join(f"{line}\n" for line in self.lines).encode())


def read_rows(path: Path, step: int) -> list[str]:
    """The header and the lines but for rows beyond step: a resumed run writes those again.

    Raises UserError if the file has other columns.
    """
    header, *lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines() or [""]
    if header != ",".join(COLUMNS):
        raise UserError(f"{path} is not as this project writes it: move it away")
    return [header, *(line for line in lines if not is_beyond(line, step))]


def is_beyond(line: str, step: int) -> bool:
    """Whether it is the row of a later step, whatever program has saved it: 12, 12.0, 1.2E+01."""
    try:
        return float(line.split(",")[0]) > step
    except ValueError:
        return False  # a note of the user's


def open_tensorboard(run_dir: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--tensorboard needs a package that is not installed: "
                        "pip install tensorboard") from error
    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)
