"""On a CUDA GPU: pytest -m gpu.  Skipped where there is none.

On a GPU a repeated run differs by rounding, so losses are compared, not bits.
"""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    TINY,
    called,
    environment,
    flags,
    latest,
    metrics_rows,
    random_unet,
    script,
    succeeded,
    tiny,
    torchrun,
    train,
)
from torch import nn

import ddim
from data import Batches
from ddpm import DDPM
from inference import slerp
from train import TrainingState, train_step
from utils.device import autocast, select_device, select_precision
from utils.randomness import ImageNoise

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
DEVICE = torch.device("cuda")
SHORT = {"device": DEVICE, "max_steps": 6, "log_every": 1, "sample_every": 3, "save_every": 0}
PRECISIONS = ["fp32", "bf16", "fp16"]


@contextmanager
def nothing_waits() -> Iterator[None]:
    """Inside, whatever makes the processor wait for the GPU raises an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class TrainingOnGpu:
    """It is what train.py sets up, with random weights so that every gradient counts."""

    def __init__(self, precision: str = "fp32", **settings) -> None:
        self.config = tiny(device=DEVICE.type, precision=precision, batch_size=8, **settings)
        self.device = select_device(self.config.device)
        images = np.random.default_rng(0).integers(0, 256, (40, 3, 8, 8), np.uint8)
        self.batches = Batches(images, self.config, self.device)
        self.state = TrainingState(self.config, self.device)
        torch.manual_seed(1)
        self.state.model.load_state_dict(random_unet(self.config).state_dict())
        self.ddpm = DDPM(self.state.model, self.config).to(self.device)
        self.state.metrics.start_clock(0)

    def step(self) -> torch.Tensor:
        """The losses of one step."""
        losses, t, grad_norm = train_step(self.ddpm, self.state, self.batches, self.config)
        self.state.metrics.add(losses, t, grad_norm)
        return losses

    def weights(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.state.model.parameters()]


# Nothing waits

def test_what_waits_is_seen():
    x = torch.ones(3, device=DEVICE)
    with nothing_waits(), pytest.raises(RuntimeError):
        x.sum().item()
    with nothing_waits(), pytest.raises(RuntimeError):
        torch.ones(3).to(DEVICE)


@pytest.mark.parametrize("precision", PRECISIONS[:2])  # fp16's scaler may wait
@pytest.mark.parametrize("fits", [True, False])
def test_a_training_step_waits_for_nothing(fits, precision, monkeypatch):
    if not fits:  # the data set, on the GPU
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    training = TrainingOnGpu(precision, grad_accum=2)
    assert isinstance(training.batches.images, torch.Tensor) == fits
    training.step()  # convolutions are tried out, libraries are loaded
    before = training.weights()
    with nothing_waits():
        for _ in range(10):  # two epochs
            losses = training.step()
    assert losses.device.type == DEVICE.type
    assert torch.isfinite(losses).all()
    assert not torch.equal(before[0], training.weights()[0])
    row = training.state.metrics.row(11, 88, 40, lr=1e-4)
    assert 0.1 < row["loss"] < 10
    assert row["grad_norm"] > 0


@pytest.mark.parametrize("precision", PRECISIONS[:2])
@pytest.mark.parametrize("steps", [None, 10])
def test_a_chain_waits_for_nothing(steps, precision):
    config = tiny()
    ddpm = DDPM(random_unet(config), config).to(DEVICE)
    with autocast(DEVICE, precision):
        ddim.sample(ddpm, torch.randn(2, 3, 8, 8, device=DEVICE), 2)
        with nothing_waits():
            randn_like = ImageNoise(0, range(2), (3, 8, 8), DEVICE)
            x = ddim.sample(ddpm, randn_like(), steps, randn_like=randn_like)
    assert x.shape == (2, 3, 8, 8)
    assert x.abs().max() <= 1.001
    assert x.std() > 0.01


def test_mixing_two_noises_waits_for_nothing():
    a, b = torch.randn(2, 1, 3, 8, 8, device=DEVICE)
    fractions = torch.linspace(0, 1, 5, device=DEVICE).view(-1, 1, 1, 1)
    with nothing_waits():
        mixed = slerp(a, b, fractions)
    torch.testing.assert_close(mixed[:1], a)
    torch.testing.assert_close(mixed[-1:], b, rtol=1e-4, atol=1e-4)


# What it calculates

def losses_of(device: torch.device, precision: str = "fp32") -> torch.Tensor:
    config = tiny()
    torch.manual_seed(0)
    ddpm = DDPM(random_unet(config), config)
    x_start, noise = torch.rand(8, 3, 8, 8) * 2 - 1, torch.randn(8, 3, 8, 8)
    t = torch.tensor([0, 1, 5, 10, 15, 20, 25, 29])
    inputs = [tensor.to(device) for tensor in (x_start, t, noise)]
    with torch.no_grad(), autocast(device, precision):
        losses, _ = ddpm.to(device).training_losses(*inputs)
    assert losses.dtype == torch.float32
    return losses.cpu()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_losses_are_those_of_a_cpu(precision):
    tolerance = 0.01 if precision == "fp32" else 0.05
    expected = losses_of(torch.device("cpu"))
    torch.testing.assert_close(losses_of(DEVICE, precision), expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_in_16_bits_convolutions_are_and_the_rest_is_not(precision):
    training = TrainingOnGpu(precision)
    dtypes = set()
    blocks = training.state.model.down
    convolutions = [m for m in blocks.modules() if isinstance(m, nn.Conv2d)]
    for conv in convolutions:
        conv.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    assert training.step().dtype == torch.float32
    assert dtypes == {torch.bfloat16 if precision == "bf16" else torch.float16}
    for module in (training.state.model, training.state.ema):
        assert {p.dtype for p in module.parameters()} == {torch.float32}


def test_fp16_trains_and_a_step_that_overflows_changes_no_weight():
    training = TrainingOnGpu("fp16")
    before = training.weights()
    for _ in range(3):  # a first one may overflow too
        training.step()
    assert not torch.equal(before[0], training.weights()[0])

    training.state.scaler = torch.amp.GradScaler(DEVICE.type, init_scale=1e38)
    before = training.weights()
    losses = training.step()
    assert torch.isfinite(losses).all()
    assert training.state.step == 4
    assert training.state.scaler.get_scale() == pytest.approx(5e37)
    assert all(torch.equal(p, q) for p, q in zip(before, training.weights(), strict=True))
    assert training.state.metrics.row(4, 32, 40, lr=1e-4)["grad_norm"] > 0  # of the steps before


def test_auto_is_bf16_where_it_is_native():
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    assert (select_precision("auto", DEVICE) == "bf16") == native


def test_the_noise_of_an_image_does_not_depend_on_its_batch():
    whole = ImageNoise(0, range(8), (3, 8, 8), DEVICE)
    alone = ImageNoise(0, [3], (3, 8, 8), DEVICE)
    for _ in range(40):
        assert torch.equal(whole()[3:4], alone())


# The scripts

def losses(run_dir: Path) -> list[float]:
    return [float(row[2]) for row in metrics_rows(run_dir)]


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(pictures, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    succeeded(train(whole, SHORT, pictures))
    succeeded(train(parts, SHORT, pictures, max_steps=3))
    succeeded(train(parts, SHORT, "--resume", pictures))
    assert latest(parts)["step"] == 6
    assert losses(parts) == pytest.approx(losses(whole), rel=0.01)


@pytest.mark.parametrize("precision", ["auto", *PRECISIONS])
def test_from_training_to_pictures_and_figures(precision, pictures, tmp_path):
    run = tmp_path / "run"
    result = succeeded(train(run, SHORT, pictures, precision=precision))
    assert f"1 x {torch.cuda.get_device_name()}" in result.stdout
    assert len(list((run / "samples").iterdir())) == 2
    common = ["--run_dir", str(run), "--precision", precision]
    for device in (DEVICE.type, "cpu"):
        line = [*common, "--device", device]
        result = called("inference.py", *line, "--mode", "all", cwd=tmp_path)
        assert f"on 1 x {device} in" in succeeded(result).stdout
    line = [*common, "--metric", "bpd", "--num_images", "2", "--device", DEVICE.type]
    result = succeeded(called("evaluate.py", *line, cwd=tmp_path))
    total = float(result.stdout.split("total")[1].split()[0])
    assert 1 < total < 100


def test_a_compiled_run_is_the_same_to_rounding(pictures, tmp_path):
    start = partial(script, timeout=600)
    for setting in ("off", "on"):
        run = tmp_path / setting
        result = succeeded(train(run, SHORT, pictures, start=start, compile=setting))
    assert "torch.compile failed" not in result.stderr
    assert losses(tmp_path / "on") == pytest.approx(losses(tmp_path / "off"), rel=0.01)


def test_the_bench_runs(tmp_path):
    settings = {**TINY, "device": DEVICE, "rounds": 1, "seconds": 0.1, "json": "bench.json"}
    result = succeeded(called("tools.bench", *flags(**settings), cwd=tmp_path))
    assert "ours_bf16" in result.stdout


# One process, wrapped as each of several is.
ONE_OF_MANY = """
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from test_gpu import DEVICE, TrainingOnGpu
from utils.process import StopSignal, from_first_process, start_processes

plain = TrainingOnGpu(grad_accum=2, dropout=0.0)
expected = [plain.step() for _ in range(3)]
assert start_processes() == (0, 1)
assert from_first_process(lambda: "said") == "said"
wrapped = TrainingOnGpu(grad_accum=2, dropout=0.0)
wrapped.ddpm.model = DistributedDataParallel(wrapped.state.model)
got = [wrapped.step() for _ in range(3)]
torch.testing.assert_close(torch.cat(got), torch.cat(expected), rtol=0.01, atol=0)
assert wrapped.state.metrics.row(3, 24, 40, lr=1e-4)["loss"] > 0
assert not StopSignal().requested()
backend = dist.distributed_c10d._get_default_group()._get_backend(DEVICE)
assert "NCCL" in type(backend).__name__, backend
dist.destroy_process_group()
"""


def test_a_process_of_nccl_trains_as_one_alone(tmp_path):
    path = tmp_path / "one_of_many.py"
    path.write_text(ONE_OF_MANY)
    line = torchrun(str(path), processes=1)
    succeeded(subprocess.run(
        line, capture_output=True, text=True, timeout=300, env=environment(), check=False))
