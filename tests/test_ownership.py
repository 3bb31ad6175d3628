"""Whose file is it?  Only what this project made is removed, counted or gone on with."""

import json
import os
import subprocess
import time
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
    random_unet,
    refused,
    succeeded,
    tiny,
    wait_for,
)
from PIL import Image

from utils.checkpoint import save_checkpoint

SHORT = {"max_steps": 6, "log_every": 2, "sample_every": 2, "save_every": 0}


def train(run_dir: Path, *extra: str, **settings) -> subprocess.CompletedProcess:
    return helpers.train(run_dir, *extra, **{**SHORT, **settings})


# Temporary files

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
    succeeded(train(run, **pictures))
    assert not any(path.exists() for path in ours)
    assert all(path.exists() for path in theirs)
    assert (run / "checkpoints/folder.tmp").is_dir()


# metrics.csv

def as_a_spreadsheet(text: str) -> bytes:
    return b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode()


@pytest.mark.parametrize("edit", [
    as_a_spreadsheet,
    lambda text: text.replace("\n", "\r\n").encode(),
    lambda text: text.rstrip("\n").encode(),
])
def test_metrics_survive_an_editor(edit, pictures, tmp_path):
    succeeded(train(tmp_path / "whole", **pictures))
    succeeded(train(tmp_path / "run", **{**pictures, "max_steps": 4}))
    path = tmp_path / "run/metrics.csv"
    path.write_bytes(edit(path.read_text()))
    succeeded(train(tmp_path / "run", "--resume", **pictures))
    assert metrics_rows(tmp_path / "run") == metrics_rows(tmp_path / "whole")
    assert path.read_text().startswith("step,epoch,loss,")


def in_another_encoding(lines: list[str]) -> bytes:
    return "\n".join(lines).encode("utf-16")


def with_another_column(lines: list[str]) -> bytes:
    return "\n".join(f"{line},note" for line in lines).encode()


def without_the_last_column(lines: list[str]) -> bytes:
    return "\n".join(line.rpartition(",")[0] for line in lines).encode()


def with_empty_columns(lines: list[str]) -> bytes:
    return "\n".join([lines[0], *(f"{line},," for line in lines[1:])]).encode()


def with_a_raised_number(lines: list[str]) -> bytes:
    return "\n".join([*lines[:-1], lines[-1].replace("4", "\N{SUPERSCRIPT TWO}", 1)]).encode()


def with_a_note(lines: list[str]) -> bytes:
    return "\n".join([*lines[:2], "here I lowered the rate", *lines[2:]]).encode()


@pytest.mark.parametrize("change", [
    in_another_encoding, with_another_column, without_the_last_column, with_empty_columns,
    with_a_raised_number, with_a_note])
def test_metrics_that_were_changed_are_refused_not_lost(change, pictures, tmp_path):
    succeeded(train(tmp_path / "run", **{**pictures, "max_steps": 4}))
    path = tmp_path / "run/metrics.csv"
    content = change(path.read_text().splitlines())
    path.write_bytes(content)
    refused(train(tmp_path / "run", "--resume", **pictures), 1, "metrics.csv", "move the file away")
    assert path.read_bytes() == content


def test_metrics_removed_during_the_run_come_back_whole(pictures, tmp_path):
    run = tmp_path / "run"
    settings = {**SHORT, "max_steps": 60, "sample_every": 0, **pictures}
    process = begin([*python("train.py"), *command(run, **settings)], tmp_path)
    wait_for(run / "metrics.csv", process)
    (run / "metrics.csv").unlink()
    assert process.wait(timeout=60) == 0
    assert [row[0] for row in metrics_rows(run)] == [str(step) for step in range(2, 61, 2)]


@pytest.mark.parametrize("extra", [[], ["--resume"]])
def test_a_foreign_metrics_csv_is_not_cut(extra, pictures, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.csv").write_text("step,loss\n900,0.1\n")
    refused(train(run, *extra, **pictures), 1, "metrics.csv")
    assert (run / "metrics.csv").read_text() == "step,loss\n900,0.1\n"


# A run_dir

def test_a_new_run_draws_its_own_grids(pictures, tmp_path):
    run = tmp_path / "run"
    (run / "samples").mkdir(parents=True)
    (run / "samples/sample_step_4.png").write_bytes(b"of another run")
    succeeded(train(run, **pictures))
    assert Image.open(run / "samples/sample_step_4.png").format == "PNG"


def test_a_second_training_in_the_same_run_dir_is_refused(pictures, tmp_path):
    run = tmp_path / "run"
    settings = {**SHORT, "max_steps": 100_000, "sample_every": 0, **pictures}
    process = begin([*python("train.py"), *command(run, **settings)], tmp_path)
    wait_for(run / "metrics.csv", process)
    refused(train(run, "--resume", **pictures), 1, "another process")
    process.kill()
    process.wait()
    before = latest(run)["step"]
    succeeded(train(run, "--resume", **pictures))  # the lock died with its process
    assert latest(run)["step"] == 6 >= before


def test_a_run_killed_before_its_first_save_is_started_again(pictures, tmp_path):
    run = tmp_path / "run"
    settings = {**SHORT, "max_steps": 100_000, "sample_every": 0, **pictures}
    process = begin([*python("train.py"), *command(run, **settings)], tmp_path)
    wait_for(run / "metrics.csv", process)
    process.kill()
    process.wait()
    succeeded(train(run, "--resume", **pictures))
    succeeded(train(tmp_path / "whole", **pictures))
    assert differing(everything(run), everything(tmp_path / "whole")) == []


def test_outputs_is_made_only_where_something_goes_there(checkpoint, tmp_path):
    base = ["--checkpoint", str(checkpoint), "--num_samples", "1", "--steps", "2"]
    succeeded(called("inference.py", *base, "--npz", "x.npz", cwd=tmp_path))
    succeeded(called("inference.py", *base, "--save_images", "out", cwd=tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "x.npz"]


# --save_images

def save_images(checkpoint: Path, folder: Path) -> subprocess.CompletedProcess:
    line = ["--checkpoint", str(checkpoint), "--num_samples", "3", "--steps", "2"]
    return called("inference.py", *line, "--save_images", str(folder), cwd=folder.parent)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("change", ["weights", "config"])
def test_another_network_of_the_same_step_is_refused(change, checkpoint, tmp_path):
    succeeded(save_images(checkpoint, tmp_path / "out"))
    before = contents(tmp_path / "out")
    torch.manual_seed(2)
    config = tiny(image_size=16, attn_resolutions=(8,)) if change == "config" else tiny()
    other = tmp_path / "other.pth"
    weights = random_unet(config).state_dict()
    save_checkpoint({"config": vars(config), "step": 7, "ema": weights}, other)
    refused(save_images(other, tmp_path / "out"), 1, "out", "choose another folder")
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("name", ["000001.png", "2024-01-01.png", "7.png"])
def test_a_folder_of_other_pictures_is_refused_untouched(name, checkpoint, tmp_path):
    coloured_pictures(tmp_path / "out", 1)
    (tmp_path / "out/000.png").rename(tmp_path / "out" / name)
    before = contents(tmp_path / "out")
    refused(save_images(checkpoint, tmp_path / "out"), 1, name, "choose another folder")
    assert contents(tmp_path / "out") == before


def test_a_picture_of_another_name_beside_ours_is_let_alone(checkpoint, tmp_path):
    succeeded(save_images(checkpoint, tmp_path / "out"))
    Image.new("RGB", (8, 8)).save(tmp_path / "out/2024-01-01.png")
    succeeded(save_images(checkpoint, tmp_path / "out"))


def test_half_a_picture_is_drawn_again(checkpoint, tmp_path):
    succeeded(save_images(checkpoint, tmp_path / "out"))
    before = contents(tmp_path / "out")
    for name, size in (("000000.png", 0), ("000001.png", 40)):
        (tmp_path / "out" / name).write_bytes(before[name][:size])
    succeeded(save_images(checkpoint, tmp_path / "out"))
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("record", ["", "{", "[1]", "\xff", "[" * 100_000])
def test_a_damaged_record_is_one_line(record, checkpoint, tmp_path):
    succeeded(save_images(checkpoint, tmp_path / "out"))
    (tmp_path / "out/sampled_with.json").write_bytes(record.encode("latin-1"))
    refused(save_images(checkpoint, tmp_path / "out"), 1, "out", "choose another folder")


def test_the_record_says_what_made_the_images(checkpoint, tmp_path):
    succeeded(save_images(checkpoint, tmp_path / "out"))
    record = json.loads((tmp_path / "out/sampled_with.json").read_text())
    assert record["sampler"] == "order 2, eta 1, quadratic spacing, 2 of 30 steps"
    assert record["seed"] == 0
    assert len(record["network"]) == 16
