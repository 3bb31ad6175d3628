"""Resuming: a run that is stopped, killed or changed goes on as if nothing had happened."""

import os
import random
import signal
import time
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
from helpers import (
    SHORT,
    begin_training,
    called,
    differing,
    everything,
    latest,
    metrics_rows,
    refused,
    succeeded,
    tiny,
    train,
    wait_for,
)

import train as train_module
from config import Config
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.cli import UserError
from utils.run_folder import RunFolder

# Stop and resume

RUN = {"dropout": 0.3, "max_steps": 40, "log_every": 3, "sample_every": 10, "save_every": 0}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, str]:
    """What a run leaves behind that nothing interrupts."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    succeeded(train(run_dir, RUN))
    return everything(run_dir)


@pytest.mark.parametrize("stops", [[1], [20], [39], [7, 8, 25]])
def test_resume_after_max_steps_is_bit_for_bit(stops, whole, tmp_path):
    for stop in [*stops, 40]:
        succeeded(train(tmp_path / "run", RUN, "--resume", max_steps=stop))
    assert differing(everything(tmp_path / "run"), whole) == []


@pytest.mark.parametrize("settings", [
    {"grad_accum": 2}, {"precision": "bf16"}, {"precision": "fp16"}])
def test_resume_is_bit_for_bit_with(settings, tmp_path):
    for name, stops in (("whole", [12]), ("parts", [5, 12])):
        for stop in stops:
            line = (RUN, "--resume", settings)
            succeeded(train(tmp_path / name, *line, max_steps=stop, log_every=2))
    assert differing(everything(tmp_path / "parts"), everything(tmp_path / "whole")) == []


def test_resume_in_the_middle_of_an_epoch(pictures, tmp_path):
    for name, stops in (("whole", [12]), ("parts", [4, 9, 12])):  # an epoch is 2.5 steps
        for stop in stops:
            succeeded(train(tmp_path / name, RUN, "--resume", pictures, max_steps=stop))
    assert differing(everything(tmp_path / "parts"), everything(tmp_path / "whole")) == []


def test_a_run_from_before_norm_groups_keeps_its_number(pictures, tmp_path):
    settings = {"dim": 8, "norm_groups": 8}  # the largest divisor of dim up to 32
    succeeded(train(tmp_path / "whole", RUN, settings, pictures, max_steps=6))
    succeeded(train(tmp_path / "parts", RUN, settings, pictures, max_steps=3))
    content = latest(tmp_path / "parts")
    del content["config"]["norm_groups"]
    save_checkpoint(content, tmp_path / "parts/checkpoints/latest.pth")
    succeeded(train(tmp_path / "parts", RUN, "--resume", pictures, max_steps=6))
    assert latest(tmp_path / "parts")["config"]["norm_groups"] == 8
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
        result = train(tmp_path / "run", RUN)
    assert result.returncode == status
    assert "stopped after 8 of 40 steps" in result.stdout
    assert "--resume" in result.stdout
    assert "Traceback" not in result.stderr
    assert latest(tmp_path / "run")["step"] == 8
    succeeded(train(tmp_path / "run", RUN, "--resume"))
    assert differing(everything(tmp_path / "run"), whole) == []


def test_a_second_signal_ends_at_once(pictures, tmp_path):
    settings = {"max_steps": 100_000, "sample_every": 3, "sample_steps": 30, "num_samples": 2000}
    process = begin_training(tmp_path / "run", RUN, settings, pictures)
    wait_for(tmp_path / "run/metrics.csv", process)  # drawing a long grid from now on
    process.send_signal(signal.SIGSTOP)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    out, _ = process.communicate(timeout=30)
    assert process.returncode in (130, 143)
    assert "stopped after" not in out
    assert latest(tmp_path / "run")["step"] == 0  # as it was saved at the start


# Killed: the networks are wide, so that writing them takes a good part of each step.

def survives(kills: int, root: Path, settings: dict) -> None:
    """Kill a run at random moments, so many times, resuming after each; then let it end.

    Not a bit differs from a run that nobody kills.
    """
    succeeded(train(root / "whole", RUN, settings))
    run_dir, rng = root / "run", random.Random(kills)
    path = run_dir / "checkpoints/latest.pth"

    def written() -> int:
        return path.stat().st_mtime_ns if path.exists() else 0

    for _ in range(kills):
        before = written()
        # Every step writes: most moments are in a write, or near one.
        process = begin_training(run_dir, RUN, "--resume", settings, save_minutes=0.0)
        end = time.monotonic() + 60
        while written() == before and process.poll() is None and time.monotonic() < end:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.15))
        assert process.poll() is None, "it finished, or failed, before it was killed"
        process.kill()
        process.communicate()
        torch.load(path, weights_only=True)  # loads, whatever the moment
    succeeded(train(run_dir, RUN, "--resume", settings))
    assert differing(everything(run_dir), everything(root / "whole")) == []
    assert not list(run_dir.rglob("*.tmp"))


def test_kill_9_three_times(pictures, tmp_path):
    survives(3, tmp_path, {**pictures, "dim": 32, "max_steps": 24})


@pytest.mark.slow
def test_kill_9_thirty_times(pictures, tmp_path):
    survives(30, tmp_path, {**pictures, "dim": 64, "max_steps": 400, "sample_every": 200})


def test_a_killed_grid_is_drawn_after_resuming(whole, tmp_path):
    succeeded(train(tmp_path / "run", RUN, max_steps=20))
    (tmp_path / "run/samples/sample_step_20.png").unlink()
    succeeded(train(tmp_path / "run", RUN, "--resume"))
    assert differing(everything(tmp_path / "run"), whole) == []


def test_a_finished_run_says_so(tmp_path):
    def written() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}

    succeeded(train(tmp_path / "run", RUN, max_steps=3))
    before = written()
    result = succeeded(train(tmp_path / "run", RUN, "--resume", max_steps=3))
    assert "already finished" in result.stdout
    assert written() == before


@pytest.mark.parametrize("damage", [
    lambda path, older: path.write_bytes(older), lambda path, older: path.write_bytes(b"half")])
def test_an_older_or_damaged_final_model_is_written_anew(damage, pictures, tmp_path):
    run = tmp_path / "run"
    final = run / "checkpoints/final_model.pth"
    succeeded(train(run, SHORT, pictures, max_steps=1))
    older = final.read_bytes()
    succeeded(train(run, SHORT, "--resume", pictures, max_steps=2))
    damage(final, older)
    result = succeeded(train(run, SHORT, "--resume", pictures, max_steps=2))
    assert "already finished" not in result.stdout
    assert load_checkpoint(final)["step"] == 2


# What may change on the way, and what not

def test_a_preset_said_again_changes_no_setting_of_the_run(tmp_path):
    run = ["--run_dir", "run", "--device", "cpu", "--precision", "fp32", "--num_samples", "1"]
    wide = ["--preset", "demo", "--dim", "8", "--max_steps", "1", "--sample_every", "0"]
    succeeded(called("train.py", *run, *wide, cwd=tmp_path))
    more = ["--preset", "demo", "--resume", "--max_steps", "2"]
    succeeded(called("train.py", *run, *more, cwd=tmp_path))
    content = latest(tmp_path / "run")
    assert content["step"] == 2
    assert content["config"]["dim"] == 8


OTHER_NETWORK_OR_DIFFUSION = {
    "image_size": 16,
    "channels": 1,
    "dim": 16,
    "dim_mults": (2, 2),
    "num_res_blocks": 2,
    "attn_resolutions": (8, 4),
    "norm_groups": 2,
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


def resumed(saved: Config, **given) -> Config:
    """What the settings of a run become by these flags."""
    run = RunFolder(Path("run"), tensorboard=False)
    run.is_new, run.saved_config = False, asdict(saved)
    return run.resumed_config(given)


@pytest.mark.parametrize("name", OTHER_NETWORK_OR_DIFFUSION)
def test_another_network_or_diffusion_is_refused(name):
    saved = tiny(attn_resolutions=(8,))
    value = OTHER_NETWORK_OR_DIFFUSION[name]
    given = {name: value}
    if name == "image_size":
        given["attn_resolutions"] = (8,)
    change = f"{name} {getattr(saved, name)} -> {value}"
    with pytest.raises(UserError, match="another network or diffusion") as error:
        resumed(saved, **given)
    assert change in str(error.value)


@pytest.mark.parametrize("name", OTHER_TRAINING)
def test_any_other_setting_is_taken_and_said(name, capsys):
    saved, value = tiny(), OTHER_TRAINING[name]
    config = resumed(saved, **{name: value})
    assert config == tiny(**{name: value, "run_dir": "run"})
    assert f"{name} {getattr(saved, name)} -> {value}" in capsys.readouterr().out


def test_the_size_of_the_images_is_what_is_refused():
    with pytest.raises(UserError, match="image_size 8 -> 16"):
        resumed(tiny(attn_resolutions=(4,)), image_size=16)


def test_epochs_that_are_asked_for_count(pictures, tmp_path):
    settings = {"max_steps": 3, "batch_size": 5}
    succeeded(train(tmp_path / "run", RUN, settings, pictures))
    line = ("--resume", "--run_dir", str(tmp_path / "run"), "--epochs", "4")
    result = succeeded(called("train.py", *line, cwd=tmp_path))
    assert "max_steps 3 -> 0" in result.stdout
    assert latest(tmp_path / "run")["step"] == 8  # of ten pictures


def test_a_run_goes_on_with_other_settings(tmp_path):
    settings = {"max_steps": 5, "sample_every": 0}
    succeeded(train(tmp_path / "run", RUN, settings))
    changes = {**OTHER_TRAINING, "data": "shapes", "device": "cpu"}
    result = succeeded(train(tmp_path / "run", RUN, "--resume", changes))
    assert "batch_size 4 -> 6" in result.stdout
    assert "max_steps 5 -> 9" in result.stdout
    assert latest(tmp_path / "run")["images_seen"] == 5 * 4 + 4 * 6
    assert [row[0] for row in metrics_rows(tmp_path / "run")] == ["3", "6", "7", "8", "9"]


def test_a_flag_that_fits_the_run_though_not_the_defaults(pictures, tmp_path):
    succeeded(train(tmp_path / "run", SHORT, pictures, batch_size=6, max_steps=1))
    line = ["--resume", "--run_dir", "run", "--grad_accum", "3", "--max_steps", "2"]
    succeeded(called("train.py", *line, cwd=tmp_path))
    assert latest(tmp_path / "run")["images_seen"] == 12


def test_the_script_refuses_another_network(tmp_path):
    succeeded(train(tmp_path / "run", RUN, max_steps=5))
    before = (tmp_path / "run/checkpoints/latest.pth").read_bytes()
    result = train(tmp_path / "run", RUN, "--resume", dim=16, timesteps=31)
    refused(result, 1, "dim 8 -> 16", "timesteps 30 -> 31")
    line = ("--resume", "--run_dir", str(tmp_path / "run"), "--grad_accum", "16")
    result = called("train.py", *line, cwd=tmp_path)  # possible alone, but not together
    refused(result, 1, "grad_accum=16", "batch_size=4")
    assert (tmp_path / "run/checkpoints/latest.pth").read_bytes() == before


def test_another_variance_changes_the_grids_and_no_weight(whole, tmp_path):
    succeeded(train(tmp_path / "run", RUN, max_steps=15, sample_steps=30))
    settings = {"variance": "fixed_small", "sample_steps": 30, "max_steps": 25}
    result = succeeded(train(tmp_path / "run", RUN, "--resume", settings))
    assert "variance fixed_large -> fixed_small" in result.stdout
    succeeded(train(tmp_path / "large", RUN, sample_steps=30, max_steps=25))
    changed = differing(everything(tmp_path / "run"), everything(tmp_path / "large"))
    assert changed == ["sample_step_20.png"]


# Progress is images seen


@pytest.mark.parametrize(("batch_size", "steps"), [(2, 15), (8, 8)])
def test_another_batch_size_trains_exactly_what_is_left(batch_size, steps, pictures, tmp_path):
    settings = {"epochs": 4, "save_every": 2, "log_every": 1, "sample_every": 0, **pictures}
    succeeded(train(tmp_path / "run", RUN, settings, max_steps=5))
    changes = {"max_steps": 0, "batch_size": batch_size}
    succeeded(train(tmp_path / "run", RUN, "--resume", settings, changes))
    state = latest(tmp_path / "run")
    assert state["step"] == steps
    assert 40 <= state["images_seen"] < 40 + batch_size  # 10 images, 4 epochs
    rows = metrics_rows(tmp_path / "run")
    assert [int(row[0]) for row in rows] == list(range(1, steps + 1))
    assert rows[-1][1] == "4"
    kept = {path.name for path in (tmp_path / "run/checkpoints").iterdir()}
    assert {"checkpoint_epoch_2.pth", "checkpoint_epoch_4.pth"} <= kept


@pytest.mark.parametrize(("setting", "said"), [
    ({"max_steps": 2}, "max_steps=2"), ({"max_steps": 0, "epochs": 1}, "epochs=1")])
def test_an_end_that_lies_behind_is_refused(setting, said, pictures, tmp_path):
    run = tmp_path / "run"
    succeeded(train(run, SHORT, pictures))
    before = (run / "checkpoints/latest.pth").read_bytes()
    result = train(run, SHORT, "--resume", pictures, setting)
    assert result.returncode == 1
    assert said in result.stderr
    assert "finished" not in result.stdout
    assert (run / "checkpoints/latest.pth").read_bytes() == before
