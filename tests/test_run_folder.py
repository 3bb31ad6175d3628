"""utils/run_folder.py: what a run writes and when, whose run it is, what a bad disk costs."""

import csv
import errno
import os
import resource
import shutil
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    SHORT,
    TORCHRUN,
    begin_training,
    called,
    coloured_pictures,
    command,
    latest,
    metrics_rows,
    refused,
    script,
    succeeded,
    tiny,
    train,
    wait_for,
)
from PIL import Image

from config import Config
from train import TrainingState
from utils import run_folder
from utils.checkpoint import is_finite, tensors_of
from utils.cli import UserError
from utils.files import locked
from utils.metrics import COLUMNS
from utils.run_folder import RunFolder, open_run

# What is written

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four epochs over 24 images in a folder: its run_dir, and what it said."""
    root = tmp_path_factory.mktemp("scripts")
    for i in range(3):
        coloured_pictures(root / "pictures" / str(i), count=8)
    settings = {
        "data": root / "pictures",
        "data_dir": root / "data",
        "epochs": 4,
        "save_every": 2,
        "sample_every": 10,
        "log_every": 5,
        "num_samples": 5,
    }
    result = succeeded(train(root / "run", settings, start=script))
    return root / "run", result


def test_a_run_writes_what_the_readme_says(finished):
    run_dir, _ = finished
    files = {str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if path.is_file()}
    assert files == {
        "checkpoints/checkpoint_epoch_2.pth",
        "checkpoints/checkpoint_epoch_4.pth",
        "checkpoints/final_model.pth",
        "checkpoints/latest.pth",
        "metrics.csv",
        "samples/sample_step_10.png",
        "samples/sample_step_20.png",
    }


def test_a_run_says_what_it_does(finished):
    run_dir, result = finished
    for said in ("24 images", "0 to 24", "cpu in fp32", str(run_dir), "final_model.pth",
                 "parameters", "finished 24 steps"):
        assert said in result.stdout
    for said in ("loss", "images/s", "24/24"):  # the progress bar
        assert said in result.stderr


def test_metrics(finished):
    run_dir, _ = finished
    with (run_dir / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "step", "epoch", "loss", "loss_q1", "loss_q2", "loss_q3", "loss_q4", "lr", "grad_norm",
        "images_per_sec"]
    progress = [(int(row["step"]), int(row["epoch"])) for row in rows]
    assert progress == [(5, 0), (10, 1), (15, 2), (20, 3)]
    for row in rows:
        assert 0 < float(row["loss"]) < 1.5
        assert float(row["lr"]) == 2e-4
        assert float(row["grad_norm"]) > 0
        assert float(row["images_per_sec"]) > 0


def test_checkpoints_hold_tensors_and_plain_values(finished):
    folder = finished[0] / "checkpoints"
    kept = torch.load(folder / "final_model.pth", weights_only=True)
    state = torch.load(folder / "latest.pth", weights_only=True)
    assert kept.keys() == {"config", "step", "ema"}
    assert state.keys() == {
        "config", "step", "images_seen", "ema", "model", "optimizer", "scaler", "sums"}
    assert (kept["step"], state["step"], state["images_seen"]) == (24, 24, 96)
    epoch_2 = torch.load(folder / "checkpoint_epoch_2.pth", weights_only=True)
    assert epoch_2["step"] == 12


def test_the_samples_of_a_run_come_from_its_ema_weights_and_one_noise(finished, tmp_path):
    """inference.py draws the last grid again: same seed, same steps."""
    run_dir, _ = finished
    pictures = run_dir.parent / "pictures"
    settings = {"data": pictures, "data_dir": tmp_path / "data", "sample_every": 10}
    succeeded(train(tmp_path / "again", settings, max_steps=20, num_samples=5))
    grid = tmp_path / "again/samples/sample_step_20.png"
    assert grid.read_bytes() == (run_dir / "samples/sample_step_20.png").read_bytes()

    state = latest(tmp_path / "again")
    assert not torch.equal(state["ema"]["conv_out.weight"], state["model"]["conv_out.weight"])
    line = ("--run_dir", str(tmp_path / "again"), "--num_samples", "5", "--steps", "3")
    succeeded(called("inference.py", *line, cwd=tmp_path))
    sampled = np.asarray(Image.open(tmp_path / "outputs/samples.png")).astype(int)
    drawn = np.asarray(Image.open(grid)).astype(int)
    assert abs(sampled - drawn).max() <= 1


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    succeeded(train(tmp_path / "run", "--tensorboard", max_steps=2, log_every=1))
    assert list((tmp_path / "run/tensorboard").iterdir())


# When

@pytest.mark.parametrize(("batch_size", "save_every", "num_images", "expected"), [
    (4, 1, 10, [0, 0, 1, 0, 2, 0, 0, 3]),
    (5, 1, 10, [0, 1, 0, 2, 0, 3]),
    (4, 2, 10, [0, 0, 0, 0, 2, 0, 0, 0, 0, 4]),
    (4, 0, 10, [0, 0, 0, 0]),
    (4, 2, 1, [4, 8, 12]),  # several epochs per step
    (4, 8, 1, [0, 8, 0, 16]),
    (1, 1, 1, list(range(1, 21))),
    (1, 1, 1, [0, 2] + [0, 4, 0, 6, 0, 8, 0, 10, 0, 12, 0, 14, 0, 16, 0, 18, 0, 20, 0]),
    (4, 3, 1, [0, 6, 12, 0, 18, 24, 0, 30, 36, 0, 42, 48, 0, 54, 60, 0, 66]),
])
def test_the_epochs_that_are_kept(batch_size, save_every, num_images, expected, tmp_path):
    run = begun(tmp_path / "run", len(expected), num_images, batch_size=batch_size,
                save_every=save_every)
    state = TrainingState(run.config, torch.device("cpu"))
    for epoch in expected:
        before = set(run.checkpoints.iterdir())
        state.step += 1
        state.images_seen += batch_size
        run.save_if_due(state)
        names = {path.name for path in set(run.checkpoints.iterdir()) - before}
        assert names == ({f"checkpoint_epoch_{epoch}.pth"} if epoch else set())
        if epoch:  # first the state, for which there may be no room afterwards
            assert latest(tmp_path / "run")["step"] == state.step


def test_a_run_of_few_images_keeps_twenty_checkpoints(tmp_path):
    folder = coloured_pictures(tmp_path / "pictures", count=1)
    settings = {"data": folder, "data_dir": tmp_path, "max_steps": 43, "save_every": 1}
    succeeded(train(tmp_path / "run", settings))
    assert len(list((tmp_path / "run/checkpoints").glob("checkpoint_epoch_*"))) in range(10, 21)


def test_folders_that_vanish_are_made_again(pictures, tmp_path):
    run = begun(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    run.save_grid(Image.new("RGB", (8, 8)), 2)
    run.write_row(dict.fromkeys(COLUMNS, 0.5))
    run.save_latest(TrainingState(run.config, torch.device("cpu")))
    assert not run.unwritten
    assert len(list((tmp_path / "run").rglob("*.*"))) == 3


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", ["", "checkpoints", "samples"])
def test_a_folder_that_cannot_be_written_is_refused_before_the_work(
    name, resume, pictures, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    succeeded(train(tmp_path / "other", SHORT, pictures, max_steps=1))  # decodes the pictures
    if resume:
        succeeded(train(run, SHORT, pictures, max_steps=2))
    touch = Path.touch

    def refusing(path: Path) -> None:
        if path.parent == run / name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        touch(path)

    monkeypatch.setattr(Path, "touch", refusing)
    monkeypatch.setattr("train.train_step", None)
    refused(train(run, SHORT, pictures, "--resume"), 1, f"run/{name}", "Permission denied")
    assert run.exists() == resume


def run_from(folder: Path, config: Config, first_step: int) -> RunFolder:
    """The run goes on from this step, as after --resume."""
    state = TrainingState(config, torch.device("cpu"))
    state.step = first_step
    with open_run(str(folder), resume=False, tensorboard=False) as run:
        run.restore(config, state)
    return run


def test_when_a_grid_is_drawn(tmp_path):
    config = tiny(sample_every=10)
    run = run_from(tmp_path, config, first_step=0)
    assert not run.grid_is_due(0)
    assert not run.grid_is_due(15)
    assert run.grid_is_due(20)
    assert not run_from(tmp_path, tiny(sample_every=0), first_step=0).grid_is_due(20)

    run = run_from(tmp_path, config, first_step=20)
    assert run.grid_is_due(20)  # a signal came before it
    for step in (20, 30):
        (tmp_path / f"samples/sample_step_{step}.png").touch()
    assert not run.grid_is_due(20)
    assert run.grid_is_due(30)  # of steps that are taken anew


# inference.py beside it

def test_inference_needs_the_checkpoint_alone(finished, tmp_path):
    path = finished[0] / "checkpoints/final_model.pth"
    line = ("--checkpoint", str(path), "--num_samples", "5", "--batch_size", "2")
    result = succeeded(script("inference.py", *line, cwd=tmp_path))
    assert "samples.png" in result.stdout
    assert "step 24" in result.stdout
    assert Image.open(tmp_path / "outputs/samples.png").size == (3 * 10 + 2, 2 * 10 + 2)


# Whose run it is

def test_a_run_is_not_written_over(tmp_path):
    run = tmp_path / "run"
    checkpoints = run / "checkpoints"
    succeeded(train(run, SHORT))
    before = (run / "metrics.csv").read_bytes()
    refused(train(run, SHORT), 1, str(run), "already holds a run", "--resume")
    (checkpoints / "latest.pth").unlink()
    refused(train(run, SHORT, "--resume"), 1, "latest.pth")
    refused(train(run, SHORT), 1, "already holds a run")
    (checkpoints / "final_model.pth").replace(checkpoints / "latest.pth")
    refused(train(run, SHORT, "--resume"), 1, "latest.pth", "model", "optimizer")
    assert (run / "metrics.csv").read_bytes() == before


def test_a_second_training_in_the_same_run_dir_is_refused(pictures, tmp_path):
    run = tmp_path / "run"
    process = begin_training(run, SHORT, pictures, max_steps=100_000, sample_every=0)
    wait_for(run / "metrics.csv", process)
    refused(train(run, SHORT, "--resume", pictures), 1, "another process")
    process.kill()
    process.wait()
    before = latest(run)["step"]
    succeeded(train(run, SHORT, "--resume", pictures))  # the lock died with its process
    assert latest(run)["step"] == 6 >= before


def test_only_temporary_files_of_our_own_making_go(pictures, tmp_path):
    run, data = tmp_path / "run", tmp_path / "data"
    for folder in (run / "checkpoints", run / "samples", data):
        folder.mkdir(parents=True)
    ours = [run / "checkpoints/latest.pth.0123abcd.tmp", run / "metrics.csv.0123abcd.tmp",
            run / "samples/sample_step_2.png.0123abcd.tmp"]
    theirs = [run / "checkpoints/thesis.tmp", run / "samples/holiday.png.0123abcd.tmp",
              data / "old.tmp", data / "other-0123.images.0123abcd.tmp"]
    for path in ours + theirs:
        path.write_bytes(b"half")
        os.utime(path, (time.time() - 7200,) * 2)
    (run / "checkpoints/folder.tmp").mkdir()
    succeeded(train(run, SHORT, pictures))
    assert not any(path.exists() for path in ours)
    assert all(path.exists() for path in theirs)
    assert (run / "checkpoints/folder.tmp").is_dir()


def test_latest_is_read_while_the_folder_is_held(pictures, tmp_path, monkeypatch):
    """Read before that, it could be set back: another process may be going on with it."""
    run = tmp_path / "run"
    succeeded(train(run, SHORT, pictures, max_steps=2))
    load_checkpoint = run_folder.load_checkpoint

    def load(path: Path, **options) -> dict:
        with pytest.raises(UserError, match="another process"), locked(run / "checkpoints"):
            pass
        loads.append(path)
        return load_checkpoint(path, **options)

    loads = []
    monkeypatch.setattr(run_folder, "load_checkpoint", load)
    succeeded(train(run, SHORT, "--resume", pictures))
    assert loads == [run / "checkpoints/latest.pth"]


@pytest.mark.parametrize("wrong", [{"data": "nowhere"}, {"grad_accum": 3}])
def test_a_start_that_is_refused_leaves_no_folder(wrong, tmp_path):
    (tmp_path / "deep").mkdir()
    result = train(tmp_path / "deep/run", SHORT, wrong)
    assert result.returncode != 0
    assert not (tmp_path / "deep/run").exists()


def begun(folder: Path, total_steps: int = 6, num_images: int = 4, **settings) -> RunFolder:
    """A run that has come to its first step."""
    config = tiny(**{**SHORT, **settings, "run_dir": str(folder)})
    with open_run(str(folder), resume=False, tensorboard=False) as run:
        state = TrainingState(config, torch.device("cpu"))
        run.restore(config, state)
        run.begin(state, total_steps, num_images)
    return run


def test_only_the_first_of_torchruns_processes_writes_and_speaks(tmp_path, monkeypatch, capsys):
    for name, value in {**TORCHRUN, "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    run = begun(tmp_path / "run", save_every=1, save_minutes=0.0)
    state = TrainingState(run.config, torch.device("cpu"))
    state.step, state.images_seen = 6, 24
    assert not run.grid_is_due(2)
    run.save_grid(Image.new("RGB", (8, 8)), 2)
    run.write_row(dict.fromkeys(COLUMNS, 0.5))
    run.save_if_due(state)
    assert run.end(state, total_steps=6, signal=0) == 0
    assert run.end(state, total_steps=9, signal=15) == 143
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""


def test_what_was_read_is_let_go_of(pictures, tmp_path):
    folder = tmp_path / "run"
    succeeded(train(folder, SHORT, pictures))
    with open_run(str(folder), resume=True, tensorboard=False) as run:
        config = run.resumed_config({})
        state = TrainingState(config, torch.device("cpu"))
        content = run.saved
        read = [weakref.ref(tensor) for tensor in tensors_of(content)]
        del content
        run.restore(config, state)
        assert state.step == 6
        assert len(read) > 100
        assert not any(tensor() is not None for tensor in read)


# metrics.csv

def as_a_spreadsheet(text: str) -> bytes:
    return b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode()


@pytest.mark.parametrize("edit", [
    as_a_spreadsheet,
    lambda text: text.replace("\n", "\r\n").encode(),
    lambda text: text.rstrip("\n").encode(),
])
def test_metrics_survive_an_editor(edit, pictures, tmp_path):
    succeeded(train(tmp_path / "whole", SHORT, pictures))
    succeeded(train(tmp_path / "run", SHORT, pictures, max_steps=4))
    path = tmp_path / "run/metrics.csv"
    path.write_bytes(edit(path.read_text()))
    succeeded(train(tmp_path / "run", SHORT, "--resume", pictures))
    assert metrics_rows(tmp_path / "run") == metrics_rows(tmp_path / "whole")
    assert path.read_text().startswith("step,epoch,loss,")


def test_rows_of_other_programs_and_notes_are_kept(pictures, tmp_path):
    run = tmp_path / "run"
    succeeded(train(run, SHORT, pictures))
    path = run / "metrics.csv"
    header, *rows = path.read_text().splitlines()
    rows = [f"{float(row.split(',')[0]):.1f},{row.split(',', 1)[1]}" for row in rows]  # 2.0,...
    path.write_text("\n".join([header, "a note", *rows, "1.00E+01,0"]) + "\n")
    succeeded(train(run, SHORT, pictures, "--resume", max_steps=8))
    lines = path.read_text().splitlines()
    assert lines[:5] == [header, "a note", *rows]
    assert [line.split(",")[0] for line in lines[5:]] == ["8"]  # 10 was beyond the checkpoint


def test_metrics_removed_during_the_run_come_back_whole(pictures, tmp_path):
    run = tmp_path / "run"
    process = begin_training(run, SHORT, pictures, max_steps=60, sample_every=0)
    wait_for(run / "metrics.csv", process)
    (run / "metrics.csv").unlink()
    assert process.wait(timeout=60) == 0
    assert [row[0] for row in metrics_rows(run)] == [str(step) for step in range(2, 61, 2)]


@pytest.mark.parametrize("extra", [[], ["--resume"]])
def test_a_foreign_metrics_csv_is_not_cut(extra, pictures, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.csv").write_text("step,loss\n900,0.1\n")
    refused(train(run, SHORT, *extra, pictures), 1, "metrics.csv")
    assert (run / "metrics.csv").read_text() == "step,loss\n900,0.1\n"


# Disks

def test_a_full_disk_is_a_warning_and_the_last_good_file_stays(tmp_path):
    """No file may grow beyond the limit: checkpoints fail as on a full disk, metrics.csv fits."""
    run = tmp_path / "run"
    succeeded(train(run, SHORT, max_steps=2))
    path = run / "checkpoints/latest.pth"
    before = path.read_bytes()

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    line = command(run, SHORT, "--resume", max_steps=12, save_minutes=0.0)
    result = script("train.py", *line, cwd=tmp_path, preexec_fn=limit)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert result.stderr.count("latest.pth could not be written") == 11
    assert path.read_bytes() == before
    assert not list(path.parent.glob("*.tmp"))
    assert metrics_rows(run)[-1][0] == "12"
    succeeded(train(run, SHORT, "--resume", max_steps=12))


def test_metrics_that_could_not_be_written_are_written_later(tmp_path, monkeypatch):
    run = begun(tmp_path / "run")

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    row = dict.fromkeys(COLUMNS, 0.5)
    run.write_row({**row, "step": 1})
    whole = run.metrics_csv.read_text()
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", full)
        run.write_row({**row, "step": 2})
    assert run.unwritten == {run.metrics_csv}
    assert run.metrics_csv.read_text() == whole
    run.write_row({**row, "step": 3})
    assert not run.unwritten
    assert [row[0] for row in metrics_rows(run.folder)] == ["1", "2", "3"]


def test_a_final_model_that_could_not_be_written_is_not_claimed(pictures, tmp_path):
    run = tmp_path / "run"
    succeeded(train(run, SHORT, pictures, max_steps=2))
    (run / "checkpoints/final_model.pth").unlink()
    (run / "checkpoints/final_model.pth").mkdir()
    result = train(run, SHORT, "--resume", pictures)
    assert result.returncode == 1
    assert "final_model.pth could not be written" in result.stdout


def test_a_kept_checkpoint_that_failed_does_not_spoil_the_status(pictures, tmp_path):
    run = tmp_path / "run"
    succeeded(train(run, SHORT, pictures, max_steps=1))
    (run / "checkpoints/checkpoint_epoch_1.pth").mkdir()
    settings = {"max_steps": 0, "epochs": 2, "save_every": 1, **pictures}
    result = succeeded(train(run, SHORT, "--resume", settings))
    assert "checkpoint_epoch_1.pth could not be written" in result.stderr
    assert (run / "checkpoints/checkpoint_epoch_2.pth").is_file()


# Numbers that are not finite

ABSURD = {"max_steps": 60, "learning_rate": 1e38, "grad_clip": 0.0}


def test_a_loss_that_is_not_finite_or_its_gradient_stops_the_run(tmp_path, monkeypatch):
    run = tmp_path / "run"
    succeeded(train(run, SHORT, max_steps=3))
    path = run / "checkpoints/latest.pth"
    before = path.read_bytes()
    result = train(run, SHORT, "--resume", ABSURD)
    assert result.returncode == 1
    assert "not finite at step" in result.stderr
    assert "--learning_rate" in result.stderr
    norm = torch.tensor(float("nan"))
    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", lambda *arguments: norm)
    result = train(run, SHORT, "--resume")
    assert result.returncode == 1
    assert "not finite at step 4:" in result.stderr
    assert path.read_bytes() == before
    assert is_finite(latest(run)["model"])


def test_weights_that_are_not_finite_are_never_saved(pictures, tmp_path):
    """One step at such a rate makes them infinite, while the loss of that step is still good."""
    run = tmp_path / "run"
    result = train(run, SHORT, pictures, learning_rate=1e39, save_minutes=0)
    refused_line = result.stderr.splitlines()[-1]
    assert result.returncode == 1
    assert "not finite at step 1" in refused_line
    assert latest(run)["step"] == 0
    for weights in latest(run)["model"].values():
        assert weights.isfinite().all()
