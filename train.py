"""Train a DDPM: Algorithm 1 of arXiv 2006.11239.

    python train.py                        CIFAR-10, downloaded into ./data
    python train.py --preset demo          built-in shapes, minutes on a CPU
    python train.py --data path/to/images --image_size 64
    python train.py --resume               go on from checkpoints/latest.pth
    torchrun --nproc_per_node=4 train.py --preset paper --resume
"""

import copy
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from checkpoint import load_checkpoint, read_config, save_checkpoint
from config import CommandLine, Config, UserError, derive_seed
from data import Batches, load_images, progress_bar, save_grid
from ddpm import DDPM, ImageNoise
from device import autocast, run, select_device, select_precision, start_processes, wants_compile
from model import UNet

# What the weights and the diffusion are made of: a resumed run cannot change it.
FIXED = ("image_size", "channels", "dim", "dim_mults", "num_res_blocks", "attn_resolutions",
         "timesteps", "beta_schedule", "beta_start", "beta_end", "variance")
MAX_SKIPPED = 20  # steps in a row that fp16's scaler may skip


def train(config: Config, state: dict[str, Any] | None, rank: int, world_size: int, tensorboard: bool) -> int:
    """Train to the end or until a signal, from the state of a latest.pth where one is given.  The exit status."""
    stop = StopSignal()
    device = select_device(config.device)
    precision = select_precision(config.precision, device, config.dim)
    images = load_in_turn(config, rank, world_size)
    batches = Batches(images, config, device, rank, world_size)
    total_steps = config.max_steps or math.ceil(config.epochs * len(images) / config.batch_size)

    torch.manual_seed(derive_seed("weights", config.seed))
    model = UNet(config).to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(model).eval()
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    metrics = Metrics(config.timesteps, device)
    step = 0
    if state is not None:
        step = state["step"]
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        if rank == 0:
            metrics.sums.copy_(state["sums"])

    files = RunFiles(config, step, tensorboard) if rank == 0 else None
    network = DistributedDataParallel(model) if world_size > 1 else model
    if wants_compile(config.compile, device, total_steps - step):
        network.compile()
        ema.compile()
    ddpm, ddpm_ema = DDPM(network, config).to(device), DDPM(ema, config).to(device)
    if files:
        print(describe(config, model, images, step, total_steps, device, precision, world_size))
        if step >= total_steps and files.final.exists():
            print(f"already finished: {files.final}")
            return 0

    def weights() -> dict[str, Any]:
        return {"config": asdict(config), "step": step, "ema": ema.state_dict()}

    def save_latest() -> None:
        files.save(files.latest, {**weights(), "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                                  "scaler": scaler.state_dict(), "sums": metrics.sums})

    bar = progress_bar(total=total_steps * config.batch_size, initial=step * config.batch_size, unit=" images",
                       unit_scale=True, disable=rank > 0)
    skipped = 0
    while True:
        if files and files.grid_is_due(step):
            metrics.check_finite()
            files.save_grid(step, ddpm_ema, autocast(device, precision), stop)
        if step >= total_steps or (stop.number and files):
            break

        torch.manual_seed(derive_seed("step", config.seed, step, rank))
        x_start = batches(step)
        t = torch.randint(config.timesteps, x_start.shape[:1], device=device)
        noise = torch.randn_like(x_start)
        losses = []
        for micro_batch in zip(*(tensor.chunk(config.grad_accum) for tensor in (x_start, t, noise))):
            last = len(losses) == config.grad_accum - 1
            with nullcontext() if last or world_size == 1 else network.no_sync():
                with autocast(device, precision):
                    losses.append(ddpm.loss_per_image(*micro_batch))
                scaler.scale(losses[-1].mean() / config.grad_accum).backward()
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        # fp16 overflowed: the scaler has left the weights alone and lowered its scale, and the same step is tried again
        skipped = skipped + 1 if scaler.get_scale() < scale else 0
        if skipped == MAX_SKIPPED:
            raise UserError(f"fp16 overflowed {skipped} times in a row at step {step + 1}: try --precision bf16 "
                            "or fp32, or a lower --learning_rate")
        if skipped:
            continue
        ema_decay = min(config.ema_decay, (1 + step) / (10 + step))  # the ramp forgets the random initial weights
        get_ema_multi_avg_fn(ema_decay)(list(ema.parameters()), list(model.parameters()), None)
        step += 1

        metrics.add(step, torch.cat(losses).detach(), t, grad_norm)
        bar.update(config.batch_size)
        if step % config.log_every == 0:
            row = metrics.row(step, epoch=step * config.batch_size // len(images), config=config)
            if files:
                files.write_row(row)
        if step % config.log_every == 0 or device.type == "cpu":  # reading the loss of a GPU would wait for it
            bar.set_postfix_str(f"step {step:,}/{total_steps:,}, loss {metrics.smoothed.item():.4f}", refresh=False)
        if files and (epoch := kept_epoch(config, step, len(images))):
            metrics.check_finite()
            files.save(files.checkpoints / f"checkpoint_epoch_{epoch}.pth", weights())
        if files and files.latest_is_due():
            metrics.check_finite()
            save_latest()

    bar.close()
    if not files:
        return 0
    metrics.check_finite()
    save_latest()
    if step >= total_steps:
        files.save(files.final, weights())
        print(f"finished {step:,} steps: {files.final}")
        return files.status()
    print(f"stopped after {step:,} of {total_steps:,} steps: {files.latest}; the same command with --resume goes on")
    return 128 + stop.number


def learning_rate(config: Config, step: int) -> float:
    """Linear warm-up, then constant; the very first step is already above 0."""
    return config.learning_rate * min(1.0, (step + 1) / max(1, config.warmup_steps))


def kept_epoch(config: Config, step: int, num_images: int) -> int:
    """The epoch, a multiple of save_every, that ended with this step; 0 where none did."""
    before, now = ((s * config.batch_size // num_images) // (config.save_every or math.inf) for s in (step - 1, step))
    return int(now) * config.save_every if now > before else 0


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

    def row(self, step: int, epoch: int, config: Config) -> dict[str, float]:
        """The next row of metrics.csv, over all processes; starts the sums anew."""
        if dist.is_initialized():
            dist.all_reduce(self.sums)
            dist.all_reduce(self.first_bad, dist.ReduceOp.MIN)
        self.check_finite()
        steps, grad_norm, *quarters = self.sums.tolist()
        losses, counts = quarters[:4], quarters[4:]
        now = time.perf_counter()
        images_per_sec = self.added * config.batch_size / (now - self.clock)
        self.sums.zero_()
        self.added, self.clock = 0, now
        return {"step": step, "epoch": epoch, "loss": sum(losses) / sum(counts),
                **{f"loss_q{i + 1}": losses[i] / counts[i] if counts[i] else math.nan for i in range(4)},
                "lr": learning_rate(config, step - 1), "grad_norm": grad_norm / steps, "images_per_sec": images_per_sec}

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
        self.latest, self.final = self.checkpoints / "latest.pth", self.checkpoints / "final_model.pth"
        self.metrics, self.rows, self.rows_end = self.run_dir / "metrics.csv", "", 0
        self.unwritten: set[Path] = set()
        self.last_save = time.monotonic()
        try:
            for folder in (self.checkpoints, self.samples):
                folder.mkdir(parents=True, exist_ok=True)
                for left_over in folder.glob("*.tmp"):
                    left_over.unlink()
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

    def save_grid(self, step: int, ddpm: DDPM, precision: AbstractContextManager, stop: "StopSignal") -> None:
        """Samples from the same starting noise at every step, with the EMA weights; none where stop comes first."""
        config, device = self.config, ddpm.betas.device
        noise = ImageNoise(config.seed, range(config.num_samples),
                           (config.channels, config.image_size, config.image_size), device)
        with precision:
            for _, x, _ in ddpm.sample_loop(noise(), min(config.sample_steps, config.timesteps), noise=noise):
                if stop.number:
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


class StopSignal:
    """SIGINT and SIGTERM: the first asks the loop to stop after its step, a second one ends the process at once."""

    def __init__(self) -> None:
        self.number = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self)

    def __call__(self, number: int, frame: Any) -> None:
        if self.number:
            os._exit(128 + number)
        self.number = number


def load_in_turn(config: Config, rank: int, world_size: int) -> np.ndarray:
    """The first process downloads and decodes, then the first one of every machine, and the others find it done."""
    if world_size == 1:
        return load_images(config)
    images = None
    for my_turn in (rank == 0, os.environ["LOCAL_RANK"] == "0", True):
        if my_turn and images is None:
            images = load_images(config)
        dist.barrier()
    return images


def describe(config: Config, model: UNet, images: np.ndarray, step: int, total_steps: int, device: torch.device,
             precision: str, world_size: int) -> str:
    parameters = sum(p.numel() for p in model.parameters())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    size = f"{config.image_size} x {config.image_size} x {config.channels}"
    return (f"training a U-Net of {parameters:,} parameters on {len(images):,} images of {config.data} ({size})\n"
            f"steps {step:,} to {total_steps:,} of {config.batch_size} images on {world_size} x {name} in {precision}\n"
            f"writing checkpoints/, samples/ and metrics.csv under {config.run_dir}")


def open_run(run_dir: Path, resume: bool) -> dict[str, Any] | None:
    """The state to go on from.  Raises UserError where starting would write over a run."""
    latest = run_dir / "checkpoints" / "latest.pth"
    kept = [*latest.parent.glob("*.pth")]
    if resume and latest.exists():
        state = load_checkpoint(latest)
        if missing := {"model", "optimizer", "scaler", "sums"} - state.keys():
            raise UserError(f"{latest} cannot be resumed from: it lacks {', '.join(sorted(missing))}")
        return state
    if kept and resume:
        raise UserError(f"{latest.parent} holds checkpoints but no latest.pth to resume from: choose another --run_dir")
    if (kept or (run_dir / "metrics.csv").exists()) and not resume:
        raise UserError(f"{run_dir} already holds a run: go on with --resume, or choose another --run_dir")
    return None


def resumed_config(given: dict[str, Any], run_dir: str, saved: Config) -> Config:
    """The settings of the checkpoint, changed by those that the command line gives; UserError where that cannot be."""
    config = Config(**{**asdict(saved), **given, "run_dir": run_dir})
    changes = {name: f"{name} {old} -> {getattr(config, name)}" for name, old in asdict(saved).items()
               if getattr(config, name) != old and name != "run_dir"}
    if wrong := [text for name, text in changes.items() if name in FIXED]:
        raise UserError(f"the checkpoint is of another network or diffusion: {'; '.join(wrong)}; leave these flags "
                        "out, or choose another --run_dir")
    if changes:
        print(f"resuming with changed settings: {'; '.join(changes.values())}")
    return config


def main(argv: list[str] | None = None) -> int:
    parser = CommandLine(__doc__, "python train.py [--preset NAME] [--resume] [--SETTING VALUE ...]")
    parser.add_argument("--resume", action="store_true", help="go on from latest.pth, or start where there is none")
    parser.add_argument("--tensorboard", action="store_true", help="write the metrics to run_dir/tensorboard too")
    parser.add_settings()
    args = parser.parse_args(argv)
    given = parser.given_settings(args)
    try:
        config = Config(**given)
    except ValueError as error:
        parser.error(str(error))

    rank, world_size = start_processes()
    box = [open_run(Path(config.run_dir), args.resume) if rank == 0 else None]
    if world_size > 1:
        dist.broadcast_object_list(box)  # only the first machine need have the file
    state = box[0]
    if state:
        latest = Path(config.run_dir) / "checkpoints" / "latest.pth"
        config = resumed_config(given, config.run_dir, read_config(state, latest))
    if config.batch_size % (world_size * config.grad_accum):
        raise UserError(f"batch_size={config.batch_size} does not divide among {world_size} processes with "
                        f"grad_accum={config.grad_accum}: use a multiple of {world_size * config.grad_accum}")
    return train(config, state, rank, world_size, args.tensorboard)


if __name__ == "__main__":
    run(main)
