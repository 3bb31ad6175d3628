"""Several processes, by torchrun and gloo on the CPU."""

import os
import signal
import subprocess
import time
from pathlib import Path

import helpers
import pytest
from helpers import (
    begin,
    coloured_pictures,
    command,
    differing,
    environment,
    everything,
    latest,
    metrics_rows,
    refused,
    succeeded,
    succeeds_under_torchrun,
    torchrun,
    wait_for,
)

from utils.cli import StopSignal

SETTINGS = {"grad_accum": 2, "max_steps": 40, "log_every": 1, "sample_every": 20}


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


# What a rank's optimizer gets, against the mean over the ranks of the gradients of their losses.
GRADIENT = """
import copy

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from data import Batches
from ddpm import DDPM
from helpers import random_unet, tiny
from train import TrainingState, train_step

config = tiny(batch_size=8, grad_accum=2, dropout=0.0, grad_clip=0.0)
device = torch.device("cpu")
dist.init_process_group("gloo")
images = np.random.default_rng(0).integers(0, 256, (8, 3, 8, 8), np.uint8)
batches = Batches(images, config, device, dist.get_rank(), world_size=2)
state = TrainingState(config, device, "fp32")
torch.manual_seed(0)
state.model.load_state_dict(random_unet(config).state_dict())
before = DDPM(copy.deepcopy(state.model), config)
ddpm = DDPM(DistributedDataParallel(state.model), config)

def training_losses(x_start):
    t, noise = torch.randint(30, (len(x_start),)), torch.randn_like(x_start)
    loss = before.training_loss(x_start, t, noise) / 2  # of two micro-batches
    loss.backward()
    return DDPM.training_losses(ddpm, x_start, t, noise)

gradients = []
ddpm.training_losses = training_losses
state.optimizer.register_step_pre_hook(
    lambda *_: gradients.extend(p.grad.clone() for p in state.model.parameters()))
losses, _, _ = train_step(ddpm, state, batches, config, "fp32")
assert len(losses) == 4

for gradient, p in zip(gradients, before.model.parameters(), strict=True):
    mine = p.grad.clone()
    dist.all_reduce(p.grad)
    torch.testing.assert_close(gradient, p.grad / 2, atol=1e-5, rtol=1e-4)
assert not torch.allclose(gradient, mine, atol=1e-5, rtol=1e-4)  # of the last layer
dist.destroy_process_group()
"""


def test_the_gradient_is_that_of_the_whole_batch(tmp_path):
    succeeds_under_torchrun(GRADIENT, tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The run of two processes that nothing interrupts, with its data beside it."""
    root = tmp_path_factory.mktemp("whole")
    train(root / "run", **data_of(root))
    return root / "run"


def data_of(root: Path) -> dict[str, Path]:
    """Ten pictures, quicker to load than the shapes are to draw."""
    folder = root / "pictures"
    if not folder.exists():
        coloured_pictures(folder)
    return {"data": folder, "data_dir": root / "data"}


def test_two_processes_decode_once_and_see_as_many_images_as_one(whole):
    assert len(list((whole.parent / "data").iterdir())) == 1
    assert latest(whole)["images_seen"] == 40 * 4


def test_both_draw_for_themselves(whole, tmp_path):
    # Did both draw the same, it would be what one process draws for half of the batch.
    half = {**SETTINGS, **data_of(whole.parent), "batch_size": 2, "max_steps": 1}
    succeeded(helpers.train(tmp_path / "half", **half))
    assert metrics_rows(whole)[0][2] != metrics_rows(tmp_path / "half")[0][2]


def test_a_signal_while_the_flags_are_exchanged_counts_at_the_next_step(monkeypatch):
    stop = object.__new__(StopSignal)  # without handlers
    stop.number = 0
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    with monkeypatch.context() as patch:
        patch.setattr(
            "torch.distributed.all_reduce", lambda *arguments: stop(signal.SIGTERM, None))
        assert not stop.requested()  # as in the other processes
    monkeypatch.setattr("torch.distributed.all_reduce", lambda *arguments: None)
    assert stop.requested()
    assert stop.number == signal.SIGTERM


def test_a_batch_that_does_not_divide_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("train.start_processes", lambda: (0, 2))
    for batch_size, accum, multiple in ((5, 1, 2), (6, 2, 4)):
        settings = {"batch_size": batch_size, "grad_accum": accum}
        result = helpers.train(tmp_path / "run", **settings)
        refused(result, 1, f"batch_size={batch_size} does not divide among 2 processes",
                f"multiple of {multiple}")
    assert not (tmp_path / "run").exists()


# train.py in a folder of the process's own, as on machines that share no disk.
APART = """
import os

folder = f"machine {os.environ['RANK']}"
os.makedirs(folder, exist_ok=True)
os.chdir(folder)

from train import main
from utils.cli import run

run(main)
"""


def test_a_finished_run_is_finished_where_only_the_first_machine_has_it(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    (tmp_path / "apart.py").write_text(APART)
    line = command(Path("run"), "--resume", **{**SETTINGS, "max_steps": 1})
    outputs = []
    for _ in range(2):
        process = begin(torchrun(str(tmp_path / "apart.py"), *line), tmp_path)
        out, err = process.communicate(timeout=180)
        assert process.returncode == 0, err
        outputs.append(out)
    assert "finished 1 steps" in outputs[0]
    assert "already finished" in outputs[1]
    assert not (tmp_path / "machine 1/run").exists()


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


def test_a_dead_rank_takes_the_others_down_and_torchrun_starts_again(whole, tmp_path):
    settings = {**data_of(whole.parent), "save_minutes": 0.0}
    process = begin_training(
        tmp_path / "run", "--resume", options=("--max-restarts=1",), **settings)
    wait_for(tmp_path / "run/metrics.csv", process)
    (second,) = [pid for pid in children(process) if rank_of(pid) == 1]
    os.kill(second, signal.SIGKILL)
    killed = time.monotonic()
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    assert time.monotonic() - killed < 60
    assert out.count("training a U-Net") == 2
    assert out.count("steps 0 to 40") == 1  # the second time it went on
    assert differing(everything(tmp_path / "run"), everything(whole)) == []


def test_sigterm_to_torchrun_saves_and_nothing_is_lost(whole, tmp_path):
    data = data_of(whole.parent)
    grids = {"sample_every": 2, "sample_steps": 30, "num_samples": 2000}
    process = begin_training(tmp_path / "run", **data, **grids)
    wait_for(tmp_path / "run/metrics.csv", process)  # a long grid comes next
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert "stopped after" in out, err
    assert 0 < latest(tmp_path / "run")["step"] < 40

    out = train(tmp_path / "run", "--resume", **data)
    assert "2 x cpu" in out
    assert out.count("training a U-Net") == 1
    assert differing(everything(tmp_path / "run"), everything(whole)) == []
