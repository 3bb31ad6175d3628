"""utils/cli.py: --help, and mistakes that are answered in one line."""

import os
import re
from types import SimpleNamespace

import pytest
from helpers import ROOT, called, refused, script, succeeded

from config import Config
from utils.cli import brief, progress_bar, warn

# Streams of a notebook, or none

@pytest.mark.parametrize("stream", [None, SimpleNamespace(write=len, flush=lambda: None)])
def test_a_bar_and_a_warning_need_no_terminal(stream, monkeypatch):
    monkeypatch.setattr("sys.stderr", stream)
    warn("nobody reads this")
    assert list(progress_bar(range(3))) == [0, 1, 2]


# Help

@pytest.mark.parametrize("name", [
    "train.py", "inference.py", "evaluate.py", "tools.convert", "tools.bench"])
def test_help_fits_into_80_columns(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result = succeeded(called(name, "--help", cwd=ROOT))
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_help_shows_every_setting():
    result = succeeded(called("train.py", "--help", cwd=ROOT))
    for name in Config.__dataclass_fields__:
        assert re.search(rf"--{name}\b", result.stdout), name


def test_a_tool_runs_as_a_file_too(tmp_path):
    without = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    succeeded(script("tools/convert.py", "--help", cwd=tmp_path, env=without))


# One line

@pytest.mark.parametrize(("arguments", "words"), [
    (["--wings", "2"], ["--wings"]),
    (["--preset", "huge"], ["huge", "paper", "demo"]),
    (["--dim", "x"], ["--dim"]),
    (["--dim", "7"], ["dim=7", "64"]),
    (["--attn_resolutions", "5"], ["attn_resolutions=(5,)", "[32, 16, 8, 4]"]),
    (["--beta_schedule", "sine"], ["sine", "cosine"]),
    (["--max", "5"], ["--max"]),  # no abbreviations
])
def test_a_wrong_command_line(arguments, words, tmp_path):
    refused(called("train.py", *arguments, cwd=tmp_path), 2, *words)
    assert not list(tmp_path.iterdir())


def test_a_mistake_with_a_line_break_in_it_is_one_line(tmp_path):
    refused(called("train.py", "--wings\ntwo", cwd=tmp_path), 2, "--wings two")


def test_a_warning_is_one_line(capfd):
    warn("two\nlines")
    assert capfd.readouterr().err == "warning: two lines\n"


def test_the_real_script_refuses_with_one_line_and_its_status(tmp_path):
    result = script("inference.py", "--checkpoint", "none.pth", cwd=tmp_path)
    refused(result, 1, "inference.py: error:", "none.pth")


def test_what_is_cut_short_says_so():
    assert brief("a b") == "a b"
    assert brief("x" * 201) == "x" * 200 + " ..."
