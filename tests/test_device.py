"""Where it runs: the rule behind precision auto, which --resume keeps; memory format; compiling."""

import copy
import math
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    called,
    differing,
    environment,
    everything,
    flags,
    latest,
    metrics_rows,
    refused,
    script,
    succeeded,
    train,
)
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_compiler

from utils import device
from utils.device import (
    autocast,
    fastest_precision,
    maybe_compile,
    memory_format,
    select_precision,
)

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
AUTO = {"precision": "auto", "log_every": 1, "sample_every": 2, "save_every": 0}


# The rule

def cpuinfo(vendor: str, features: str) -> str:
    """The file has such a part for every core."""
    core = f"vendor_id\t: {vendor}\nmodel name\t: a CPU\nflags\t\t: fpu avx2 {features}\n\n"
    return core * 2


@pytest.mark.parametrize(("text", "expected"), [
    (cpuinfo("GenuineIntel", "avx512f avx512_bf16 amx_bf16 amx_tile"), "bf16"),
    (cpuinfo("GenuineIntel", "avx512f avx512_bf16"), "fp32"),
    (cpuinfo("AuthenticAMD", "avx512f avx512_bf16"), "bf16"),
    (cpuinfo("AuthenticAMD", "avx512f"), "fp32"),
    ("CPU implementer\t: 0x41\nFeatures\t: fp asimd bf16\n", "fp32"),
    (None, "fp32"),  # a system without the file
])
def test_a_cpu_takes_bf16_where_it_is_fast(text, expected, tmp_path, monkeypatch):
    pretended = tmp_path / "cpuinfo"
    if text is not None:
        pretended.write_text(text)
    files = {"/proc/cpuinfo": pretended}
    monkeypatch.setattr(device, "Path", lambda name: files[name])
    assert fastest_precision(CPU) == expected


@pytest.mark.parametrize(("name", "major", "arch", "expected"), [
    ("NVIDIA GeForce RTX 5090", 12, "", "bf16"),
    ("NVIDIA H100 80GB HBM3", 9, "", "bf16"),
    ("NVIDIA A100-SXM4-40GB", 8, "", "bf16"),
    ("Tesla T4", 7, "", "fp16"),
    ("Tesla V100-SXM2-16GB", 7, "", "fp16"),
    ("NVIDIA GeForce GTX 1660 Ti", 7, "", "fp32"),  # as a T4 has it, but without tensor cores
    ("Tesla P100-PCIE-16GB", 6, "", "fp32"),
    ("AMD Instinct MI300X", 9, "gfx942:sramecc+:xnack-", "bf16"),
    ("AMD Instinct MI210", 9, "gfx90a:sramecc+:xnack-", "bf16"),
    ("AMD Instinct MI100", 9, "gfx908:sramecc+:xnack-", "fp32"),
    ("AMD Radeon RX 7900 XTX", 11, "gfx1100", "fp32"),
])
def test_a_gpu_takes_16_bits_where_it_has_them(name, major, arch, expected, monkeypatch):
    gpus = {CUDA: SimpleNamespace(name=name, major=major, gcnArchName=arch)}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpus[device])
    monkeypatch.setattr(torch.version, "hip", "6.2" if arch else None)
    assert fastest_precision(CUDA) == expected


def test_an_apple_gpu_takes_fp32():
    assert fastest_precision(torch.device("mps")) == "fp32"


# The choice

def rule_says(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on this is the fastest on every device."""
    monkeypatch.setattr(device, "fastest_precision", lambda _: precision)


@pytest.mark.parametrize(("kind", "fastest", "name", "is_slow"), [
    ("cpu", "fp32", "fp32", False),
    ("cpu", "fp32", "bf16", True),
    ("cpu", "fp32", "fp16", True),
    ("cpu", "bf16", "fp32", False),
    ("cpu", "bf16", "bf16", False),
    ("cpu", "bf16", "fp16", True),
    ("cuda", "bf16", "bf16", False),
    ("cuda", "bf16", "fp16", False),
    ("cuda", "fp16", "fp32", False),
    ("cuda", "fp16", "bf16", True),
    ("cuda", "fp32", "fp16", False),
    ("mps", "fp32", "bf16", False),
    ("mps", "fp32", "fp16", False),
])
def test_what_is_asked_for_is_taken_and_said_to_be_slow_where_it_is(
    kind, fastest, name, is_slow, monkeypatch, capsys
):
    rule_says(fastest, monkeypatch)
    assert select_precision(name, torch.device(kind)) == name
    warning = f"warning: {name} is slow on this {kind}: --precision auto takes {fastest}\n"
    assert capsys.readouterr().err == (warning if is_slow else "")


def test_the_first_process_chooses_for_all(monkeypatch):
    rule_says("fp32", monkeypatch)
    monkeypatch.setattr(device, "from_first_process", lambda load: "bf16")
    assert select_precision("auto", CPU) == "bf16"


# The scripts

def resume(run_dir: Path, **changes) -> subprocess.CompletedProcess:
    """All but these settings comes from latest.pth."""
    line = flags(run_dir=run_dir, **changes)
    return called("train.py", "--resume", *line, cwd=run_dir.parent)


def saved_precision(run_dir: Path) -> str:
    return latest(run_dir)["config"]["precision"]


@pytest.mark.parametrize(("fastest", "elsewhere"), [("bf16", "fp32"), ("fp32", "bf16")])
def test_a_resumed_run_keeps_the_choice_and_not_a_bit_differs(
    fastest, elsewhere, pictures, tmp_path, monkeypatch
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    rule_says(fastest, monkeypatch)
    succeeded(train(whole, AUTO, pictures, max_steps=4))
    succeeded(train(parts, AUTO, pictures, max_steps=2))
    rule_says(elsewhere, monkeypatch)  # as on another machine
    result = succeeded(resume(parts, max_steps=4))
    assert "precision" not in result.stdout
    assert saved_precision(parts) == saved_precision(whole) == fastest
    assert differing(everything(parts), everything(whole)) == []


def test_a_resumed_run_chooses_anew_where_auto_is_asked_for(pictures, tmp_path, monkeypatch):
    run = tmp_path / "run"
    rule_says("fp32", monkeypatch)
    succeeded(train(run, AUTO, pictures, max_steps=1))
    rule_says("bf16", monkeypatch)
    result = succeeded(resume(run, precision="auto", max_steps=2))
    assert "precision fp32 -> auto" in result.stdout
    assert "in bf16" in result.stdout
    assert saved_precision(run) == "bf16"


@pytest.mark.parametrize("fastest", ["bf16", "fp32"])
def test_sampling_and_evaluating_choose_too(fastest, checkpoint, tmp_path, monkeypatch):
    rule_says(fastest, monkeypatch)
    common = flags(checkpoint=checkpoint, device="cpu")
    result = succeeded(called("inference.py", *common, "--num_samples", "1", cwd=tmp_path))
    assert f"on 1 x cpu in {fastest}" in result.stdout
    line = [*common, *flags(metric="bpd", num_images=1, timesteps_per_image=1)]
    result = succeeded(called("evaluate.py", *line, cwd=tmp_path))
    assert result.stdout.split("precision")[1].split()[0] == fastest


# The memory format

def test_in_16_bits_a_cpu_is_faster_without_channels_last():
    assert memory_format(CPU, "bf16") == torch.contiguous_format
    assert memory_format(CPU, "fp16") == torch.contiguous_format
    assert memory_format(CPU, "fp32") == torch.channels_last
    assert memory_format(CUDA, "bf16") == torch.channels_last


def test_fp32_is_fp32_within_an_autocast_of_ones_own():
    x = torch.randn(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with autocast(CPU, "fp32"):
            assert (x @ x).dtype == torch.float32


# Compiling

@pytest.mark.parametrize(("setting", "kind", "steps", "version", "expected"), [
    ("auto", "cuda", 2000, "2.5.0", True),
    ("auto", "cuda", 1999, "2.5.0", False),  # fewer steps than pay for it
    ("auto", "cuda", 2000, "2.4.1", False),
    ("auto", "cpu", math.inf, "2.5.0", False),
    ("on", "cpu", 1, "2.4.1", True),
    ("off", "cuda", math.inf, "2.5.0", False),
])
def test_auto_compiles_on_a_gpu_where_the_steps_pay_for_it(
    setting, kind, steps, version, expected, monkeypatch
):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    networks = [nn.Identity(), nn.Identity()]
    assert maybe_compile(setting, torch.device(kind), steps, *networks) == expected
    for network in networks:
        assert (network._compiled_call_impl is not None) == expected


def test_where_the_backward_pass_does_not_compile_it_goes_on(monkeypatch, capsys):
    config = pytest.importorskip("torch._functorch.config")
    if not hasattr(config, "force_non_lazy_backward_lowering"):
        pytest.skip("this PyTorch compiles the backward pass at the first backward() alone")

    def no_backward(graph: torch.fx.GraphModule, inputs: list) -> None:
        raise RuntimeError("no backward pass")

    backend = aot_autograd(fw_compiler=make_boxed_compiler(lambda graph, inputs: graph),
                           bw_compiler=no_backward)
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: backend)
    plain = nn.Linear(3, 2)
    compiled = copy.deepcopy(plain)
    maybe_compile("on", CPU, 1, compiled)
    x = torch.randn(4, 3)
    for network in (plain, compiled):
        network(x).square().sum().backward()
    assert torch.equal(compiled.weight.grad, plain.weight.grad)
    assert capsys.readouterr().err.count("torch.compile failed (no backward pass)") == 1


@pytest.mark.parametrize("script", [
    ["inference.py", "--npz", "x.npz", "--num_samples", "5", "--steps", "3"],
    ["evaluate.py", "--metric", "bpd", "--json", "x.npz", "--num_images", "5",
     "--timesteps_per_image", "2"],
])
def test_a_compiled_network_sees_one_shape_of_batch(script, checkpoint, tmp_path, monkeypatch):
    def without_compiling(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        shapes.extend(x.shape for x in inputs if getattr(x, "shape", ())[1:] == (3, 8, 8))
        return graph.forward

    shapes, written = [], []
    monkeypatch.setattr(device, "inductor_or_eager", without_compiling)
    line = ["--checkpoint", str(checkpoint), "--precision", "fp32", "--batch_size", "2"]
    for setting in ("off", "on"):
        succeeded(called(*script, *line, "--compile", setting, cwd=tmp_path))
        written.append((tmp_path / "x.npz").read_bytes())
    assert shapes == [(2, 3, 8, 8)]
    assert written[0] == written[1]


@pytest.mark.slow
def test_where_compiling_fails_it_says_so_and_goes_on(pictures, tmp_path):
    cache = str(tmp_path / "cache")
    start = partial(script, timeout=600,
                    env=environment(TORCHINDUCTOR_CACHE_DIR=cache, CXX="/bin/false"))
    settings = {"dim_mults": (1,), "attn_resolutions": (8,), "max_steps": 3, "log_every": 1}
    for setting in ("off", "on"):
        result = train(tmp_path / setting, settings, pictures, start=start, compile=setting)
        succeeded(result)
    warnings = result.stderr.count("torch.compile failed")
    parts = 14 if torch.__version__.startswith("2.4.") else 2  # training and the grid, or more
    assert 1 <= warnings <= parts
    assert "Traceback" not in result.stderr
    assert metrics_rows(tmp_path / "on") == metrics_rows(tmp_path / "off")


# The device

@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(tmp_path):
    refused(train(tmp_path / "run", device="cuda"), 1, "cuda", "--device cpu")
    result = called("inference.py", "--device", "cuda", cwd=tmp_path)
    refused(result, 1, "cuda", "--device cpu")
