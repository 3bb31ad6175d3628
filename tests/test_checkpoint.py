"""utils/checkpoint.py: which files are refused, and how; which one is taken."""

import copy
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SHORT, called, latest, refused, succeeded, tiny, train

from config import Config
from train import TrainingState
from utils.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from utils.cli import UserError

# Files that are no checkpoint, or a bad one

class Evil:
    def __reduce__(self):
        return (print, ("this code ran",))


@pytest.mark.parametrize(("damage", "words"), [
    (Path.unlink, "not exist"),
    (lambda path: path.write_bytes(b""), "truncated"),
    (lambda path: path.write_bytes(path.read_bytes()[:-5000]), "truncated"),
    (lambda path: torch.save({"weights": 1}, path), "not a checkpoint"),
    (lambda path: torch.save([1, 2], path), "not a checkpoint"),
    (lambda path: torch.save({"config": {}, "step": 1, "ema": Evil()}, path), "code"),
    (lambda path: torch.save({"config": {"wings": 2}, "step": 1, "ema": {}}, path), "wings"),
    (lambda path: torch.save({"config": 5, "step": 1, "ema": {}}, path), "config"),
    (lambda path: torch.save({"config": vars(tiny()), "step": 1, "ema": {}}, path), "not fit"),
])
def test_a_bad_checkpoint(damage, words, checkpoint, tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(checkpoint.read_bytes())
    damage(path)
    result = called("inference.py", "--checkpoint", str(path), cwd=tmp_path)
    refused(result, 1, "model.pth", words)
    assert "this code ran" not in result.stdout


@pytest.mark.parametrize("content", [
    b"<!DOCTYPE html><html></html>", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
    b'{"error": "not found"}', b"hello", b"\x80\x04", b"PK\x03\x04 half a zip"])
def test_a_file_of_another_kind_is_called_that(content, tmp_path):
    (tmp_path / "model.pth").write_bytes(content)
    result = called("inference.py", "--checkpoint", "model.pth", cwd=tmp_path)
    refused(result, 1, "model.pth", "not a checkpoint")
    assert "run code" not in result.stderr


@pytest.mark.parametrize("script", ["train.py", "inference.py"])
def test_a_flipped_bit_is_found(script, state, tmp_path):
    path = tmp_path / "run/checkpoints/latest.pth"
    path.parent.mkdir(parents=True)
    torch.save(state, path)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        tensors = [member for member in archive.infolist() if "/data/" in member.filename]
    largest = max(tensors, key=lambda member: member.file_size)
    content[largest.header_offset + largest.file_size // 2] ^= 64
    path.write_bytes(content)
    line = {"train.py": ["--resume", "--run_dir", "run"], "inference.py": ["--run_dir", "run"]}
    refused(called(script, *line[script], cwd=tmp_path), 1, "latest.pth", "damaged")


# States that do not fit

@pytest.fixture(scope="module")
def state(tmp_path_factory) -> dict:
    """The content of a latest.pth."""
    run = tmp_path_factory.mktemp("states") / "run"
    succeeded(train(run, SHORT, sample_every=0))
    return latest(run)


def moments(content: dict) -> dict:
    """Return Adam's moments of one parameter."""
    return content["optimizer"]["state"][3]


TAMPERED = [
    lambda content: moments(content).clear(),
    # It would overrun the heap in the fused Adam; or copy_ would stretch it.
    lambda content: moments(content).update(exp_avg=torch.zeros(2)),
    lambda content: moments(content).update(exp_avg=torch.zeros(1)),
    lambda content: moments(content)["exp_avg"][0].fill_(torch.nan),
    lambda content: content["model"]["conv_in.weight"][0].fill_(torch.nan),
    lambda content: content["model"].pop("conv_in.weight"),
    lambda content: content["config"].update(image_size=torch.zeros(2)),
    lambda content: content.update(sums=content["sums"].to_sparse()),
    lambda content: content.update(optimizer=None),
    lambda content: content.update(optimizer={}),
    lambda content: content.update(sums=torch.zeros(1)),
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


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize("tamper", TAMPERED)
def test_a_state_that_does_not_fit_is_refused_in_one_line(tamper, state, tmp_path):
    content = copy.deepcopy(state)
    tamper(content)
    path = tmp_path / "run/checkpoints/latest.pth"
    path.parent.mkdir(parents=True)
    torch.save(content, path)
    before = path.read_bytes()
    line = ["--resume", "--run_dir", str(tmp_path / "run"), "--max_steps", "8"]
    refused(called("train.py", *line, cwd=tmp_path), 1, "latest.pth")
    assert path.read_bytes() == before


def test_moments_lie_in_memory_as_the_weights_do_in_another_precision(pictures, tmp_path):
    """The fused Adam relies on it, and bf16 on a CPU has another memory format than fp32."""
    run = tmp_path / "run"
    succeeded(train(run, SHORT, pictures, dim=16))
    content = latest(run)
    config = Config(**{**content["config"], "precision": "bf16"})
    state = TrainingState(config, torch.device("cpu"))
    state.load_state_dict(content)
    for index, p in enumerate(state.model.parameters()):
        saved = content["optimizer"]["state"][index]["exp_avg"]
        moment = state.optimizer.state[p]["exp_avg"]
        assert moment.stride() == p.stride()
        assert torch.equal(moment, saved)


# Which one is taken

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


def test_a_foreign_file_among_the_checkpoints_is_not_looked_at(state, tmp_path):
    folder = tmp_path / "run/checkpoints"
    folder.mkdir(parents=True)
    for name in ("._final_model.pth", "notes.pth", "checkpoint_epoch_x.pth", "latest.pth.bak"):
        (folder / name).write_bytes(b"macOS")
    with pytest.raises(UserError, match="no checkpoint"):
        newest_checkpoint(tmp_path / "run")
    succeeded(train(tmp_path / "run", max_steps=1))  # nor are they a run
    assert newest_checkpoint(tmp_path / "run").name == "final_model.pth"


def test_a_folder_whose_name_is_no_text(pictures, tmp_path):
    run = tmp_path / "mod\udce8les"
    settings = {"max_steps": 1, "sample_every": 0}
    succeeded(train(run, pictures, settings))
    assert newest_checkpoint(run).name == "final_model.pth"
    result = succeeded(train(run, pictures, settings, "--resume"))
    assert "already finished" in result.stdout


def test_attention_at_a_size_that_no_level_has_was_once_allowed(checkpoint, tmp_path):
    """It built nothing, so such a checkpoint is that of the network without it."""
    content = load_checkpoint(checkpoint)
    content["config"]["attn_resolutions"] = (4, 16)
    save_checkpoint(content, tmp_path / "old.pth")
    samples = []
    for path in (checkpoint, tmp_path / "old.pth"):
        line = ("--checkpoint", str(path), "--num_samples", "2", "--npz", "x.npz")
        succeeded(called("inference.py", *line, cwd=tmp_path))
        samples.append(np.load(tmp_path / "x.npz")["arr_0"])
    assert np.array_equal(*samples)
