"""What several test modules use: tiny settings, the scripts, networks with a known answer."""

import contextlib
import hashlib
import importlib
import io
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from config import Config
from ddpm import DDPM
from model import UNet
from utils.checkpoint import save_checkpoint
from utils.process import run_script

ROOT = Path(__file__).resolve().parent.parent
TINY = {
    "data": "shapes",
    "image_size": 8,
    "dim": 8,
    "dim_mults": (1, 2),
    "num_res_blocks": 1,
    "attn_resolutions": (4,),
    "timesteps": 30,
    "batch_size": 4,
    "warmup_steps": 0,
    "num_samples": 3,
    "sample_steps": 3,
    "device": "cpu",
    "precision": "fp32",
}
SHORT = {"max_steps": 6, "log_every": 2, "sample_every": 2, "save_every": 0}

# The variables of its first process
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}


def tiny(**changes) -> Config:
    return Config(**{**TINY, **changes})


def flags(**settings) -> list[str]:
    """The command line of these settings."""
    line = []
    for name, value in settings.items():
        if isinstance(value, bool):
            line.append(f"--{name}" if value else f"--no-{name}")
            continue
        line.append(f"--{name}")
        values = value if isinstance(value, tuple) else (value,)
        line.extend(map(str, values))
    return line


# The scripts: "train.py", or a module such as "tools.bench"

def python(name: str) -> list[str]:
    """The command that starts it."""
    if name.endswith(".py"):
        return [sys.executable, str(ROOT / name)]
    return [sys.executable, "-m", name]


def environment(**changes: str) -> dict[str, str]:
    """In which a process in any folder finds the modules of the project and of the tests."""
    return {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", **changes}


def script(
    name: str, *arguments: str, timeout: float = 120, **options
) -> subprocess.CompletedProcess:
    """The real script in a process of its own, which takes seconds to start."""
    options = {"env": environment(), **options}
    return subprocess.run(
        [*python(name), *arguments], capture_output=True, text=True, timeout=timeout, **options)


def called(name: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """The same by way of the script's main(), in this process.

    For tests of one setting or one mistake among many.
    """
    main = importlib.import_module(name.removesuffix(".py")).main
    out, err = io.StringIO(), io.StringIO()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1,
               signal.SIGUSR2)
    handlers = {number: signal.getsignal(number) for number in numbers}
    before = Path.cwd()
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run_script(lambda: main(list(arguments)))
    except SystemExit as end:
        status = end.code
        if not isinstance(status, int):  # a message, which Python prints and makes a 1 of
            err.write(f"{status}\n")
            status = 1
    finally:
        os.chdir(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return subprocess.CompletedProcess([name, *arguments], status, out.getvalue(), err.getvalue())


def succeeded(result: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    assert result.returncode == 0, result.stderr
    return result


def refused(result: subprocess.CompletedProcess, status: int, *words: str) -> None:
    """Ended with this status and one line on stderr that holds these words."""
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert result.returncode == status, result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    assert len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[0], lines[0]


def command(run_dir: Path, *extra: str | dict, **settings) -> list[str]:
    """The command line of a tiny training run: settings from dicts, a later one counts; flags."""
    merged = {**TINY, "run_dir": run_dir}
    line = []
    for part in (*extra, settings):
        if isinstance(part, dict):
            merged.update(part)
        else:
            line.append(part)
    return [*flags(**merged), *line]


def train(
    run_dir: Path, *extra: str | dict, start=called, **settings
) -> subprocess.CompletedProcess:
    """A tiny training run to its end: train(run, RUN, "--resume", max_steps=5)."""
    return start("train.py", *command(run_dir, *extra, **settings), cwd=run_dir.parent)


def begin(line: list[str], cwd: Path) -> subprocess.Popen:
    """A process that is not waited for."""
    return subprocess.Popen(
        line, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def begin_training(
    run_dir: Path, *extra: str | dict, processes: int = 0, options: tuple[str, ...] = (),
    **settings,
) -> subprocess.Popen:
    """A tiny training run that is not waited for; by so many processes of torchrun."""
    line = command(run_dir, *extra, **settings)
    start = python("train.py")
    if processes:
        start = torchrun("train.py", processes=processes, options=options)
    return begin([*start, *line], run_dir.parent)


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not path.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    if not path.exists():
        process.kill()
        raise AssertionError(f"{path} did not come: {process.communicate()[1]}")


def torchrun(
    name: str, *arguments: str, processes: int = 2, options: tuple[str, ...] = ()
) -> list[str]:
    """The command line of so many processes of a script, of the project or of any path."""
    line = [*python("torch.distributed.run"), "--standalone", f"--nproc_per_node={processes}"]
    return [*line, *options, str(ROOT / name), *map(str, arguments)]


def succeeds_under_torchrun(
    source: str, folder: Path, *arguments: str, processes: int = 2
) -> None:
    """So many processes of this Python code end without an error."""
    path = folder / "processes.py"
    path.write_text(source)
    line = torchrun(str(path), *arguments, processes=processes)
    succeeded(subprocess.run(
        line, capture_output=True, text=True, timeout=120, env=environment(), check=False))


def infer(checkpoint: Path, cwd: Path, *arguments) -> subprocess.CompletedProcess:
    """inference.py with this checkpoint, in fp32."""
    line = ["--checkpoint", checkpoint, "--device", "cpu", "--precision", "fp32", *arguments]
    return succeeded(called("inference.py", *map(str, line), cwd=cwd))


def arrays(checkpoint: Path, cwd: Path, *arguments) -> np.ndarray:
    """The samples [N, H, W, C], as numbers that can be subtracted."""
    infer(checkpoint, cwd, "--npz", "x.npz", *arguments)
    return np.load(cwd / "x.npz")["arr_0"].astype(int)


# What a run leaves behind

def latest(run_dir: Path) -> dict:
    return torch.load(run_dir / "checkpoints/latest.pth", weights_only=True)


def metrics_rows(run_dir: Path) -> list[list[str]]:
    """The rows of metrics.csv below its header, without images_per_sec."""
    lines = (run_dir / "metrics.csv").read_text().splitlines()
    return [line.split(",")[:-1] for line in lines[1:]]


def everything(run_dir: Path) -> dict[str, str]:
    """Down to the bit: tensors and pictures by their bytes, and the metrics."""
    found = {}

    def walk(name: str, value) -> None:
        if isinstance(value, dict):
            for key in value:
                walk(f"{name}.{key}", value[key])
        elif isinstance(value, Tensor):
            found[name] = hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
        else:
            found[name] = repr(value)

    state = latest(run_dir)
    del state["config"]
    walk("latest", state)
    found["metrics"] = repr(metrics_rows(run_dir))
    for path in sorted((run_dir / "samples").iterdir()):
        found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def differing(a: dict, b: dict) -> list[str]:
    return [name for name in a.keys() | b.keys() if a.get(name) != b.get(name)]


def coloured_pictures(folder: Path, count: int = 10, size: int = 8) -> Path:
    """The folder, with so many PNGs of one colour each, all different."""
    folder.mkdir(parents=True)
    for i in range(count):
        colour = (240 * i // count, 100, 200)
        Image.new("RGB", (size, size), colour).save(folder / f"{i:03}.png")
    return folder


# Networks

def random_unet(config: Config) -> UNet:
    """No parameter at 0 or 1, where a mistake could hide; its output is of order 1."""
    model = UNet(config).eval()
    for name, parameter in model.named_parameters():
        std = 0.1
        if parameter.ndim > 1:
            std = 0.7 / math.sqrt(parameter[0].numel())
        nn.init.normal_(parameter, std=std)
        if "norm" in name and name.endswith("weight"):
            parameter.data += 1
    return model


def save_network(path: Path, config: Config, model: UNet | None = None, step: int = 7) -> Path:
    """Save a checkpoint of the model, or of random weights, and return its path."""
    weights = (model or random_unet(config)).state_dict()
    save_checkpoint({"config": asdict(config), "step": step, "ema": weights}, path)
    return path


class Constant(nn.Module):
    """Predicts the same number everywhere, and notes how it was called."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.value = value
        self.timesteps: list[list[int]] = []
        self.modes: list[bool] = []  # whether it was in training mode

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        self.timesteps.append(t.tolist())
        self.modes.append(self.training)
        return torch.full_like(x_t, self.value)


class ConstantImage(nn.Module):
    """Its x_0 is the same picture at every step."""

    def __init__(self, config: Config, x_start: Tensor) -> None:
        super().__init__()
        self.x_start = x_start
        self.alphas_cumprod = DDPM(nn.Identity(), config).alphas_cumprod

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        a = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        return (x_t - a.sqrt() * self.x_start) / (1 - a).sqrt()


class Gaussian(nn.Module):
    """The perfect network for data whose pixels are independent normal numbers."""

    def __init__(self, config: Config, mean: float, std: float) -> None:
        super().__init__()
        self.mean, self.std = mean, std
        exact = DDPM(nn.Identity(), config).alphas_cumprod_float64
        self.alphas_cumprod = torch.tensor(exact, dtype=torch.float64)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        a = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        variance = a * self.std**2 + 1 - a
        noise = (1 - a).sqrt() * (x_t - a.sqrt() * self.mean) / variance
        return noise.to(x_t.dtype)


def half_frozen(config: Config) -> DDPM:
    """Around a Constant in training mode, a submodule of which is not."""
    model = Constant()
    model.frozen = nn.Dropout().eval()
    return DDPM(model, config)


def modes(module: nn.Module) -> list[bool]:
    return [m.training for m in module.modules()]
