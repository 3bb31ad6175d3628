"""Train a DDPM (arXiv 2006.11239): the state, one step, the loop.

    python train.py                        CIFAR-10, downloaded into ./data
    python train.py --preset demo          built-in shapes, minutes on a CPU
    python train.py --data path/to/images --image_size 64
    python train.py --resume               go on from checkpoints/latest.pth
    torchrun --nproc_per_node=4 train.py --preset paper --resume
"""

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import ddim
from config import Config
from data import Batches, load_images, mirror_half, to_uint8
from ddpm import DDPM
from model import UNet
from utils.cli import CommandLine, UserError, progress_bar, say, warn
from utils.device import (
    LossScaler,
    autocast,
    maybe_compile,
    memory_format,
    select_device,
    select_precision,
)
from utils.metrics import Metrics
from utils.pictures import grid
from utils.process import StopSignal, first_process_first, run_script, script, start_processes
from utils.randomness import ImageNoise, derive_seed
from utils.run_folder import RunFolder, open_run


class TrainingState:
    """All that a resumed run needs to go on exactly: what latest.pth holds beside the config."""

    def __init__(self, config: Config, device: torch.device) -> None:
        torch.manual_seed(derive_seed("weights", config.seed))
        self.model = UNet(config).to(
            device, memory_format=memory_format(device, config.precision))
        self.ema = copy.deepcopy(self.model).eval()
        # Lists, since to walk through the modules takes longer than to launch a kernel.
        self.parameters = list(self.model.parameters())
        self.ema_parameters = list(self.ema.parameters())
        self.optimizer = torch.optim.Adam(self.parameters, fused=True)
        # As Adam's first step would, since latest.pth is saved before that, and loaded into these.
        for p in self.parameters:
            self.optimizer.state[p] = {"step": torch.zeros((), device=device),
                                       "exp_avg": torch.zeros_like(p),
                                       "exp_avg_sq": torch.zeros_like(p)}
        self.scaler = LossScaler(device.type, enabled=config.precision == "fp16")
        self.metrics = Metrics(config.timesteps, device)  # the sums of the next row
        self.step = 0  # updates done
        self.images_seen = 0  # the position in the data

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "images_seen": self.images_seen,
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "sums": self.metrics.sums,
        }

    def load_state_dict(self, content: dict[str, Any]) -> None:
        """Take over what state_dict saved.  Raises any exception if it is of another network."""
        self.step, self.images_seen = content["step"], content["images_seen"]
        self.model.load_state_dict(content["model"])
        self.ema.load_state_dict(content["ema"])
        if content["scaler"]:  # none was in use if it is empty
            self.scaler.load_state_dict(content["scaler"])
        # Copied into the tensors that are there: they have the memory format of the weights, which
        # Adam's fused kernel relies on.
        pairs = [(self.metrics.sums, content["sums"])]
        for i, moments in self.optimizer.state_dict()["state"].items():
            saved_moments = content["optimizer"]["state"][i]
            pairs += [(moments[name], saved_moments[name]) for name in moments]
        for ours, saved in pairs:
            if ours.shape != saved.shape:  # copy_ would stretch it
                raise ValueError("a moment of Adam, or the sums, have another shape")
            ours.copy_(saved)


def train_step(
    ddpm: DDPM, state: TrainingState, batches: Batches, config: Config
) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 1, once: the losses [B], their t [B], and the norm of the gradient unclipped.

    B images are this process's share.  Nothing in it waits for a GPU, but for fp16's scaler.
    """
    # Draw: all that is random follows from the step, so no generator's state is ever saved.
    torch.manual_seed(derive_seed("step", config.seed, state.step, batches.rank))
    x_start = batches(state.images_seen)
    if config.horizontal_flip:
        x_start = mirror_half(x_start)

    # Gradient: of the mean loss, whose t and noise are drawn on the way.
    losses, t = accumulate_gradient(ddpm, state.scaler, x_start, config)
    state.scaler.unscale_(state.optimizer)
    max_norm = config.grad_clip or math.inf
    grad_norm = torch.nn.utils.clip_grad_norm_(state.parameters, max_norm)
    if state.scaler.is_enabled():
        # Where fp16 overflows the scaler skips the update and lowers its scale; the step counts.
        grad_norm = grad_norm.nan_to_num(0.0, 0.0, 0.0)

    # Update: Adam, then the average.
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(config, state.step)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad()
    update_ema(state.ema_parameters, state.parameters, ema_decay(config, state.step))
    state.step += 1
    state.images_seen += config.batch_size
    return losses, t, grad_norm


def accumulate_gradient(
    ddpm: DDPM, scaler: torch.amp.GradScaler, x_start: Tensor, config: Config
) -> tuple[Tensor, Tensor]:
    """Add up the gradient of the mean loss over grad_accum micro-batches: the losses [B], their t.

    With several processes it is the mean over all of them.
    """
    losses, timesteps = [], []
    micro_batches = x_start.chunk(config.grad_accum)
    for i, micro_batch in enumerate(micro_batches):
        if isinstance(ddpm.model, DistributedDataParallel):
            # The processes exchange their gradients once per step, with the last micro-batch.
            is_last = i == len(micro_batches) - 1
            ddpm.model.require_backward_grad_sync = is_last
        with autocast(x_start.device, config.precision):
            micro_losses, t = ddpm.training_losses(micro_batch)
        loss = micro_losses.mean() / len(micro_batches)
        scaler.scale(loss).backward()
        losses.append(micro_losses.detach())
        timesteps.append(t)
    return torch.cat(losses), torch.cat(timesteps)


def learning_rate(config: Config, step: int) -> float:
    """The rate of update number step + 1: linear warm-up, then constant; never 0."""
    return config.learning_rate * min(1.0, (step + 1) / max(1, config.warmup_steps))


def ema_decay(config: Config, step: int) -> float:
    """Ramped up from 0.1, so that the average forgets the random first weights.

    After 1,000 steps half of the average is the last 75 updates; the ramp meets 0.9999 after
    89,990 steps, 58 % of the default run.
    """
    return min(config.ema_decay, (1 + step) / (10 + step))


@torch.no_grad()
def update_ema(ema: list[Tensor], parameters: list[Tensor], decay: float) -> None:
    """ema = decay * ema + (1 - decay) * parameter, for each of them, in fp32."""
    # lerp for all of them at once: a few kernels instead of hundreds.
    torch._foreach_lerp_(ema, parameters, 1 - decay)


def train(run: RunFolder, config: Config, rank: int, world_size: int) -> int:
    """Train to the end or until a signal, and return the exit status."""
    device = select_device(config.device)
    # So that --resume goes on with what auto chose.
    config = replace(config, precision=select_precision(config.precision, device))
    images = first_process_first(lambda: load_images(config))
    batches = Batches(images, config, device, rank, world_size)
    state = TrainingState(config, device)
    run.restore(config, state)
    total_steps = count_steps(config, state, len(images))
    say(describe(config, state, images.shape, total_steps, device, world_size))
    if run.is_finished(state.step, total_steps):
        return 0

    network = DistributedDataParallel(state.model) if world_size > 1 else state.model
    maybe_compile(config.compile, device, total_steps - state.step, network, state.ema)
    ddpm = DDPM(network, config).to(device)
    ddpm_ema = DDPM(state.ema, config).to(device)

    stop = StopSignal()
    run.begin(state, total_steps, len(images))
    state.metrics.start_clock(state.images_seen)
    images_ahead = (total_steps - state.step) * config.batch_size
    with progress_bar(total=state.images_seen + images_ahead, initial=state.images_seen,
                      unit=" images", unit_scale=True) as bar:
        while True:
            # First, so that a resumed run draws the grid during which the last one was stopped.
            if run.grid_is_due(state.step):
                run.save_grid(sample_grid(ddpm_ema, config, stop), state.step)
            if state.step >= total_steps or stop.requested():
                break
            losses, t, grad_norm = train_step(ddpm, state, batches, config)

            state.metrics.add(losses, t, grad_norm)
            bar.update(config.batch_size)
            row_is_due = state.step % config.log_every == 0
            if row_is_due:
                lr = state.optimizer.param_groups[0]["lr"]
                run.write_row(state.metrics.row(state.step, state.images_seen, len(images), lr))
            if row_is_due or device.type == "cpu":  # reading the loss of a GPU would wait for it
                state.metrics.check_finite(state.step)
                loss = f"loss {state.metrics.smoothed.item():.4f}"
                bar.set_postfix_str(f"step {state.step:,}/{total_steps:,}, {loss}", refresh=False)
            run.save_if_due(state)
    return run.end(state, total_steps, stop.number)


def count_steps(config: Config, state: TrainingState, num_images: int) -> int:
    """The step at which the run ends: max_steps, or the one that completes the epochs.

    Raises UserError if the run has already gone further.
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


def sample_grid(ddpm: DDPM, config: Config, stop: StopSignal) -> Image.Image | None:
    """EMA samples, from the same noise at every step; None if stopped, or if not finite."""
    device = ddpm.betas.device
    shape = (config.channels, config.image_size, config.image_size)
    steps = min(config.sample_steps, config.timesteps)
    images = []
    for indices in torch.arange(config.num_samples).split(config.batch_size // config.grad_accum):
        randn_like = ImageNoise(config.seed, indices.tolist(), shape, device)
        with autocast(device, config.precision):
            for _, x in ddim.sample_loop(ddpm, randn_like(), steps, randn_like=randn_like):
                if stop.number:
                    return None
        if not x.isfinite().all():
            warn(f"the network overflows in {config.precision}: no grid is drawn")
            return None
        images.append(to_uint8(x))
    return grid(torch.cat(images))


def describe(
    config: Config, state: TrainingState, shape: tuple[int, ...], total_steps: int,
    device: torch.device, world_size: int,
) -> str:
    """The banner: what is trained on what, where; shape: of the images [N, C, H, W]."""
    parameters = sum(p.numel() for p in state.parameters)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    count, channels, height, width = shape
    return (
        f"training a U-Net of {parameters:,} parameters on {count:,} images of {config.data} "
        f"({width} x {height} x {channels})\n"
        f"steps {state.step:,} to {total_steps:,} of {config.batch_size} images "
        f"on {world_size} x {name} in {config.precision}\n"
        f"writing checkpoints/, samples/ and metrics.csv under {config.run_dir}"
    )


def check(config: Config, world_size: int) -> None:
    """Refuse a batch that does not divide; warn of grids that would become training data."""
    parts = world_size * config.grad_accum
    if config.batch_size % parts:
        raise UserError(
            f"batch_size={config.batch_size} does not divide among {world_size} processes with "
            f"grad_accum={config.grad_accum}: use a multiple of {parts}")
    samples, data = Path(config.run_dir).resolve() / "samples", Path(config.data).resolve()
    if data.is_dir() and samples.is_relative_to(data):
        warn(f"the grids of {config.run_dir} will be among the images of {config.data}: choose "
             "another --run_dir")


@script
def main(argv: list[str] | None = None) -> int:
    usage = "python train.py [--preset NAME] [--resume] [--SETTING VALUE ...]"
    parser = CommandLine(__doc__, usage)
    parser.add_argument("--resume", action="store_true",
                        help="go on from latest.pth, if there is one: with its settings, also the "
                             "precision that auto took, but for the flags given (no preset's)")
    parser.add_argument("--tensorboard", action="store_true",
                        help="write the metrics to run_dir/tensorboard too")
    parser.add_settings()
    args = parser.parse_args(argv)
    run_dir = parser.settings_with_preset(args).get("run_dir", Config.run_dir)

    rank, world_size = start_processes()
    with open_run(run_dir, args.resume, args.tensorboard) as run:
        config = run.resumed_config(parser.given_settings(args)) or parser.config(args)
        check(config, world_size)
        return train(run, config, rank, world_size)


if __name__ == "__main__":
    run_script(main)
