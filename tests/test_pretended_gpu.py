"""No step waits for a GPU, nor reads a value from it: on a GPU that is pretended.

Under FakeTensorMode tensors have a shape, a type and a device, but no values, so a "cuda" that is
not there will do: reading a value raises, and Copies sees what goes from one device to another.
The backward pass does not run there; tests/test_gpu.py has it, on a real GPU.
"""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch._dynamo  # here, since it makes a class of torch.Generator, which gpu replaces
from helpers import SHORT, command, latest, succeeds_under_torchrun, tiny
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ddim
from data import Batches, mirror_half
from ddpm import DDPM
from evaluate import bits_per_dim
from inference import slerp
from model import UNet
from utils.metrics import Metrics
from utils.randomness import ImageNoise

CUDA = torch.device("cuda")
CONFIG = tiny()
IMAGES = np.zeros((64, 3, 8, 8), np.uint8)


class Copies(TorchDispatchMode):
    """Notes every operation that involves two kinds of device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        if len({tensor.device.type for tensor in tensors}) > 1:
            self.found.append(str(function))
        return result


@pytest.fixture
def gpu(monkeypatch) -> Iterator[pytest.MonkeyPatch]:
    """Inside, "cuda" is a device without values."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device: generator("cpu"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        try:
            torch.zeros(1, device=CUDA).uniform_()
        except RuntimeError:  # of CUDA, where there is no driver
            pytest.skip("this version of PyTorch cannot pretend a GPU")
        yield monkeypatch


def ddpm_on_gpu() -> DDPM:
    """Its schedule is built with values, before there is none."""
    with unset_fake_temporarily():
        ddpm = DDPM(nn.Identity(), CONFIG)
    ddpm = ddpm.to(CUDA)
    with CUDA:
        ddpm.model = UNet(CONFIG)
    return ddpm


def batches_on_gpu(monkeypatch: pytest.MonkeyPatch, free_bytes: int) -> Batches:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_bytes, free_bytes))
    return Batches(IMAGES, CONFIG, CUDA)


def test_copies_and_read_values_are_seen(gpu):
    with Copies() as copies:
        torch.zeros(3).to(CUDA)
        torch.zeros(3, device=CUDA).copy_(torch.zeros(3))
        torch.tensor(0.5).to(CUDA)
    assert len(copies.found) == 3
    with pytest.raises(DataDependentOutputException):
        torch.zeros((), device=CUDA).item()


@pytest.mark.parametrize(("free_bytes", "copied"), [(10**9, (4,)), (0, (4, 3, 8, 8))])
def test_a_batch_copies_one_thing_from_pinned_memory_without_waiting(free_bytes, copied, gpu):
    # The indices of images that are on the GPU; the images that are not.
    pinned, waited = [], []
    to = torch.Tensor.to

    def pin_memory(self):
        pinned.append(self.shape)
        return self

    def noted_to(self, *args, non_blocking=False, **kwargs):
        if self.device.type == "cpu":
            waited.append(not non_blocking)
        return to(self, *args, non_blocking=non_blocking, **kwargs)

    batches = batches_on_gpu(gpu, free_bytes)
    assert isinstance(batches.images, np.ndarray) == (free_bytes == 0)
    gpu.setattr(torch.Tensor, "pin_memory", pin_memory)
    gpu.setattr(torch.Tensor, "to", noted_to)
    with Copies() as copies:
        batch = batches(0)
    assert (batch.device.type, batch.shape) == ("cuda", (4, 3, 8, 8))
    assert pinned == [copied]
    assert waited == [False]
    assert len(copies.found) == 1


def test_a_training_step_copies_nothing_but_its_batch(gpu):
    batch = batches_on_gpu(gpu, free_bytes=10**9)(0)
    ddpm = ddpm_on_gpu()
    metrics = Metrics(CONFIG.timesteps, CUDA)
    with Copies() as copies:
        x_start = mirror_half(batch)
        losses, t = ddpm.training_losses(x_start)
        losses = losses.detach()
        metrics.add(losses, t, losses.norm())
    assert losses.device.type == "cuda"
    assert copies.found == []


@pytest.mark.parametrize("steps", [None, 10])
def test_a_chain_copies_nothing(steps, gpu):
    ddpm = ddpm_on_gpu()
    randn_like = ImageNoise(0, range(2), (3, 8, 8), CUDA)
    with Copies() as copies:
        x = ddim.sample(ddpm, randn_like(), steps, randn_like=randn_like)
    assert x.device.type == "cuda"
    assert copies.found == []


def test_mixing_two_noises_copies_nothing(gpu):
    a, b = torch.randn(2, 1, 3, 8, 8, device=CUDA)
    fractions = torch.linspace(0, 1, 5, device=CUDA).view(-1, 1, 1, 1)
    with Copies() as copies:
        assert slerp(a, b, fractions).shape == (5, 3, 8, 8)
    assert copies.found == []


def test_the_likelihood_copies_nothing(gpu):
    ddpm = ddpm_on_gpu()
    x_start = torch.zeros(2, 3, 8, 8, device=CUDA)
    with Copies() as copies:
        bits_per_dim(ddpm, x_start)
    assert copies.found == []


# torchrun's processes: while they meet a GPU is pretended, and "fake" stands in NCCL's place

ACCELERATOR = """
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg

chosen = []
init = dist.init_process_group
patches = [
    patch("torch.cuda.is_available", lambda: True),
    patch("torch.cuda.device_count", lambda: 2),
    patch("torch.cuda.set_device", chosen.append),
    patch("torch.distributed.is_nccl_available", lambda: True),
    patch.dict(dist.Backend.default_device_backend_map, {"cuda": "fake"}),
]
if hasattr(torch, "accelerator"):
    patches.append(patch("torch.accelerator.current_accelerator", lambda **_: torch.device("cuda")))

def init_process_group(backend=None, **options):
    init(backend and backend.replace("nccl", "fake"), **options)
    for patched in patches:
        patched.stop()

for patched in patches:
    patched.start()
dist.init_process_group = init_process_group
"""
EXCHANGES = """
from utils.process import (
    StopSignal, broadcast, first_process_first, from_first_process, start_processes)

rank, world_size = start_processes()
assert chosen == [rank], chosen  # before anything is exchanged
assert from_first_process(lambda: rank) == 0
assert first_process_first(lambda: rank) == rank
assert not StopSignal().requested()
numbers = torch.full((3,), float(rank))
broadcast([numbers])
assert numbers.sum() == 0
dist.destroy_process_group()
"""
TRAINING = """
from train import main
from utils.process import run_script

run_script(main)
"""


def test_processes_beside_gpus_exchange_numbers_on_the_cpu(tmp_path):
    succeeds_under_torchrun(ACCELERATOR + EXCHANGES, tmp_path)


def test_processes_beside_gpus_train_on_the_cpu_if_told_to(pictures, tmp_path):
    line = command(tmp_path / "run", SHORT, pictures)
    succeeds_under_torchrun(ACCELERATOR + TRAINING, tmp_path, *line)
    assert latest(tmp_path / "run")["step"] == 6
