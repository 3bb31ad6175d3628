"""tools.bench measures what it says, beside diffusers, and ends where it cannot."""

import json
import os
import subprocess
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, called, flags, refused, succeeded, tiny

from config import Config
from tools import bench
from utils import device
from utils.cli import UserError

BOTH = ("train", "sample")


def run_bench(tmp_path: Path, *extra: str, **settings) -> subprocess.CompletedProcess:
    settings = {**TINY, "rounds": 1, "seconds": 0.01, **settings}
    return called("tools.bench", *flags(**settings), *extra, cwd=tmp_path)


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
        (line,) = [line for line in result.stdout.splitlines() if line.split()[0] == name]
        for what in BOTH:
            assert figures[what] > 0
            assert figures["rounds"][what] == [figures[what]]
            ratio = ours[what] / figures[what]
            assert f"{what} {figures[what]:9.1f}{ratio:7.2f}x" in line
            if name != "ours":
                assert found["ratios"][f"{what}_vs_{name}"] == pytest.approx(ratio)
    assert found["torch"] == torch.__version__
    assert found["settings"].items() >= {"dim": 8, "timesteps": 30, "precision": "fp32"}.items()


@pytest.mark.parametrize(("precision", "peers", "expected"), [
    ("fp32", True, "ours ours_bf16 diffusers_fp32 diffusers_bf16"),
    ("bf16", True, "ours ours_fp32 diffusers_fp32 diffusers_bf16"),
    ("fp16", False, "ours ours_fp32 ours_bf16"),
    ("auto", False, "ours ours_fp32"),
])
def test_who_takes_part(precision, peers, expected, tmp_path, monkeypatch):
    measured = {}

    def take_turns(contenders, rounds, seconds):
        measured.update(contenders)
        return dict.fromkeys(contenders, {"train": 1.0, "sample": 1.0})

    monkeypatch.setattr(bench, "take_turns", take_turns)
    monkeypatch.setattr(device, "fastest_precision", lambda _: "bf16")
    monkeypatch.setattr(bench, "find_spec", lambda name: True)
    result = succeeded(run_bench(tmp_path, *["--peers"] * peers, precision=precision))
    if precision == "auto":
        precision = "bf16"
    assert f"batch 4, {precision};" in result.stdout
    assert measured.keys() == set(expected.split())
    for name, (make, config) in measured.items():
        family, _, suffix = name.partition("_")
        assert make is getattr(bench, family)
        assert config == tiny(precision=suffix or precision)


def test_ours_trains_and_samples():
    config = tiny()
    model, train, evaluations = bench.ours(config)
    before = model.conv_out.weight.clone()
    train()
    assert not torch.equal(model.conv_out.weight, before)
    timesteps = [next(evaluations)[0] for _ in range(config.timesteps + 2)]
    assert timesteps == [*range(29, -1, -1), 29, 28]  # one chain after another


@pytest.mark.parametrize("name", ["ours", "diffusers"])
def test_a_turn_is_in_its_precision_and_counts_images(name, monkeypatch):
    if name == "diffusers":
        pytest.importorskip("diffusers")
    conv2d = F.conv2d
    dtypes = set()
    are_bf16 = []

    def noted(*args):
        y = conv2d(*args)
        dtypes.add(y.dtype)
        return y

    def steps_per_second(step, seconds, device):
        dtypes.clear()
        step()
        are_bf16.append(torch.bfloat16 in dtypes)
        return 10.0

    monkeypatch.setattr(F, "conv2d", noted)
    monkeypatch.setattr(bench, "steps_per_second", steps_per_second)
    for precision in ("fp32", "bf16"):
        turn = bench.measure(getattr(bench, name), tiny(precision=precision), seconds=1)
        assert turn == {"train": 40, "sample": 40}  # 4 images per step
    assert are_bf16 == [False, False, True, True]


@pytest.mark.parametrize(("step_seconds", "steps"), [(10.0, 2), (3.0, 3), (0.1, 32)])
def test_a_step_longer_than_the_turn_is_not_repeated(step_seconds, steps, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])

    def step() -> None:
        now[0] += step_seconds

    found = bench.steps_per_second(step, 3.0, torch.device("cpu"))
    assert found == pytest.approx(1 / step_seconds)
    assert now[0] == pytest.approx(steps * step_seconds)


def dies(config: Config) -> None:
    os._exit(1)


def sleeps(config: Config) -> None:
    time.sleep(100)


def test_the_end_of_an_interrupted_turn_is_not_waited_for(monkeypatch):
    def interrupted(turn: Future) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Future, "result", interrupted)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        bench.take_turns({"it": (sleeps, tiny())}, rounds=1, seconds=0)
    assert time.monotonic() - start < 20


def test_a_process_that_dies_is_named():
    with pytest.raises(UserError, match="the process of it died"):
        bench.take_turns({"it": (dies, tiny())}, rounds=1, seconds=0)


@pytest.mark.parametrize(("status", "settings", "word"), [
    (2, {"rounds": 0}, "rounds=0"),
    (2, {"seconds": "nan"}, "seconds=nan"),
    (2, {"dim": 7}, "dim=7"),
    (1, {"json": "/dev/null/bench.json"}, "/dev/null"),
])
def test_a_mistake_is_one_line_before_anything_is_measured(
    status, settings, word, tmp_path, monkeypatch
):
    monkeypatch.setattr(bench, "take_turns", None)
    refused(run_bench(tmp_path, **settings), status, word)


def test_peers_that_cannot_be_had_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "take_turns", None)
    monkeypatch.setattr(bench, "find_spec", lambda name: True)
    refused(run_bench(tmp_path, "--peers", dim_mults=(2, 2)), 1, "dim_mults=(2, 2)")
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    refused(run_bench(tmp_path, "--peers"), 1, "pip install diffusers")
