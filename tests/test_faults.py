"""What a run survives: the real script, real signals, real full disks, real processes."""

import hashlib
import random
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, called, flags, refused, script
from PIL import Image

from config import Config
from record import RunFiles

STEPS = 40
RUN = {**TINY, "dropout": 0.3, "max_steps": STEPS, "log_every": 3, "sample_every": 10, "save_every": 0, "image_size": 8}


def command(run_dir, *extra, **settings) -> list[str]:
    return flags(**{**RUN, "run_dir": run_dir, **settings}) + list(extra)


def train(run_dir, *extra, start=called, **settings):
    return start("train.py", *command(run_dir, *extra, **settings), cwd=run_dir.parent)


def begin(run_dir, *extra, **settings) -> subprocess.Popen:
    """The script in a process of its own, not waited for."""
    return subprocess.Popen([sys.executable, str(ROOT / "train.py"), *command(run_dir, *extra, **settings)],
                            cwd=run_dir.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path, process, seconds=60.0) -> None:
    end = time.monotonic() + seconds
    while not path.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    assert path.exists(), process.communicate()[1] if process.poll() is not None else "timed out"


def everything(run_dir) -> dict[str, str]:
    """What a run has left behind, down to the bit: tensors by their bytes, metrics without images/s."""
    state = torch.load(run_dir / "checkpoints/latest.pth", weights_only=True)
    found = {}

    def walk(name, value):
        if isinstance(value, dict):
            for key in value:
                walk(f"{name}.{key}", value[key])
        elif isinstance(value, torch.Tensor):
            found[name] = hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
        else:
            found[name] = repr(value)

    walk("latest", {key: value for key, value in state.items() if key != "config"})
    rows = (run_dir / "metrics.csv").read_text().splitlines()
    found["metrics"] = "\n".join(row.rpartition(",")[0] for row in rows)
    for path in sorted((run_dir / "samples").iterdir()):
        found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def differing(a: dict, b: dict) -> list[str]:
    return [name for name in a.keys() | b.keys() if a.get(name) != b.get(name)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing interrupts."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    assert train(run_dir).returncode == 0
    return everything(run_dir)


# Stop and resume

@pytest.mark.parametrize("stops", [[1], [20], [39], [7, 8, 25]])
def test_resume_after_max_steps_is_bit_for_bit(stops, whole, tmp_path):
    for stop in stops:
        assert train(tmp_path / "run", "--resume", max_steps=stop).returncode == 0
    assert train(tmp_path / "run", "--resume").returncode == 0
    assert differing(everything(tmp_path / "run"), whole) == []


@pytest.mark.parametrize("settings", [dict(grad_accum=2), dict(precision="bf16"), dict(precision="fp16")])
def test_resume_is_bit_for_bit_with(settings, tmp_path):
    for name, stops in (("whole", [12]), ("parts", [5, 12])):
        for stop in stops:
            result = train(tmp_path / name, "--resume", max_steps=stop, log_every=2, **settings)
            assert result.returncode == 0, result.stderr
    assert differing(everything(tmp_path / "parts"), everything(tmp_path / "whole")) == []


def test_resume_in_the_middle_of_an_epoch(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(10):
        Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(pictures / f"{i}.png")
    for name, stops in (("whole", [12]), ("parts", [4, 9, 12])):  # an epoch is two and a half steps
        for stop in stops:
            train(tmp_path / name, "--resume", data=pictures, data_dir=tmp_path / "data", max_steps=stop)
    assert differing(everything(tmp_path / "parts"), everything(tmp_path / "whole")) == []


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(number, status, whole, tmp_path):
    process = begin(tmp_path / "run", max_steps=100_000)
    wait_for(tmp_path / "run/metrics.csv", process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status and "--resume" in out and "Traceback" not in err
    stopped = torch.load(tmp_path / "run/checkpoints/latest.pth", weights_only=True)["step"]
    assert stopped > 0
    again = tmp_path / "again"  # the same number of steps, not interrupted
    assert train(again, max_steps=stopped).returncode == 0
    assert differing(everything(tmp_path / "run"), everything(again)) == []


def test_a_second_signal_ends_at_once(tmp_path):
    process = begin(tmp_path / "run", max_steps=100_000, sample_every=3, sample_steps=30, num_samples=2000)
    wait_for(tmp_path / "run/metrics.csv", process)  # drawing a long grid from now on
    process.send_signal(signal.SIGSTOP)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    process.communicate(timeout=30)
    assert process.returncode in (130, 143)


def kill_and_resume(run_dir, rng, kills: int, **settings) -> int:
    """kill -9 at random moments, resuming after each, until so many have hit; then to the end.  The kills that hit."""
    hits, latest = 0, run_dir / "checkpoints/latest.pth"
    while hits < kills:
        process = begin(run_dir, "--resume", save_minutes=0, **settings)
        before = latest.stat().st_mtime_ns if latest.exists() else 0
        end = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < end:  # every step writes: most moments are in or near one
            if latest.exists() and latest.stat().st_mtime_ns != before:
                break
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.3))
        if process.poll() is not None:
            assert process.returncode == 0, process.communicate()[1]
            break
        process.kill()
        process.communicate()
        torch.load(latest, weights_only=True)  # loads, whatever the moment
        hits += 1
    assert train(run_dir, "--resume", **settings).returncode == 0
    return hits


def test_kill_9_three_times(tmp_path, whole):
    # a wider network: writing it takes a good part of each step
    settings = dict(dim=64, max_steps=120)
    assert train(tmp_path / "whole", **settings).returncode == 0
    assert kill_and_resume(tmp_path / "run", random.Random(0), 3, **settings) == 3
    assert differing(everything(tmp_path / "run"), everything(tmp_path / "whole")) == []
    assert not list((tmp_path / "run").rglob("*.tmp"))


@pytest.mark.slow
def test_kill_9_thirty_times(tmp_path):
    settings = dict(dim=64, max_steps=1500, log_every=10, sample_every=200)
    assert train(tmp_path / "whole", **settings).returncode == 0
    assert kill_and_resume(tmp_path / "run", random.Random(1), 30, **settings) == 30
    assert differing(everything(tmp_path / "run"), everything(tmp_path / "whole")) == []


def test_a_killed_grid_is_drawn_after_resuming(whole, tmp_path):
    assert train(tmp_path / "run", max_steps=20).returncode == 0
    (tmp_path / "run/samples/sample_step_20.png").unlink()
    assert train(tmp_path / "run", "--resume").returncode == 0
    assert differing(everything(tmp_path / "run"), whole) == []


# What may change on the way, and what not

def test_what_fits_is_taken_and_said_what_does_not_is_refused(tmp_path):
    assert train(tmp_path / "run", max_steps=5).returncode == 0
    before = (tmp_path / "run/checkpoints/latest.pth").read_bytes()
    refused(train(tmp_path / "run", "--resume", dim=16, timesteps=31), 1, "dim 8 -> 16", "timesteps 30 -> 31")
    refused(called("train.py", "--resume", "--run_dir", str(tmp_path / "run"), "--grad_accum", "16", cwd=tmp_path), 1,
            "grad_accum=16", "batch_size=4")  # each is possible, but not together
    assert (tmp_path / "run/checkpoints/latest.pth").read_bytes() == before
    result = train(tmp_path / "run", "--resume", max_steps=8, batch_size=6)
    assert result.returncode == 0 and "batch_size 4 -> 6" in result.stdout and "max_steps 5 -> 8" in result.stdout


def test_settings_need_not_be_said_again(tmp_path):
    assert train(tmp_path / "run", max_steps=5).returncode == 0
    result = called("train.py", "--resume", "--run_dir", str(tmp_path / "run"), "--max_steps", "7", cwd=tmp_path)
    assert result.returncode == 0 and torch.load(tmp_path / "run/checkpoints/latest.pth")["step"] == 7


def test_a_finished_run_says_so(tmp_path):
    assert train(tmp_path / "run", max_steps=3).returncode == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    result = train(tmp_path / "run", "--resume", max_steps=3)
    assert result.returncode == 0 and "already finished" in result.stdout
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_kept_checkpoints_without_latest_are_not_written_over(tmp_path):
    assert train(tmp_path / "run", max_steps=3).returncode == 0
    (tmp_path / "run/checkpoints/latest.pth").unlink()
    refused(train(tmp_path / "run", "--resume", max_steps=3), 1, "latest.pth")
    refused(train(tmp_path / "run", max_steps=3), 1, "already holds a run")


def test_left_over_temporary_files_are_removed(tmp_path):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints/latest.pth.1234.tmp").write_bytes(b"half")
    assert train(tmp_path / "run", max_steps=1).returncode == 0
    assert not list((tmp_path / "run").rglob("*.tmp"))


# Disks

def test_a_full_disk_is_a_warning_and_the_last_good_file_stays(tmp_path):
    """No file may grow beyond the limit: checkpoints fail as on a full disk, metrics.csv still fits."""
    assert train(tmp_path / "run", max_steps=2).returncode == 0
    latest = tmp_path / "run/checkpoints/latest.pth"
    before = latest.read_bytes()
    result = script("train.py", *command(tmp_path / "run", "--resume", max_steps=12, save_minutes=0), cwd=tmp_path,
                    preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)))
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.count("latest.pth could not be written") == 11
    assert latest.read_bytes() == before and not list(latest.parent.glob("*.tmp"))
    assert (tmp_path / "run/metrics.csv").read_text().splitlines()[-1].startswith("12,")
    assert train(tmp_path / "run", "--resume", max_steps=12).returncode == 0


def test_metrics_that_could_not_be_written_are_written_later(tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    files = RunFiles(Config(run_dir=str(run_dir)), 0, False)
    broken = open

    def full(path, *args, **kwargs):
        if str(path).endswith("metrics.csv"):
            raise OSError(28, "No space left on device")
        return broken(path, *args, **kwargs)

    files.write_row({"step": 1, "loss": 0.5})
    monkeypatch.setattr("builtins.open", full)
    files.write_row({"step": 2, "loss": 0.25})
    assert files.status() == 1
    monkeypatch.undo()
    files.write_row({"step": 3, "loss": 0.125})
    assert files.status() == 0
    assert (run_dir / "metrics.csv").read_text() == "step,loss\n1,0.5\n2,0.25\n3,0.125\n"


def test_a_run_dir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    refused(called("train.py", *command(tmp_path / "file/run"), cwd=tmp_path), 1, "file/run")


# Numbers that are not finite

def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    assert train(tmp_path / "run", max_steps=3).returncode == 0
    before = (tmp_path / "run/checkpoints/latest.pth").read_bytes()
    result = train(tmp_path / "run", "--resume", max_steps=60, learning_rate=1e38, grad_clip=0, save_minutes=0)
    assert result.returncode == 1 and "not finite at step" in result.stderr and "--learning_rate" in result.stderr
    state = torch.load(tmp_path / "run/checkpoints/latest.pth", weights_only=True)
    assert all(torch.isfinite(value).all() for value in state["ema"].values()) or (
        tmp_path / "run/checkpoints/latest.pth").read_bytes() == before


def test_fp16_that_always_overflows_stops_the_run(tmp_path, monkeypatch):
    calls = []

    class NeverSteps(torch.amp.GradScaler):
        def get_scale(self):
            calls.append(None)
            return 2.0**-len(calls)

    monkeypatch.setattr("torch.amp.GradScaler", NeverSteps)
    result = train(tmp_path / "run", precision="fp16")
    assert result.returncode == 1 and "overflowed 20 times in a row at step 1" in result.stderr


# Data

def test_two_processes_build_one_cache(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(200):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 40, 3), np.uint8)).save(pictures / f"{i:03}.png")
    settings = dict(data=pictures, data_dir=tmp_path / "data", max_steps=3)
    processes = [begin(tmp_path / name, **settings) for name in ("a", "b")]
    for process in processes:
        assert process.wait(timeout=60) == 0, process.communicate()[1]
    assert differing(everything(tmp_path / "a"), everything(tmp_path / "b")) == []
    assert len(list((tmp_path / "data").iterdir())) == 1
