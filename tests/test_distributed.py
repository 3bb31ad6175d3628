"""Several processes, by torchrun and gloo on the CPU."""

import os
import signal
import subprocess
import time
from pathlib import Path

import helpers
from helpers import (
    begin,
    command,
    differing,
    environment,
    everything,
    latest,
    metrics_rows,
    python,
    succeeded,
    torchrun,
    wait_for,
)

SETTINGS = {"dropout": 0.0, "max_steps": 12, "log_every": 3, "sample_every": 6}


def begin_training(
    run_dir: Path, *extra: str, options: tuple[str, ...] = (), **settings
) -> subprocess.Popen:
    line = command(run_dir, *extra, **{**SETTINGS, **settings})
    return begin(torchrun("train.py", *line, options=options), run_dir.parent)


def train(run_dir: Path, *extra: str, **settings) -> str:
    """To the end, with success; what it printed."""
    process = begin_training(run_dir, *extra, **settings)
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    return out


def differing_weights(a: Path, b: Path) -> list[str]:
    """All but the row after a stop, which lacks the other process's share of the loss before it."""
    names = differing(everything(a), everything(b))
    return [name for name in names if name not in ("metrics", "latest.sums")]


GRADIENT = """
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from ddpm import DDPM
from helpers import random_unet, tiny

config = tiny()
torch.manual_seed(0)
model = random_unet(config)
x = torch.rand(4, 3, 8, 8) * 2 - 1
t = torch.tensor([0, 9, 18, 29])
noise = torch.randn(4, 3, 8, 8)
DDPM(model, config).training_loss(x, t, noise).backward()
whole = [p.grad.clone() for p in model.parameters()]
model.zero_grad()
dist.init_process_group("gloo")
rank = dist.get_rank()
mine = slice(2 * rank, 2 * rank + 2)
ddpm = DDPM(DistributedDataParallel(model), config)
ddpm.training_loss(x[mine], t[mine], noise[mine]).backward()
for gradient, p in zip(whole, model.parameters(), strict=True):
    torch.testing.assert_close(p.grad, gradient, atol=1e-5, rtol=1e-5)
dist.destroy_process_group()
"""


def test_the_gradient_is_that_of_the_whole_batch(tmp_path):
    path = tmp_path / "gradient.py"
    path.write_text(GRADIENT)
    line = [*python("torch.distributed.run"), "--standalone", "--nproc_per_node=2", str(path)]
    result = subprocess.run(line, capture_output=True, text=True, timeout=120, env=environment())
    assert result.returncode == 0, result.stderr


def test_two_processes_train_resume_and_decode_once(pictures, tmp_path):
    settings = {**pictures, "grad_accum": 2, "log_every": 1}
    train(tmp_path / "whole", **settings)
    train(tmp_path / "parts", "--resume", max_steps=5, **settings)
    out = train(tmp_path / "parts", "--resume", **settings)
    assert "2 x cpu" in out
    assert out.count("training a U-Net") == 1
    assert differing_weights(tmp_path / "whole", tmp_path / "parts") == []
    assert len(list((tmp_path / "data").iterdir())) == 1
    assert latest(tmp_path / "whole")["images_seen"] == 12 * 4

    # Did both draw the same, it would be what one process draws for half of the batch.
    half = {**SETTINGS, **settings, "batch_size": 2, "max_steps": 1}
    succeeded(helpers.train(tmp_path / "half", **half))
    loss_of_two, loss_of_one = (
        metrics_rows(tmp_path / name)[0][2] for name in ("whole", "half"))
    assert loss_of_two != loss_of_one


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    process = begin_training(tmp_path / "run", batch_size=5)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "batch_size=5 does not divide among 2 processes" in err
    assert not (tmp_path / "run/checkpoints").exists()


def rank_of(pid: int) -> int | None:
    """That torchrun gave to the process; None where it is not its child any more."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    for variable in variables:
        name, _, value = variable.partition(b"=")
        if name == b"RANK":
            return int(value)
    return None


def children(process: subprocess.Popen) -> list[int]:
    path = f"/proc/{process.pid}/task/{process.pid}/children"
    return [int(pid) for pid in Path(path).read_text().split()]


def test_a_dead_rank_takes_the_others_down_and_torchrun_starts_again(pictures, tmp_path):
    settings = {**pictures, "max_steps": 60, "sample_every": 0}
    process = begin_training(
        tmp_path / "run", "--resume", options=("--max-restarts=1",), save_minutes=0.0, **settings)
    wait_for(tmp_path / "run/metrics.csv", process)
    (second,) = [pid for pid in children(process) if rank_of(pid) == 1]
    os.kill(second, signal.SIGKILL)
    killed = time.monotonic()
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    assert time.monotonic() - killed < 60
    assert out.count("training a U-Net") == 2
    assert out.count("steps 0 to 60") == 1  # the second time it went on
    train(tmp_path / "whole", **settings)
    assert differing_weights(tmp_path / "whole", tmp_path / "run") == []


def test_sigterm_to_torchrun_saves(pictures, tmp_path):
    settings = {**pictures, "max_steps": 100_000, "sample_every": 0}
    process = begin_training(tmp_path / "run", **settings)
    wait_for(tmp_path / "run/metrics.csv", process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert "stopped after" in out, err
    assert latest(tmp_path / "run")["step"] > 0
