"""inference.py: every mode, few steps, the same picture every time."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import arrays, called, infer, refused, save_network, succeeded, tiny
from PIL import Image

import inference
from ddpm import DDPM
from inference import slerp
from model import UNet
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.sampler import Sampler

# The same picture every time

@pytest.mark.parametrize("arguments", [
    ("--num_samples", 9, "--batch_size", 1),
    ("--num_samples", 9, "--batch_size", 7),
    ("--num_samples", 4),
])
def test_a_picture_depends_on_seed_and_index_alone(arguments, checkpoint, tmp_path):
    reference = arrays(checkpoint, tmp_path, "--num_samples", 9)
    assert reference.shape == (9, 8, 8, 3)
    assert len({image.tobytes() for image in reference}) == 9
    images = arrays(checkpoint, tmp_path, *arguments)
    assert abs(images - reference[:len(images)]).max() <= 1


# --steps

def test_each_flag_of_the_sampler_changes_the_picture(checkpoint, tmp_path):
    pictures = set()
    for line in ((), ("--steps", 10), ("--steps", 10, "--eta", 1), ("--eta", 0),
                 ("--steps", 10, "--eta", 0), ("--steps", 10, "--spacing", "uniform"),
                 ("--steps", 10, "--order", 1)):
        images = arrays(checkpoint, tmp_path, "--num_samples", 2, *line)
        pictures.add(images.tobytes())
    assert len(pictures) == 6
    whole_chain = arrays(checkpoint, tmp_path, "--num_samples", 2, "--steps", 30)
    assert whole_chain.tobytes() in pictures


def test_a_network_that_overflows_in_16_bits_is_refused(checkpoint, tmp_path):
    content = load_checkpoint(checkpoint)
    content["ema"]["down.0.conv1.weight"] *= 1e6  # fp16 ends at 65504
    save_checkpoint(content, tmp_path / "large.pth")
    line = ["--checkpoint", "large.pth", "--steps", "2", "--precision"]
    succeeded(called("inference.py", *line, "fp32", cwd=tmp_path))
    result = called("inference.py", *line, "fp16", cwd=tmp_path)
    assert result.returncode == 1
    assert "overflows in fp16: use --precision fp32" in result.stderr


# --mode process

@pytest.mark.parametrize(("steps", "columns"), [(30, 11), (3, 4)])
def test_process(steps, columns, checkpoint, tmp_path):
    line = ("--mode", "process", "--num_samples", 3, "--steps", steps)
    result = infer(checkpoint, tmp_path, *line)
    rows, cell = 6, 10
    picture = Image.open(tmp_path / "outputs/process.png")
    assert picture.size == ((columns * cell + 2) * 5, (rows * cell + 2) * 5 + 14)
    with Image.open(tmp_path / "outputs/process.gif") as gif:
        assert gif.n_frames == columns
    assert "process.png" in result.stdout
    assert "process.gif" in result.stdout


def test_process_ends_with_the_sample(checkpoint, tmp_path):
    infer(checkpoint, tmp_path, "--mode", "process", "--num_samples", 1)
    row = frames(tmp_path / "outputs/process.png", 11)
    sample = arrays(checkpoint, tmp_path, "--num_samples", 1)[0]
    assert abs(row[-1] - sample).max() <= 1


@pytest.mark.parametrize("line", [
    ("process",), ("process", "--steps", 10), ("interpolate",), ("interpolate", "--steps", 10),
    ("interpolate", "--images", "a.png", "b.png", "--t", 5, 20)])
def test_images_by_batches_are_the_same_images(
    line, two_pictures, checkpoint, tmp_path, monkeypatch
):
    def noted(model, x_t, t):
        sizes.append(len(x_t))
        return forward(model, x_t, t)

    forward, sizes, pictures = UNet.forward, [], []
    monkeypatch.setattr(UNet, "forward", noted)
    for batch_size in (64, 2):
        sizes.clear()
        infer(checkpoint, tmp_path, "--mode", *line, "--num_samples", 5, "--batch_size", batch_size)
        (path,) = (tmp_path / "outputs").glob("*.png")
        pictures.append(np.asarray(Image.open(path)).astype(int))
        assert set(sizes) == ({5} if batch_size == 64 else {2, 1})
    assert abs(pictures[0] - pictures[1]).max() <= 1  # the last batch rounds in its own way


# --mode interpolate

def frames(path: Path, count: int) -> np.ndarray:
    """The images of the first row of a table, [count, 8, 8, 3]."""
    zoom, cell = 5, 10
    picture = np.asarray(Image.open(path)).astype(int)[14::zoom, ::zoom]
    images = [picture[2:cell, 2 + i * cell:(i + 1) * cell] for i in range(count)]
    return np.stack(images)


@pytest.mark.parametrize("sampler", [(), ("--steps", 10), ("--steps", 10, "--eta", 1)])
def test_interpolation_between_two_seeds(sampler, checkpoint, tmp_path):
    infer(checkpoint, tmp_path, "--mode", "interpolate", "--seeds", 3, 8, *sampler)
    path = frames(tmp_path / "outputs/interpolation.png", 9)
    for seed, end in ((3, path[0]), (8, path[-1])):  # the plain samples of their seeds
        line = ("--num_samples", 1, "--seed", seed, *sampler)
        assert abs(arrays(checkpoint, tmp_path, *line)[0] - end).max() <= 1
    near = abs(np.diff(path, axis=0)).mean(axis=(1, 2, 3))
    assert near.max() < abs(path[0] - path[-1]).mean()


def test_the_film_of_an_interpolation_rests_at_its_end(checkpoint, tmp_path):
    infer(checkpoint, tmp_path, "--mode", "interpolate", "--num_samples", 3, "--steps", 2)
    frames, durations = [], []
    with Image.open(tmp_path / "outputs/interpolation.gif") as gif:
        for frame in range(gif.n_frames):
            gif.seek(frame)
            frames.append(np.asarray(gif.convert("RGB")))
            durations.append(gif.info["duration"])
    assert durations == [150, 150, 150, 150, 750]
    assert np.array_equal(frames[0], frames[-1])


def test_interpolation_of_a_seed_with_itself(checkpoint, tmp_path):
    infer(checkpoint, tmp_path, "--mode", "interpolate", "--seeds", 3, 3)
    path = frames(tmp_path / "outputs/interpolation.png", 9)
    sample = arrays(checkpoint, tmp_path, "--num_samples", 1, "--seed", 3)
    assert sample.max() > 0
    assert abs(path - sample).max() <= 1


def fractions(count: int) -> torch.Tensor:
    return torch.linspace(0, 1, count).view(-1, 1, 1, 1)


def test_slerp_keeps_the_deviation_of_noise():  # mixed linearly, it is 0.707 in the middle
    a, b = torch.randn(1, 3, 64, 64), torch.randn(1, 3, 64, 64)
    mixed = slerp(a, b, fractions(5))
    assert torch.equal(mixed[:1], a)
    assert torch.equal(mixed[-1:], b)
    assert (mixed.std(dim=(1, 2, 3)) - 1).abs().max() < 0.02


@pytest.mark.parametrize("off", [0.0, 1e-6, 1e-4, 1e-2])
def test_slerp_of_what_is_nearly_equal(off):
    a = torch.randn(1, 3, 64, 64)
    b = a + off * torch.randn(1, 3, 64, 64)
    mixed = slerp(a, b, fractions(5))
    expected = torch.lerp(a, b, fractions(5))
    torch.testing.assert_close(mixed, expected, atol=1e-3, rtol=0)


@pytest.fixture
def two_pictures(tmp_path) -> tuple[str, str]:
    """One of the network's size, one of another."""
    Image.new("RGB", (8, 8), (250, 10, 10)).save(tmp_path / "a.png")
    Image.new("RGB", (30, 20), (10, 10, 250)).save(tmp_path / "b.png")
    return ("a.png", "b.png")


def test_interpolation_between_two_images(two_pictures, checkpoint, tmp_path):
    line = ("--mode", "interpolate", "--images", *two_pictures, "--t", 0, 20)
    result = infer(checkpoint, tmp_path, *line)
    assert "b.png: 30 x 20, resized to 8 x 8" in result.stdout
    assert "a.png:" not in result.stdout
    path = tmp_path / "outputs/interpolation.png"
    assert Image.open(path).size == (11 * 50 + 10, 2 * 50 + 10 + 14)
    row = frames(path, 11)
    assert (row[0] == [250, 10, 10]).all()
    assert (row[-1] == [10, 10, 250]).all()


def between_pictures(pictures, checkpoint, tmp_path, *sampler) -> bytes:
    line = ("--mode", "interpolate", "--images", *pictures, "--num_samples", 3, *sampler)
    infer(checkpoint, tmp_path, *line)
    return (tmp_path / "outputs/interpolation.png").read_bytes()


def test_interpolation_between_images_with_steps_T_is_algorithm_2(
    two_pictures, checkpoint, tmp_path
):
    chain = between_pictures(two_pictures, checkpoint, tmp_path)
    assert between_pictures(two_pictures, checkpoint, tmp_path, "--steps", 30) == chain
    assert between_pictures(two_pictures, checkpoint, tmp_path, "--steps", 3) != chain
    assert between_pictures(two_pictures, checkpoint, tmp_path, "--eta", 0) != chain
    fewer = between_pictures(two_pictures, checkpoint, tmp_path, "--t", 9, "--steps", 20)
    assert fewer != between_pictures(two_pictures, checkpoint, tmp_path, "--t", 9)


def test_interpolation_between_images_starts_exactly_at_t(checkpoint, tmp_path, monkeypatch):
    starts = []

    def p_sample_loop(ddpm, x_t, t_start, randn_like):
        starts.append(t_start)
        yield 0, x_t

    monkeypatch.setattr(DDPM, "p_sample_loop", p_sample_loop)
    path = tmp_path / "grey.png"
    Image.new("RGB", (8, 8), (100, 100, 100)).save(path)
    sampler = Sampler(inference.parse_args(["--checkpoint", str(checkpoint)]))
    images = inference.read_images(sampler, [path, path])
    rows = inference.between_images(sampler, images, [3, 17], fractions(5))
    assert starts == [3, 17]
    for row in rows:  # the same image and the same noise at both ends: all between is the same
        torch.testing.assert_close(row, row[:1].expand(5, -1, -1, -1))


# Mistakes

@pytest.mark.parametrize(("arguments", "words"), [
    (["--steps", "31"], ["steps=31", "30"]),
    (["--mode", "interpolate", "--images", "a.png", "missing.png"], ["missing.png"]),
    (["--mode", "interpolate", "--images", "a.png", "b.png", "--t", "30"], ["t=[30]", "29"]),
])
def test_what_cannot_be_done(arguments, words, two_pictures, checkpoint, tmp_path):
    line = ("--checkpoint", str(checkpoint), *arguments)
    refused(called("inference.py", *line, cwd=tmp_path), 1, *words)


@pytest.mark.parametrize("script", [["inference.py"], ["evaluate.py", "--metric", "fid"]])
@pytest.mark.parametrize("flags", [
    ["--order", "1"], ["--spacing", "uniform"], ["--order", "2", "--steps", "30"],
    ["--variance", "fixed_small", "--steps", "10"], ["--variance", "fixed_large", "--eta", "0"]])
def test_what_this_sampler_has_no_use_for(flags, script, checkpoint, tmp_path):
    line = [*script, "--checkpoint", str(checkpoint), *flags]
    refused(called(*line, cwd=tmp_path), 1, f"{flags[0]} has no effect")


@pytest.mark.parametrize(("arguments", "words"), [
    (["--mode", "dance"], ["dance", "sample"]),
    (["--num_samples", "0"], ["num_samples=0"]),
    (["--batch_size", "0"], ["batch_size=0"]),
    (["--steps", "0"], ["steps=0"]),
    (["--steps", "many"], ["--steps", "many"]),
    (["--eta", "2"], ["eta=2"]),
    (["--eta", "nan"], ["eta=nan"]),
    (["--seed", "-1"], ["seed=-1"]),
    (["--seed", str(10**19)], ["at most 4,294,967,295"]),
    (["--num_samples", str(10**400)], ["at most 10,000,000"]),
    (["--steps", str(10**19)], ["at most"]),
])
def test_a_wrong_command_line(arguments, words, tmp_path):
    refused(called("inference.py", *arguments, cwd=tmp_path), 2, *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("line", [
    "--mode sample --seeds 1 2", "--mode process --seeds 1 2", "--mode sample --images a.png b.png",
    "--mode process --images a.png b.png", "--mode sample --t 5", "--mode process --t 5",
    "--mode process --npz x.npz", "--mode interpolate --npz x.npz",
    "--mode process --save_images out", "--mode interpolate --save_images out"])
def test_flags_of_another_mode(line, tmp_path):
    _, mode, flag, *_ = line.split()
    result = called("inference.py", *line.split(), cwd=tmp_path)
    refused(result, 2, f"{flag} has no effect with --mode {mode}")


@pytest.mark.parametrize(("line", "words"), [
    ("--mode interpolate --images a b --seeds 1 2", "--seeds has no effect with --images"),
    ("--mode all --images a b --seeds 1 2", "--seeds has no effect with --images"),
    ("--mode interpolate --t 5", "--t has no effect without --images"),
    ("--mode all --t 5", "--t has no effect without --images"),
    ("--npz x.npz --save_images out", "--npz has no effect with --save_images"),
])
def test_flags_that_exclude_each_other(line, words, tmp_path):
    refused(called("inference.py", *line.split(), cwd=tmp_path), 2, words)


def test_mode_all_of_a_grey_checkpoint(tmp_path):
    path = save_network(tmp_path / "grey.pth", tiny(channels=1))
    infer(path, tmp_path, "--mode", "all", "--num_samples", 2, "--steps", 3)
    assert {path.name for path in (tmp_path / "outputs").iterdir()} == {
        "samples.png", "process.png", "process.gif", "interpolation.png", "interpolation.gif"}
