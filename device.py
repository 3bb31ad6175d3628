"""Where it runs: the device, its precision, the processes of torchrun, and how a script ends."""

import ctypes
import os
import platform
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from config import UserError


def select_device(name: str) -> torch.device:
    """auto, cuda, mps or cpu -> the device, under torchrun this process's own.  UserError where it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but PyTorch finds no CUDA GPU here: use --device cpu, or auto")
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("device=mps, but PyTorch finds no Apple GPU here: use --device cpu, or auto")
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
    """Have glibc keep what is freed: it hands large blocks back to the system, which clears them anew each step."""
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-3, 2**25)      # M_MMAP_THRESHOLD, at its largest


def has_bf16(device: torch.device) -> bool:
    """Whether the device calculates in bf16 itself; emulated, it is many times slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = torch.cpu.get_capabilities()
    return device.type == "cpu" and bool(cpu.get("avx512_bf16") or cpu.get("amx_bf16"))


def select_precision(name: str, device: torch.device, dim: int) -> str:
    """auto, fp32, bf16 or fp16 -> the precision of the network's convolutions and matrix products."""
    native = has_bf16(device)
    if name == "auto":
        # On a CPU the casts of autocast cost a narrow network more than bf16 saves it.
        return "bf16" if native and (device.type == "cuda" or dim >= 16) else "fp32"
    if name == "bf16" and not native:
        warnings.warn(f"this {device.type} has no bf16 arithmetic of its own: fp32 is many times faster", stacklevel=2)
    return name


def memory_format(device: torch.device, precision: str) -> torch.memory_format:
    """Of the network: channels_last, except in 16 bits on a CPU, where it makes group norm many times slower."""
    plain = device.type == "cpu" and precision != "fp32"
    return torch.contiguous_format if plain else torch.channels_last


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Keeps the 16-bit copies of weights that require a gradient until it ends: those of others are made each time."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


def start_processes() -> tuple[int, int]:
    """Join the other processes where torchrun started this one: (rank, world_size), which is (0, 1) without it."""
    if "RANK" not in os.environ:
        return 0, 1
    # Long, since the first process may download and decode the data while the others wait.
    patience = timedelta(hours=2)
    store, rank, world_size = next(dist.rendezvous("env://", timeout=patience))
    # torchrun's restarts share one store: without a prefix they would find the addresses of the dead in it.
    store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(store=store, rank=rank, world_size=world_size, timeout=patience)
    return rank, world_size


def maybe_compile(setting: str, device: torch.device, steps: float, *networks: nn.Module) -> bool:
    """Compile the networks in place for so many steps; auto: on a GPU, if they are enough to pay.  True if so."""
    wanted = setting == "on" or (setting == "auto" and device.type == "cuda" and steps >= 2000)
    for network in networks if wanted else ():
        network.compile(backend=inductor_or_eager)
    return wanted


def inductor_or_eager(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable:
    """torch.compile's own backend; where it fails, one line, and the network runs as it is."""
    try:
        return torch._dynamo.lookup_backend("inductor")(graph, inputs)
    except Exception as error:  # a compiler that is missing or broken: of what that may raise there is no list
        reason = " ".join(str(error).split())[:150]
        tqdm.write(f"warning: torch.compile failed ({reason}): going on without it", file=sys.stderr)
        return graph.forward


def run(main: Callable[[], int | None]) -> None:
    """Call main and exit; what the user can mend becomes one line and exit status 1 instead of a traceback."""
    try:
        status = main() or 0
    except UserError as error:
        status = f"{sys.argv[0]}: error: {error}"
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        status = (f"{sys.argv[0]}: error: out of memory: lower --batch_size, or to train, raise --grad_accum or lower "
                  "--dim or --image_size")
    except KeyboardInterrupt:
        status = 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    sys.exit(status)
