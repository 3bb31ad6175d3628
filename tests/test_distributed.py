"""Several processes, by torchrun and gloo on the CPU."""

import os
import signal
import subprocess
import sys
import time

import torch
from conftest import ROOT, TINY, flags
from PIL import Image
from test_faults import differing, everything

SETTINGS = {**TINY, "dropout": 0.0, "max_steps": 12, "log_every": 3, "sample_every": 6}


def torchrun(run_dir, *extra, processes=2, torchrun_flags=(), **settings) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
            *torchrun_flags, str(ROOT / "train.py"), *flags(**{**SETTINGS, "run_dir": run_dir, **settings}), *extra]


def train(run_dir, *extra, **settings) -> subprocess.CompletedProcess:
    return subprocess.run(torchrun(run_dir, *extra, **settings), cwd=run_dir.parent, capture_output=True, text=True,
                          timeout=180)


GRADIENT = """
import os, sys, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from conftest import tiny
from ddpm import DDPM
from model import UNet

config = tiny(dropout=0.0)
torch.manual_seed(0)
model = UNet(config)
for p in model.parameters():
    torch.nn.init.normal_(p, std=0.1)
x, t, noise = torch.rand(4, 3, 8, 8) * 2 - 1, torch.tensor([0, 9, 18, 29]), torch.randn(4, 3, 8, 8)
DDPM(model, config).training_loss(x, t, noise).backward()
whole = [p.grad.clone() for p in model.parameters()]
model.zero_grad()
dist.init_process_group("gloo")
rank = dist.get_rank()
mine = slice(2 * rank, 2 * rank + 2)
ddpm = DDPM(DistributedDataParallel(model), config)
ddpm.training_loss(x[mine], t[mine], noise[mine]).backward()
for a, p in zip(whole, model.parameters(), strict=True):
    torch.testing.assert_close(p.grad, a, atol=1e-5, rtol=1e-5)
dist.destroy_process_group()
"""


def test_the_gradient_is_that_of_the_whole_batch(tmp_path):
    (tmp_path / "gradient.py").write_text(GRADIENT)
    result = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                             str(tmp_path / "gradient.py")], capture_output=True, text=True, timeout=120,
                            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"})
    assert result.returncode == 0, result.stderr


def test_two_processes_train_resume_and_decode_once(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(10):
        Image.new("RGB", (8, 8), (20 * i, 100, 0)).save(pictures / f"{i}.png")
    data = dict(data=pictures, data_dir=tmp_path / "data")
    assert train(tmp_path / "whole", **data).returncode == 0
    for steps in (5, 12):
        result = train(tmp_path / "parts", "--resume", max_steps=steps, **data)
        assert result.returncode == 0, result.stderr
    whole, parts = everything(tmp_path / "whole"), everything(tmp_path / "parts")
    # the row after a stop lacks the other process's share of the loss before it; the weights lack nothing
    assert [name for name in differing(whole, parts) if name not in ("metrics", "latest.sums")] == []
    assert "2 x cpu" in result.stdout and result.stdout.count("training a U-Net") == 1
    assert len(list((tmp_path / "data").iterdir())) == 1


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    result = train(tmp_path / "run", batch_size=5)
    assert result.returncode != 0 and "batch_size=5 does not divide among 2 processes" in result.stderr
    assert not (tmp_path / "run/checkpoints").exists()


def test_ranks_draw_different_noise():
    from config import derive_seed

    assert len({derive_seed("step", 0, step, rank) for step in range(100) for rank in range(8)}) == 800


def ranks_of(process) -> dict[int, int]:
    """rank -> pid of the training processes below a torchrun."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat") as file:
                    parent = int(file.read().rsplit(")", 1)[1].split()[1])
                if parent == process.pid:
                    with open(f"/proc/{entry}/environ") as file:
                        environ = dict(item.split("=", 1) for item in file.read().split("\0") if "=" in item)
                    if "RANK" in environ:
                        found[int(environ["RANK"])] = int(entry)
            except (OSError, ProcessLookupError):
                pass
    return found


def begin(run_dir, **settings):
    return subprocess.Popen(torchrun(run_dir, "--resume", **settings), cwd=run_dir.parent, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for(path, process):
    end = time.monotonic() + 120
    while not path.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    assert path.exists()


def test_a_dead_rank_takes_the_others_down_and_torchrun_starts_again(tmp_path):
    process = begin(tmp_path / "run", max_steps=300, save_minutes=0, sample_every=0,
                    torchrun_flags=("--max-restarts=1",))
    wait_for(tmp_path / "run/metrics.csv", process)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    killed = time.monotonic()
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    assert out.count("training a U-Net") == 2 and "steps 0 to 300" in out and out.count("steps 0 to") == 1
    assert time.monotonic() - killed < 60
    assert train(tmp_path / "whole", max_steps=300, sample_every=0).returncode == 0
    whole, again = everything(tmp_path / "whole"), everything(tmp_path / "run")
    assert [name for name in differing(whole, again) if name not in ("metrics", "latest.sums")] == []


def test_sigterm_to_torchrun_saves(tmp_path):
    process = begin(tmp_path / "run", max_steps=100_000, sample_every=0)
    wait_for(tmp_path / "run/metrics.csv", process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert "stopped after" in out, err
    assert torch.load(tmp_path / "run/checkpoints/latest.pth", weights_only=True)["step"] > 0
