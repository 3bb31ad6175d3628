"""Speed: bench.py measures what it says, compiling works or is done without, and the fast paths calculate the same."""

import json
import os
import subprocess

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, called, flags, refused, script, tiny

import device
from bench import count_gflop
from config import PRESETS, Config
from device import has_bf16, memory_format, select_precision
from model import UNet, attend

CPU = torch.device("cpu")


def bench(tmp_path, *extra, **settings):
    return called("bench.py", *flags(**{**TINY, "rounds": 1, "seconds": 0.01, **settings}), *extra, cwd=tmp_path)


def test_bench_measures_ours_and_the_peers(tmp_path):
    result = bench(tmp_path, "--peers", json=tmp_path / "bench.json")
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "bench.json").read_text())
    peers = ["diffusers_fp32", "denoising_diffusion_pytorch"] + ["diffusers_bf16"] * has_bf16(CPU)
    measured = [peer for peer in peers if f"{peer} is left out: No module" not in result.stdout]
    assert "diffusers_fp32" in measured and found["results"].keys() == {"ours", *measured}
    assert found["ratios"].keys() == {f"{what}_vs_{peer}" for peer in measured for what in ("train", "sample")}
    for name, figures in found["results"].items():
        assert name in result.stdout and figures["peak_memory_gb"] > 0.1
        for what in ("train", "sample"):
            assert figures[what] == figures["rounds"][what][0] > 0 and figures["first_seconds"][what] > 0
    for peer in measured:
        ratio = found["results"]["ours"]["train"] / found["results"][peer]["train"]
        assert found["ratios"][f"train_vs_{peer}"] == pytest.approx(ratio)
    assert found["results"]["diffusers_fp32"]["parameters"] == found["results"]["ours"]["parameters"]
    assert found["tflops"]["train"] == pytest.approx(
        found["results"]["ours"]["train"] * found["gflop"]["train"] / 1000)
    assert all(peak > 0.001 for peak in found["peak_tflops"].values())


def test_a_network_that_a_peer_does_not_have_is_left_out(tmp_path):
    result = bench(tmp_path, "--peers", dim_mults=(2, 2))
    assert result.returncode == 0 and "diffusers_fp32 is left out: dim_mults=(2, 2)" in result.stdout


def test_bench_refuses(tmp_path):
    refused(bench(tmp_path, rounds=0), 2, "rounds=0")
    refused(bench(tmp_path, dim=7), 2, "dim=7")


def test_the_cost_of_the_paper_network():
    gflop = count_gflop(Config(**PRESETS["paper"]))
    assert gflop["sample"] == pytest.approx(12.44, abs=0.01) and gflop["train"] == pytest.approx(37.3, abs=0.05)


# What is faster calculates the same

def test_attention_is_the_same_by_hand():
    q, k, v = torch.randn(3, 2, 1, 16, 32)
    exact = F.scaled_dot_product_attention(q, k, v)
    assert torch.equal(attend(q, k, v), exact)
    assert (attend(q.bfloat16(), k.bfloat16(), v.bfloat16()) - exact).abs().max() < 0.03


def test_the_memory_format_changes_rounding_alone():
    config = tiny(dropout=0.0)
    model = UNet(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x_t, t = torch.randn(2, 3, 8, 8), torch.tensor([1, 20])
    plain = model(x_t, t)
    assert (model.to(memory_format=torch.channels_last)(x_t, t) - plain).abs().max() < 1e-5 * plain.abs().max()
    assert memory_format(CPU, "fp32") == memory_format(torch.device("cuda"), "bf16") == torch.channels_last
    assert memory_format(CPU, "bf16") == torch.contiguous_format


@pytest.mark.parametrize("native, dim, expected", [(True, 64, "bf16"), (True, 16, "bf16"), (True, 8, "fp32"),
                                                   (False, 64, "fp32")])
def test_precision_auto(native, dim, expected, monkeypatch):
    monkeypatch.setattr(device, "has_bf16", lambda device: native)
    assert select_precision("auto", CPU, dim) == expected


# Compiling

COMPILED = dict(dim_mults=(1,), attn_resolutions=(8,), max_steps=3, log_every=1, sample_every=3, compile="on")


def losses(run_dir) -> list[float]:
    return [float(line.split(",")[2]) for line in (run_dir / "metrics.csv").read_text().splitlines()[1:]]


def compiled_run(tmp_path, **environment) -> subprocess.CompletedProcess:
    """The same short run without and with --compile on; the latter. Their losses are equal."""
    for name, compile in (("plain", "off"), ("compiled", "on")):
        settings = flags(**{**TINY, **COMPILED, "compile": compile, "run_dir": tmp_path / name})
        result = script("train.py", *settings, timeout=600, cwd=tmp_path,
                        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), **environment})
        assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
    return result


def test_where_compiling_fails_it_says_so_and_goes_on(tmp_path):
    result = compiled_run(tmp_path, CXX="/bin/false")
    warnings = [line for line in result.stderr.splitlines() if "torch.compile failed" in line]
    assert 1 <= len(warnings) <= 2 and "Traceback" not in result.stderr  # one each for training and for the grid


@pytest.mark.slow
def test_a_compiled_run_is_the_same_to_rounding(tmp_path):
    result = compiled_run(tmp_path)
    assert "torch.compile failed" not in result.stderr
    assert list((tmp_path / "cache").rglob("*.so"))
    state = torch.load(tmp_path / "compiled/checkpoints/latest.pth", weights_only=True)
    assert not any("_orig_mod" in key for weights in (state["ema"], state["model"]) for key in weights)
    sampled = script("inference.py", "--run_dir", "compiled", "--num_samples", "2", "--compile", "on", timeout=600,
                     cwd=tmp_path, env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")})
    assert sampled.returncode == 0 and (tmp_path / "outputs/samples.png").exists(), sampled.stderr
