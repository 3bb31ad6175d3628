"""What surrounds a script: names that are no text, pipes among the files, torchrun's variables."""

import os
import signal
import socket
import subprocess
import time
import warnings
from pathlib import Path

import pytest
from helpers import (
    TORCHRUN,
    called,
    coloured_pictures,
    command,
    environment,
    python,
    refused,
    script,
    succeeded,
    train,
)
from PIL import Image

from utils.cli import warn

NOT_TEXT = os.fsdecode(b"caf\xe9")  # in Latin-1, as an old disk may have it


# Names of files

def test_a_folder_whose_name_is_no_text(tmp_path):
    data = {"data": coloured_pictures(tmp_path / NOT_TEXT), "data_dir": tmp_path / "data"}
    line = command(tmp_path / "run", **data, max_steps=2)
    result = succeeded(script("train.py", *line, env=environment(LC_ALL="C.UTF-8")))
    assert "caf\\udce9" in result.stdout
    assert succeeded(train(tmp_path / "run", "--resume", **data, max_steps=3))


def test_a_checkpoint_whose_name_is_no_text(tmp_path):
    result = script("inference.py", "--checkpoint", NOT_TEXT, cwd=tmp_path)
    refused(result, 1, "caf\\udce9 does not exist")


def test_a_folder_with_a_name_as_long_as_can_be(tmp_path):
    data = {"data": coloured_pictures(tmp_path / ("é" * 127)), "data_dir": tmp_path / "data"}
    succeeded(train(tmp_path / "run", **data, max_steps=2))


def test_a_mistake_with_a_line_break_in_it_is_one_line(tmp_path):
    refused(called("train.py", "--wings\ntwo", cwd=tmp_path), 2, "--wings two")


def test_a_warning_is_one_line(capfd):
    warn("two\nlines")
    assert capfd.readouterr().err == "warning: two lines\n"


def test_a_warning_of_a_library_is_one_line(tmp_path, monkeypatch):
    def load(*arguments, **options):
        warnings.warn("this is\ndeprecated", stacklevel=1)
        raise OSError

    monkeypatch.setattr("inference.load_network", load)
    result = called("inference.py", "--checkpoint", "x.pth", cwd=tmp_path)
    assert result.stderr.splitlines()[0] == "warning: this is deprecated"


def test_of_torchruns_processes_only_the_first_says_that_it_was_interrupted(
    tmp_path, monkeypatch
):
    def interrupted(*arguments) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("train.open_run", interrupted)
    monkeypatch.setattr("utils.cli.is_first_process", lambda: False)
    result = train(tmp_path / "run")
    assert (result.returncode, result.stderr) == (130, "")


# What is no file

@pytest.fixture
def pipe(tmp_path) -> Path:
    """Opening it would wait for somebody to write."""
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


def test_a_pipe_is_no_checkpoint(pipe, tmp_path):
    refused(called("inference.py", "--checkpoint", str(pipe), cwd=tmp_path), 1, "not a file")


def test_a_pipe_is_no_run_to_resume(tmp_path):
    latest = tmp_path / "run/checkpoints/latest.pth"
    latest.parent.mkdir(parents=True)
    os.mkfifo(latest)
    refused(train(tmp_path / "run", "--resume"), 1, "not a file")


def test_pipes_among_what_a_run_has_written(pictures, tmp_path):
    run_dir = tmp_path / "run"
    succeeded(train(run_dir, **pictures, max_steps=1))
    (cache,) = (tmp_path / "data").iterdir()
    for path in (cache, run_dir / "metrics.csv"):
        path.unlink(missing_ok=True)
        os.mkfifo(path)
    succeeded(train(run_dir, "--resume", **pictures, max_steps=2))


@pytest.mark.parametrize("name", ["pipe", "/dev/zero"])
def test_a_pipe_is_no_picture(name, pipe, checkpoint, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    line = ["--checkpoint", str(checkpoint), "--mode", "interpolate", "--images", "a.png", name]
    refused(called("inference.py", *line, cwd=tmp_path), 1, f"{name} is not a file")


# torchrun's variables

@pytest.mark.parametrize("name", TORCHRUN)
def test_some_of_torchruns_variables_are_no_torchrun(name, tmp_path, monkeypatch):
    """RANK=1, left from elsewhere, does not silence a script."""
    monkeypatch.setenv(name, "1")
    refused(train(tmp_path / "run", data="nowhere"), 1, "nowhere")
    refused(called("evaluate.py", "--metric", "bpd", cwd=tmp_path), 1, "no checkpoint")


@pytest.mark.parametrize(("name", "value"), [
    ("MASTER_PORT", "many"), ("WORLD_SIZE", "x"), ("RANK", "first")])
def test_variables_of_torchrun_that_make_no_sense(name, value, tmp_path, monkeypatch):
    for key, sensible in {**TORCHRUN, name: value}.items():
        monkeypatch.setenv(key, sensible)
    monkeypatch.setattr("utils.cli.time.sleep", lambda seconds: None)
    refused(train(tmp_path / "run"), 1, "torchrun", "MASTER_PORT")


def test_waiting_for_processes_that_never_come_can_be_interrupted(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as first_process:  # one that never answers
        port = first_process.getsockname()[1]
        variables = {**TORCHRUN, "RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": str(port)}
        process = subprocess.Popen(
            [*python("train.py"), *command(tmp_path / "run")], cwd=tmp_path,
            env=environment(**variables), stderr=subprocess.PIPE, text=True)
        first_process.settimeout(100)
        first_process.accept()
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    assert "Traceback" not in err
