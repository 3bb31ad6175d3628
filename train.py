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
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from checkpoint import latest_path, load_checkpoint, load_weights, read_config
from config import CommandLine, Config, UserError, derive_seed
from data import Batches, load_images, progress_bar
from ddpm import DDPM
from device import autocast, maybe_compile, memory_format, run, select_device, select_precision, start_processes
from model import UNet
from record import Metrics, RunFiles

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
    model = UNet(config).to(device, memory_format=memory_format(device, precision))
    ema = copy.deepcopy(model).eval()
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    metrics = Metrics(config.timesteps, device)
    step = 0
    if state is not None:
        step = state["step"]
        for network, key in ((model, "model"), (ema, "ema")):
            load_weights(network, state[key], latest_path(config))
        optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:
            scaler.load_state_dict(state["scaler"])
        if rank == 0:
            metrics.sums.copy_(state["sums"])

    files = RunFiles(config, step, tensorboard) if rank == 0 else None
    network = DistributedDataParallel(model) if world_size > 1 else model
    maybe_compile(config.compile, device, total_steps - step, network, ema)
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
            files.save_grid(step, ddpm_ema, autocast(device, precision), lambda: bool(stop.number))
        if step >= total_steps or (stop.number and files):
            break

        done = train_step(ddpm, ema, optimizer, scaler, batches, step, precision)
        skipped = 0 if done else skipped + 1
        if skipped == MAX_SKIPPED:
            raise UserError(f"fp16 overflowed {skipped} times in a row at step {step + 1}: try --precision bf16 "
                            "or fp32, or a lower --learning_rate")
        if not done:
            continue
        step += 1

        metrics.add(step, *done)
        bar.update(config.batch_size)
        if step % config.log_every == 0:
            epoch = step * config.batch_size // len(images)
            row = metrics.row(step, epoch, learning_rate(config, step - 1), config.batch_size)
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


def train_step(ddpm: DDPM, ema: UNet, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, batches: Batches,
               step: int, precision: str) -> tuple[Tensor, Tensor, Tensor] | None:
    """Algorithm 1, once: the losses [B] and their t [B], and the norm of the gradient.  Only fp16 waits for the device.

    None where fp16 overflowed: the scaler has left the weights alone and lowered its scale; take the same step again.
    """
    config, device = batches.config, batches.device
    torch.manual_seed(derive_seed("step", config.seed, step, batches.rank))
    x_start = batches(step)
    t = torch.randint(config.timesteps, x_start.shape[:1], device=device)
    noise = torch.randn_like(x_start)
    losses = []
    for micro_batch in zip(*(tensor.chunk(config.grad_accum) for tensor in (x_start, t, noise))):
        last = len(losses) == config.grad_accum - 1
        with nullcontext() if last or batches.world_size == 1 else ddpm.model.no_sync():
            with autocast(device, precision):
                losses.append(ddpm.loss_per_image(*micro_batch))
            scaler.scale(losses[-1].mean() / config.grad_accum).backward()
    scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(ddpm.model.parameters(), config.grad_clip or math.inf)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
    scale = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    if scaler.get_scale() < scale:
        return None
    ema_decay = min(config.ema_decay, (1 + step) / (10 + step))  # the ramp forgets the random initial weights
    get_ema_multi_avg_fn(ema_decay)(list(ema.parameters()), list(ddpm.model.parameters()), None)
    return torch.cat(losses).detach(), t, grad_norm


def learning_rate(config: Config, step: int) -> float:
    """Linear warm-up, then constant; the very first step is already above 0."""
    return config.learning_rate * min(1.0, (step + 1) / max(1, config.warmup_steps))


def kept_epoch(config: Config, step: int, num_images: int) -> int:
    """The epoch, a multiple of save_every, that ended with this step; 0 where none did."""
    before, now = ((s * config.batch_size // num_images) // (config.save_every or math.inf) for s in (step - 1, step))
    return int(now) * config.save_every if now > before else 0


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


def open_run(config: Config, resume: bool) -> dict[str, Any] | None:
    """The state to go on from.  Raises UserError where starting would write over a run."""
    latest = latest_path(config)
    kept = [*latest.parent.glob("*.pth")]
    if resume and latest.exists():
        state = load_checkpoint(latest)
        if missing := {"model", "optimizer", "scaler", "sums"} - state.keys():
            raise UserError(f"{latest} cannot be resumed from: it lacks {', '.join(sorted(missing))}")
        return state
    if kept and resume:
        raise UserError(f"{latest.parent} holds checkpoints but no latest.pth to resume from: choose another --run_dir")
    if (kept or (Path(config.run_dir) / "metrics.csv").exists()) and not resume:
        raise UserError(f"{config.run_dir} already holds a run: go on with --resume, or choose another --run_dir")
    return None


def resumed_config(given: dict[str, Any], run_dir: str, saved: Config) -> Config:
    """The settings of the checkpoint, changed by those that the command line gives; UserError where that cannot be."""
    try:
        config = Config(**{**asdict(saved), **given, "run_dir": run_dir})
    except ValueError as error:
        raise UserError(f"with the settings of the checkpoint, {error}") from error
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
    box = [open_run(config, args.resume) if rank == 0 else None]
    if world_size > 1:
        dist.broadcast_object_list(box)  # only the first machine need have the file
    state = box[0]
    if state:
        config = resumed_config(given, config.run_dir, read_config(state, latest_path(config)))
    if config.batch_size % (world_size * config.grad_accum):
        raise UserError(f"batch_size={config.batch_size} does not divide among {world_size} processes with "
                        f"grad_accum={config.grad_accum}: use a multiple of {world_size * config.grad_accum}")
    return train(config, state, rank, world_size, args.tensorboard)


if __name__ == "__main__":
    run(main)
