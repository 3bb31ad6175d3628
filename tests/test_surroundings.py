"""What surrounds a script: names that are no text, pipes among the files, torchrun's variables."""

import os
import signal
import subprocess
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
    variables = environment(**{**TORCHRUN, "RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "29512"})
    process = subprocess.Popen(
        [*python("train.py"), *command(tmp_path / "run")], cwd=tmp_path, env=variables,
        stderr=subprocess.PIPE, text=True)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=15)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert process.returncode == -signal.SIGINT
    assert "Traceback" not in err
