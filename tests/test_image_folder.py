"""utils/image_folder.py: numbered PNGs that are filled up, and never mixed with others."""

import hashlib
import json
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    arrays,
    begin,
    called,
    coloured_pictures,
    infer,
    python,
    refused,
    save_network,
    succeeded,
    tiny,
    torchrun,
    wait_for,
)
from PIL import Image


def pngs(folder: Path) -> dict[str, str]:
    paths = folder.glob("*.png")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def save_images(checkpoint: Path, folder: Path) -> subprocess.CompletedProcess:
    line = ["--checkpoint", str(checkpoint), "--num_samples", "3", "--steps", "2",
            "--precision", "fp32"]
    return called("inference.py", *line, "--save_images", str(folder), cwd=folder.parent)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("count", "batch_size"), [(1, 1), (5, 2), (6, 3), (3, 64)])
def test_save_images_writes_exactly_as_many(count, batch_size, checkpoint, tmp_path):
    line = ("--num_samples", count, "--batch_size", batch_size, "--steps", 2)
    infer(checkpoint, tmp_path, "--save_images", "out", *line)
    assert sorted(pngs(tmp_path / "out")) == [f"{i:06}.png" for i in range(count)]
    expected = arrays(checkpoint, tmp_path, *line)
    for i in range(count):
        image = np.asarray(Image.open(tmp_path / f"out/{i:06}.png"))
        assert np.array_equal(image, expected[i])


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_save_images_of_one_pixel(channels, mode, tmp_path):
    one_pixel = {"image_size": 1, "dim_mults": (1,), "attn_resolutions": ()}
    path = save_network(tmp_path / "one_pixel.pth", tiny(channels=channels, **one_pixel))
    infer(path, tmp_path, "--save_images", "out", "--num_samples", 2, "--steps", 2)
    image = Image.open(tmp_path / "out/000000.png")
    assert (image.size, image.mode) == ((1, 1), mode)


def test_save_images_goes_on_with_the_missing_ones_and_with_half_ones(checkpoint, tmp_path):
    line = ("--save_images", "out", "--num_samples", 6, "--batch_size", 1, "--steps", 2)
    infer(checkpoint, tmp_path, *line)
    whole = pngs(tmp_path / "out")
    kept = tmp_path / "out/000003.png"
    written = kept.stat().st_mtime_ns
    (tmp_path / "out/000001.png").unlink()
    for number, size in ((0, 0), (5, 40)):
        path = tmp_path / f"out/{number:06}.png"
        path.write_bytes(path.read_bytes()[:size])
    infer(checkpoint, tmp_path, *line)
    assert pngs(tmp_path / "out") == whole
    assert kept.stat().st_mtime_ns == written


@pytest.mark.parametrize(("line", "words"), [
    (("--num_samples", "5", "--steps", "3"), ["out", "another folder"]),
    (("--num_samples", "5", "--steps", "2", "--seed", "1"), ["out", "another folder"]),
    (("--num_samples", "5", "--steps", "2", "--precision", "bf16"), ["out", "another folder"]),
    (("--num_samples", "2", "--steps", "2"), ["beyond num_samples=2"]),
])
def test_save_images_never_mixes_two_kinds(line, words, checkpoint, tmp_path):
    infer(checkpoint, tmp_path, "--save_images", "out", "--num_samples", 3, "--steps", 2)
    before = pngs(tmp_path / "out")
    base = ("--checkpoint", str(checkpoint), "--precision", "fp32", "--save_images", "out")
    refused(called("inference.py", *base, *line, cwd=tmp_path), 1, *words)
    assert pngs(tmp_path / "out") == before


def test_four_processes_write_the_same_files_as_one(checkpoint, tmp_path):
    line = ("--num_samples", 5, "--batch_size", 1, "--steps", 4, "--precision", "fp32")
    infer(checkpoint, tmp_path, *line, "--save_images", "one")
    shared = ("--checkpoint", checkpoint, *line, "--save_images", "four")
    process = begin(torchrun("inference.py", *shared, processes=4), tmp_path)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "share of process 0:" in err  # not all five
    assert len(pngs(tmp_path / "four")) == 5
    assert pngs(tmp_path / "one") == pngs(tmp_path / "four")


def test_stopped_while_saving_images(checkpoint, tmp_path):
    line = ["--checkpoint", str(checkpoint), "--save_images", "out", "--num_samples", "100000",
            "--batch_size", "2"]
    process = begin([*python("inference.py"), *line], tmp_path)
    wait_for(tmp_path / "out/000002.png", process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    for path in (tmp_path / "out").glob("*.png"):
        Image.open(path).load()
    assert json.loads((tmp_path / "out/sampled_with.json").read_text())["seed"] == 0


@pytest.mark.parametrize("change", ["weights", "config"])
def test_another_network_of_the_same_step_is_refused(change, checkpoint, tmp_path):
    succeeded(save_images(checkpoint, tmp_path / "out"))
    before = contents(tmp_path / "out")
    torch.manual_seed(2)
    config = tiny(image_size=16, attn_resolutions=(8,)) if change == "config" else tiny()
    other = save_network(tmp_path / "other.pth", config)
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
    assert record["precision"] == "fp32"
    assert len(record["network"]) == 16
