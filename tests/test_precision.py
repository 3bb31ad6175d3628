"""Precision auto is measured, never the slower choice, and kept by --resume."""

import subprocess
from pathlib import Path

import pytest
import torch
from helpers import (
    TINY,
    called,
    differing,
    everything,
    flags,
    latest,
    succeeded,
    succeeds_under_torchrun,
    tiny,
)

from config import PRESETS, Config
from utils import device
from utils.device import measure_speedup, select_precision

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
SHORT = {"log_every": 1, "sample_every": 2, "save_every": 0}


def measures(speedup: float, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Config, bool]]:
    """From now on 16 bits are so many times as fast as fp32; what was asked for is noted."""
    asked = []

    def answer(precision: str, config: Config, training: bool) -> float:
        asked.append((precision, config, training))
        return speedup

    monkeypatch.setattr(device, "measure_speedup", answer)
    return asked


# The choice

@pytest.mark.parametrize(("speedup", "expected"), [
    (30.0, "bf16"), (1.3, "bf16"), (1.1, "fp32"), (0.7, "fp32"), (0.01, "fp32")])
def test_auto_is_bf16_where_that_clearly_wins(speedup, expected, monkeypatch, capsys):
    asked = measures(speedup, monkeypatch)
    config = tiny()
    assert select_precision("auto", CPU, config, training=True) == expected
    assert asked == [("bf16", config, True)]
    assert capsys.readouterr().err == ""


def test_fp32_needs_no_measurement(monkeypatch):
    asked = measures(30.0, monkeypatch)
    assert select_precision("fp32", CPU, tiny(), training=True) == "fp32"
    assert asked == []


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(("speedup", "is_slow"), [(2.0, False), (0.05, True)])
def test_what_is_asked_for_is_taken_and_said_to_be_slow_where_it_is(
    precision, speedup, is_slow, monkeypatch, capsys
):
    asked = measures(speedup, monkeypatch)
    config = tiny()
    assert select_precision(precision, CPU, config, training=False) == precision
    assert asked == [(precision, config, False)]
    said = capsys.readouterr().err
    assert (f"warning: {precision} is slower than fp32 on this cpu" in said) == is_slow


@pytest.mark.parametrize(("native", "name", "expected", "is_slow"), [
    (False, "auto", "fp32", False),
    (False, "bf16", "bf16", True),
    (False, "fp16", "fp16", False),
    (True, "auto", "bf16", False),
    (True, "bf16", "bf16", False),
])
def test_a_gpu_is_not_measured(native, name, expected, is_slow, monkeypatch, capsys):
    def is_bf16_supported(including_emulation: bool) -> bool:
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    monkeypatch.setattr(device, "measure_speedup", None)
    assert select_precision(name, CUDA, tiny(), training=True) == expected
    assert ("bf16 is slower than fp32 on this cuda" in capsys.readouterr().err) == is_slow


def test_an_apple_gpu_is_not_measured(monkeypatch):
    monkeypatch.setattr(device, "measure_speedup", None)
    assert select_precision("auto", torch.device("mps"), tiny(), training=True) == "fp32"


CHOICE = """
import torch

from helpers import tiny
from utils import device
from utils.cli import run

def main():
    rank, world_size = device.start_processes()
    device.measure_speedup = lambda *_: 2.0 if rank == 0 else 0.5
    choice = device.select_precision("auto", torch.device("cpu"), tiny(), training=True)
    assert choice == "bf16", choice
    return 0

run(main)
"""


def test_the_first_process_chooses_for_all(tmp_path):
    succeeds_under_torchrun(CHOICE, tmp_path)


# The measurement

def timed(seconds: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """From now on a convolution takes so long; the shapes of the fp32 ones are noted."""
    shapes = []

    def convolution_seconds(shape: tuple[int, ...], precision: str, training: bool) -> float:
        assert training
        if precision == "fp32":
            shapes.append(shape)
        return seconds[precision]

    monkeypatch.setattr(device, "convolution_seconds", convolution_seconds)
    return shapes


@pytest.mark.parametrize(("preset", "shape"), [
    ("paper", (3, 128, 32, 32)),  # 0.3 GFLOP per image
    ("demo", (8, 40, 16, 16)),
])
def test_the_convolution_is_as_wide_as_the_network(preset, shape, monkeypatch):
    shapes = timed({"fp32": 3.0, "bf16": 2.0}, monkeypatch)
    assert measure_speedup("bf16", Config(**PRESETS[preset]), training=True) == 1.5
    assert shapes[-1] == shape


def test_large_images_are_measured_on_a_part(monkeypatch):
    shapes = timed({"fp32": 1.0, "bf16": 1.0}, monkeypatch)
    measure_speedup("bf16", Config(image_size=256, dim=256, attn_resolutions=()), training=True)
    assert shapes[-1] == (1, 256, 32, 32)


def test_where_bf16_is_emulated_a_small_convolution_tells(monkeypatch):
    shapes = timed({"fp32": 1.0, "bf16": 20.0}, monkeypatch)
    assert measure_speedup("bf16", Config(**PRESETS["paper"]), training=True) == 0.05
    assert shapes == [(1, 128, 8, 8)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_convolution_is_timed_with_its_gradients_only_for_training(
    precision, training, monkeypatch
):
    seen = []
    gradients = []
    grad = torch.autograd.grad

    class Conv2d(torch.nn.Conv2d):
        def forward(self, x):
            seen.append((x, self.weight, torch.is_grad_enabled()))
            return super().forward(x)

    def noted_grad(y, inputs, gradient):
        gradients.append(grad(y, inputs, gradient))
        return gradients[-1]

    monkeypatch.setattr(device.nn, "Conv2d", Conv2d)
    monkeypatch.setattr(torch.autograd, "grad", noted_grad)
    assert 0 < device.convolution_seconds((2, 8, 4, 4), precision, training) < 1
    layout = device.memory_format(CPU, precision)
    for x, weight, grad_is_on in seen:
        assert x.shape == (2, 8, 4, 4)
        assert x.dtype == weight.dtype == device.DTYPES[precision]
        assert x.is_contiguous(memory_format=layout)
        assert weight.is_contiguous(memory_format=layout)
        assert grad_is_on == training
    assert len(seen) >= 3
    assert len(gradients) == len(seen) * training
    for of_x, of_weight in gradients:
        assert (of_x.shape, of_weight.shape) == ((2, 8, 4, 4), (8, 8, 3, 3))


def test_the_best_of_25_ms_counts_without_the_first(monkeypatch):
    seconds = iter([5.0, 0.02, 0.004, 0.003, 0.9])
    now = [0.0]

    class Conv2d(torch.nn.Conv2d):
        def forward(self, x):
            now[0] += next(seconds)
            return super().forward(x)

    monkeypatch.setattr(device.nn, "Conv2d", Conv2d)
    monkeypatch.setattr(device.time, "perf_counter", lambda: now[0])
    found = device.convolution_seconds((1, 8, 4, 4), "fp32", training=False)
    assert found == pytest.approx(0.003)


# The scripts

def train(run_dir: Path, *extra: str, **settings) -> subprocess.CompletedProcess:
    """With precision auto unless told otherwise."""
    settings = {**TINY, **SHORT, "run_dir": run_dir, **settings}
    if settings["precision"] == "fp32":
        del settings["precision"]
    return called("train.py", *flags(**settings), *extra, cwd=run_dir.parent)


def saved_precision(run_dir: Path) -> str:
    return latest(run_dir)["config"]["precision"]


def test_the_choice_is_printed_and_saved(pictures, tmp_path, monkeypatch):
    for speedup, expected in ((2.0, "bf16"), (1.0, "fp32")):
        run = tmp_path / expected
        asked = measures(speedup, monkeypatch)
        result = succeeded(train(run, max_steps=1, **pictures))
        assert f"on 1 x cpu in {expected}" in result.stdout
        assert saved_precision(run) == expected
        final = run / "checkpoints/final_model.pth"
        assert torch.load(final, weights_only=True)["config"]["precision"] == expected
        assert [training for _, _, training in asked] == [True]


def test_a_resumed_run_keeps_the_choice_and_not_a_bit_differs(pictures, tmp_path, monkeypatch):
    for speedup, other in ((2.0, 1.0), (1.0, 2.0)):
        whole, parts = tmp_path / f"whole {speedup}", tmp_path / f"parts {speedup}"
        measures(speedup, monkeypatch)
        succeeded(train(whole, max_steps=4, **pictures))
        succeeded(train(parts, max_steps=2, **pictures))
        measures(other, monkeypatch)  # as with another load, or on another machine
        result = succeeded(train(parts, "--resume", max_steps=4, **pictures))
        assert "precision" not in result.stdout
        assert saved_precision(parts) == saved_precision(whole)
        assert differing(everything(parts), everything(whole)) == []


def test_resuming_measures_anew_where_auto_is_asked_for(pictures, tmp_path, monkeypatch):
    run = tmp_path / "run"
    measures(1.0, monkeypatch)
    succeeded(train(run, max_steps=1, **pictures))
    measures(2.0, monkeypatch)
    result = succeeded(
        train(run, "--resume", "--precision", "auto", max_steps=2, **pictures))
    assert "precision fp32 -> auto" in result.stdout
    assert "in bf16" in result.stdout
    assert saved_precision(run) == "bf16"


def test_a_run_that_was_saved_with_auto_measures_when_it_is_resumed(
    pictures, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    measures(1.0, monkeypatch)
    succeeded(train(run, max_steps=1, **pictures))
    content = latest(run)
    content["config"]["precision"] = "auto"
    torch.save(content, run / "checkpoints/latest.pth")
    measures(2.0, monkeypatch)
    result = succeeded(train(run, "--resume", max_steps=2, **pictures))
    assert "precision" not in result.stdout
    assert "in bf16" in result.stdout
    assert saved_precision(run) == "bf16"


@pytest.mark.parametrize("speedup", [2.0, 1.0])
def test_sampling_and_evaluating_measure_too(speedup, checkpoint, tmp_path, monkeypatch):
    expected = "bf16" if speedup > 1.5 else "fp32"
    asked = measures(speedup, monkeypatch)
    common = ["--checkpoint", str(checkpoint), "--device", "cpu"]
    result = succeeded(called("inference.py", *common, "--num_samples", "1", cwd=tmp_path))
    assert f"on 1 x cpu in {expected}" in result.stdout
    line = [*common, "--metric", "bpd", "--num_images", "1", "--timesteps_per_image", "1"]
    result = succeeded(called("evaluate.py", *line, cwd=tmp_path))
    assert result.stdout.split("precision")[1].split()[0] == expected
    assert [(precision, training) for precision, _, training in asked] == [("bf16", False)] * 2
