"""The scripts with tiny settings: what they write, and how they refuse bad input."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    ROOT,
    called,
    coloured_pictures,
    latest,
    metrics_rows,
    refused,
    script,
    succeeded,
    train,
)
from PIL import Image

from config import Config
from model import UNet
from utils.checkpoint import load_checkpoint, save_checkpoint


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
    result = succeeded(train(root / "run", start=script, **settings))
    return root / "run", result


# What train.py writes

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


def test_weights_have_the_names_of_the_network(finished):  # no module., no _orig_mod.
    state = latest(finished[0])
    names = UNet(Config(**state["config"])).state_dict().keys()
    assert state["ema"].keys() == names
    assert state["model"].keys() == names


def test_the_samples_of_a_run_come_from_its_ema_weights_and_one_noise(finished, tmp_path):
    """inference.py draws the last grid again: same seed, same steps."""
    run_dir, _ = finished
    pictures = run_dir.parent / "pictures"
    settings = {"data": pictures, "data_dir": tmp_path / "data", "sample_every": 10}
    succeeded(train(tmp_path / "again", max_steps=20, num_samples=5, **settings))
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


# Settings

@pytest.mark.parametrize("settings", [
    {"beta_schedule": "cosine", "channels": 1, "variance": "fixed_small"},
    {"batch_size": 6, "grad_accum": 3},
    {"precision": "bf16"},
    {"precision": "fp16"},
    {"batch_size": 1, "save_minutes": 0.0},
    {"sample_every": 0, "save_every": 0, "grad_clip": 0.0, "attn_resolutions": ()},
    {"horizontal_flip": False, "sample_steps": 30},
    {"sample_steps": 100},  # more than there are timesteps: the whole chain
])
def test_settings_that_run(settings, tmp_path):
    common = {"max_steps": 3, "log_every": 1, "sample_every": 2}
    succeeded(train(tmp_path / "run", **{**common, **settings}))
    assert len(metrics_rows(tmp_path / "run")) == 3


def test_a_single_image(tmp_path):  # fewer than a batch
    Image.new("RGB", (5, 5)).save(tmp_path / "one.png")
    succeeded(train(tmp_path / "run", data=tmp_path, epochs=8, log_every=1))
    assert [row[:2] for row in metrics_rows(tmp_path / "run")] == [["1", "4"], ["2", "8"]]


def test_the_same_settings_give_the_same_run_and_others_another(tmp_path):
    losses = {}
    for name, settings in {
        "first": {},
        "second": {},
        "seed": {"seed": 1},
        "flip": {"horizontal_flip": False},
        "warm-up": {"warmup_steps": 5},
    }.items():
        succeeded(train(tmp_path / name, max_steps=6, log_every=6, **settings))
        losses[name] = metrics_rows(tmp_path / name)[0][2]
    assert losses["first"] == losses["second"]
    assert len(set(losses.values())) == 4


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


# inference.py beside it

def test_inference_needs_the_checkpoint_alone(finished, tmp_path):
    path = finished[0] / "checkpoints/final_model.pth"
    line = ("--checkpoint", str(path), "--num_samples", "5", "--batch_size", "2")
    result = succeeded(script("inference.py", *line, cwd=tmp_path))
    assert "samples.png" in result.stdout
    assert "step 24" in result.stdout
    assert Image.open(tmp_path / "outputs/samples.png").size == (3 * 10 + 2, 2 * 10 + 2)


def test_inference_takes_the_newest_checkpoint_and_says_which(finished, tmp_path):
    line = ("--run_dir", str(finished[0]), "--num_samples", "1", "--steps", "2",
            "--output_dir", str(tmp_path / "deep/er"))
    result = succeeded(called("inference.py", *line, cwd=tmp_path))
    assert "final_model.pth" in result.stdout
    assert (tmp_path / "deep/er/samples.png").exists()


@pytest.mark.parametrize("name", ["latest", "checkpoint_epoch_2", "final_model"])
def test_inference_takes_any_checkpoint(name, finished, tmp_path):
    path = finished[0] / f"checkpoints/{name}.pth"
    line = ("--checkpoint", str(path), "--num_samples", "1", "--steps", "2")
    succeeded(called("inference.py", *line, cwd=tmp_path))


# Mistakes

@pytest.mark.parametrize(("arguments", "words"), [
    (["--wings", "2"], ["--wings"]),
    (["--preset", "huge"], ["huge", "paper", "demo"]),
    (["--dim", "x"], ["--dim"]),
    (["--dim", "7"], ["dim=7", "64"]),
    (["--image_size", "30"], ["image_size=30", "32"]),
    (["--attn_resolutions", "5"], ["attn_resolutions=(5,)", "[32, 16, 8, 4]"]),
    (["--beta_schedule", "sine"], ["sine", "cosine"]),
    (["--max", "5"], ["--max"]),  # no abbreviations
])
def test_a_wrong_command_line(arguments, words, tmp_path):
    refused(called("train.py", *arguments, cwd=tmp_path), 2, *words)
    assert not list(tmp_path.iterdir())


def test_no_such_folder(tmp_path):
    refused(train(tmp_path / "run", data=tmp_path / "nowhere"), 1, "nowhere")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(tmp_path):
    refused(train(tmp_path / "run", device="cuda"), 1, "cuda", "--device cpu")
    result = called("inference.py", "--device", "cuda", cwd=tmp_path)
    refused(result, 1, "cuda", "--device cpu")


def test_the_real_script_refuses_with_one_line_and_its_status(tmp_path):
    result = script("inference.py", "--checkpoint", "none.pth", cwd=tmp_path)
    refused(result, 1, "inference.py: error:", "none.pth")


def test_a_run_is_not_written_over(finished):
    run_dir, _ = finished
    before = (run_dir / "metrics.csv").read_bytes()
    refused(train(run_dir), 1, str(run_dir), "--resume")
    assert (run_dir / "metrics.csv").read_bytes() == before


# Bad checkpoints

class Evil:
    def __reduce__(self):
        return (print, ("this code ran",))


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5000])


def with_code(path: Path) -> None:
    torch.save({"config": {}, "step": 1, "ema": Evil()}, path)


def with_another_network(path: Path) -> None:
    content = load_checkpoint(path)
    content["config"]["dim"] = 16
    save_checkpoint(content, path)


def with_an_unknown_setting(path: Path) -> None:
    torch.save({"config": {"wings": 2}, "step": 1, "ema": {}}, path)


def with_a_config_that_is_none(path: Path) -> None:
    torch.save({"config": 5, "step": 1, "ema": {}}, path)


@pytest.mark.parametrize(("damage", "words"), [
    (Path.unlink, ["not exist"]),
    (lambda path: path.write_bytes(b""), ["truncated"]),
    (truncated, ["truncated"]),
    (lambda path: path.write_bytes(b"<html>not found</html>"), ["not a checkpoint"]),
    (lambda path: torch.save({"weights": 1}, path), ["not a checkpoint"]),
    (lambda path: torch.save([1, 2], path), ["not a checkpoint"]),
    (with_code, ["code"]),
    (with_another_network, ["another network"]),
    (with_an_unknown_setting, ["wings"]),
    (with_a_config_that_is_none, ["config"]),
])
def test_a_bad_checkpoint(damage, words, finished, tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes((finished[0] / "checkpoints/final_model.pth").read_bytes())
    damage(path)
    result = called("inference.py", "--checkpoint", str(path), cwd=tmp_path)
    refused(result, 1, "model.pth", *words)
    assert "this code ran" not in result.stdout


# Checkpoints of earlier versions

OLD_RUN = ROOT / "tests/data/latest_of_first_version.pth"  # stopped at step 7 of 12


def test_inference_takes_a_checkpoint_of_the_first_version(tmp_path):
    line = ("--checkpoint", str(OLD_RUN), "--num_samples", "2", "--npz", "x.npz")
    result = succeeded(called("inference.py", *line, cwd=tmp_path))
    assert "step 7" in result.stdout
    assert np.load(tmp_path / "x.npz")["arr_0"].std() > 10


def test_a_run_of_the_first_version_goes_on(tmp_path):
    checkpoints = tmp_path / "run/checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "latest.pth").write_bytes(OLD_RUN.read_bytes())
    line = ("--resume", "--run_dir", "run", "--max_steps", "12")
    result = succeeded(called("train.py", *line, cwd=tmp_path))
    assert "steps 7 to 12" in result.stdout
    state = latest(tmp_path / "run")
    assert (state["step"], state["images_seen"]) == (12, 48)
    # What that version wrote itself when it went on; its sums of steps 6 and 7 are in it.
    (row,) = metrics_rows(tmp_path / "run")
    expected = [10, 0, 0.959939, 0.946399, 0.950396, 1.00924, 0.879287, 0.0002, 0.521976]
    assert [float(value) for value in row] == pytest.approx(expected, rel=1e-3)


def test_attention_at_a_size_that_no_level_has_was_once_allowed(checkpoint, tmp_path):
    """And built nothing, so that such a checkpoint is that of the network without it."""
    content = load_checkpoint(checkpoint)
    content["config"]["attn_resolutions"] = (4, 16)
    save_checkpoint(content, tmp_path / "old.pth")
    samples = []
    for path in (checkpoint, tmp_path / "old.pth"):
        line = ("--checkpoint", str(path), "--num_samples", "2", "--npz", "x.npz")
        succeeded(called("inference.py", *line, cwd=tmp_path))
        samples.append(np.load(tmp_path / "x.npz")["arr_0"])
    assert np.array_equal(*samples)


def test_such_a_run_goes_on(tmp_path):
    succeeded(train(tmp_path / "run", max_steps=2))
    path = tmp_path / "run/checkpoints/latest.pth"
    content = load_checkpoint(path)
    content["config"]["attn_resolutions"] = (4, 16)
    save_checkpoint(content, path)
    line = ("--resume", "--run_dir", "run", "--max_steps", "3")
    succeeded(called("train.py", *line, cwd=tmp_path))
    assert latest(tmp_path / "run")["config"]["attn_resolutions"] == (4,)
