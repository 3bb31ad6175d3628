"""Speed: the bench measures what it says, compiling works or is done without, and the fast paths
calculate the same."""

import json
import os
import subprocess
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, called, environment, flags, random_unet, refused, script, succeeded, tiny
from torch.utils.flop_counter import FlopCounterMode

from config import PRESETS, Config
from model import attend
from tools import bench
from utils import device
from utils.cli import UserError
from utils.device import memory_format

CPU = torch.device("cpu")
BOTH = ("train", "sample")


def run_bench(tmp_path: Path, *extra: str, **settings) -> subprocess.CompletedProcess:
    settings = {**TINY, "rounds": 1, "seconds": 0.01, **settings}
    return called("tools.bench", *flags(**settings), *extra, cwd=tmp_path)


# tools.bench

def test_bench_measures_ours_and_diffusers(tmp_path):
    pytest.importorskip("diffusers")
    result = succeeded(run_bench(tmp_path, "--peers", json="bench.json"))
    found = json.loads((tmp_path / "bench.json").read_text())
    names = {"ours", "ours_bf16", "diffusers_fp32", "diffusers_bf16"}
    assert found["results"].keys() == names
    others = names - {"ours"}
    assert found["ratios"].keys() == {f"{what}_vs_{name}" for what in BOTH for name in others}

    ours = found["results"]["ours"]
    for name, figures in found["results"].items():
        assert name in result.stdout
        assert figures["parameters"] == ours["parameters"]
        assert 0.1 < figures["peak_memory_gb"] < 10
        for what in BOTH:
            assert figures["rounds"][what] == [figures[what]]
            assert figures[what] > 0
    for name in others:
        for what in BOTH:
            ratio = ours[what] / found["results"][name][what]
            assert found["ratios"][f"{what}_vs_{name}"] == pytest.approx(ratio)
    for what in BOTH:
        tflops = ours[what] * found["gflop"][what] / 1000
        assert found["tflops"][what] == pytest.approx(tflops)
        assert found["peak_tflops"][what] > 0.001
    assert found["settings"].items() >= {"dim": 8, "timesteps": 30, "precision": "fp32"}.items()
    assert (found["precision"], found["compiled"]) == ("fp32", False)


@pytest.mark.parametrize(("speedup", "precision", "peers", "expected"), [
    (0.05, "fp32", True, "ours ours_bf16 diffusers_fp32 diffusers_bf16 convolution"),
    (0.05, "auto", False, "ours ours_bf16 convolution"),
    (0.05, "bf16", True, "ours ours_fp32 diffusers_fp32 diffusers_bf16 convolution"),
    (2.0, "fp32", False, "ours ours_bf16 convolution"),
    (2.0, "auto", True, "ours ours_fp32 diffusers_fp32 diffusers_bf16 convolution"),
    (2.0, "fp16", False, "ours ours_fp32 ours_bf16 convolution"),
])
def test_who_takes_part(speedup, precision, peers, expected, tmp_path, monkeypatch):
    measured = {}

    def take_turns(contenders, rounds, seconds):
        measured.update(contenders)
        figures = {"parameters": 1, "train": 1.0, "sample": 1.0, "peak_memory_gb": 1.0}
        return dict.fromkeys(contenders, figures)

    monkeypatch.setattr(bench, "take_turns", take_turns)
    for module in (bench, device):
        monkeypatch.setattr(module, "measure_speedup", lambda *_: speedup)
    monkeypatch.setattr(bench, "find_spec", lambda name: True)
    # For the convolution of 16 images this grad_accum would be impossible.
    settings = {"precision": precision, "batch_size": 6, "grad_accum": 3}
    result = succeeded(run_bench(tmp_path, *["--peers"] * peers, **settings))
    if precision == "auto":
        precision = "bf16" if speedup > 1 else "fp32"
    assert f"batch 6, {precision}," in result.stdout
    is_emulated = speedup < 1
    assert ("bf16 is emulated here" in result.stdout) == is_emulated
    assert set(measured) == set(expected.split())
    for name, (make, config, its_precision) in measured.items():
        family, _, suffix = name.partition("_")
        assert make is getattr(bench, family)
        assert its_precision == (suffix or precision)
        batch_size = 1 if its_precision == "bf16" and is_emulated else 6
        assert config.batch_size == (16 if make is bench.convolution else batch_size)


@pytest.mark.parametrize(("step_seconds", "steps"), [(10.0, 2), (3.0, 3), (0.1, 32)])
def test_a_step_longer_than_the_turn_is_not_repeated(step_seconds, steps, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])

    def step() -> None:
        now[0] += step_seconds

    assert bench.steps_per_second(step, 3.0, CPU) == pytest.approx(1 / step_seconds)
    assert now[0] == pytest.approx(steps * step_seconds)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["ours", "diffusers", "convolution"])
def test_a_turn(name, precision):
    if name == "diffusers":
        pytest.importorskip("diffusers")
    figures = bench.measure(getattr(bench, name), tiny(batch_size=2), precision, seconds=0)
    assert figures["train"] > 0
    assert figures["sample"] > 0


def test_ours_trains_and_samples():
    config = tiny()
    model, train, evaluations = bench.ours(config, "fp32")
    before = model.conv_out.weight.clone()
    train()
    assert not torch.equal(model.conv_out.weight, before)
    timesteps = [next(evaluations)[0] for _ in range(config.timesteps + 2)]
    assert timesteps == [*range(29, -1, -1), 29, 28]  # one chain after another


def dies(config: Config, precision: str) -> None:
    os._exit(1)


def sleeps(config: Config, precision: str) -> None:
    time.sleep(100)


def test_the_end_of_an_interrupted_turn_is_not_waited_for(monkeypatch):
    def interrupted(turn: Future) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Future, "result", interrupted)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        bench.take_turns({"it": (sleeps, tiny(), "fp32")}, rounds=1, seconds=0)
    assert time.monotonic() - start < 20


def test_a_process_that_dies_is_named():
    with pytest.raises(UserError, match="the process of it died"):
        bench.take_turns({"it": (dies, tiny(), "fp32")}, rounds=1, seconds=0)


@pytest.mark.parametrize(("status", "settings", "word"), [
    (2, {"rounds": 0}, "rounds=0"),
    (2, {"seconds": "nan"}, "seconds=nan"),
    (2, {"seconds": "inf"}, "seconds=inf"),
    (2, {"dim": 7}, "dim=7"),
    (1, {"json": "/dev/null/bench.json"}, "/dev/null"),
    (1, {"json": "."}, "Is a directory"),
    (1, {"json": ""}, "Is a directory"),
])
def test_bench_refuses(status, settings, word, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "take_turns", None)  # before anything is measured
    refused(run_bench(tmp_path, **settings), status, word)


def test_peers_that_cannot_be_had_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "take_turns", None)
    monkeypatch.setattr(bench, "find_spec", lambda name: True)
    refused(run_bench(tmp_path, "--peers", dim_mults=(2, 2)), 1, "dim_mults=(2, 2)")
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    refused(run_bench(tmp_path, "--peers"), 1, "pip install diffusers")


def test_the_cost_of_the_paper_network():
    gflop = bench.count_gflop(Config(**PRESETS["paper"]))
    assert gflop["sample"] == pytest.approx(12.44, abs=0.01)
    assert gflop["train"] == pytest.approx(37.3, abs=0.05)


def test_the_cost_of_the_convolution():
    _, train, evaluations = bench.convolution(tiny(batch_size=2), "fp32")
    for what, step in (("train", train), ("sample", lambda: next(evaluations))):
        with FlopCounterMode(display=False) as counter:
            step()
        gflop = counter.get_total_flops() / 2 / 1e9
        assert gflop == pytest.approx(bench.CONVOLUTION_GFLOP[what])


# What is faster calculates the same

def test_attention_is_the_same_by_hand():
    q, k, v = torch.randn(3, 2, 1, 16, 32)
    exact = F.scaled_dot_product_attention(q, k, v)
    assert torch.equal(attend(q, k, v), exact)
    by_hand = attend(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert (by_hand - exact).abs().max() < 0.03


def test_the_memory_format_changes_rounding_alone(shape):
    model = random_unet(tiny())
    x_t = torch.randn(shape)
    t = torch.tensor([1, 20, 3, 29])
    plain = model(x_t, t)
    model.to(memory_format=torch.channels_last)
    assert (model(x_t, t) - plain).abs().max() < 1e-5 * plain.abs().max()


def test_in_16_bits_a_cpu_is_faster_without_channels_last():
    assert memory_format(CPU, "bf16") == torch.contiguous_format
    assert memory_format(CPU, "fp32") == torch.channels_last
    assert memory_format(torch.device("cuda"), "bf16") == torch.channels_last


# Compiling

COMPILED = {
    **TINY,
    "dim_mults": (1,),
    "attn_resolutions": (8,),
    "max_steps": 3,
    "log_every": 1,
    "sample_every": 3,
}


def losses(run_dir: Path) -> list[float]:
    rows = (run_dir / "metrics.csv").read_text().splitlines()[1:]
    return [float(row.split(",")[2]) for row in rows]


def compiled_run(tmp_path: Path, **changes: str) -> subprocess.CompletedProcess:
    """The same short run without and with --compile on; the latter.  Their losses are equal."""
    env = environment(TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"), **changes)
    for setting in ("off", "on"):
        line = flags(**COMPILED, compile=setting, run_dir=setting)
        result = succeeded(script("train.py", *line, timeout=600, cwd=tmp_path, env=env))
    assert losses(tmp_path / "on") == pytest.approx(losses(tmp_path / "off"), rel=1e-4)
    return result


@pytest.mark.slow
def test_where_compiling_fails_it_says_so_and_goes_on(tmp_path):
    result = compiled_run(tmp_path, CXX="/bin/false")
    warnings = result.stderr.count("torch.compile failed")
    parts = 14 if torch.__version__.startswith("2.4.") else 2  # training and the grid, or more
    assert 1 <= warnings <= parts
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_a_compiled_run_is_the_same_to_rounding(tmp_path):
    result = compiled_run(tmp_path)
    assert "torch.compile failed" not in result.stderr
    assert list((tmp_path / "cache").rglob("*.so"))
    state = torch.load(tmp_path / "on/checkpoints/latest.pth", weights_only=True)
    for key in [*state["ema"], *state["model"]]:
        assert "_orig_mod" not in key

    env = environment(TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    line = flags(run_dir="on", num_samples=2, compile="on")
    succeeded(script("inference.py", *line, timeout=600, cwd=tmp_path, env=env))
    assert (tmp_path / "outputs/samples.png").exists()
