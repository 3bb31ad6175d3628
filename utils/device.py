"""Where it runs: the device, its precision, compiling, the processes of torchrun.

In 16 bits the network calculates its convolutions and matrix products, and on a CPU the layers
between them.  The time embedding, the network's output, the schedule, the loss, the weights, their
average and the optimizer stay in fp32 whatever the precision.
"""

import ctypes
import os
import platform
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from config import Config
from utils.cli import UserError, brief, ended_by_signals, under_torchrun, warn


def select_device(name: str) -> torch.device:
    """auto, cuda, mps or cpu -> the device, under torchrun this process's own.

    Raises UserError where it is not there.
    """
    has_mps = torch.backends.mps.is_available()
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but PyTorch finds no CUDA GPU here: "
                        "use --device cpu, or auto")
    if name == "mps" and not has_mps:
        raise UserError("device=mps, but PyTorch finds no Apple GPU here: "
                        "use --device cpu, or auto")
    if name == "auto" and torch.cuda.is_available():
        name = "cuda"
    elif name == "auto":
        name = "mps" if has_mps else "cpu"

    if name == "cpu":
        keep_freed_memory()
    if name != "cuda":
        return torch.device(name)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")  # TF32 where a product is left in fp32
    return device


def keep_freed_memory() -> None:
    """Have glibc keep what is freed.

    It hands large blocks back to the system, which clears them anew for each step.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-3, 2**25)      # M_MMAP_THRESHOLD, at its largest


# Precision

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CLEARLY = 1.2  # times as fast: a measurement errs, and casting the weights takes time as well
EMULATED = 1 / 3  # times as fast, or less: the processor has no such arithmetic


def select_precision(name: str, device: torch.device, config: Config, training: bool) -> str:
    """auto, fp32, bf16 or fp16 -> the precision of the network's convolutions and products.

    auto is bf16 where that is clearly faster.  Of torchrun's processes the first one decides.
    """
    return from_first_process(lambda: choose_precision(name, device, config, training))


def choose_precision(name: str, device: torch.device, config: Config, training: bool) -> str:
    if name == "fp32":
        return name
    wanted = "bf16" if name == "auto" else name
    if device.type == "cpu":
        speedup = measure_speedup(wanted, config, training)
        is_faster, is_slower = speedup > CLEARLY, speedup < 1
    else:
        is_cuda = device.type == "cuda"
        is_faster = is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        is_slower = is_cuda and wanted == "bf16" and not is_faster
    if name == "auto":
        return "bf16" if is_faster else "fp32"
    if is_slower:
        warn(f"{name} is slower than fp32 on this {device.type}: --precision auto avoids it")
    return name


def measure_speedup(precision: str, config: Config, training: bool) -> float:
    """How many times as fast as fp32 it is, for a convolution as wide as the network on this CPU.

    The flags of a processor do not tell: bf16 instructions are twice as fast as fp32 on one, and
    slower on another.
    """
    width, size = config.dim, min(32, config.image_size)
    gflop = 2 * 9 * width**2 * size**2 / 1e9  # of one image
    images = max(1, min(8, round(1 / gflop)))
    # A small one first: where 16 bits are emulated, a large one takes seconds.
    for shape in [(1, width, 8, 8), (images, width, size, size)]:
        fp32_seconds = convolution_seconds(shape, "fp32", training)
        speedup = fp32_seconds / convolution_seconds(shape, precision, training)
        if speedup < EMULATED:
            break
    return speedup


def convolution_seconds(shape: tuple[int, ...], precision: str, training: bool) -> float:
    """The best of the 3 x 3 convolutions of 25 ms on the CPU, with their gradients for training."""
    layout = memory_format(torch.device("cpu"), precision)
    options = {"dtype": DTYPES[precision], "memory_format": layout}
    conv = nn.Conv2d(shape[1], shape[1], 3, padding=1).to(**options)
    x = torch.randn(shape).to(**options).requires_grad_(training)

    def run() -> float:
        start = time.perf_counter()
        with torch.set_grad_enabled(training):
            y = conv(x)
        if training:
            torch.autograd.grad(y, (x, conv.weight), y.detach())
        return time.perf_counter() - start

    run()  # the first one takes longer
    times: list[float] = []
    while len(times) < 2 or sum(times) < 0.025:
        times.append(run())
    return min(times)


def memory_format(device: torch.device, precision: str) -> torch.memory_format:
    """Of the network: channels_last, but not in 16 bits on a CPU: group norm is slow there."""
    if device.type == "cpu" and precision != "fp32":
        return torch.contiguous_format
    return torch.channels_last


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Convolutions and products inside run in the precision.

    autocast caches the 16-bit copies of weights until it ends, but only of those that require a
    gradient: the EMA's do, although none is taken.
    """
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


# Compiling

def maybe_compile(
    setting: str, device: torch.device, steps: float, *networks: nn.Module
) -> bool:
    """Compile the networks in place for so many steps; True if so.

    auto: on a GPU, where the steps are enough to pay for it.
    """
    pays = device.type == "cuda" and steps >= 2000
    wanted = setting == "on" or (setting == "auto" and pays)
    if wanted:
        for network in networks:
            network.compile(backend=inductor_or_eager)
    return wanted


def inductor_or_eager(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable:
    """torch.compile's own backend; where it fails, one line, and the network runs as it is."""
    try:
        return torch._dynamo.lookup_backend("inductor")(graph, inputs)
    except Exception as error:  # a compiler that is missing or broken can raise anything
        reason = brief(error)
        warn(f"torch.compile failed ({reason}): going on without it")
        return graph.forward


# Processes

def start_processes() -> tuple[int, int]:
    """Join the other processes where torchrun started this one.

    (rank, world_size), which is (0, 1) without torchrun.  Raises UserError where they do not meet.
    """
    if not under_torchrun():
        return 0, 1
    try:
        with ended_by_signals():
            store, rank, world_size = next(dist.rendezvous("env://", timeout=timedelta(minutes=5)))
            # Long, since the first one may download and decode the data while the others wait.
            patience = timedelta(hours=2)
            store.set_timeout(patience)
            # torchrun's restarts share one store: without a prefix they would find the addresses
            # of the dead in it.
            restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
            store = dist.PrefixStore(f"restart {restart}", store)
            dist.init_process_group(
                store=store, rank=rank, world_size=world_size, timeout=patience)
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = brief(error)
        raise UserError("the processes that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT speak of "
                        f"do not meet ({reason}): start with torchrun, or unset these") from error
    return rank, world_size


def from_first_process(load: Callable[[], Any]) -> Any:
    """What load() returns in rank 0, in every process: only its machine need have the file."""
    if not dist.is_initialized():
        return load()
    box = [load() if dist.get_rank() == 0 else None]
    with ended_by_signals():
        dist.broadcast_object_list(box)
    return box[0]


def first_process_first(load: Callable[[], Any]) -> Any:
    """load() in every process: what rank 0 downloads or decodes, the others find done."""
    if not dist.is_initialized():
        return load()
    if dist.get_rank() > 0:
        with ended_by_signals():
            dist.barrier()
        return load()
    loaded = load()
    dist.barrier()
    return loaded
