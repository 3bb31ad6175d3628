"""How fast training and sampling are, beside diffusers in the same run.

    python -m tools.bench                                   the default network
    python -m tools.bench --preset paper --batch_size 16 --peers
    python -m tools.bench --preset demo --json bench.json

It takes the settings of train.py.  Ours, in fp32, bf16 and the precision asked
for, and with --peers the same network in diffusers, in fp32 and by bf16
autocast, take turns, each in a process of its own.  The figures are medians of
the rounds, without the warm-up and compiling that every turn begins with.  The
images are random pixels: what they show does not change the speed.
"""

import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also without -m

from config import Config
from data import Batches
from ddpm import DDPM
from tools.convert import scheduler_settings, unet_settings
from train import TrainingState, train_step
from utils.cli import CommandLine, UserError
from utils.device import autocast, maybe_compile, select_device, select_precision
from utils.files import make_writable, write_json
from utils.process import run_script
from utils.randomness import ImageNoise

# What is measured: the network, a training step, and an iterator that evaluates it once each time.
Codebase = tuple[nn.Module, Callable[[], None], Iterator[Any]]


def ours(config: Config) -> Codebase:
    """The step of train.py; Algorithm 2, its noise drawn as inference.py draws it."""
    device = select_device(config.device)
    shape = (config.channels, config.image_size, config.image_size)
    size = (max(1000, config.batch_size), *shape)
    images = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    batches = Batches(images, config, device)
    state = TrainingState(config, device)
    maybe_compile(config.compile, device, math.inf, state.model, state.ema)
    ddpm = DDPM(state.model, config).to(device)
    ddpm_ema = DDPM(state.ema, config).to(device)

    def train() -> None:
        train_step(ddpm, state, batches, config)

    def evaluations() -> Iterator[Any]:
        while True:
            randn_like = ImageNoise(config.seed, range(config.batch_size), shape, device)
            yield from ddpm_ema.p_sample_loop(randn_like(), randn_like=randn_like)

    return state.model, train, evaluations()


def diffusers(config: Config) -> Codebase:
    """The step of its example of unconditional training, with AdamW and EMA; its DDPMPipeline."""
    from diffusers import DDPMScheduler, UNet2DModel
    from diffusers.training_utils import EMAModel

    device = torch.device(config.device)  # select_device's settings would speed it up too
    model = UNet2DModel(**unet_settings(config)).to(device)
    ema = EMAModel(model.parameters(), 0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    scheduler = DDPMScheduler(**scheduler_settings(config))
    shape = (config.batch_size, config.channels, config.image_size, config.image_size)
    x_start = torch.randn(shape, device=device)

    def train() -> None:
        noise = torch.randn_like(x_start)
        t = torch.randint(config.timesteps, (config.batch_size,), device=device)
        x_t = scheduler.add_noise(x_start, noise, t)
        with autocast(device, config.precision):
            pred_noise = model(x_t, t).sample
        F.mse_loss(pred_noise.float(), noise).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(model.parameters())

    def evaluations() -> Iterator[Any]:
        x_t = torch.randn(shape, device=device)
        scheduler.set_timesteps(config.timesteps)
        for t in cycle(scheduler.timesteps):
            pred_noise = model(x_t, t).sample
            x_t = scheduler.step(pred_noise, t, x_t).prev_sample
            yield x_t

    return model, train, evaluations()


# In a process of its own

def measure(make: Callable[[Config], Codebase], config: Config, seconds: float) -> dict[str, float]:
    """One turn, of so many seconds for training and as many for sampling; both in images/s."""
    model, train, evaluations = make(config)
    device = next(model.parameters()).device
    trained = steps_per_second(train, seconds, device)
    model.eval()
    with torch.no_grad(), autocast(device, config.precision):
        sampled = steps_per_second(lambda: next(evaluations), seconds, device)
    return {"train": config.batch_size * trained, "sample": config.batch_size * sampled}


def steps_per_second(step: Callable[[], Any], seconds: float, device: torch.device) -> float:
    timed(step, 1, device)  # compiles
    estimate = timed(step, 1, device)
    if estimate > seconds:
        return 1 / estimate
    count = round(seconds / estimate)
    return count / timed(step, count, device)


def timed(step: Callable[[], Any], count: int, device: torch.device) -> float:
    """The seconds that so many steps take."""
    start = time.perf_counter()
    for _ in range(count):
        step()
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()
    return time.perf_counter() - start


# The report

def take_turns(
    contenders: dict[str, tuple], rounds: int, seconds: float
) -> dict[str, dict[str, Any]]:
    """From name -> (make, config) to name -> the medians, and what they are of."""
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                try:
                    turns[name].append(process.submit(measure, *contender, seconds).result())
                except BrokenProcessPool as error:
                    raise UserError(f"the process of {name} died: out of memory?") from error
                except BaseException:  # a signal, say: its end is not waited for
                    for child in multiprocessing.active_children():
                        child.kill()
                    raise
    results = {}
    for name, its_turns in turns.items():
        rounds_of = {what: [turn[what] for turn in its_turns] for what in ("train", "sample")}
        medians = {what: median(rates) for what, rates in rounds_of.items()}
        results[name] = {**medians, "rounds": rounds_of}
    return results


def main(argv: list[str] | None = None) -> int:
    usage = "python -m tools.bench [--peers] [--preset NAME] [--SETTING VALUE ...]"
    parser = CommandLine(__doc__, usage)
    parser.add_argument("--peers", action="store_true", help="measure diffusers too")
    parser.add_number("--rounds", int, "of which the median counts (default: 3)", 1, default=3)
    parser.add_number("--seconds", float, "per figure, about (default: 3)", 0, 3600, default=3.0)
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures here too")
    parser.add_settings()
    args = parser.parse_args(argv)
    config = parser.config(args)
    device = select_device(config.device)
    config = replace(config, device=device.type,
                     precision=select_precision(config.precision, device))
    if args.peers:
        if find_spec("diffusers") is None:
            raise UserError("--peers needs a package that is not installed: pip install diffusers")
        unet_settings(config)  # refuses a network that diffusers does not have
    if args.json:
        make_writable(args.json)

    contenders = {"ours": (ours, config)}
    for precision in ("fp32", "bf16"):
        if precision != config.precision:
            contenders[f"ours_{precision}"] = (ours, replace(config, precision=precision))
        if args.peers:
            contenders[f"diffusers_{precision}"] = (diffusers, replace(config, precision=precision))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    print(f"{name}, torch {torch.__version__}, {config.image_size} x {config.image_size}, batch "
          f"{config.batch_size}, {config.precision}; images, or image evaluations, per second, "
          "and how many times as fast ours is")
    results = take_turns(contenders, args.rounds, args.seconds)
    ratios = {}
    for name, result in results.items():
        line = f"{name:<16}"
        for what in ("train", "sample"):
            ratio = results["ours"][what] / result[what]
            line += f"   {what} {result[what]:9.1f}{ratio:7.2f}x"
            if name != "ours":
                ratios[f"{what}_vs_{name}"] = ratio
        print(line)
    if args.json:
        write_json(args.json, {"torch": torch.__version__, "settings": asdict(config),
                               "ratios": ratios, "results": results})
    return 0


if __name__ == "__main__":
    run_script(main)
