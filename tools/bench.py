"""How fast training and sampling are, beside diffusers in the same run.

    python -m tools.bench                                   the default network
    python -m tools.bench --preset paper --batch_size 16 --peers
    python -m tools.bench --preset demo --json bench.json

It takes the settings of train.py.  All take turns, and every turn is in a
process of its own, where no one profits from the memory or the settings of
another.  The figures are medians of the rounds, without warm-up and
compiling, which every turn begins with; a step that takes longer than
--seconds is timed once.  Ours is in the precision of --precision, auto as in
train.py, and in the other one too.  The images are random pixels: what
they show does not change the speed.  --peers adds the same network in
diffusers, in fp32, its default, and by bf16 autocast.
"""

import math
import multiprocessing
import platform
import re
import resource
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
from torch.utils.flop_counter import FlopCounterMode

from config import Config
from data import Batches
from ddpm import DDPM
from model import UNet
from tools.convert import scheduler_settings, unet_settings
from train import train_step
from utils.checkpoint import TrainingState
from utils.cli import CommandLine, UserError, run
from utils.device import (
    DTYPES,
    EMULATED,
    autocast,
    maybe_compile,
    measure_speedup,
    memory_format,
    select_device,
    select_precision,
)
from utils.files import make_writable, write_json
from utils.randomness import ImageNoise

# What is measured: the network, a training step, and an iterator that evaluates it once each time.
Codebase = tuple[nn.Module, Callable[[], None], Iterator[Any]]


def ours(config: Config, precision: str) -> Codebase:
    """The step of train.py; Algorithm 2, its noise drawn as inference.py draws it."""
    device = select_device(config.device)
    shape = (config.channels, config.image_size, config.image_size)
    size = (max(1000, config.batch_size), *shape)
    images = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    batches = Batches(images, config, device)
    state = TrainingState(config, device, precision)
    maybe_compile(config.compile, device, math.inf, state.model, state.ema)
    ddpm = DDPM(state.model, config).to(device)
    ddpm_ema = DDPM(state.ema, config).to(device)

    def train() -> None:
        train_step(ddpm, state, batches, config, precision)

    def evaluations() -> Iterator[Any]:
        while True:
            noise = ImageNoise(config.seed, range(config.batch_size), shape, device)
            yield from ddpm_ema.p_sample_loop(noise.next(), noise=noise)

    return state.model, train, evaluations()


def diffusers(config: Config, precision: str) -> Codebase:
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
        with autocast(device, precision):
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


def convolution(config: Config, precision: str) -> Codebase:
    """A bare 3 x 3 convolution of 128 channels at 32 x 32: what the device can do."""
    device = select_device(config.device)
    dtype, layout = DTYPES[precision], memory_format(device, precision)
    conv = nn.Conv2d(128, 128, 3, padding=1, bias=False).to(device, dtype, memory_format=layout)
    x = torch.randn(config.batch_size, 128, 32, 32, device=device, dtype=dtype)
    x = x.to(memory_format=layout).requires_grad_()
    gradient = torch.ones_like(x)

    def train() -> None:
        conv(x).backward(gradient)
        x.grad = conv.weight.grad = None

    def evaluations() -> Iterator[Any]:
        while True:
            yield conv(x)

    return conv, train, evaluations()


FORWARD_GFLOP = 2 * 32 * 32 * 9 * 128 * 128 / 1e9
# Of one image.  A gradient takes as much as its convolution; there are two, of x and of the weight.
CONVOLUTION_GFLOP = {"train": 3 * FORWARD_GFLOP, "sample": FORWARD_GFLOP}


# In a process of its own

def measure(
    make: Callable[[Config, str], Codebase], config: Config, precision: str, seconds: float
) -> dict[str, float]:
    """One turn, of so many seconds for training and as many for sampling; both in images/s."""
    model, train, evaluations = make(config, precision)
    device = next(model.parameters()).device
    train_rate = steps_per_second(train, seconds, device)
    model.eval()
    with torch.no_grad(), autocast(device, precision):
        sample_rate = steps_per_second(lambda: next(evaluations), seconds, device)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "train": config.batch_size * train_rate,
        "sample": config.batch_size * sample_rate,
        "peak_memory_gb": peak_memory_gb(device),
    }


def steps_per_second(step: Callable[[], Any], seconds: float, device: torch.device) -> float:
    timed(step, 1, device)  # compiles
    estimate = timed(step, 1, device)
    if estimate > seconds:
        return 1 / estimate
    count = round(seconds / estimate)
    return count / timed(step, count, device)


def timed(step: Callable[[], Any], count: int, device: torch.device) -> float:
    """Seconds."""
    start = time.perf_counter()
    for _ in range(count):
        step()
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()
    return time.perf_counter() - start


def peak_memory_gb(device: torch.device) -> float:
    """The most that this process has held until now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


# The report

def take_turns(
    contenders: dict[str, tuple], rounds: int, seconds: float
) -> dict[str, dict[str, Any]]:
    """From name -> (make, config, precision) to name -> its figures."""
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                turn = process.submit(measure, *contender, seconds)
                try:
                    turns[name].append(turn.result())
                except BrokenProcessPool as error:
                    raise UserError(f"the process of {name} died: out of memory?") from error
                except BaseException:  # a signal, say: its end is not waited for
                    for child in multiprocessing.active_children():
                        child.kill()
                    raise
    return {name: summary(its_turns) for name, its_turns in turns.items()}


def summary(turns: list[dict[str, float]]) -> dict[str, Any]:
    """The medians of what measure returned."""
    trained = [turn["train"] for turn in turns]
    sampled = [turn["sample"] for turn in turns]
    return {
        "parameters": turns[0]["parameters"],
        "train": median(trained),
        "sample": median(sampled),
        "rounds": {"train": trained, "sample": sampled},
        "peak_memory_gb": max(turn["peak_memory_gb"] for turn in turns),
    }


def count_gflop(config: Config) -> dict[str, float]:
    """The convolutions and matrix products of the network for one image, in GFLOP."""
    found = {}
    with torch.device("meta"):
        model = UNet(config)
        x_t = torch.randn(1, config.channels, config.image_size, config.image_size)
        t = torch.zeros(1, dtype=torch.int64)
        for what in ("train", "sample"):
            with FlopCounterMode(display=False) as counter:
                loss = model(x_t, t).sum()
                if what == "train":
                    loss.backward()
            found[what] = counter.get_total_flops() / 1e9
    return found


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = f"{torch.get_num_threads()} threads"
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():  # not Linux
        return f"{platform.machine()}, {threads}"
    facts = dict(re.findall(r"(.+?)\s*: (.*)", cpuinfo.read_text()))
    name = facts.get("model name", platform.machine())
    flags = facts.get("flags", "").split()
    kinds = [kind for kind in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if kind in flags]
    return f"{name} ({' '.join(kinds)}), {threads}"


def print_table(results: dict[str, dict[str, Any]]) -> None:
    """Images trained with and evaluated per second; beside them, how many times as fast ours is."""
    row = "{:<16}{:>12}{:>12}{:>9}{:>13}{:>9}{:>11}".format
    print(row("", "parameters", "trained/s", "ours is", "evaluated/s", "ours is", "memory GB"))
    ours = results["ours"]
    for name, result in results.items():
        rates = []
        for what in ("train", "sample"):
            rates.append(f"{result[what]:.1f}")
            rates.append(f"{ours[what] / result[what]:.2f}x")
        memory = f"{result['peak_memory_gb']:.2f}"
        print(row(name, f"{result['parameters']:,}", *rates, memory))


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
    config = replace(config, device=device.type)
    precision = select_precision(config.precision, device, config, training=True)
    if args.peers:
        if find_spec("diffusers") is None:
            raise UserError("--peers needs a package that is not installed: pip install diffusers")
        unet_settings(config)  # refuses a network that diffusers does not have
    if args.json:
        make_writable(args.json)

    settings = {"fp32": config, "bf16": config}
    is_emulated = device.type == "cpu" and measure_speedup("bf16", config, True) < EMULATED
    if is_emulated:
        settings["bf16"] = replace(config, batch_size=1, grad_accum=1)
    contenders = {"ours": (ours, settings.get(precision, config), precision)}
    for other, its_config in settings.items():
        if other != precision:
            contenders[f"ours_{other}"] = (ours, its_config, other)
        if args.peers:
            contenders[f"diffusers_{other}"] = (diffusers, its_config, other)
    bare = replace(config, batch_size=512 if device.type == "cuda" else 16, grad_accum=1)
    contenders["convolution"] = (convolution, bare, precision)
    compiled = maybe_compile(config.compile, device, math.inf)
    gflop = count_gflop(config)
    print(f"{machine(device)}, torch {torch.__version__}")
    print(f"{config.image_size} x {config.image_size}, batch {config.batch_size}, {precision}, "
          f"compile {'on' if compiled else 'off'}")
    print(f"{gflop['train']:.3g} GFLOP to train an image, {gflop['sample']:.3g} to evaluate it")
    if is_emulated:
        print("bf16 is emulated here, so slowly that it gets batches of one image")

    results = take_turns(contenders, args.rounds, args.seconds)
    peak = results.pop("convolution")
    print_table(results)
    tflops, peak_tflops, ratios = {}, {}, {}
    for what in ("train", "sample"):
        rate = results["ours"][what]
        tflops[what] = rate * gflop[what] / 1000
        peak_tflops[what] = peak[what] * CONVOLUTION_GFLOP[what] / 1000
        share = 100 * tflops[what] / peak_tflops[what]
        print(f"{what}: ours reaches {tflops[what]:.3g} TFLOP/s, {share:.0f} % of a bare 3 x 3 "
              "convolution")
        for name in results.keys() - {"ours"}:
            ratios[f"{what}_vs_{name}"] = rate / results[name][what]
    if args.json:
        write_json(args.json, {
            "machine": machine(device),
            "torch": torch.__version__,
            "settings": asdict(config),
            "precision": precision,
            "compiled": compiled,
            "ratios": ratios,
            "gflop": gflop,
            "tflops": tflops,
            "peak_tflops": peak_tflops,
            "results": results,
        })
    return 0


if __name__ == "__main__":
    run(main)
