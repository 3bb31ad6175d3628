"""A state is checked whole before any of it is used, and none that is not good is ever written."""

import copy
import subprocess
import zipfile
from pathlib import Path

import helpers
import pytest
import torch
from helpers import called, command, latest, metrics_rows, refused, script, succeeded

from config import Config
from utils.checkpoint import TrainingState, load_checkpoint

SHORT = {"max_steps": 4, "log_every": 2, "sample_every": 0, "save_every": 0}


def train(run_dir: Path, *extra: str, **settings) -> subprocess.CompletedProcess:
    return helpers.train(run_dir, *extra, **{**SHORT, **settings})


@pytest.fixture(scope="module")
def state(tmp_path_factory) -> dict:
    """The content of a latest.pth after four steps."""
    run = tmp_path_factory.mktemp("states") / "run"
    succeeded(train(run))
    return latest(run)


# Progress is images seen

def test_another_batch_size_trains_exactly_what_is_left(pictures, tmp_path):
    run = tmp_path / "run"
    epochs = {"max_steps": 0, "epochs": 4}  # of ten pictures
    succeeded(train(run, **{**pictures, "max_steps": 5}))
    assert latest(run)["images_seen"] == 20
    result = succeeded(train(run, "--resume", batch_size=2, **epochs, **pictures))
    assert "batch_size 4 -> 2" in result.stdout
    assert latest(run)["step"] == 15
    assert latest(run)["images_seen"] == 40
    assert [row[:2] for row in metrics_rows(run)][-1] == ["14", "3"]


@pytest.mark.parametrize(("setting", "said"), [
    ({"max_steps": 2}, "max_steps=2"), ({"max_steps": 0, "epochs": 1}, "epochs=1")])
def test_an_end_that_lies_behind_is_refused(setting, said, pictures, tmp_path):
    run = tmp_path / "run"
    succeeded(train(run, **pictures))
    before = (run / "checkpoints/latest.pth").read_bytes()
    result = train(run, "--resume", **{**pictures, **setting})
    assert result.returncode == 1
    assert said in result.stderr
    assert "finished" not in result.stdout
    assert (run / "checkpoints/latest.pth").read_bytes() == before


# States that do not fit

def without_a_moment(content: dict) -> None:
    del content["optimizer"]["state"][5]


def with_a_short_moment(content: dict) -> None:  # which would overrun the heap in the fused Adam
    content["optimizer"]["state"][3]["exp_avg"] = torch.zeros(2)


def with_a_moment_of_another_type(content: dict) -> None:
    moments = content["optimizer"]["state"][3]
    moments["exp_avg_sq"] = moments["exp_avg_sq"].double()


def with_nan_weights(content: dict) -> None:
    content["model"]["conv_in.weight"][0] = torch.nan


def with_nan_moments(content: dict) -> None:
    content["optimizer"]["state"][3]["exp_avg"][0] = torch.nan


def with_a_missing_weight(content: dict) -> None:
    del content["model"]["conv_in.weight"]


TAMPERED = [
    without_a_moment, with_a_short_moment, with_a_moment_of_another_type, with_nan_weights,
    with_nan_moments, with_a_missing_weight,
    lambda content: content.update(optimizer=None),
    lambda content: content.update(optimizer={}),
    lambda content: content.update(sums=torch.zeros(3)),
    lambda content: content.update(sums=None),
    lambda content: content.update(step="x"),
    lambda content: content.update(step=-5),
    lambda content: content.update(step=2.5),
    lambda content: content.update(images_seen=-1),
    lambda content: content.update(ema=[1]),
    lambda content: content.update(config=None),
    lambda content: content["config"].update(dim=10**9),
    lambda content: content["config"].update(timesteps="many"),
]


@pytest.mark.parametrize("tamper", TAMPERED)
def test_a_state_that_does_not_fit_is_refused_in_one_line(tamper, state, tmp_path):
    content = copy.deepcopy(state)
    tamper(content)
    path = tmp_path / "run/checkpoints/latest.pth"
    path.parent.mkdir(parents=True)
    torch.save(content, path)
    before = path.read_bytes()
    line = ["--resume", "--run_dir", str(tmp_path / "run"), "--max_steps", "6"]
    refused(called("train.py", *line, cwd=tmp_path), 1, "latest.pth")
    assert path.read_bytes() == before


def as_a_sparse_tensor(content: dict) -> None:
    content["sums"] = content["sums"].to_sparse()


def without_the_length_of_the_chain(content: dict) -> None:
    del content["config"]["timesteps"]


def with_a_tensor_among_the_settings(content: dict) -> None:
    content["config"]["image_size"] = torch.zeros(2)


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize("tamper", [
    as_a_sparse_tensor, without_the_length_of_the_chain, with_a_tensor_among_the_settings])
def test_what_would_be_another_state_in_silence_is_refused(tamper, state, tmp_path):
    test_a_state_that_does_not_fit_is_refused_in_one_line(tamper, state, tmp_path)


def test_moments_lie_in_memory_as_the_weights_do_in_another_precision(pictures, tmp_path):
    """The fused Adam relies on it, and bf16 on a CPU has another memory format than fp32."""
    run = tmp_path / "run"
    succeeded(train(run, dim=16, **pictures))
    content = latest(run)
    config = Config(**{**content["config"], "precision": "bf16"})
    state = TrainingState(config, torch.device("cpu"), "bf16")
    state.load_state_dict(content, run)
    for index, p in enumerate(state.model.parameters()):
        saved = content["optimizer"]["state"][index]["exp_avg"]
        moment = state.optimizer.state[p]["exp_avg"]
        assert moment.stride() == p.stride()
        assert torch.equal(moment, saved)


@pytest.mark.parametrize("script", ["train.py", "inference.py"])
def test_a_flipped_bit_is_found(script, state, tmp_path):
    path = tmp_path / "run/checkpoints/latest.pth"
    path.parent.mkdir(parents=True)
    torch.save(state, path)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
    content[largest.header_offset + largest.file_size // 2] ^= 64  # in the middle of a tensor
    path.write_bytes(content)
    line = {"train.py": ["--resume", "--run_dir", "run"], "inference.py": ["--run_dir", "run"]}
    refused(called(script, *line[script], cwd=tmp_path), 1, "latest.pth", "damaged")


def test_a_run_that_went_on_while_it_was_read_is_not_set_back(pictures, tmp_path, monkeypatch):
    run = tmp_path / "run"
    succeeded(train(run, **{**pictures, "max_steps": 2}))
    stale = latest(run)
    succeeded(train(run, "--resume", **pictures))
    monkeypatch.setattr("train.open_run", lambda run_dir, resume: stale)
    refused(train(run, "--resume", **{**pictures, "max_steps": 6}), 1, "another process")
    assert latest(run)["step"] == 4


def test_a_flag_that_fits_the_run_though_not_the_defaults(pictures, tmp_path):
    succeeded(train(tmp_path / "run", **{**pictures, "batch_size": 6, "max_steps": 1}))
    line = ["--resume", "--run_dir", "run", "--grad_accum", "3", "--max_steps", "2"]
    succeeded(called("train.py", *line, cwd=tmp_path))
    assert latest(tmp_path / "run")["images_seen"] == 12


# Numbers that are not finite

def test_weights_that_are_not_finite_are_never_saved(pictures, tmp_path):
    """One step at such a rate makes them infinite, while the loss of that step is still good."""
    run = tmp_path / "run"
    result = train(run, learning_rate=1e39, save_minutes=0, **pictures)
    refused_line = result.stderr.splitlines()[-1]
    assert result.returncode == 1
    assert "not finite at step 1" in refused_line
    assert latest(run)["step"] == 0
    for weights in latest(run)["model"].values():
        assert weights.isfinite().all()


@pytest.mark.parametrize("mode", ["sample", "process"])
def test_sampling_from_weights_that_are_not_finite_is_refused(mode, state, tmp_path):
    content = {"config": state["config"], "step": 4, "ema": copy.deepcopy(state["ema"])}
    content["ema"]["conv_in.weight"][0] = torch.inf
    torch.save(content, tmp_path / "model.pth")
    line = ["--checkpoint", "model.pth", "--mode", mode]
    refused(called("inference.py", *line, cwd=tmp_path), 1, "model.pth", "not finite")


# What is said to be written is there

@pytest.mark.parametrize("damage", [
    lambda path, older: path.write_bytes(older), lambda path, older: path.write_bytes(b"half")])
def test_an_older_or_damaged_final_model_is_written_anew(damage, pictures, tmp_path):
    run = tmp_path / "run"
    final = run / "checkpoints/final_model.pth"
    succeeded(train(run, **{**pictures, "max_steps": 1}))
    older = final.read_bytes()
    succeeded(train(run, "--resume", **{**pictures, "max_steps": 2}))
    damage(final, older)
    result = succeeded(train(run, "--resume", **{**pictures, "max_steps": 2}))
    assert "already finished" not in result.stdout
    assert load_checkpoint(final)["step"] == 2


def test_grids_become_training_data_with_a_warning_alone(pictures, tmp_path):
    inside = pictures["data"] / "run"
    result = succeeded(train(inside, **{**pictures, "max_steps": 1, "sample_every": 1}))
    assert "will be among the images" in result.stderr
    of_its_grids = {**pictures, "data": inside / "samples", "max_steps": 2}
    result = succeeded(train(inside, "--resume", **of_its_grids))
    assert "will be among the images" in result.stderr
    result = succeeded(train(tmp_path / "run", **{**pictures, "max_steps": 1}))
    assert "will be among the images" not in result.stderr


def test_a_final_model_that_could_not_be_written_is_not_claimed(pictures, tmp_path):
    run = tmp_path / "run"
    succeeded(train(run, **{**pictures, "max_steps": 2}))
    (run / "checkpoints/final_model.pth").unlink()
    (run / "checkpoints/final_model.pth").mkdir()
    result = train(run, "--resume", **pictures)
    assert result.returncode == 1
    assert "final_model.pth could not be written" in result.stdout


def test_a_kept_checkpoint_that_failed_does_not_spoil_the_status(pictures, tmp_path):
    run = tmp_path / "run"
    succeeded(train(run, **{**pictures, "max_steps": 1}))
    (run / "checkpoints/checkpoint_epoch_1.pth").mkdir()
    settings = {"max_steps": 0, "epochs": 2, "save_every": 1, **pictures}
    result = succeeded(train(run, "--resume", **settings))
    assert "checkpoint_epoch_1.pth could not be written" in result.stderr
    assert (run / "checkpoints/checkpoint_epoch_2.pth").is_file()


# Disks, outside of train.py

@pytest.mark.parametrize(("arguments", "said"), [
    (["--npz", "."], "Is a directory"),
    (["--npz", "/dev/null"], "Not a file"), (["--npz", "kept.pth"], "Is a checkpoint"),
    (["--npz", "file/x.npz"], "file"),
    (["--output_dir", "file"], "file"), (["--save_images", "file/x"], "file"),
    (["--output_dir", "/proc/nowhere"], "/proc/nowhere")])
def test_what_cannot_be_written_is_said_before_the_work(arguments, said, checkpoint, tmp_path):
    for name in ("file", "kept.pth"):
        (tmp_path / name).write_text("")
    line = ["--checkpoint", str(checkpoint), "--num_samples", "1", *arguments]
    refused(called("inference.py", *line, cwd=tmp_path), 1, said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "kept.pth"]


@pytest.mark.parametrize("path", ["", ".", "file/x.json"])
def test_a_json_that_cannot_be_written_is_said_before_the_work(path, checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    line = ["--metric", "bpd", "--checkpoint", str(checkpoint), "--json", path]
    result = called("evaluate.py", *line, cwd=tmp_path)
    refused(result, 1, "error")
    assert result.stdout == ""


def test_a_full_disk_in_inference_is_one_line(checkpoint, tmp_path):
    """No file may grow beyond the limit, as on a full disk."""
    import resource

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    line = ["--checkpoint", str(checkpoint), "--num_samples", "2", "--steps", "2"]
    result = script("inference.py", *line, cwd=tmp_path, preexec_fn=limit)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "error: outputs/samples.png: File too large" in result.stderr.splitlines()[-1]
    assert not list((tmp_path / "outputs").iterdir())


@pytest.mark.parametrize("make", [
    lambda path: path.write_text(""), lambda path: path.symlink_to("nowhere"),
    lambda path: path.symlink_to("/proc/nowhere/else")])
def test_a_data_dir_that_cannot_be_made_is_one_line(make, pictures, tmp_path):
    make(tmp_path / "broken")
    result = train(tmp_path / "run", **{**pictures, "data_dir": tmp_path / "broken/data"})
    refused(result, 1, "broken")


# The newest checkpoint

def test_the_newest_checkpoint_goes_by_its_step_not_its_date(state, tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    small = {"config": state["config"], "ema": state["ema"]}
    for name, step in (("final_model", 8), ("latest", 8), ("checkpoint_epoch_3", 6)):
        torch.save({**small, "step": step}, folder / f"{name}.pth")
    (folder / "link.pth").symlink_to("nowhere")
    line = ["--num_samples", "1", "--steps", "2"]
    result = succeeded(called("inference.py", *line, cwd=tmp_path))
    assert "final_model.pth: step 8" in result.stdout
    torch.save({**small, "step": 9}, folder / "latest.pth")
    torch.save({**small, "step": 6}, folder / "checkpoint_epoch_3.pth")  # the youngest file
    result = succeeded(called("inference.py", *line, cwd=tmp_path))
    assert "latest.pth: step 9" in result.stdout


# Checkpoints that are none

@pytest.mark.parametrize("content", [
    b"<!DOCTYPE html><html></html>", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
    b'{"error": "not found"}', b"hello", b"\x80\x04", b"PK\x03\x04 half a zip"])
def test_a_file_of_another_kind_is_called_that(content, tmp_path):
    (tmp_path / "model.pth").write_bytes(content)
    result = called("inference.py", "--checkpoint", "model.pth", cwd=tmp_path)
    refused(result, 1, "model.pth", "not a checkpoint")
    assert "run code" not in result.stderr


# Presets and resuming

def test_a_preset_said_again_changes_no_setting_of_the_run(tmp_path):
    run = ["--run_dir", "run", "--device", "cpu", "--precision", "fp32", "--num_samples", "1"]
    wide = ["--preset", "demo", "--dim", "8", "--max_steps", "1", "--sample_every", "0"]
    succeeded(called("train.py", *run, *wide, cwd=tmp_path))
    more = ["--preset", "demo", "--resume", "--max_steps", "2"]
    succeeded(called("train.py", *run, *more, cwd=tmp_path))
    content = latest(tmp_path / "run")
    assert content["step"] == 2
    assert content["config"]["dim"] == 8


@pytest.mark.parametrize(("settings", "name"), [
    ({"beta_start": 1e-17}, "beta_start"), ({"image_size": 10_000_000}, "image_size"),
    ({"dim": 10**9}, "dim")])
def test_values_that_no_machine_can_use(settings, name):
    with pytest.raises(ValueError, match=name):
        Config(**settings)


def test_other_memory_errors_keep_their_traceback(monkeypatch, tmp_path):
    def broken(*_, **__):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("train.load_images", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        called("train.py", *command(tmp_path / "run"), cwd=tmp_path)
