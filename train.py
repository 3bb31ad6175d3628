"""Train a DDPM: Algorithm 1 of arXiv 2006.11239.

    python train.py                        CIFAR-10, downloaded into ./data
    python train.py --preset demo          built-in shapes, minutes on a CPU
    python train.py --data path/to/images --image_size 64
    python train.py --resume               go on from checkpoints/latest.pth
    torchrun --nproc_per_node=4 train.py --preset paper --resume
"""

import math
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from config import Config
from data import Batches, load_images, mirror_half, to_picture
from ddpm import DDPM
from model import UNet
from utils.checkpoint import (
    TrainingState,
    check_alike,
    checkpoints_of,
    claimed,
    is_finite,
    is_of_step,
    latest_path,
    open_run,
    resumed_config,
    save_checkpoint,
)
from utils.cli import CommandLine, StopSignal, UserError, progress_bar, run, warn
from utils.device import (
    autocast,
    first_process_first,
    from_first_process,
    maybe_compile,
    select_device,
    select_precision,
    start_processes,
)
from utils.files import PatientWriter, save_png
from utils.metrics import Metrics, MetricsFile, not_finite
from utils.randomness import ImageNoise, derive_seed


def train_step(
    ddpm: DDPM, state: TrainingState, batches: Batches, config: Config, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 1, once: the losses [B], their t [B], and the norm of the gradient.

    Nothing in it waits for a GPU, but for fp16's scaler.
    """
    # All that is random below follows from the step: a resumed run needs no generator's state.
    torch.manual_seed(derive_seed("step", config.seed, state.step, batches.rank))
    x_start = batches(state.images_seen)
    if config.horizontal_flip:
        x_start = mirror_half(x_start)

    losses, timesteps = [], []
    micro_batches = x_start.chunk(config.grad_accum)
    for i, micro_batch in enumerate(micro_batches):
        if isinstance(ddpm.model, DistributedDataParallel):
            # The processes exchange gradients once per step, with the last micro-batch.
            is_last = i == len(micro_batches) - 1
            ddpm.model.require_backward_grad_sync = is_last
        with autocast(x_start.device, precision):
            micro_losses, t = ddpm.training_losses(micro_batch)
        loss = micro_losses.mean() / len(micro_batches)
        state.scaler.scale(loss).backward()
        losses.append(micro_losses.detach())
        timesteps.append(t)

    state.scaler.unscale_(state.optimizer)
    max_norm = config.grad_clip or math.inf
    grad_norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), max_norm)
    if state.scaler.is_enabled():
        # Where fp16 overflows the scaler skips the update and lowers its scale; the step counts.
        grad_norm = grad_norm.nan_to_num(0.0, 0.0, 0.0)
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(config, state.step)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad()
    update_ema(state.ema, state.model, ema_decay(config, state.step))

    state.step += 1
    state.images_seen += config.batch_size
    return torch.cat(losses), torch.cat(timesteps), grad_norm


def learning_rate(config: Config, step: int) -> float:
    """Of update number step + 1: linear warm-up, then constant; the first is already above 0."""
    return config.learning_rate * min(1.0, (step + 1) / max(1, config.warmup_steps))


def ema_decay(config: Config, step: int) -> float:
    """Ramped up from 0.1, so that the average forgets the random first weights.

    The ramp meets 0.9999 after 89,990 steps, 58 % of the default run.
    """
    return min(config.ema_decay, (1 + step) / (10 + step))


@torch.no_grad()
def update_ema(ema: UNet, model: UNet, decay: float) -> None:
    """ema = decay * ema + (1 - decay) * model, for each parameter, in fp32."""
    # lerp for all of them at once: a few kernels instead of hundreds.
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def train(
    config: Config, saved: dict[str, Any], tensorboard: bool, rank: int, world_size: int
) -> int:
    """Train to the end or until a signal, from a saved state where there is one: the exit status.

    Rank 0 writes the files and speaks.
    """
    run_dir = Path(config.run_dir)
    device = select_device(config.device)
    precision = select_precision(config.precision, device, config, training=True)
    config = replace(config, precision=precision)  # so that --resume goes on with it
    images = first_process_first(lambda: load_images(config))
    batches = Batches(images, config, device, rank, world_size)
    state = TrainingState(config, device, precision)
    metrics = Metrics(config.timesteps, device)
    if saved:
        check_alike(saved["sums"], metrics.sums, "sums", latest_path(run_dir))
        state.load_state_dict(saved, latest_path(run_dir))
        if rank == 0:
            metrics.sums.copy_(saved["sums"])
    first_step = state.step
    total_steps = count_steps(config, state, len(images))
    if rank == 0:
        print(describe(config, state, images.shape, total_steps, device, precision, world_size))
    final = checkpoints_of(run_dir) / "final_model.pth"
    if from_first_process(lambda: is_finished(config, first_step, total_steps, final)):
        if rank == 0:
            print(f"already finished: {final}")
        return 0

    network = DistributedDataParallel(state.model) if world_size > 1 else state.model
    maybe_compile(config.compile, device, total_steps - first_step, network, state.ema)
    ddpm = DDPM(network, config).to(device)
    ddpm_ema = DDPM(state.ema, config).to(device)

    writer = PatientWriter()
    if rank == 0:
        metrics_file = MetricsFile(run_dir / "metrics.csv", first_step, tensorboard, writer)

    def save_latest() -> None:
        content = {"config": asdict(config), "sums": metrics.sums, **state.state_dict()}
        save(latest_path(run_dir), content)

    def save_weights(path: Path) -> None:
        content = {"config": asdict(config), "step": state.step, "ema": state.ema.state_dict()}
        save(path, content)

    def save(path: Path, content: dict[str, Any]) -> None:
        if not is_finite(content):
            raise not_finite(state.step)
        writer.write(path, lambda path: save_checkpoint(content, path))

    stop = StopSignal()
    if rank == 0 and not saved:
        save_latest()  # from now on this is a run, which --resume goes on with
    last_save = time.monotonic()
    metrics.start_clock(state.images_seen)
    images_ahead = (total_steps - first_step) * config.batch_size
    bar = progress_bar(total=state.images_seen + images_ahead, initial=state.images_seen,
                       unit=" images", unit_scale=True, disable=rank > 0)
    while True:
        if rank == 0 and grid_is_due(config, state.step, first_step):
            save_grid(ddpm_ema, config, state.step, precision, writer, stop)
        if state.step >= total_steps or stop.requested():
            break

        losses, t, grad_norm = train_step(ddpm, state, batches, config, precision)
        metrics.add(losses, t, grad_norm)
        bar.update(config.batch_size)
        row_is_due = state.step % config.log_every == 0
        if row_is_due:  # of all processes together
            lr = learning_rate(config, state.step - 1)
            row = metrics.row(state.step, state.images_seen, len(images), lr)
        if rank > 0:
            continue

        if row_is_due:
            metrics_file.write_row(row)
        if row_is_due or device.type == "cpu":  # reading the loss of a GPU would wait for it
            metrics.check_finite(state.step)
            loss = f"loss {metrics.smoothed.item():.4f}"
            bar.set_postfix_str(f"step {state.step:,}/{total_steps:,}, {loss}", refresh=False)
        if epoch := kept_epoch(config, state.images_seen, len(images)):
            save_weights(checkpoints_of(run_dir) / f"checkpoint_epoch_{epoch}.pth")
        if time.monotonic() - last_save >= 60 * config.save_minutes:
            save_latest()
            last_save = time.monotonic()
    # The files first: printing may fail, where the reader of a pipe has gone.
    finished = state.step == total_steps
    if rank == 0:
        save_latest()
        if finished:
            save_weights(final)
    bar.close()
    if rank == 0:
        written = final if finished else latest_path(run_dir)
        where = f"{written} could not be written" if written in writer.unwritten else f"{written}"
        if finished:
            print(f"finished {state.step:,} steps: {where}")
        else:
            print(f"stopped after {state.step:,} of {total_steps:,} steps: {where}; the same "
                  "command with --resume goes on")
    if not finished:
        return 128 + stop.number
    needed = {latest_path(run_dir), final, run_dir / "metrics.csv"}
    return 1 if needed & writer.unwritten else 0


def count_steps(config: Config, state: TrainingState, num_images: int) -> int:
    """The step at which the run ends: max_steps, or the one that completes the epochs.

    Raises UserError where the run has already gone further.
    """
    if config.max_steps:
        if state.step > config.max_steps:
            raise UserError(f"max_steps={config.max_steps} is impossible: the run has taken "
                            f"{state.step} steps already")
        return config.max_steps
    images_left = config.epochs * num_images - state.images_seen
    if images_left <= -config.batch_size:
        raise UserError(f"epochs={config.epochs} is impossible: the run has seen "
                        f"{state.images_seen} images already, of {num_images} per epoch")
    return state.step + max(0, math.ceil(images_left / config.batch_size))


def is_finished(config: Config, step: int, total_steps: int, final: Path) -> bool:
    """Whether nothing is left to train, to draw or to write: rank 0 alone sees the files."""
    if step < total_steps or grid_is_due(config, step, step):
        return False
    return is_of_step(final, total_steps)


def kept_epoch(config: Config, images_seen: int, num_images: int) -> int:
    """The epoch, a multiple of save_every, that ended with the last step; 0 where none did."""
    if not config.save_every:
        return 0
    images_per_checkpoint = config.save_every * num_images
    before = (images_seen - config.batch_size) // images_per_checkpoint
    now = images_seen // images_per_checkpoint
    return now * config.save_every if now > before else 0


def grid_path(config: Config, step: int) -> Path:
    return Path(config.run_dir) / "samples" / f"sample_step_{step}.png"


def grid_is_due(config: Config, step: int, first_step: int) -> bool:
    """Also where a run was stopped while it drew one."""
    if step == 0 or not config.sample_every or step % config.sample_every:
        return False
    drawn_before = step == first_step and grid_path(config, step).exists()
    return not drawn_before


def save_grid(
    ddpm: DDPM, config: Config, step: int, precision: str, writer: PatientWriter, stop: StopSignal
) -> None:
    """Samples from the same noise at every step, with the EMA weights; none where it is stopped."""
    device = ddpm.betas.device
    shape = (config.channels, config.image_size, config.image_size)
    noise = ImageNoise(config.seed, range(config.num_samples), shape, device)
    steps = min(config.sample_steps, config.timesteps)
    with autocast(device, precision):
        for _, x in ddpm.sample_loop(noise.next(), steps, noise=noise):
            if stop.number:
                return
    picture = to_picture(x)
    writer.write(grid_path(config, step), lambda path: save_png(picture, path))


def describe(
    config: Config, state: TrainingState, shape: tuple[int, ...], total_steps: int,
    device: torch.device, precision: str, world_size: int,
) -> str:
    """What is trained on what, where; shape: of the images [N, C, H, W]."""
    parameters = sum(p.numel() for p in state.model.parameters())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    count, channels, height, width = shape
    return (
        f"training a U-Net of {parameters:,} parameters on {count:,} images of {config.data} "
        f"({width} x {height} x {channels})\n"
        f"steps {state.step:,} to {total_steps:,} of {config.batch_size} images "
        f"on {world_size} x {name} in {precision}\n"
        f"writing checkpoints/, samples/ and metrics.csv under {config.run_dir}"
    )


def main(argv: list[str] | None = None) -> int:
    usage = "python train.py [--preset NAME] [--resume] [--SETTING VALUE ...]"
    parser = CommandLine(__doc__, usage)
    parser.add_argument("--resume", action="store_true",
                        help="go on from latest.pth with its settings and the flags given (a "
                             "preset counts for a new run only), or start where there is none; "
                             "the precision that auto took is kept, --precision auto measures anew")
    parser.add_argument("--tensorboard", action="store_true",
                        help="write the metrics to run_dir/tensorboard too")
    parser.add_settings()
    args = parser.parse_args(argv)
    run_dir = parser.settings(args).get("run_dir", Config.run_dir)

    rank, world_size = start_processes()
    saved = from_first_process(lambda: open_run(run_dir, args.resume))
    if saved:
        config = resumed_config(parser.given_settings(args), run_dir, saved, say=rank == 0)
    else:
        config = parser.config(args)
    parts = world_size * config.grad_accum
    if config.batch_size % parts:
        raise UserError(
            f"batch_size={config.batch_size} does not divide among {world_size} processes with "
            f"grad_accum={config.grad_accum}: use a multiple of {parts}")
    samples = Path(run_dir).resolve() / "samples"
    data = Path(config.data).resolve()
    if data.is_dir() and samples.is_relative_to(data):
        warn(f"the grids of {run_dir} will be among the images of {config.data}: choose another "
             "--run_dir")
    with claimed(Path(run_dir), saved) if rank == 0 else nullcontext():
        return train(config, saved, args.tensorboard, rank, world_size)


if __name__ == "__main__":
    run(main)
