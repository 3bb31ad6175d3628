import contextlib
import importlib
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from config import Config
from ddpm import DDPM
from device import run

ROOT = Path(__file__).resolve().parent.parent
TINY = dict(data="shapes", image_size=8, dim=8, dim_mults=(1, 2), num_res_blocks=1, attn_resolutions=(4,), timesteps=30,
            batch_size=4, warmup_steps=0, num_samples=3, sample_steps=3, device="cpu", precision="fp32")

# One thread, here and in the processes started from here: another number rounds differently.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


def tiny(**changes) -> Config:
    return Config(**{**TINY, **changes})


def flags(**settings) -> list[str]:
    """The command line of these settings."""
    line = []
    for name, value in settings.items():
        if isinstance(value, bool):
            line.append(f"--{name}" if value else f"--no-{name}")
        else:
            line += [f"--{name}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return line


def script(name: str, *arguments: str, timeout: float = 120, **kwargs) -> subprocess.CompletedProcess:
    """The real script in a process of its own, which takes seconds to start."""
    return subprocess.run([sys.executable, str(ROOT / name), *arguments], capture_output=True, text=True,
                          timeout=timeout, **kwargs)


def called(name: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """The same by way of the script's main(), in this process: for tests of one setting or one mistake among many."""
    main = importlib.import_module(name.removesuffix(".py")).main
    out, err = io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.chdir(cwd):
            run(lambda: main(list(arguments)))
    except SystemExit as exit:
        status = exit.code if isinstance(exit.code, int) else 1
        err.write("" if isinstance(exit.code, int) else f"{exit.code}\n")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return subprocess.CompletedProcess([name, *arguments], status, out.getvalue(), err.getvalue())


def refused(result: subprocess.CompletedProcess, status: int, *words: str) -> None:
    """Ended with this status and one line on stderr that holds these words."""
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert result.returncode == status, result.stderr
    assert len(lines) == 1 and "Traceback" not in result.stderr, result.stderr
    for word in words:
        assert word in lines[0], lines[0]


class Gaussian(nn.Module):
    """The perfect network for data whose pixels are independent normal numbers of this mean and standard deviation."""

    def __init__(self, config: Config, mean: float, std: float) -> None:
        super().__init__()
        self.mean, self.std = mean, std
        self.alphas_cumprod = torch.tensor(DDPM(nn.Identity(), config).alphas_cumprod_float64, dtype=torch.float64)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        a = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        noise = (1 - a).sqrt() * (x_t - a.sqrt() * self.mean) / (a * self.std**2 + 1 - a)
        return noise.to(x_t.dtype)


@pytest.fixture
def shape() -> tuple[int, ...]:
    return (4, 3, 8, 8)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
