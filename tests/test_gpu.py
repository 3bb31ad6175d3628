"""On a CUDA GPU: pytest -m "gpu and not slow".  What can run on a CPU does, among the other tests.

On a GPU a repeated run differs by rounding, so gradients and images are compared, not bits.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import GPU, TWO_GPUS
from helpers import (
    SHORT,
    begin_training,
    called,
    environment,
    flags,
    latest,
    metrics_rows,
    random_unet,
    refused,
    save_network,
    script,
    succeeded,
    tiny,
    train,
)
from torch import Tensor

import ddim
from config import PRESETS, Config
from data import Batches
from ddpm import DDPM
from tools import bench
from train import TrainingState, train_step
from utils.checkpoint import load_checkpoint, save_checkpoint, tensors_of
from utils.device import autocast, maybe_compile, select_device
from utils.randomness import ImageNoise

TINY = tiny(batch_size=8, dropout=0.0)
ONE_LEVEL = tiny(batch_size=8, dropout=0.0, dim_mults=(1,), attn_resolutions=(8,))
DEFAULT = Config(batch_size=4, dropout=0.0)
PAPER = Config(**{**PRESETS["paper"], "batch_size": 4, "dropout": 0.0})


# torchrun

@pytest.mark.parametrize(("device", "processes"), [
    ("cpu", 1),
    pytest.param("cuda", 1, marks=GPU),
    pytest.param("cuda", 2, marks=TWO_GPUS),
])
def test_torchrun_trains(device, processes, pictures, tmp_path):
    compile = "on" if device == "cuda" else "off"
    run = tmp_path / "run"
    settings = {"device": device, "compile": compile, "precision": "auto"}
    process = begin_training(run, SHORT, pictures, settings, processes=processes)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "torch.compile failed" not in err
    assert f"on {processes} x" in out
    assert latest(run)["step"] == 6


# Gradients, from random weights, so that every part of the network counts

def gradients(
    config: Config, device: torch.device, precision: str, compile: str = "off"
) -> tuple[Tensor, list[Tensor]]:
    """The losses [B] of one batch and the gradient of each weight, on the CPU."""
    config = replace(config, precision=precision)
    state = TrainingState(config, device)
    torch.manual_seed(0)
    state.model.load_state_dict(random_unet(config).state_dict())
    shape = (config.batch_size, config.channels, config.image_size, config.image_size)
    x_start = torch.rand(shape) * 2 - 1
    t = torch.randint(config.timesteps, (config.batch_size,))
    noise = torch.randn(shape)
    inputs = [tensor.to(device) for tensor in (x_start, t, noise)]
    torch._dynamo.reset()  # else it gives up compiling after a few networks
    maybe_compile(compile, device, 1, state.model)
    with autocast(device, precision):
        losses, _ = DDPM(state.model, config).to(device).training_losses(*inputs)
    state.scaler.scale(losses.mean()).backward()
    state.scaler.unscale_(state.optimizer)
    found = [p.grad.double().cpu() for p in state.parameters]
    state.scaler.step(state.optimizer)  # Adam's fused kernel refuses gradients of another layout
    assert all(p.isfinite().all() for p in state.parameters)
    return losses.detach().cpu(), found


def norm(tensors: list[Tensor]) -> float:
    return torch.stack([tensor.norm() for tensor in tensors]).norm().item()


ROUNDING = {"fp32": 0.005, "bf16": 0.03, "fp16": 0.005}  # fp32 is TF32 on a GPU


@pytest.mark.parametrize(("device", "config", "precision"), [
    ("cpu", TINY, "fp32"),
    ("cpu", TINY, "bf16"),
    ("cpu", TINY, "fp16"),
    pytest.param("cuda", TINY, "fp32", marks=GPU),
    pytest.param("cuda", PAPER, "fp32", marks=GPU),
    pytest.param("cuda", PAPER, "bf16", marks=GPU),
    pytest.param("cuda", PAPER, "fp16", marks=GPU),
    pytest.param("cuda", DEFAULT, "bf16", marks=GPU),
])
def test_the_gradient_is_that_of_fp32_on_a_cpu(device, config, precision):
    compare_gradients(device, config, precision, "off")


@pytest.mark.parametrize(("device", "config", "precision"), [
    pytest.param("cpu", ONE_LEVEL, "bf16", marks=pytest.mark.slow),
    pytest.param("cuda", TINY, "fp32", marks=GPU),
    pytest.param("cuda", DEFAULT, "bf16", marks=GPU),
])
def test_the_gradient_of_a_compiled_network_too(device, config, precision, capsys):
    compare_gradients(device, config, precision, "on")
    assert "failed" not in capsys.readouterr().err


def compare_gradients(device: str, config: Config, precision: str, compile: str) -> None:
    expected_losses, expected = gradients(config, torch.device("cpu"), "fp32")
    losses, found = gradients(config, select_device(device), precision, compile)
    rounding = ROUNDING[precision]
    torch.testing.assert_close(losses, expected_losses, rtol=rounding, atol=0)
    differences = [a - b for a, b in zip(found, expected, strict=True)]
    whole = norm(expected)
    assert norm(differences) < rounding * whole
    if precision != "fp32":
        assert norm(differences) > 1e-4 * whole
    for difference, tensor in zip(differences, expected, strict=True):
        assert difference.norm() < 3 * rounding * (tensor.norm() + 0.02 * whole)


def test_the_output_is_calculated_in_32_bits(device):
    # The sampler multiplies its error by up to 157.
    config = tiny()
    model = random_unet(config).to(device)
    seen = []
    model.norm_out.register_forward_hook(lambda module, inputs, output: seen.extend(inputs))
    x_t = torch.randn(4, 3, 8, 8, device=device)
    with torch.no_grad(), autocast(device, "bf16"):
        output = model(x_t, torch.arange(4, device=device))
    layers = copy.deepcopy(torch.nn.Sequential(model.norm_out, torch.nn.SiLU(), model.conv_out))
    exact = layers.double()(seen[0].double())
    assert output.dtype == torch.float32
    assert (output - exact).std() < 5e-4 * exact.std()


# Nothing waits: the GPU sleeps, and must be asleep still when the work has been handed to it

def is_waited_for(work: Callable[[], object]) -> bool:
    torch.cuda.synchronize()
    torch.cuda._sleep(2 * 10**9)  # clock cycles: about a second
    awake = torch.cuda.Event()
    awake.record()
    work()
    return awake.query()


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
def test_what_waits_is_seen(device):
    x = torch.ones(3, device=device)
    assert is_waited_for(lambda: x.sum().item())
    assert not is_waited_for(lambda: x.sum())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])  # fp16 reads its scale
@pytest.mark.parametrize("fits", [True, False])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
def test_a_training_step_waits_for_nothing(device, fits, precision, monkeypatch):
    if not fits:  # the data set, on the GPU
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    device = select_device(device)
    config = replace(ONE_LEVEL, precision=precision)  # of few kernels: they wait in a queue
    images = np.random.default_rng(0).integers(0, 256, (40, 3, 8, 8), np.uint8)
    batches = Batches(images, config, device)
    assert isinstance(batches.images, Tensor) == fits
    state = TrainingState(config, device)
    ddpm = DDPM(state.model, config).to(device)
    state.metrics.start_clock(0)

    def step() -> None:
        state.metrics.add(*train_step(ddpm, state, batches, config))

    for _ in range(8):  # convolutions are tried out, libraries are loaded
        step()
    for _ in range(5):  # an epoch, its first step too
        assert not is_waited_for(step)
    assert 0 < state.metrics.row(13, 104, 40, lr=1e-4)["loss"] < 10


@pytest.mark.parametrize("steps", [None, 10])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
def test_a_chain_waits_for_nothing(device, steps):
    device = select_device(device)
    ddpm = DDPM(random_unet(TINY), TINY).to(device)
    randn_like = ImageNoise(0, range(2), (3, 8, 8), device)
    chain = ddim.sample_loop(ddpm, randn_like(), steps, randn_like=randn_like)
    with torch.no_grad():
        next(chain)
        for _ in range(3):
            assert not is_waited_for(lambda: next(chain))


# Checkpoints and images

@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(("first", "second"), [
    ("cpu", "cpu"),
    pytest.param("cuda", "cpu", marks=GPU),
    pytest.param("cpu", "cuda", marks=GPU),
    pytest.param("cuda", "cuda", marks=GPU),
])
def test_a_run_goes_on_on_another_device(first, second, precision, pictures, tmp_path):
    run = tmp_path / "run"
    settings = {"precision": precision, "save_minutes": 0}
    succeeded(train(run, SHORT, settings, pictures, device=first, max_steps=4))
    saved = load_checkpoint(run / "checkpoints/latest.pth")
    assert bool(saved["scaler"]) == (precision == "fp16")

    config = Config(**{**saved["config"], "device": second})
    state = TrainingState(config, select_device(second))
    state.load_state_dict(saved)
    save_checkpoint({**saved, **state.state_dict()}, tmp_path / "again.pth")
    again = load_checkpoint(tmp_path / "again.pth")
    for name in ("step", "images_seen", "scaler"):
        assert again[name] == saved[name]
    for ours, theirs in zip(tensors_of(again), tensors_of(saved), strict=True):
        assert torch.equal(ours, theirs)

    succeeded(train(run, SHORT, settings, pictures, "--resume", device=second, max_steps=6))
    assert latest(run)["step"] == 6
    assert [row[0] for row in metrics_rows(run)] == ["2", "4", "6"]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_chain_is_that_of_fp32_on_a_cpu(precision, device):
    config = tiny()
    torch.manual_seed(0)
    ddpm = DDPM(random_unet(config), config)
    noise = torch.randn(config.timesteps + 1, 4, 3, 8, 8)

    def sample(device: torch.device, precision: str, steps: int | None) -> Tensor:
        draws = iter(noise.to(device))
        with autocast(device, precision):
            return ddim.sample(ddpm.to(device), next(draws), steps,
                               randn_like=lambda x: next(draws)).cpu()

    for steps in (None, 10):
        expected = sample(torch.device("cpu"), "fp32", steps)
        found = sample(device, precision, steps)
        assert expected.std() > 0.1
        assert (found - expected).abs().mean() < 2 * ROUNDING[precision]


def test_the_noise_of_an_image_does_not_depend_on_its_batch(device):
    whole = ImageNoise(0, range(8), (3, 8, 8), device)
    alone = ImageNoise(0, [3], (3, 8, 8), device)
    for _ in range(40):
        assert torch.equal(whole()[3:4], alone())


# The scripts

@pytest.mark.parametrize("precision", ["auto", "fp16"])
def test_from_training_to_pictures_and_figures(precision, device, pictures, tmp_path):
    run = tmp_path / "run"
    result = succeeded(train(run, SHORT, pictures, device=device, precision=precision))
    name = device.type if device.type == "cpu" else torch.cuda.get_device_name()
    assert f"1 x {name}" in result.stdout
    assert len(list((run / "samples").iterdir())) == 3
    line = flags(run_dir=run, device=device, precision=precision)
    result = succeeded(called("inference.py", *line, "--mode", "all", cwd=tmp_path))
    assert f"on 1 x {device.type} in" in result.stdout
    line += ["--metric", "bpd", "--num_images", "2"]
    result = succeeded(called("evaluate.py", *line, cwd=tmp_path))
    assert 1 < float(result.stdout.split("total")[1].split()[0]) < 100


@pytest.mark.parametrize("device", [
    pytest.param("cpu", marks=pytest.mark.slow),
    pytest.param("cuda", marks=GPU),
])
def test_a_compiled_run_is_resumed_and_sampled_from(device, pictures, tmp_path):
    run = tmp_path / "run"
    settings = {"device": device, "compile": "on", "dim_mults": (1,), "attn_resolutions": (8,)}
    start = partial(script, timeout=600,
                    env=environment(TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache")))
    for max_steps in (3, 6):
        result = train(run, SHORT, settings, pictures, "--resume", start=start, max_steps=max_steps)
        assert "torch.compile failed" not in succeeded(result).stderr
    assert list((tmp_path / "cache").iterdir())
    state = latest(run)
    assert state["step"] == 6
    for key in [*state["ema"], *state["model"]]:
        assert "_orig_mod" not in key

    checkpoint = save_network(tmp_path / "random.pth", Config(**state["config"]))
    samples = {}
    for compile in ("off", "on"):
        npz = tmp_path / f"{compile}.npz"
        line = flags(checkpoint=checkpoint, device=device, compile=compile, npz=npz, num_samples=5,
                     batch_size=2, steps=3, precision="fp32")  # the last batch is smaller
        result = succeeded(start("inference.py", *line, cwd=tmp_path))
        assert "torch.compile failed" not in result.stderr
        samples[compile] = np.load(npz)["arr_0"].astype(int)
    assert samples["on"].shape == (5, 8, 8, 3)
    assert abs(samples["on"] - samples["off"]).mean() < 2


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
def test_too_large_a_batch_is_one_line(device, pictures, tmp_path):
    settings = {"device": device, "batch_size": 1_000_000, "dim": 256, "precision": "bf16"}
    result = train(tmp_path / "run", SHORT, settings, pictures)
    refused(result, 1, "memory", "--batch_size")


# Speed

@pytest.mark.slow
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
def test_16_bits_are_faster_and_compiled_ones_more_so(device):
    speed = {}
    for precision, compile in (("fp32", "off"), ("bf16", "off"), ("bf16", "on")):
        config = Config(**{**PRESETS["paper"], "device": device, "precision": precision,
                           "compile": compile})
        speed[precision, compile] = bench.measure(bench.ours, config, 2)["train"]
    assert speed["bf16", "off"] > 1.1 * speed["fp32", "off"]
    assert speed["bf16", "on"] > 1.4 * speed["bf16", "off"]
