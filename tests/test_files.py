"""utils/files.py: what cannot be written is said before the work, and nothing half-done is left."""

import errno
import io
import os
import resource
from contextlib import nullcontext

import pytest
from helpers import (
    SHORT,
    begin_training,
    called,
    coloured_pictures,
    differing,
    everything,
    refused,
    script,
    succeeded,
    train,
)

from utils.checkpoint import save_checkpoint


@pytest.mark.parametrize(("arguments", "said"), [
    (["--npz", "."], "Is a directory"),
    (["--npz", "kept.pth"], "Is a checkpoint"),
    (["--npz", "file/x.npz"], "file"),
    (["--output_dir", "file"], "file"), (["--save_images", "file/x"], "file"),
    (["--output_dir", "/proc/nowhere"], "/proc/nowhere")])
def test_what_cannot_be_written_is_said_before_the_work(arguments, said, checkpoint, tmp_path):
    for name in ("file", "kept.pth"):
        (tmp_path / name).write_text("")
    line = ["--checkpoint", str(checkpoint), "--num_samples", "1", *arguments]
    refused(called("inference.py", *line, cwd=tmp_path), 1, said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "kept.pth"]


def test_what_is_no_file_is_let_alone_and_a_link_stays_one(checkpoint, tmp_path):
    line = ["--checkpoint", str(checkpoint), "--num_samples", "1", "--npz"]
    os.mkfifo(tmp_path / "pipe")
    refused(called("inference.py", *line, "pipe", cwd=tmp_path), 1, "pipe: Is a device")
    assert not (tmp_path / "pipe").is_file()
    (tmp_path / "disk").mkdir()
    (tmp_path / "link.npz").symlink_to(tmp_path / "disk/x.npz")
    succeeded(called("inference.py", *line, "link.npz", cwd=tmp_path))
    assert (tmp_path / "link.npz").is_symlink()
    assert (tmp_path / "disk/x.npz").stat().st_size > 100


def test_the_reason_of_a_failed_save_is_told(tmp_path):
    class Full(io.BytesIO):
        def write(self, data: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr("utils.checkpoint.atomic_write", lambda path: nullcontext(Full()))
        save_checkpoint({"step": 1}, tmp_path / "x.pth")


@pytest.mark.parametrize("path", ["", ".", "file/x.json"])
def test_a_json_that_cannot_be_written_is_said_before_the_work(path, checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    line = ["--metric", "bpd", "--checkpoint", str(checkpoint), "--json", path]
    result = called("evaluate.py", *line, cwd=tmp_path)
    refused(result, 1, "error")
    assert result.stdout == ""


def test_a_full_disk_in_inference_is_one_line(checkpoint, tmp_path):
    """No file may grow beyond the limit, as on a full disk."""
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
    result = train(tmp_path / "run", pictures, data_dir=tmp_path / "broken/data")
    refused(result, 1, "broken")


def test_a_folder_with_a_name_as_long_as_can_be(tmp_path):
    data = {"data": coloured_pictures(tmp_path / ("é" * 127)), "data_dir": tmp_path / "data"}
    succeeded(train(tmp_path / "run", data, max_steps=2))


def test_two_runs_build_one_cache(tmp_path):
    pictures = coloured_pictures(tmp_path / "pictures", count=200, size=40)
    settings = {"data": pictures, "data_dir": tmp_path / "data", "max_steps": 3}
    processes = [begin_training(tmp_path / name, SHORT, settings) for name in ("a", "b")]
    for process in processes:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    assert differing(everything(tmp_path / "a"), everything(tmp_path / "b")) == []
    assert len(list((tmp_path / "data").iterdir())) == 1


def test_outputs_is_made_only_where_something_goes_there(checkpoint, tmp_path):
    base = ["--checkpoint", str(checkpoint), "--num_samples", "1", "--steps", "2"]
    succeeded(called("inference.py", *base, "--npz", "x.npz", cwd=tmp_path))
    succeeded(called("inference.py", *base, "--save_images", "out", cwd=tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "x.npz"]
