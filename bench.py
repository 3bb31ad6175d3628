"""How fast training and sampling are, beside other codebases in the same run.

    python bench.py                                        the default network
    python bench.py --preset paper --batch_size 16 --peers
    python bench.py --preset demo --precision bf16 --json bench.json

It takes the settings of train.py.  All take turns, round by round, each in a
process of its own; the figures are medians of the rounds, without warm-up and
compiling.  The images are random pixels: what they show does not change the
speed, and nothing need be downloaded.

--peers adds those of these that are installed, their batch at hand already:
  diffusers   the same network as a UNet2DModel, the training step of its own
              unconditional example (AdamW, EMA), a step of DDPMScheduler; in
              fp32, which is its default, and by bf16 autocast
  denoising_diffusion_pytorch   its Unet of about as many parameters and all
              else as it comes: fp32, Adam, EMA every ten steps
"""

import copy
import math
import multiprocessing
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from config import CommandLine, Config, UserError, derive_seed
from convert import scheduler_settings, unet_settings
from data import Batches, write_json
from ddpm import DDPM, ImageNoise
from device import autocast, has_bf16, maybe_compile, memory_format, run, select_device, select_precision
from model import UNet
from train import train_step

# network, train(n): n training steps, sample(n): n evaluations in the sampler, of a batch each
Codebase = tuple[nn.Module, Callable[[int], None], Callable[[int], None]]


def ours(config: Config, precision: str) -> Codebase:
    """The step of train.py; Algorithm 2 with its noise as inference.py draws it."""
    device = select_device(config.device)
    shape = (config.channels, config.image_size, config.image_size)
    pixels = np.random.default_rng(0).integers(0, 256, (max(1000, config.batch_size), *shape), np.uint8)
    batches = Batches(pixels, config, device)
    torch.manual_seed(derive_seed("weights", config.seed))
    model = UNet(config).to(device, memory_format=memory_format(device, precision))
    ema = copy.deepcopy(model).eval()
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    maybe_compile(config.compile, device, math.inf, model, ema)
    ddpm, ddpm_ema = DDPM(model, config).to(device), DDPM(ema, config).to(device)
    step = 0

    def train(count: int) -> None:
        nonlocal step
        for _ in range(count):
            train_step(ddpm, ema, optimizer, scaler, batches, step, precision)
            step += 1

    def chains() -> Iterator[Any]:
        while True:
            noise = ImageNoise(config.seed, range(config.batch_size), shape, device)
            yield from ddpm_ema.p_sample_loop(noise(), noise=noise)

    chain = chains()

    def sample(count: int) -> None:
        with autocast(device, precision):
            for _ in range(count):
                next(chain)

    return model, train, sample


def diffusers(config: Config, precision: str) -> Codebase:
    from diffusers import DDPMScheduler, UNet2DModel
    from diffusers.training_utils import EMAModel

    x_start, x_t = gaussian_images(config)
    device = x_start.device
    model = UNet2DModel(**unet_settings(config)).to(device)
    ema = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    scheduler = DDPMScheduler(**scheduler_settings(config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)

    def train(count: int) -> None:
        model.train()
        for _ in range(count):
            noise = torch.randn_like(x_start)
            t = torch.randint(config.timesteps, x_start.shape[:1], device=device)
            noisy = scheduler.add_noise(x_start, noise, t)
            with autocast(device, precision):
                loss = F.mse_loss(model(noisy, t).sample.float(), noise)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            ema.step(model.parameters())

    @torch.no_grad()
    def sample(count: int) -> None:
        nonlocal x_t
        model.eval()
        t = config.timesteps // 2
        with autocast(device, precision):
            for _ in range(count):
                x_t = scheduler.step(model(x_t, t).sample, t, x_t).prev_sample

    return model, train, sample


def denoising_diffusion_pytorch(config: Config, precision: str) -> Codebase:
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from ema_pytorch import EMA

    with torch.device("meta"):
        size = parameters(UNet(config))
        dim = min(range(8, 257, 8), key=lambda dim: abs(parameters(Unet(dim, channels=config.channels)) - size))
    x_start, x_t = gaussian_images(config)
    pixels = torch.rand_like(x_start)  # it takes images in [0, 1]
    model = GaussianDiffusion(Unet(dim, channels=config.channels), image_size=config.image_size).to(x_start.device)
    ema = EMA(model, beta=0.995, update_every=10)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, betas=(0.9, 0.99))

    def train(count: int) -> None:
        model.train()
        for _ in range(count):
            model(pixels).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            ema.update()

    def sample(count: int) -> None:
        nonlocal x_t
        model.eval()
        for _ in range(count):
            x_t, _ = model.p_sample(x_t, model.num_timesteps // 2)

    return model.model, train, sample


PEERS = {"diffusers_fp32": (diffusers, "fp32"), "diffusers_bf16": (diffusers, "bf16"),
         "denoising_diffusion_pytorch": (denoising_diffusion_pytorch, "fp32")}


def gaussian_images(config: Config) -> tuple[Tensor, Tensor]:
    """Two batches of noise on the device; not by select_device, which sets what belongs to this project."""
    cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    shape = (config.batch_size, config.channels, config.image_size, config.image_size)
    return tuple(torch.randn(2, *shape, device="cuda" if cuda else config.device.replace("auto", "cpu")))


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


# Measuring

class Contender:
    """A codebase in a process of its own, where it does not live off the memory or the settings of another."""

    def __init__(self, process: ProcessPoolExecutor, make: Callable[[Config, str], Codebase], config: Config,
                 precision: str) -> None:
        """Raises ImportError where it is not installed, UserError where it has no such network."""
        self.process, self.batch_size = process, config.batch_size
        self.parameters = self.process.submit(build, make, config, precision).result()
        self.first_seconds = {what: self.measure(what, 1) for what in ("train", "sample")}  # compiling is in them
        self.rates: dict[str, list[float]] = {"train": [], "sample": []}

    def measure(self, what: str, count: int) -> float:
        """Seconds for so many steps or evaluations."""
        seconds, self.memory_gb = self.process.submit(measure, what, count).result()
        return seconds

    def take_turn(self, what: str, seconds: float) -> None:
        """Adds to rates what is measured in about that time."""
        count = max(1, round(2 * seconds / self.measure(what, 2)))
        self.rates[what].append(count * self.batch_size / self.measure(what, count))

    def rate(self, what: str) -> float:
        return statistics.median(self.rates[what])


def build(make: Callable[[Config, str], Codebase], config: Config, precision: str) -> int:
    """In a Contender's process: its codebase, kept there; the number of parameters."""
    global network, jobs
    network, train, sample = make(config, precision)
    jobs = {"train": train, "sample": sample}
    return parameters(network)


def measure(what: str, count: int) -> tuple[float, float]:
    """In a Contender's process: the seconds of so many steps, and the peak memory until then in GB."""
    device = next(network.parameters()).device
    seconds = timed(lambda: jobs[what](count), device)
    if device.type == "cuda":
        return seconds, torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if platform.system() == "Darwin" else 1024
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def timed(do: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    do()
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def measure_peaks(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """TFLOP/s of one large matrix product, and of a 3 x 3 convolution of 128 channels at 32 x 32."""
    side, batch = (8192, 512) if device.type == "cuda" else (2048, 16)
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    conv = nn.Conv2d(128, 128, 3, padding=1).to(device, dtype, memory_format=torch.channels_last)
    x = torch.randn(batch, 128, 32, 32, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    found = {}
    for name, do, flop in (("matrix product", lambda: a @ b, 2 * side**3),
                           ("3 x 3 convolution", lambda: conv(x), 2 * batch * 32 * 32 * 9 * 128 * 128)):
        seconds = [timed(do, device) for _ in range(20)]
        found[name] = flop / statistics.median(seconds[5:]) / 1e12
    return found


def count_gflop(config: Config) -> dict[str, float]:
    """The network's convolutions and matrix products for one image, in GFLOP."""
    found = {}
    with torch.device("meta"):
        model = UNet(config)
        x_t = torch.randn(1, config.channels, config.image_size, config.image_size)
        for what in ("train", "sample"):
            with FlopCounterMode(display=False) as counter:
                loss = model(x_t, torch.zeros(1, dtype=torch.int64)).sum()
                if what == "train":
                    loss.backward()
            found[what] = counter.get_total_flops() / 1e9
    return found


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = torch.cpu.get_capabilities()
    kinds = " ".join(kind for kind in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16") if cpu.get(kind))
    return f"{cpu.get('cpu_name') or platform.machine()} ({kinds}), {torch.get_num_threads()} threads"


# The report

def compete(config: Config, precision: str, names: list[str], rounds: int, seconds: float) -> dict[str, Contender]:
    """ours and the peers of these names that can be had, measured in turns."""
    with ExitStack() as stack:
        def enter(make: Callable[[Config, str], Codebase], precision: str) -> Contender:
            process = stack.enter_context(ProcessPoolExecutor(1, multiprocessing.get_context("spawn")))
            return Contender(process, make, config, precision)

        contenders = {"ours": enter(ours, precision)}
        for name in names:
            try:
                contenders[name] = enter(*PEERS[name])
            except (ImportError, UserError) as error:
                print(f"{name} is left out: {error}")
        for _ in range(rounds):
            for what in ("train", "sample"):
                for contender in contenders.values():
                    contender.take_turn(what, seconds)
    return contenders


def main(argv: list[str] | None = None) -> int:
    parser = CommandLine(__doc__, "python bench.py [--peers] [--preset NAME] [--SETTING VALUE ...]")
    parser.add_argument("--peers", action="store_true", help="measure other codebases too")
    parser.add_argument("--rounds", metavar="N", type=int, default=5, help="of which the median counts (default: 5)")
    parser.add_argument("--seconds", metavar="X", type=float, default=3.0, help="of a turn, about (default: 3)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures here too")
    parser.add_settings()
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"rounds={args.rounds} is impossible: it must be at least 1")
    given = parser.given_settings(args)
    try:
        config = Config(**given)
    except ValueError as error:
        parser.error(str(error))

    device = select_device(config.device)
    native = has_bf16(device)
    precision = select_precision(config.precision, device, config.dim)
    compiled = maybe_compile(config.compile, device, math.inf)
    names = [name for name in PEERS if native or name != "diffusers_bf16"] if args.peers else []
    contenders = compete(config, precision, names, args.rounds, args.seconds)
    us, gflop = contenders["ours"], count_gflop(config)
    tflops = {what: us.rate(what) * gflop[what] / 1000 for what in gflop}
    ratios = {f"{what}_vs_{name}": us.rate(what) / contender.rate(what)
              for name, contender in contenders.items() if contender is not us for what in us.rates}
    peaks = measure_peaks(device, torch.bfloat16 if native else torch.float32)

    print(f"{machine(device)}, torch {torch.__version__}\n"
          f"{config.image_size} x {config.image_size}, batch {config.batch_size}, {precision}, "
          f"compile {'on' if compiled else 'off'}; {gflop['train']:.2f} GFLOP to train an image, "
          f"{gflop['sample']:.2f} to evaluate it\n\n"
          f"{'':<28}{'parameters':>12}{'training':>12}{'sampling':>14}{'peak memory':>14}\n"
          f"{'':<28}{'':>12}{'images/s':>12}{'evaluations/s':>14}{'GB':>14}")
    for name, contender in contenders.items():
        print(f"{name:<28}{contender.parameters:>12,}{contender.rate('train'):>12.1f}{contender.rate('sample'):>14.1f}"
              f"{contender.memory_gb:>14.2f}")
        if contender is not us:
            print(f"{'  ours, times as fast':<40}"
                  f"{ratios[f'train_vs_{name}']:>11.2f}x{ratios[f'sample_vs_{name}']:>13.2f}x")
    print(f"\nours reaches {tflops['train']:.3g} TFLOP/s in training, {tflops['sample']:.3g} in sampling")
    for name, peak in peaks.items():
        print(f"  {100 * tflops['train'] / peak:.0f} % and {100 * tflops['sample'] / peak:.0f} % of a {name} alone "
              f"({peak:.3g} in {'bf16' if native else 'fp32'})")
    print(f"its first step took {us.first_seconds['train']:.1f} s, its first evaluation "
          f"{us.first_seconds['sample']:.1f} s")
    if args.json:
        write_json(args.json, {
            "machine": machine(device), "torch": torch.__version__, "settings": given, "precision": precision,
            "compiled": compiled, "ratios": ratios, "gflop": gflop, "tflops": tflops, "peak_tflops": peaks,
            "results": {name: {"parameters": c.parameters, "train": c.rate("train"), "sample": c.rate("sample"),
                               "rounds": c.rates, "first_seconds": c.first_seconds, "peak_memory_gb": c.memory_gb}
                        for name, c in contenders.items()}})
    return 0


if __name__ == "__main__":
    run(main)
