"""Where it runs: the device, its precision, compiling, the processes of torchrun.

In 16 bits the network calculates its convolutions and matrix products, and on a CPU what lies
between them.  The time embedding, the network's output, the schedule, the loss, the weights, their
average and the optimizer stay in fp32 whatever the precision.
"""

import ctypes
import os
import platform
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from utils.cli import UserError, ended_by_signals, one_line, under_torchrun, warn


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

def has_bf16(device: torch.device) -> bool:
    """Whether the device calculates in bf16 itself; emulated, it is far slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = torch.cpu.get_capabilities()
    native = cpu.get("avx512_bf16") or cpu.get("amx_bf16")
    return device.type == "cpu" and bool(native)


def select_precision(name: str, device: torch.device, dim: int) -> str:
    """auto, fp32, bf16 or fp16 -> the precision of the network's convolutions and products."""
    native = has_bf16(device)
    if name == "auto":
        # On a CPU the casts of autocast cost a narrow network more than bf16 saves it.
        wide_enough = device.type == "cuda" or dim >= 16
        return "bf16" if native and wide_enough else "fp32"
    if name == "bf16" and not native or name == "fp16" and device.type == "cpu":
        warn(f"this {device.type} has no {name} arithmetic of its own: fp32 is many times faster")
    return name


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
        reason = one_line(error)[:200]
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
    except (RuntimeError, ValueError) as error:
        reason = one_line(error)[:200]
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
