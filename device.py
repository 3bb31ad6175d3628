"""Where it runs: the device, its precision, the processes of torchrun, and how a script ends."""

import os
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from config import UserError


def select_device(name: str) -> torch.device:
    """auto, cuda, mps or cpu -> the device, under torchrun this process's own.  UserError where it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but PyTorch finds no CUDA GPU here: use --device cpu, or auto")
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("device=mps, but PyTorch finds no Apple GPU here: use --device cpu, or auto")
    if name != "cuda":
        return torch.device(name)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")  # TF32 where a product is left in fp32
    return device


def select_precision(name: str, device: torch.device, dim: int) -> str:
    """auto, fp32, bf16 or fp16 -> the precision of the network's convolutions and matrix products."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        cpu = torch.cpu.get_capabilities()
        native = device.type == "cpu" and bool(cpu.get("avx512_bf16") or cpu.get("amx_bf16"))
    if name == "auto":
        # On a CPU the casts of autocast cost a narrow network more than bf16 saves it.
        return "bf16" if native and (device.type == "cuda" or dim >= 64) else "fp32"
    if name == "bf16" and not native:
        warnings.warn(f"this {device.type} has no bf16 arithmetic of its own: fp32 is many times faster", stacklevel=2)
    return name


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


def wants_compile(setting: str, device: torch.device, steps: float) -> bool:
    """Whether to compile the network for so many steps; auto: on a GPU, where that is long enough to pay."""
    torch._dynamo.config.suppress_errors = True  # where compiling fails, the plain network runs
    return setting == "on" or (setting == "auto" and device.type == "cuda" and steps >= 2000)


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
