"""Where it runs: the device, its precision, compiling.

In bf16 and fp16 the network's convolutions and matrix products run in 16 bits, and so do the sums
of their results; on a CPU also the norms and activations between them.  The time embedding, the
network's output, the schedule, the loss, the weights, their average and the optimizer stay in fp32
whatever the precision.  On NVIDIA GPUs since Ampere the convolutions and products of fp32 are TF32.
"""

import ctypes
import os
import platform
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils.cli import UserError, brief, under_torchrun, warn
from utils.modes import without_autocast
from utils.process import from_first_process, undo_later


def select_device(name: str) -> torch.device:
    """auto, cuda, mps or cpu -> the device, under torchrun this process's own.

    Raises UserError if it is not there.
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
    index, processes, gpus = 0, 1, torch.cuda.device_count()
    if under_torchrun():
        index = int(os.environ.get("LOCAL_RANK", 0))
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if processes > gpus:
        raise UserError(f"{processes} processes have {gpus} GPUs here: use "
                        f"--nproc_per_node={gpus}, or --device cpu")
    device = torch.device("cuda", index)
    set_up_cuda(device)
    return device


def set_up_cuda(device: torch.device) -> None:
    cudnn, attention = torch.backends.cudnn, torch.backends.cuda
    undo_later(torch.cuda.set_device, torch.cuda.current_device())
    undo_later(setattr, cudnn, "benchmark", cudnn.benchmark)
    undo_later(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
    undo_later(attention.enable_cudnn_sdp, attention.cudnn_sdp_enabled())
    torch.cuda.set_device(device)
    cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")  # TF32, as cuDNN's convolutions have by default
    attention.enable_cudnn_sdp(False)  # it has refused shapes; the others take all


def keep_freed_memory() -> None:
    """Have glibc keep what is freed.

    It hands large blocks back to the system, which clears them anew for each step.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-3, 2**25)      # M_MMAP_THRESHOLD, at its largest


# Precision

def select_precision(name: str, device: torch.device) -> str:
    """auto, fp32, bf16 or fp16 -> the precision of the network's convolutions and products.

    auto is a rule about the hardware; of torchrun's processes the first one decides.
    """
    fastest = from_first_process(lambda: fastest_precision(device))
    if name == "auto":
        return fastest
    emulated = {"cpu": {"bf16", "fp16"} - {fastest}, "cuda": {"bf16"} - {fastest}}
    if name in emulated.get(device.type, ()):
        warn(f"{name} is slow on this {device.type}: --precision auto takes {fastest}")
    return name


def fastest_precision(device: torch.device) -> str:
    """The rule: bf16 if the hardware is fast in it, else fp16 if it is fast in that, else fp32."""
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        if torch.version.hip:  # an AMD GPU: MI200 and later
            return "bf16" if gpu.gcnArchName.startswith(("gfx90a", "gfx94", "gfx95")) else "fp32"
        if gpu.major >= 8:
            return "bf16"
        # A GTX 16xx has no tensor cores, and is known for NaN in fp16.
        return "fp16" if gpu.major == 7 and "GTX 16" not in gpu.name else "fp32"
    if device.type == "cpu" and Path("/proc/cpuinfo").exists():
        words = set(Path("/proc/cpuinfo").read_text().split())
        # An Intel with AVX512_BF16 alone is slower in bf16 than in fp32.
        if "amx_bf16" in words or {"avx512_bf16", "AuthenticAMD"} <= words:
            return "bf16"
    return "fp32"


def memory_format(device: torch.device, precision: str) -> torch.memory_format:
    """channels_last, except in 16 bits on a CPU, where its group norm is slow."""
    if device.type == "cpu" and precision != "fp32":
        return torch.contiguous_format
    return torch.channels_last


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Run the convolutions and products inside in the precision.

    It keeps the 16-bit copies of weights that require a gradient until it ends, so the EMA's do
    too, although none is taken of them.
    """
    if precision == "fp32":
        return without_autocast(device)
    return torch.autocast(device.type, torch.float16 if precision == "fp16" else torch.bfloat16)


class LossScaler(torch.amp.GradScaler):
    """PyTorch's scaler for fp16; it says so when it leaves out an update for the first time."""

    has_skipped = False

    def update(self, *arguments: Any) -> None:
        if self.has_skipped:  # to read the scale waits for the GPU
            super().update(*arguments)
            return
        scale = self.get_scale()
        super().update(*arguments)
        if self.get_scale() < scale:
            self.has_skipped = True
            warn(f"a gradient overflowed in fp16: that update is left out, and the scale becomes "
                 f"{self.get_scale():g}; this is usual at the start, and not said again")


# Compiling

def maybe_compile(
    setting: str, device: torch.device, calls: float, *networks: nn.Module
) -> bool:
    """Compile the networks in place: if asked to, or by auto if so many calls pay for it.

    Returns whether it did.  Before PyTorch 2.5 auto does not, since the fused Adam there refuses
    the layout of some compiled gradients.
    """
    pays = device.type == "cuda" and calls >= 2000 and torch.__version__ >= (2, 5)
    wanted = setting == "on" or (setting == "auto" and pays)
    if wanted:
        for network in networks:
            network.compile(backend=inductor_or_eager)
    return wanted


def inductor_or_eager(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable:
    """torch.compile's own backend; if it fails, a warning, and the network runs as it is."""
    from torch._functorch import config  # here, since it is of use for compiling alone

    # The backward pass too: it is compiled at the first backward() otherwise, out of this try.
    at_once = "force_non_lazy_backward_lowering"
    options = {at_once: True} if hasattr(config, at_once) else {}
    try:
        with config.patch(options):
            return torch._dynamo.lookup_backend("inductor")(graph, inputs)
    except Exception as error:  # a compiler that is missing or broken can raise anything
        reason = brief(error)
        warn(f"torch.compile failed ({reason}): going on without it")
        return graph.forward
