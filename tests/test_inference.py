"""Sampling: every mode, few steps, the same picture every time."""

import hashlib
import json
import signal
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import ROOT, Gaussian, called, refused, script, tiny
from PIL import Image
from test_ddpm import ConstantImage
from torch import nn

from checkpoint import save_checkpoint
from config import Config
from ddpm import DDPM, spaced_timesteps
from inference import slerp
from model import UNet


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A network with random weights everywhere, so that its pictures are not all alike."""
    config = tiny()
    model = UNet(config)
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    path = tmp_path_factory.mktemp("inference") / "model.pth"
    save_checkpoint({"config": asdict(config), "step": 7, "ema": model.state_dict()}, path)
    return path


def infer(checkpoint, tmp_path, *arguments, start=called):
    line = ["--checkpoint", str(checkpoint), "--device", "cpu", *map(str, arguments)]
    result = start("inference.py", *line, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    return result


def arrays(checkpoint, tmp_path, *arguments) -> np.ndarray:
    infer(checkpoint, tmp_path, "--npz", "x.npz", *arguments)
    return np.load(tmp_path / "x.npz")["arr_0"].astype(int)


def pngs(folder) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.png")}


# DDIM

def test_ddim_ends_exactly_at_a_constant_image(shape):  # where eps is not re-derived after the clip, it does not
    config, x_start = Config(), torch.rand(4, 3, 8, 8) * 3 - 1.5
    ddpm = DDPM(ConstantImage(config, x_start), config)
    for steps, eta, spacing in ((10, 0.0, "quadratic"), (50, 0.5, "uniform"), (7, 1.0, "quadratic")):
        torch.testing.assert_close(ddpm.sample(torch.randn(shape), steps, eta, spacing), x_start.clamp(-1, 1),
                                   atol=1e-5, rtol=0)


def test_ddim_with_eta_1_at_full_length_is_the_fixed_small_chain(shape):
    config = tiny(variance="fixed_small")
    ddpm = DDPM(Gaussian(config, 0.2, 0.3), config)
    x_T, draws = torch.randn(shape), torch.randn(config.timesteps, *shape)
    chain = [x for _, x, _ in ddpm.p_sample_loop(x_T, noise=lambda t: draws[t])]
    ddim = [x for _, x, _ in ddpm.ddim_sample_loop(x_T, range(29, -1, -1), 1.0, lambda t: draws[t])]
    for a, b in zip(chain, ddim, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0)


@pytest.mark.parametrize("steps, tolerance", [(1000, 0.02), (100, 0.04), (20, 0.15)])
def test_ddim_recovers_gaussian_data(steps, tolerance):
    """Mean within 0.01 and deviation within 2, 4 and 15 % at 1000, 100 and 20 steps."""
    config = Config()
    x = DDPM(Gaussian(config, 0.2, 0.15), config).sample(torch.randn(16, 1, 16, 16), steps, 0.0)
    assert x.mean().item() == pytest.approx(0.2, abs=0.01)
    assert x.std().item() == pytest.approx(0.15, rel=tolerance)


def test_ddim_calls_the_network_with_the_original_timesteps(shape):
    config, seen = Config(), []
    ddpm = DDPM(lambda x_t, t: seen.append(t.tolist()) or torch.zeros_like(x_t), config)
    ddpm.sample(torch.randn(shape), 10)
    assert seen == [[t] * 4 for t in spaced_timesteps(1000, 10)] and seen[0] == [999] * 4


def test_full_length_without_eta_is_algorithm_2(shape):
    config = tiny()
    ddpm, x_T, z = DDPM(Gaussian(config, 0, 0.3), config), torch.randn(shape), torch.randn(shape)
    expected = [x for _, x, _ in ddpm.p_sample_loop(x_T, noise=lambda t: z)][-1]
    for steps in (None, 30):
        assert torch.equal(ddpm.sample(x_T, steps, noise=lambda t: z), expected)
    assert not torch.equal(ddpm.sample(x_T, 30, 0.0), expected)


def test_the_generators_yield_what_they_did(shape):
    config = tiny()
    ddpm = DDPM(Gaussian(config, 0.1, 0.3), config)
    for loop in (ddpm.p_sample_loop(torch.randn(shape)), ddpm.ddim_sample_loop(torch.randn(shape), [29, 10, 0])):
        steps = list(loop)
        assert torch.equal(steps[-1][1], steps[-1][2])  # after the last step, x is the x_0 predicted in it
        for t, x, pred_x_start in steps:
            assert isinstance(t, int) and x.shape == pred_x_start.shape == shape and pred_x_start.abs().max() <= 1


# The same picture every time

def test_a_picture_depends_on_seed_and_index_alone(checkpoint, tmp_path):
    reference = arrays(checkpoint, tmp_path, "--num_samples", 9, "--batch_size", 64)
    assert reference.shape == (9, 8, 8, 3)
    for arguments in (("--batch_size", 1), ("--batch_size", 7)):
        assert abs(arrays(checkpoint, tmp_path, "--num_samples", 9, *arguments) - reference).max() <= 1
    assert abs(arrays(checkpoint, tmp_path, "--num_samples", 4) - reference[:4]).max() <= 1
    assert abs(arrays(checkpoint, tmp_path, "--num_samples", 9, "--seed", 1)[:-1] - reference[1:]).max() > 50


def test_no_two_of_256_pictures_are_equal(checkpoint, tmp_path):
    images = arrays(checkpoint, tmp_path, "--num_samples", 256, "--batch_size", 100, "--steps", 5)
    assert len({image.tobytes() for image in images}) == 256


@pytest.mark.parametrize("count, batch_size", [(1, 1), (5, 2), (6, 3), (3, 64)])
def test_save_images_writes_exactly_as_many(count, batch_size, checkpoint, tmp_path):
    infer(checkpoint, tmp_path, "--save_images", "out", "--num_samples", count, "--batch_size", batch_size,
          "--steps", 2)
    assert sorted(pngs(tmp_path / "out")) == [f"{i:06}.png" for i in range(count)]
    assert Image.open(tmp_path / "out/000000.png").size == (8, 8)


def test_save_images_goes_on_with_the_missing_ones(checkpoint, tmp_path):
    line = ("--save_images", "out", "--num_samples", 6, "--batch_size", 1, "--steps", 2)
    infer(checkpoint, tmp_path, *line)
    whole, kept = pngs(tmp_path / "out"), (tmp_path / "out/000003.png").stat().st_mtime_ns
    (tmp_path / "out/000001.png").unlink()
    (tmp_path / "out/000005.png").unlink()
    infer(checkpoint, tmp_path, *line)
    assert pngs(tmp_path / "out") == whole and (tmp_path / "out/000003.png").stat().st_mtime_ns == kept


def test_save_images_never_mixes_two_kinds(checkpoint, tmp_path):
    infer(checkpoint, tmp_path, "--save_images", "out", "--num_samples", 3, "--steps", 2)
    before = pngs(tmp_path / "out")
    base = ("inference.py", "--checkpoint", str(checkpoint), "--save_images", "out", "--num_samples")
    refused(called(*base, "5", "--steps", "3", cwd=tmp_path), 1, "out", "another")
    refused(called(*base, "2", "--steps", "2", cwd=tmp_path), 1, "beyond num_samples=2")
    assert pngs(tmp_path / "out") == before


def test_two_processes_write_the_same_files_as_one(checkpoint, tmp_path):
    line = ("--checkpoint", str(checkpoint), "--num_samples", "5", "--batch_size", "1", "--steps", "4",
            "--device", "cpu")
    infer(checkpoint, tmp_path, *line[2:], "--save_images", "one")
    result = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                             str(ROOT / "inference.py"), *line, "--save_images", "two"], cwd=tmp_path, text=True,
                            capture_output=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert pngs(tmp_path / "one") == pngs(tmp_path / "two") and len(pngs(tmp_path / "two")) == 5


# Pictures of the process, and interpolation

def test_process(checkpoint, tmp_path):
    result = infer(checkpoint, tmp_path, "--mode", "process", "--num_samples", 3)
    picture = Image.open(tmp_path / "outputs/process.png")
    columns, rows, cell = 11, 6, 10
    assert picture.size == ((columns * cell + 2) * 5, (rows * cell + 2) * 5 + 14)
    with Image.open(tmp_path / "outputs/process.gif") as gif:
        assert gif.n_frames == 11
    assert "process.png" in result.stdout and "process.gif" in result.stdout


def test_process_with_fewer_steps_than_columns(checkpoint, tmp_path):
    infer(checkpoint, tmp_path, "--mode", "process", "--steps", 3)
    with Image.open(tmp_path / "outputs/process.gif") as gif:
        assert gif.n_frames == 4


def frames(path, count: int, zoom: int = 5, cell: int = 10) -> np.ndarray:
    """The images of the first row of a table."""
    picture = np.asarray(Image.open(path)).astype(int)[14::zoom, ::zoom]
    return np.stack([picture[2:cell, 2 + i * cell:(i + 1) * cell] for i in range(count)])


@pytest.mark.parametrize("sampler", [(), ("--steps", 10), ("--steps", 10, "--eta", 1)])
def test_interpolation_between_two_seeds(sampler, checkpoint, tmp_path):
    infer(checkpoint, tmp_path, "--mode", "interpolate", "--seeds", 3, 8, *sampler)
    path = frames(tmp_path / "outputs/interpolation.png", 9)
    for seed, end in ((3, path[0]), (8, path[-1])):  # the ends are the plain samples of their seeds
        assert abs(arrays(checkpoint, tmp_path, "--num_samples", 1, "--seed", seed, *sampler)[0] - end).max() <= 1
    near = abs(np.diff(path, axis=0)).mean(axis=(1, 2, 3))
    assert near.max() < abs(path[0] - path[-1]).mean()


def test_slerp_keeps_the_deviation_of_noise():  # linear mixing shrinks it to 0.707 in the middle
    a, b = torch.randn(1, 3, 64, 64), torch.randn(1, 3, 64, 64)
    mixed = slerp(a, b, torch.linspace(0, 1, 5).view(-1, 1, 1, 1))
    assert torch.equal(mixed[:1], a) and torch.equal(mixed[-1:], b)
    assert ((mixed.std(dim=(1, 2, 3)) - 1).abs() < 0.02).all()
    assert torch.equal(slerp(a, a, torch.ones(1, 1, 1, 1)), a)


def test_interpolation_between_two_images(checkpoint, tmp_path):
    Image.new("RGB", (8, 8), (250, 10, 10)).save(tmp_path / "a.png")
    Image.new("RGB", (30, 20), (10, 10, 250)).save(tmp_path / "b.png")
    result = infer(checkpoint, tmp_path, "--mode", "interpolate", "--images", "a.png", "b.png", "--t", 0, 20)
    assert "b.png: 30 x 20, brought to 8 x 8" in result.stdout and "a.png:" not in result.stdout
    row = frames(tmp_path / "outputs/interpolation.png", 11)
    assert (row[0] == [250, 10, 10]).all() and (row[-1] == [10, 10, 250]).all()
    assert Image.open(tmp_path / "outputs/interpolation.png").size == (11 * 50 + 10, 2 * 50 + 10 + 14)


def test_interpolation_of_images_starts_exactly_at_t(tmp_path, monkeypatch):
    import inference

    starts = []
    monkeypatch.setattr(DDPM, "p_sample_loop", lambda self, x_t, t, noise: starts.append(t) or iter([(0, x_t, x_t)]))
    path = tmp_path / "grey.png"
    Image.new("RGB", (8, 8), (100, 100, 100)).save(path)
    config = tiny()
    args = inference.parse_args(["--images", str(path), str(path), "--t", "3", "17"])
    sampler = inference.Sampler(DDPM(nn.Identity(), config), config, args)
    rows = inference.interpolate_images(sampler, args, torch.linspace(0, 1, 5).view(-1, 1, 1, 1))
    assert starts == [3, 17]
    for row in rows:  # the same image and the same noise at both ends: nothing in between differs
        torch.testing.assert_close(row[1:-1], row[1:2].expand(5, -1, -1, -1))


def test_mode_all(checkpoint, tmp_path):
    infer(checkpoint, tmp_path, "--mode", "all", "--steps", 3)
    assert {path.name for path in (tmp_path / "outputs").iterdir()} == {
        "samples.png", "process.png", "process.gif", "interpolation.png", "interpolation.gif"}


# Bad input

@pytest.mark.parametrize("arguments, words", [
    (["--steps", "31"], ["steps=31", "30"]), (["--images", "a.png", "b.png", "--t", "30"], ["t=[30]", "29"]),
    (["--mode", "interpolate", "--images", "a.png", "b.png"], ["a.png"]), (["--weights", "raw"], ["latest.pth"]),
    (["--output_dir", "file/x"], ["file/x"])])
def test_refused(arguments, words, checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    refused(called("inference.py", "--checkpoint", str(checkpoint), *arguments, cwd=tmp_path), 1, *words)
    assert (tmp_path / "file").read_text() == ""


def test_stopped_while_saving_images(checkpoint, tmp_path):
    line = ["--checkpoint", str(checkpoint), "--save_images", "out", "--num_samples", "100000", "--batch_size", "2"]
    process = subprocess.Popen([sys.executable, str(ROOT / "inference.py"), *line], cwd=tmp_path, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while process.poll() is None and len(list((tmp_path / "out").glob("*.png"))) < 3:
        pass
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    for path in (tmp_path / "out").glob("*.png"):
        Image.open(path).load()
    assert json.loads((tmp_path / "out/sampled_with.json").read_text())["seed"] == 0


def test_the_real_script(checkpoint, tmp_path):
    infer(checkpoint, tmp_path, "--num_samples", 3, start=script)
    assert (tmp_path / "outputs/samples.png").exists()
