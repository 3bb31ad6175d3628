"""The real scripts, as subprocesses with tiny settings: what they write, and how they refuse bad input."""

import csv
import re

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, called, flags, refused, script, tiny
from PIL import Image

from config import Config, derive_seed
from model import UNet
from train import learning_rate


def train(run_dir, *extra, start=called, **settings):
    return start("train.py", *flags(**{**TINY, "run_dir": run_dir, **settings}), *extra, cwd=run_dir.parent)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two epochs over 24 images in a folder."""
    root = tmp_path_factory.mktemp("scripts")
    for i in range(24):
        (root / "pictures" / str(i % 3)).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 8), (10 * i, 100, 200)).save(root / "pictures" / str(i % 3) / f"{i}.png")
    run_dir = root / "run"
    result = train(run_dir, data=root / "pictures", data_dir=root / "data", epochs=4, save_every=2, sample_every=10,
                   log_every=5, num_samples=5, start=script)
    assert result.returncode == 0, result.stderr
    return run_dir, result


def test_a_run_writes_what_the_readme_says(finished):
    run_dir, result = finished
    files = {str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if path.is_file()}
    checkpoints = {f"checkpoints/{name}.pth"
                   for name in ("checkpoint_epoch_2", "checkpoint_epoch_4", "final_model", "latest")}
    assert files == checkpoints | {"metrics.csv", "samples/sample_step_10.png", "samples/sample_step_20.png"}
    for said in ("24 images", "0 to 24", "cpu in fp32", str(run_dir), "final_model.pth", "parameters"):
        assert said in result.stdout
    assert "loss" in result.stderr and "images/s" in result.stderr  # the progress bar


def test_metrics(finished):
    rows = list(csv.DictReader((finished[0] / "metrics.csv").open()))
    assert list(rows[0]) == ["step", "epoch", "loss", "loss_q1", "loss_q2", "loss_q3", "loss_q4", "lr", "grad_norm",
                             "images_per_sec"]
    assert [(int(row["step"]), int(row["epoch"])) for row in rows] == [(5, 0), (10, 1), (15, 2), (20, 3)]
    for row in rows:
        assert 0 < float(row["loss"]) < 1.5 and float(row["lr"]) == 2e-4 and float(row["grad_norm"]) > 0
        assert float(row["images_per_sec"]) > 0


def test_checkpoints_hold_tensors_and_plain_values(finished):
    folder = finished[0] / "checkpoints"
    kept = torch.load(folder / "final_model.pth", weights_only=True)
    latest = torch.load(folder / "latest.pth", weights_only=True)
    assert kept.keys() == {"config", "step", "ema"} and kept["step"] == 24
    assert latest.keys() == {"config", "step", "ema", "model", "optimizer", "scaler", "sums"}
    config = Config(**kept["config"])
    assert kept["ema"].keys() == latest["model"].keys() == UNet(config).state_dict().keys()  # no module., no _orig_mod.
    assert torch.load(folder / "checkpoint_epoch_2.pth", weights_only=True)["step"] == 12


def test_inference_needs_the_checkpoint_alone(finished, tmp_path):
    run_dir, _ = finished
    result = script("inference.py", "--checkpoint", str(run_dir / "checkpoints/final_model.pth"), "--num_samples", "5",
                    "--batch_size", "2", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "samples.png" in result.stdout and "step 24" in result.stdout
    assert Image.open(tmp_path / "outputs/samples.png").size == (3 * 10 + 2, 2 * 10 + 2)


def test_inference_takes_the_newest_checkpoint_and_says_which(finished, tmp_path):
    result = called("inference.py", "--run_dir", str(finished[0]), "--num_samples", "1", "--steps", "2",
                    "--output_dir", str(tmp_path / "deep/er"), cwd=tmp_path)
    assert result.returncode == 0 and "final_model.pth" in result.stdout
    assert (tmp_path / "deep/er/samples.png").exists()


def test_raw_weights_differ_from_the_averaged_ones(finished, tmp_path):
    pictures = []
    for weights in ("raw", "ema"):
        result = called("inference.py", "--checkpoint", str(finished[0] / "checkpoints/latest.pth"),
                        "--weights", weights, "--num_samples", "2", "--npz", f"{weights}.npz", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        pictures.append(np.load(tmp_path / f"{weights}.npz")["arr_0"])
    assert not np.array_equal(*pictures)


def test_the_samples_of_a_run_come_from_its_ema_weights_and_one_noise(finished, tmp_path):
    """inference.py draws the last grid again: same seed, same steps."""
    run_dir, _ = finished
    state = torch.load(run_dir / "checkpoints/latest.pth", weights_only=True)
    assert not torch.equal(state["ema"]["conv_out.weight"], state["model"]["conv_out.weight"])
    result = train(run_dir.parent / "again", data=run_dir.parent / "pictures", data_dir=run_dir.parent / "data",
                   max_steps=20, sample_every=10, log_every=5, num_samples=5)
    assert result.returncode == 0, result.stderr
    grid = run_dir.parent / "again/samples/sample_step_20.png"
    assert grid.read_bytes() == (run_dir / "samples/sample_step_20.png").read_bytes()
    called("inference.py", "--run_dir", str(run_dir.parent / "again"), "--num_samples", "5", "--steps", "3",
           cwd=tmp_path)
    difference = torch.tensor(list(Image.open(tmp_path / "outputs/samples.png").tobytes())).float() - torch.tensor(
        list(Image.open(grid).tobytes())).float()
    assert difference.abs().max() <= 1


@pytest.mark.parametrize("settings", [
    dict(beta_schedule="cosine", channels=1, variance="fixed_small"), dict(batch_size=6, grad_accum=3),
    dict(precision="bf16"), dict(precision="fp16"), dict(batch_size=1, save_minutes=0),
    dict(data="one"), dict(sample_every=0, save_every=0, grad_clip=0, attn_resolutions=())])
def test_settings_that_run(settings, tmp_path):
    if settings.get("data") == "one":  # a single image, smaller than the batch
        Image.new("RGB", (5, 5)).save(tmp_path / "one.png")
        settings = {**settings, "data": tmp_path}
    result = train(tmp_path / "run", **{"max_steps": 3, "log_every": 1, "sample_every": 2, **settings})
    assert result.returncode == 0, result.stderr
    assert len((tmp_path / "run/metrics.csv").read_text().splitlines()) == 4


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    assert train(tmp_path / "run", "--tensorboard", max_steps=2, log_every=1).returncode == 0
    assert list((tmp_path / "run/tensorboard").iterdir())


def test_warm_up_starts_above_zero_and_ends_at_the_learning_rate():
    config = Config(learning_rate=1e-3, warmup_steps=10)
    got = [learning_rate(config, step) for step in (0, 4, 9, 10, 10_000)]
    assert got == pytest.approx([1e-4, 5e-4, 1e-3, 1e-3, 1e-3])
    assert learning_rate(Config(learning_rate=1e-3, warmup_steps=0), 0) == 1e-3


def test_ema_is_ramped_so_that_it_forgets_the_random_start(tmp_path):  # without the ramp it is 90 % of it at step 1,000
    config = tiny()
    torch.manual_seed(derive_seed("weights", config.seed))
    expected = UNet(config).state_dict()
    for step, decay in ((1, 1 / 10), (2, 2 / 11), (3, 3 / 12)):
        assert train(tmp_path / "run", "--resume", max_steps=step).returncode == 0
        state = torch.load(tmp_path / "run/checkpoints/latest.pth", weights_only=True)
        for name, weight in state["model"].items():
            expected[name] = decay * expected[name] + (1 - decay) * weight
            torch.testing.assert_close(state["ema"][name], expected[name], atol=1e-6, rtol=0)


def test_grad_accum_is_the_same_step_to_rounding(tmp_path):
    rows = []
    for accum in (1, 4):
        train(tmp_path / str(accum), max_steps=10, log_every=10, dropout=0.0, grad_accum=accum)
        row = (tmp_path / str(accum) / "metrics.csv").read_text().splitlines()[1]
        rows.append([float(x) for x in row.split(",")[:-1]])
    assert rows[0] == pytest.approx(rows[1], rel=1e-4)


def test_help_shows_every_setting_in_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("inference.py", "evaluate.py", "convert.py", "train.py"):
        result = called(name, "--help", cwd=ROOT)
        assert result.returncode == 0 and max(map(len, result.stdout.splitlines())) <= 80
    for name in Config.__dataclass_fields__:
        assert re.search(rf"--{name}\b", result.stdout), name


# Bad input

@pytest.mark.parametrize("arguments, words", [
    (["--wings", "2"], ["--wings"]), (["--preset", "huge"], ["huge", "paper", "demo"]), (["--dim", "x"], ["--dim"]),
    (["--dim", "7"], ["dim=7", "64"]), (["--image_size", "30"], ["image_size=30", "32"]),
    (["--beta_schedule", "sine"], ["sine", "cosine"])])
def test_a_wrong_command_line(arguments, words, tmp_path):
    refused(called("train.py", *arguments, cwd=tmp_path), 2, *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments, words", [
    (["--mode", "dance"], ["dance", "sample"]), (["--num_samples", "0"], ["num_samples=0"]),
    (["--steps", "0"], ["steps=0"]), (["--eta", "2"], ["eta=2"])])
def test_a_wrong_command_line_of_inference(arguments, words, tmp_path):
    refused(called("inference.py", *arguments, cwd=tmp_path), 2, *words)


def test_no_such_folder(tmp_path):
    refused(train(tmp_path / "run", data=tmp_path / "nowhere"), 1, "nowhere")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(tmp_path):
    refused(train(tmp_path / "run", device="cuda"), 1, "cuda", "--device cpu")
    refused(called("inference.py", "--device", "cuda", cwd=tmp_path), 1, "cuda", "--device cpu")


def test_the_real_scripts_refuse_with_one_line_and_the_right_status(tmp_path):
    refused(script("train.py", "--wings", "2", cwd=tmp_path), 2, "--wings")
    refused(script("inference.py", "--checkpoint", "none.pth", cwd=tmp_path), 1, "none.pth")


def test_a_run_is_not_written_over(finished):
    before = (finished[0] / "metrics.csv").read_bytes()
    refused(train(finished[0]), 1, str(finished[0]), "--resume")
    assert (finished[0] / "metrics.csv").read_bytes() == before


class Evil:
    def __reduce__(self):
        return (print, ("this code ran",))


def save_evil(path):
    torch.save({"config": {}, "step": 1, "ema": Evil()}, path)


def save_other_network(path):
    state = torch.load(path, weights_only=True)
    torch.save({**state, "config": {**state["config"], "dim": 16}}, path)


@pytest.mark.parametrize("damage, words", [
    (lambda path: path.unlink(), ["not exist"]), (lambda path: path.write_bytes(b""), ["truncated"]),
    (lambda path: path.write_bytes(path.read_bytes()[:-5000]), ["truncated"]),
    (lambda path: path.write_bytes(b"some text, not a checkpoint"), ["model.pth"]),
    (lambda path: torch.save({"weights": 1}, path), ["not a checkpoint"]), (save_evil, ["code"]),
    (save_other_network, ["another network"]),
    (lambda path: torch.save({"config": {"wings": 2}, "step": 1, "ema": {}}, path), ["wings"])])
def test_a_bad_checkpoint(damage, words, finished, tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes((finished[0] / "checkpoints/final_model.pth").read_bytes())
    damage(path)
    result = called("inference.py", "--checkpoint", str(path), cwd=tmp_path)
    refused(result, 1, "model.pth", *words)
    assert "this code ran" not in result.stdout


def test_steps_above_t(finished, tmp_path):
    refused(called("inference.py", "--run_dir", str(finished[0]), "--steps", "31", cwd=tmp_path), 1, "steps=31", "30")
