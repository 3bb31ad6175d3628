"""What a run survives: the real script, real signals, real full disks, real processes."""

import os
import random
import resource
import signal
import subprocess
import time
from dataclasses import asdict, fields
from pathlib import Path

import helpers
import pytest
import torch
from helpers import (
    begin,
    called,
    coloured_pictures,
    command,
    differing,
    everything,
    latest,
    metrics_rows,
    python,
    refused,
    script,
    succeeded,
    tiny,
    wait_for,
)

import train as train_module
from config import Config
from utils.checkpoint import is_finite, resumed_config
from utils.cli import UserError, run
from utils.files import PatientWriter
from utils.metrics import COLUMNS, MetricsFile

RUN = {"dropout": 0.3, "max_steps": 40, "log_every": 3, "sample_every": 10, "save_every": 0}


def train(run_dir: Path, *extra: str, **settings) -> subprocess.CompletedProcess:
    return helpers.train(run_dir, *extra, **{**RUN, **settings})


def begin_training(run_dir: Path, *extra: str, **settings) -> subprocess.Popen:
    line = command(run_dir, *extra, **{**RUN, **settings})
    return begin([*python("train.py"), *line], run_dir.parent)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, str]:
    """The run that nothing interrupts."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    succeeded(train(run_dir))
    return everything(run_dir)


# Stop and resume

@pytest.mark.parametrize("stops", [[1], [20], [39], [7, 8, 25]])
def test_resume_after_max_steps_is_bit_for_bit(stops, whole, tmp_path):
    for stop in [*stops, 40]:
        succeeded(train(tmp_path / "run", "--resume", max_steps=stop))
    assert differing(everything(tmp_path / "run"), whole) == []


@pytest.mark.parametrize("settings", [
    {"grad_accum": 2}, {"precision": "bf16"}, {"precision": "fp16"}])
def test_resume_is_bit_for_bit_with(settings, tmp_path):
    for name, stops in (("whole", [12]), ("parts", [5, 12])):
        for stop in stops:
            line = {"max_steps": stop, "log_every": 2, **settings}
            succeeded(train(tmp_path / name, "--resume", **line))
    assert differing(everything(tmp_path / "parts"), everything(tmp_path / "whole")) == []


def test_resume_in_the_middle_of_an_epoch(pictures, tmp_path):
    for name, stops in (("whole", [12]), ("parts", [4, 9, 12])):  # an epoch is 2.5 steps
        for stop in stops:
            succeeded(train(tmp_path / name, "--resume", max_steps=stop, **pictures))
    assert differing(everything(tmp_path / "parts"), everything(tmp_path / "whole")) == []


@pytest.mark.parametrize(("number", "status"), [
    (signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_saves_and_says_how_to_go_on(number, status, whole, tmp_path, monkeypatch):
    def step_with_signal(*arguments):
        returned = train_step(*arguments)
        if len(steps) == 7:
            os.kill(os.getpid(), number)
        steps.append(returned)
        return returned

    steps, train_step = [], train_module.train_step
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "train_step", step_with_signal)
        result = train(tmp_path / "run")
    assert result.returncode == status
    assert "stopped after 8 of 40 steps" in result.stdout
    assert "--resume" in result.stdout
    assert "Traceback" not in result.stderr
    assert latest(tmp_path / "run")["step"] == 8
    succeeded(train(tmp_path / "run", "--resume"))
    assert differing(everything(tmp_path / "run"), whole) == []


def test_a_second_signal_ends_at_once(pictures, tmp_path):
    settings = {"max_steps": 100_000, "sample_every": 3, "sample_steps": 30, "num_samples": 2000}
    process = begin_training(tmp_path / "run", **settings, **pictures)
    wait_for(tmp_path / "run/metrics.csv", process)  # drawing a long grid from now on
    process.send_signal(signal.SIGSTOP)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    out, _ = process.communicate(timeout=30)
    assert process.returncode in (130, 143)
    assert "stopped after" not in out
    assert latest(tmp_path / "run")["step"] == 0  # as it was saved at the start


def kill_and_resume(run_dir: Path, rng: random.Random, kills: int, **settings) -> None:
    """kill -9 at random moments, resuming after each, until so many have hit; then to the end."""
    path = run_dir / "checkpoints/latest.pth"

    def written() -> int:
        return path.stat().st_mtime_ns if path.exists() else 0

    for _ in range(kills):
        before = written()
        # Every step writes: most moments are in a write, or near one.
        process = begin_training(run_dir, "--resume", save_minutes=0.0, **settings)
        end = time.monotonic() + 60
        while written() == before and process.poll() is None and time.monotonic() < end:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.15))
        assert process.poll() is None, "it finished, or failed, before it was killed"
        process.kill()
        process.communicate()
        torch.load(path, weights_only=True)  # loads, whatever the moment
    succeeded(train(run_dir, "--resume", **settings))


# Wide, so that writing the network takes a good part of each step.

def test_kill_9_three_times(pictures, tmp_path):
    settings = {"dim": 32, "max_steps": 24, **pictures}
    succeeded(train(tmp_path / "whole", **settings))
    kill_and_resume(tmp_path / "run", random.Random(0), 3, **settings)
    assert differing(everything(tmp_path / "run"), everything(tmp_path / "whole")) == []
    assert not list((tmp_path / "run").rglob("*.tmp"))


@pytest.mark.slow
def test_kill_9_thirty_times(pictures, tmp_path):
    settings = {"dim": 64, "max_steps": 400, "sample_every": 200, **pictures}
    succeeded(train(tmp_path / "whole", **settings))
    kill_and_resume(tmp_path / "run", random.Random(1), 30, **settings)
    assert differing(everything(tmp_path / "run"), everything(tmp_path / "whole")) == []


def test_a_killed_grid_is_drawn_after_resuming(whole, tmp_path):
    succeeded(train(tmp_path / "run", max_steps=20))
    (tmp_path / "run/samples/sample_step_20.png").unlink()
    succeeded(train(tmp_path / "run", "--resume"))
    assert differing(everything(tmp_path / "run"), whole) == []


def test_settings_need_not_be_said_again(tmp_path):
    succeeded(train(tmp_path / "run", max_steps=5))
    line = ("--resume", "--run_dir", str(tmp_path / "run"), "--max_steps", "7")
    succeeded(called("train.py", *line, cwd=tmp_path))
    assert latest(tmp_path / "run")["step"] == 7


def test_a_finished_run_says_so(tmp_path):
    def written() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}

    succeeded(train(tmp_path / "run", max_steps=3))
    before = written()
    result = succeeded(train(tmp_path / "run", "--resume", max_steps=3))
    assert "already finished" in result.stdout
    assert written() == before


def test_kept_checkpoints_without_latest_are_not_written_over(tmp_path):
    succeeded(train(tmp_path / "run", max_steps=3))
    (tmp_path / "run/checkpoints/latest.pth").unlink()
    refused(train(tmp_path / "run", "--resume", max_steps=3), 1, "latest.pth")
    refused(train(tmp_path / "run", max_steps=3), 1, "already holds a run")


def test_a_kept_checkpoint_is_nothing_to_resume_from(tmp_path):
    succeeded(train(tmp_path / "run", max_steps=3))
    checkpoints = tmp_path / "run/checkpoints"
    (checkpoints / "final_model.pth").replace(checkpoints / "latest.pth")
    refused(train(tmp_path / "run", "--resume", max_steps=3), 1, "latest.pth", "model", "optimizer")


# What may change on the way, and what not

OTHER_NETWORK_OR_DIFFUSION = {
    "image_size": 16,
    "channels": 1,
    "dim": 16,
    "dim_mults": (2, 2),
    "num_res_blocks": 2,
    "attn_resolutions": (8, 4),
    "timesteps": 31,
    "beta_schedule": "cosine",
    "beta_start": 0.0002,
    "beta_end": 0.01,
}
OTHER_TRAINING = {
    "data": "somewhere",
    "data_dir": "elsewhere",
    "horizontal_flip": False,
    "dropout": 0.5,
    "variance": "fixed_small",
    "batch_size": 6,
    "learning_rate": 1e-3,
    "epochs": 7,
    "max_steps": 9,
    "warmup_steps": 5,
    "grad_clip": 0.5,
    "grad_accum": 2,
    "ema_decay": 0.99,
    "seed": 1,
    "device": "auto",
    "precision": "bf16",
    "compile": "off",
    "log_every": 1,
    "sample_every": 2,
    "sample_steps": 4,
    "num_samples": 5,
    "save_every": 1,
    "save_minutes": 0.0,
}


def test_each_setting_is_in_one_of_the_two_lists():
    names = {f.name for f in fields(Config)}
    listed = [*OTHER_NETWORK_OR_DIFFUSION, *OTHER_TRAINING, "run_dir"]
    assert sorted(listed) == sorted(names)


@pytest.mark.parametrize("name", OTHER_NETWORK_OR_DIFFUSION)
def test_another_network_or_diffusion_is_refused(name):
    saved = tiny(attn_resolutions=(8,))
    value = OTHER_NETWORK_OR_DIFFUSION[name]
    given = {name: value}
    if name == "image_size":
        given["attn_resolutions"] = (8,)
    change = f"{name} {getattr(saved, name)} -> {value}"
    with pytest.raises(UserError, match="another network or diffusion") as error:
        resumed_config(given, "run", {"config": asdict(saved)}, say=False)
    assert change in str(error.value)


@pytest.mark.parametrize("name", OTHER_TRAINING)
def test_any_other_setting_is_taken_and_said(name, capsys):
    saved, value = tiny(), OTHER_TRAINING[name]
    config = resumed_config({name: value}, "run", {"config": asdict(saved)}, say=True)
    assert config == tiny(**{name: value, "run_dir": "run"})
    assert f"{name} {getattr(saved, name)} -> {value}" in capsys.readouterr().out


def test_a_run_goes_on_with_other_settings(tmp_path):
    settings = {"max_steps": 5, "sample_every": 0}
    succeeded(train(tmp_path / "run", **settings))
    changes = {**OTHER_TRAINING, "data": "shapes", "device": "cpu"}
    result = succeeded(train(tmp_path / "run", "--resume", **changes))
    assert "batch_size 4 -> 6" in result.stdout
    assert "max_steps 5 -> 9" in result.stdout
    assert latest(tmp_path / "run")["images_seen"] == 5 * 4 + 4 * 6
    assert [row[0] for row in metrics_rows(tmp_path / "run")] == ["3", "6", "7", "8", "9"]


def test_the_script_refuses_another_network(tmp_path):
    succeeded(train(tmp_path / "run", max_steps=5))
    before = (tmp_path / "run/checkpoints/latest.pth").read_bytes()
    result = train(tmp_path / "run", "--resume", dim=16, timesteps=31)
    refused(result, 1, "dim 8 -> 16", "timesteps 30 -> 31")
    line = ("--resume", "--run_dir", str(tmp_path / "run"), "--grad_accum", "16")
    result = called("train.py", *line, cwd=tmp_path)  # possible alone, but not together
    refused(result, 1, "grad_accum=16", "batch_size=4")
    assert (tmp_path / "run/checkpoints/latest.pth").read_bytes() == before


def test_another_variance_changes_the_grids_and_no_weight(whole, tmp_path):
    succeeded(train(tmp_path / "run", max_steps=15, sample_steps=30))
    settings = {"variance": "fixed_small", "sample_steps": 30, "max_steps": 25}
    result = succeeded(train(tmp_path / "run", "--resume", **settings))
    assert "variance fixed_large -> fixed_small" in result.stdout
    succeeded(train(tmp_path / "large", sample_steps=30, max_steps=25))
    changed = differing(everything(tmp_path / "run"), everything(tmp_path / "large"))
    assert changed == ["sample_step_20.png"]


@pytest.mark.parametrize(("batch_size", "steps"), [(2, 15), (8, 8)])
def test_with_another_batch_size_the_images_that_are_left_are_trained(
    batch_size, steps, pictures, tmp_path
):
    settings = {"epochs": 4, "save_every": 2, "log_every": 1, "sample_every": 0, **pictures}
    succeeded(train(tmp_path / "run", **{**settings, "max_steps": 5}))
    changes = {"max_steps": 0, "batch_size": batch_size}
    succeeded(train(tmp_path / "run", "--resume", **{**settings, **changes}))
    state = latest(tmp_path / "run")
    assert state["step"] == steps
    assert 40 <= state["images_seen"] < 40 + batch_size  # 10 images, 4 epochs
    rows = metrics_rows(tmp_path / "run")
    assert [int(row[0]) for row in rows] == list(range(1, steps + 1))
    assert rows[-1][1] == "4"
    kept = {path.name for path in (tmp_path / "run/checkpoints").iterdir()}
    assert {"checkpoint_epoch_2.pth", "checkpoint_epoch_4.pth"} <= kept


# How a script ends

@pytest.mark.parametrize(("error", "status", "words"), [
    (UserError("try another"), 1, "try another"),
    (OSError(28, "No space left on device", "x.png"), 1, "x.png: No space left on device"),
    (MemoryError(), 1, "out of memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "out of memory"),
    (KeyboardInterrupt(), 130, "interrupted"),
])
def test_an_error_is_one_line_and_a_status(error, status, words, capsys):
    def main() -> int:
        raise error

    with pytest.raises(SystemExit) as end:
        run(main)
    assert end.value.code == status
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


# Disks

def test_a_full_disk_is_a_warning_and_the_last_good_file_stays(tmp_path):
    """No file may grow beyond the limit: checkpoints fail as on a full disk, metrics.csv fits."""
    succeeded(train(tmp_path / "run", max_steps=2))
    path = tmp_path / "run/checkpoints/latest.pth"
    before = path.read_bytes()

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    line = command(tmp_path / "run", "--resume", **{**RUN, "max_steps": 12, "save_minutes": 0.0})
    result = script("train.py", *line, cwd=tmp_path, preexec_fn=limit)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert result.stderr.count("latest.pth could not be written") == 11
    assert path.read_bytes() == before
    assert not list(path.parent.glob("*.tmp"))
    assert metrics_rows(tmp_path / "run")[-1][0] == "12"
    succeeded(train(tmp_path / "run", "--resume", max_steps=12))


def test_metrics_that_could_not_be_written_are_written_later(tmp_path, monkeypatch):
    path = tmp_path / "metrics.csv"
    writer = PatientWriter()
    file = MetricsFile(path, 0, False, writer)

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    row = dict.fromkeys(COLUMNS, 0.5)
    file.write_row({**row, "step": 1})
    whole = path.read_text()
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", full)
        file.write_row({**row, "step": 2})
    assert writer.unwritten == {path}
    assert path.read_text() == whole
    file.write_row({**row, "step": 3})
    assert not writer.unwritten
    steps = [line.split(",")[0] for line in path.read_text().splitlines()]
    assert steps == ["step", "1", "2", "3"]


def test_a_run_dir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    line = command(tmp_path / "file/run", **RUN)
    refused(called("train.py", *line, cwd=tmp_path), 1, "file/run")


# Numbers that are not finite

ABSURD = {"max_steps": 60, "learning_rate": 1e38, "grad_clip": 0.0}


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    succeeded(train(tmp_path / "run", max_steps=3))
    path = tmp_path / "run/checkpoints/latest.pth"
    before = path.read_bytes()
    result = train(tmp_path / "run", "--resume", **ABSURD)
    assert result.returncode == 1
    assert "not finite at step" in result.stderr
    assert "--learning_rate" in result.stderr
    assert path.read_bytes() == before
    assert is_finite(latest(tmp_path / "run")["model"])


def test_what_is_saved_at_each_step_is_finite(tmp_path):
    succeeded(train(tmp_path / "run", max_steps=3))
    result = train(tmp_path / "run", "--resume", save_minutes=0.0, **ABSURD)
    assert result.returncode == 1
    assert "not finite at step" in result.stderr
    state = latest(tmp_path / "run")
    assert state["step"] > 3
    for key in ("model", "ema", "sums"):
        assert is_finite(state[key]), key


def test_a_gradient_that_is_not_finite_stops_the_run_too(tmp_path, monkeypatch):
    succeeded(train(tmp_path / "run", max_steps=3))
    path = tmp_path / "run/checkpoints/latest.pth"
    before = path.read_bytes()
    norm = torch.tensor(float("nan"))
    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", lambda *arguments: norm)
    result = train(tmp_path / "run", "--resume")
    assert result.returncode == 1
    assert "not finite at step 4:" in result.stderr
    assert path.read_bytes() == before


# Data

def test_two_runs_build_one_cache(tmp_path):
    pictures = coloured_pictures(tmp_path / "pictures", count=200, size=40)
    settings = {"data": pictures, "data_dir": tmp_path / "data", "max_steps": 3}
    processes = [begin_training(tmp_path / name, **settings) for name in ("a", "b")]
    for process in processes:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    assert differing(everything(tmp_path / "a"), everything(tmp_path / "b")) == []
    assert len(list((tmp_path / "data").iterdir())) == 1
