"""evaluate.py: the likelihood against closed forms in float64, and from the command line."""

import json
import math
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    TORCHRUN,
    Constant,
    Gaussian,
    called,
    coloured_pictures,
    half_frozen,
    modes,
    refused,
    save_network,
    tiny,
)
from PIL import Image
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from config import Config
from data import to_float
from ddpm import DDPM, beta_schedule, linear_beta_schedule
from evaluate import bits_per_dim, discretized_log_likelihood, posterior_kl, random_timesteps
from utils.checkpoint import load_checkpoint, save_checkpoint

LEVELS = to_float(torch.arange(256))
FIELDS = [
    "metric", "checkpoint", "step", "data", "num_images", "timesteps_per_image", "seed",
    "precision", "total", "standard_error", "prior", "rate", "distortion", "rmse",
]


def evaluate(checkpoint: Path, tmp_path: Path, *arguments):
    line = ["--checkpoint", str(checkpoint), "--device", "cpu", "--precision", "fp32"]
    return called("evaluate.py", *line, *map(str, arguments), cwd=tmp_path)


def fields(checkpoint: Path, tmp_path: Path, *arguments) -> dict:
    """Return what it writes with --json."""
    result = evaluate(checkpoint, tmp_path, "--json", "result.json", *arguments)
    assert result.returncode == 0, result.stderr
    return json.loads((tmp_path / "result.json").read_text())


def pictures(*shape: int) -> Tensor:
    return LEVELS[torch.randint(256, shape)]


def bits(nats: Tensor) -> Tensor:
    return nats.double().mean(dim=(1, 2, 3)) / math.log(2)


# The terms of the bound

def log_mass(x: Tensor, decoder: Normal) -> Tensor:
    """Calculate Eq. 13 in float64, by two cdf, or far away by the tail's expansion."""
    above = torch.where(x > 0.999, 1, decoder.cdf(x + 1 / 255))
    below = torch.where(x < -0.999, 0, decoder.cdf(x - 1 / 255))
    z = ((x - decoder.mean).abs() - 1 / 255) / decoder.stddev
    tail = -z**2 / 2 - torch.log(z * math.sqrt(2 * math.pi))
    return torch.where(z > 6, tail, (above - below).log())


@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_every_term_is_what_the_paper_writes(variance, schedule):
    """Eq. 5 is written out in float64, with the same noise, for a network that returns zero."""
    config = tiny(timesteps=50, variance=variance, beta_schedule=schedule)
    x, noise = pictures(4, 3, 8, 8), torch.randn(50, 4, 3, 8, 8)
    draws = iter(noise)  # from t = 0 up
    got = bits_per_dim(DDPM(Constant(), config), x, randn_like=lambda x: next(draws))

    betas = beta_schedule(config)
    alphas_cumprod = torch.cumprod(1 - betas, dim=0)
    before = torch.cat([torch.ones(1), alphas_cumprod[:-1]])
    posterior_variance = betas * (1 - before) / (1 - alphas_cumprod)
    x = x.double()
    last = Normal(alphas_cumprod[-1].sqrt() * x, (1 - alphas_cumprod[-1]).sqrt())
    expected = {
        "prior": bits(kl_divergence(last, Normal(0.0, 1.0))),
        "rate": torch.zeros(4, dtype=torch.float64),
    }
    for t in range(50):
        a, a_prev, beta = alphas_cumprod[t], before[t], betas[t]
        x_t = a.sqrt() * x + (1 - a).sqrt() * noise[t]
        pred_x_start = (x_t / a.sqrt()).clamp(-1, 1)
        coef1 = a_prev.sqrt() * beta / (1 - a)
        coef2 = (1 - beta).sqrt() * (1 - a_prev) / (1 - a)
        pred_mean = coef1 * pred_x_start + coef2 * x_t
        if t == 0:
            decoder = Normal(pred_mean, posterior_variance[1].sqrt())
            expected["distortion"] = bits(-log_mass(x, decoder))
            expected["mse"] = (x - pred_x_start).square().mean(dim=(1, 2, 3))
        else:
            model_variance = beta if variance == "fixed_large" else posterior_variance[t]
            q = Normal(coef1 * x + coef2 * x_t, posterior_variance[t].sqrt())
            p = Normal(pred_mean, model_variance.sqrt())
            expected["rate"] += bits(kl_divergence(q, p))
    expected["total"] = expected["prior"] + expected["rate"] + expected["distortion"]

    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == torch.float32
        rtol = 1e-3 if name == "distortion" else 2e-5
        torch.testing.assert_close(got[name].double(), value, rtol=rtol, atol=0)


def test_the_perfect_network_for_gaussian_data_costs_its_exact_integrals():
    """x_0 given x_t is normal with a known variance, over which each term can be integrated."""
    mean, std, config = 0.1, 0.15, Config()
    values = (mean + std * torch.randn(16, 1, 32, 32)) * 127.5 + 127.5
    x_start = LEVELS[values.round().long().clamp(0, 255)]
    got = bits_per_dim(DDPM(Gaussian(config, mean, std), config), x_start)

    betas = linear_beta_schedule(1000)
    a = torch.cumprod(1 - betas, dim=0)
    a_prev = torch.cat([torch.ones(1), a[:-1]])
    error = std**2 * (1 - a) / (a * std**2 + 1 - a)
    ratio = ((1 - a_prev) / (1 - a))[1:]  # posterior variance / beta_t
    coef1 = (a_prev.sqrt() * betas / (1 - a))[1:]
    kl = (ratio - 1 - ratio.log() + coef1**2 * error[1:] / betas[1:]) / 2
    rate = kl.sum() / math.log(2)
    sigma, z = 5.4532e-5**0.5, torch.linspace(-8, 8, 10_001, dtype=torch.float64)
    off = (z * error[0].sqrt()).abs()
    above = torch.erfc((off - 1 / 255) / sigma / 2**0.5)
    below = torch.erfc((off + 1 / 255) / sigma / 2**0.5)
    weights = torch.softmax(-z**2 / 2, dim=0)
    distortion = -(weights * ((above - below) / 2).log()).sum() / math.log(2)

    assert got["rate"].mean().item() == pytest.approx(rate.item(), rel=0.005)
    assert got["distortion"].mean().item() == pytest.approx(distortion.item(), rel=0.01)
    assert got["mse"].mean().item() == pytest.approx(error[0].item(), rel=0.03)
    # No code is shorter than the data's entropy; the perfect network's is little longer.
    entropy = math.log2(std * math.sqrt(2 * math.pi * math.e) * 127.5)
    assert entropy < got["total"].mean().item() < entropy + 0.2


def test_the_prior_is_about_1e_5():  # 1 - A in float32 alone would be 1e-7 off
    x = pictures(64, 3, 32, 32)
    timesteps = torch.ones(1, 64, dtype=torch.int64)
    got = bits_per_dim(DDPM(Constant(), Config()), x, timesteps)["prior"]
    a = 4.0358e-5
    square = x.double().square().mean(dim=(1, 2, 3))
    expected = (a * square - a - math.log1p(-a)) / 2 / math.log(2)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=0)
    assert got.mean().item() == pytest.approx(1e-5, rel=0.1)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_the_kl_of_the_posterior_is_the_weighted_error_of_the_noise(variance):
    """Eq. 8 is Eq. 12, up to a constant."""
    ddpm = DDPM(nn.Identity(), Config(variance=variance)).double()
    x_start, error = torch.randn(2, 5, 1, 2, 2, dtype=torch.float64)
    t = torch.tensor([1, 10, 200, 700, 999])
    betas = linear_beta_schedule(1000)
    a = torch.cumprod(1 - betas, dim=0)[t].view(-1, 1, 1, 1)
    beta = betas[t].view(-1, 1, 1, 1)
    pred_x_start = x_start - ((1 - a) / a).sqrt() * error  # Eq. 15 of a noise that is off by error
    least = posterior_kl(ddpm, x_start, x_start, t)
    kl = posterior_kl(ddpm, x_start, pred_x_start, t) - least
    sigma2 = ddpm.model_variance[t].view(-1, 1, 1, 1)
    expected = beta**2 / (2 * sigma2 * (1 - beta) * (1 - a)) * error**2
    torch.testing.assert_close(kl, expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("std", [0.00738, 0.1, 2.0])
@pytest.mark.parametrize("mean", [-1.0, -0.3, 0.999, 1.0])
def test_the_decoders_256_bins_sum_to_one(mean, std):
    means = torch.full((256,), mean)
    mass = discretized_log_likelihood(LEVELS, means, torch.tensor(std)).double().exp()
    assert mass.sum().item() == pytest.approx(1, abs=2e-6)
    # The bins at the edges reach to infinity.
    decoder = Normal(torch.tensor(mean).double(), std)
    left, right = decoder.cdf(LEVELS[0] + 1 / 255), 1 - decoder.cdf(LEVELS[-1] - 1 / 255)
    assert mass[0].item() == pytest.approx(left.item(), abs=1e-6)
    assert mass[-1].item() == pytest.approx(right.item(), abs=1e-6)


@pytest.mark.parametrize(("x", "mean"), [(-1.0, 1.0), (1.0, -1.0)])
def test_the_likelihood_far_from_the_mean_is_neither_infinite_nor_cut_off(x, mean):
    z = (2 - 1 / 255) / 0.00738
    got = discretized_log_likelihood(
        torch.tensor([x]), torch.tensor([mean]), torch.tensor(0.00738))
    tail = -z**2 / 2 - math.log(z * math.sqrt(2 * math.pi))
    assert got.item() == pytest.approx(tail, rel=1e-5)


# An estimate from K timesteps

def test_the_estimate_of_the_rate_is_unbiased():
    """40,000 estimates from two timesteps each come within three standard errors."""
    ddpm = DDPM(Constant(), tiny())
    x = pictures(1, 1, 2, 2).expand(40_000, -1, -1, -1)
    exact = bits_per_dim(ddpm, x[:4000])
    estimate = bits_per_dim(ddpm, x, random_timesteps(0, range(40_000), 2, 30))
    for name in ("rate", "total"):
        a, b = exact[name].double(), estimate[name].double()
        errors = [value.std().item() / math.sqrt(len(value)) for value in (a, b)]
        allowed = 3 * math.hypot(*errors)
        assert abs((a.mean() - b.mean()).item()) < allowed
        assert allowed < exact["rate"].mean() / 30  # T / K would be off by 1 / 29


def test_random_timesteps_are_different_and_uniform():
    drawn = random_timesteps(0, range(2000), 3, 30)
    assert drawn.shape == (3, 2000)
    assert all(len(set(column)) == 3 for column in drawn.T.tolist())
    counts = torch.bincount(drawn.flatten(), minlength=30)
    assert len(counts) == 30
    assert counts[0] == 0
    expected = 6000 / 29
    assert (counts[1:] - expected).abs().max() < 5 * math.sqrt(expected)
    # They depend on the seed and the image alone.
    assert torch.equal(drawn[:, 5:9], random_timesteps(0, range(5, 9), 3, 30))
    assert not torch.equal(drawn, random_timesteps(1, range(2000), 3, 30))
    assert not torch.equal(drawn[:, 1:], random_timesteps(1, range(1999), 3, 30))


# How the network is called

def test_one_call_per_timestep_without_dropout_and_each_mode_restored():
    ddpm = half_frozen(tiny())
    before = modes(ddpm)
    calls_before = []  # calls of the network, as each noise is asked for

    def randn_like(like: Tensor) -> Tensor:
        assert like.shape == x.shape
        calls_before.append(len(ddpm.model.modes))
        return torch.zeros_like(like)

    x = pictures(4, 3, 8, 8).requires_grad_()
    got = bits_per_dim(ddpm, x, randn_like=randn_like)
    assert ddpm.model.timesteps == [[t] * 4 for t in range(30)]
    assert ddpm.model.modes == [False] * 30
    assert calls_before == list(range(30))
    assert not any(value.requires_grad for value in got.values())
    assert modes(ddpm) == before


# evaluate.py --metric bpd

@pytest.mark.parametrize("K", [(), ("--timesteps_per_image", 4)])
def test_the_result_does_not_depend_on_the_batch_size(checkpoint, tmp_path, K):
    line = ("--metric", "bpd", "--num_images", 7, *K)
    first, *others = [
        fields(checkpoint, tmp_path, *line, "--batch_size", size) for size in (1, 3, 64)]
    for other in others:
        for name, value in first.items():
            expected = pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
            assert other[name] == expected
    another_seed = fields(checkpoint, tmp_path, *line, "--seed", 1)
    assert another_seed["rate"] != pytest.approx(first["rate"], rel=1e-4)


def test_variance_is_that_of_the_checkpoint_unless_given(checkpoint, tmp_path):
    content = load_checkpoint(checkpoint)
    content["config"]["variance"] = "fixed_small"
    small = tmp_path / "small.pth"
    save_checkpoint(content, small)
    line = ("--metric", "bpd", "--num_images", 2)
    of_large = fields(checkpoint, tmp_path, *line)
    of_small = fields(small, tmp_path, *line)
    chosen = fields(checkpoint, tmp_path, *line, "--variance", "fixed_small")
    assert of_small["rate"] != pytest.approx(of_large["rate"], rel=0.01)
    assert of_small["distortion"] == of_large["distortion"]
    assert chosen["rate"] == of_small["rate"]


def test_the_json_is_what_is_printed(checkpoint, tmp_path):
    line = ("--metric", "bpd", "--num_images", 5, "--json", "result.json")
    result = evaluate(checkpoint, tmp_path, *line)
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / "result.json").read_text())
    printed = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert list(written) == list(printed) == FIELDS
    for name, value in written.items():
        assert printed[name].startswith(str(value))
    assert "paper: 3.75" in printed["total"]
    assert "paper: 0.95" in printed["rmse"]
    assert (written["num_images"], written["timesteps_per_image"]) == (5, 29)
    assert written["data"] == "shapes, test set"
    total = written["prior"] + written["rate"] + written["distortion"]
    assert written["total"] == pytest.approx(total, rel=1e-4)
    assert 0 < written["standard_error"] < written["total"]
    assert written["rmse"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_the_progress_bar_counts_evaluations(checkpoint, tmp_path):
    line = ("--metric", "bpd", "--num_images", 5, "--batch_size", 3)
    for K, evaluations in (((), 150), (("--timesteps_per_image", 19), 100)):
        result = evaluate(checkpoint, tmp_path, *line, *K)
        assert f" {evaluations}/{evaluations} " in result.stderr, result.stderr


def test_another_data_set_and_the_newest_checkpoint(checkpoint, tmp_path):
    folder, run = tmp_path / "folder", tmp_path / "run" / "checkpoints"
    folder.mkdir()
    run.mkdir(parents=True)
    (run / "final_model.pth").write_bytes(checkpoint.read_bytes())
    Image.new("RGB", (9, 9), (90, 90, 90)).save(folder / "a.png")
    line = ("--metric", "bpd", "--run_dir", str(tmp_path / "run"), "--data", "folder",
            "--data_dir", "cache", "--json", "x.json", "--device", "cpu")
    result = called("evaluate.py", *line, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / "x.json").read_text())
    assert written["data"] == "folder, the whole folder"
    assert written["num_images"] == 1
    assert written["standard_error"] is None  # of one image there is none
    assert list((tmp_path / "cache").glob("*.images"))


# Mistakes

@pytest.mark.parametrize(("status", "words", "line"), [
    (2, ["--metric"], []),
    (2, ["num_images=0", "at least 1"], ["--metric", "bpd", "--num_images", "0"]),
    (2, ["timesteps_per_image=0"], ["--metric", "bpd", "--timesteps_per_image", "0"]),
    (1, ["timesteps_per_image=30", "1 to 29"], ["--metric", "bpd", "--timesteps_per_image", "30"]),
    (2, ["num_samples=1", "at least 2"], ["--metric", "fid", "--num_samples", "1"]),
    (1, ["neither a folder"], ["--metric", "bpd", "--data", "nowhere"]),
])
def test_mistakes_are_answered_in_one_line(checkpoint, tmp_path, status, words, line):
    refused(evaluate(checkpoint, tmp_path, *line), status, *words)


VALUES = {"images": "folder", "inception_weights": "file", "eta": "0", "order": "1",
          "spacing": "uniform", "variance": "fixed_small"}


@pytest.mark.parametrize(("line", "flags"), [
    ("--metric bpd", "num_samples images inception_weights steps eta order spacing"),
    ("--metric fid", "num_images timesteps_per_image"),
    ("--metric fid --images folder", "steps eta order spacing variance"),
])
def test_flags_without_effect(line, flags, tmp_path):
    where = "--images" if "--images" in line else line
    for flag in flags.split():
        given = (*line.split(), f"--{flag}", VALUES.get(flag, "5"))
        result = called("evaluate.py", *given, cwd=tmp_path)
        refused(result, 2, f"--{flag} has no effect with {where}")


def test_it_runs_in_one_process(checkpoint, tmp_path, monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    refused(evaluate(checkpoint, tmp_path, "--metric", "bpd"), 1, "one process")


# evaluate.py --metric fid

@pytest.fixture
def inception(tmp_path_factory, monkeypatch) -> Path:
    """The file holds random weights; the features are the 64 of the first layers, not 2048."""
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    network = fidelity.FeatureExtractorInceptionV3
    first_layers = staticmethod(lambda metric: "64")
    monkeypatch.setattr(network, "get_default_feature_layer_for_metric", first_layers)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    with monkeypatch.context() as patch:
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(network, "load_state_dict", lambda *_: None)
        torch.save(network("inception-v3-compat", ["64"]).state_dict(), path)
    return path


def test_fid_of_generated_images(checkpoint, inception, tmp_path, monkeypatch):
    shapes = np.random.default_rng(0).integers(256, size=(5, 3, 8, 8), dtype=np.uint8)
    monkeypatch.setattr("data.draw_shapes", lambda *arguments: shapes)
    common = ("--metric", "fid", "--num_samples", 3, "--inception_weights", inception)
    chain = fields(checkpoint, tmp_path, *common)
    assert chain["step"] == 7
    assert chain["sampler"] == "Algorithm 2, fixed_large, 30 of 30 steps, seed 0, fp32"
    assert chain["reference"] == "shapes, train set"
    assert (chain["num_reference"], chain["num_samples"]) == (5, 3)
    assert math.isfinite(chain["fid"])
    assert chain["fid"] > 0
    ddim = fields(checkpoint, tmp_path, *common, "--steps", 3, "--batch_size", 2)
    assert ddim["sampler"] == "order 2, eta 1, quadratic spacing, 3 of 30 steps, seed 0, fp32"
    assert ddim["fid"] != chain["fid"]


@pytest.mark.parametrize("channels", [1, 3])
def test_fid_of_equal_images_is_zero_and_of_others_is_not(inception, tmp_path, channels):
    config = tiny(channels=channels, data="same", data_dir="cache")
    path = save_network(tmp_path / "model.pth", config)
    pixels = np.random.default_rng(0).integers(256, size=(6, 8, 8), dtype=np.uint8)
    for name, images in (("same", pixels), ("other", pixels // 2)):
        (tmp_path / name).mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / name / f"{i}.png")
    (tmp_path / "same" / "sampled_with.json").write_text('{"steps": 50}')

    common = ("--metric", "fid", "--inception_weights", inception, "--images")
    same = fields(path, tmp_path, *common, "same")
    other = fields(path, tmp_path, *common, "other", "--num_samples", 5)
    assert other["fid"] > 1e-4
    assert abs(same["fid"]) < other["fid"] / 100
    assert same["sampler"] == 'same, {"steps": 50}'
    assert other["sampler"] == "other, of unknown origin"
    assert (same["num_samples"], other["num_samples"]) == (6, 5)


def test_fid_of_images_of_another_size_is_refused(checkpoint, inception, tmp_path):
    coloured_pictures(tmp_path / "large", size=9)
    line = ("--metric", "fid", "--inception_weights", inception, "--images", "large")
    refused(evaluate(checkpoint, tmp_path, *line), 1, "9 x 9", "8 x 8")


def test_fid_is_not_calculated_in_the_samplers_precision(checkpoint, tmp_path, monkeypatch):
    seen = []

    class Fake:
        def __init__(self, weights: str | None) -> None:
            pass

        def distance(self, *arguments) -> float:
            seen.append(torch.is_autocast_enabled("cpu"))
            return 1.0

    monkeypatch.setattr("evaluate.Inception", Fake)
    line = ("--metric", "fid", "--num_samples", 2, "--steps", 2, "--precision", "bf16")
    fields(checkpoint, tmp_path, *line)
    assert seen == [False]


def test_fid_without_torch_fidelity(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    result = evaluate(checkpoint, tmp_path, "--metric", "fid")
    refused(result, 1, "pip install torch-fidelity")


def test_fid_without_network(checkpoint, tmp_path, monkeypatch):
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")

    def unreachable(*args, **options):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(fidelity, "load_state_dict_from_url", unreachable)
    result = evaluate(checkpoint, tmp_path, "--metric", "fid")
    refused(result, 1, "could not be downloaded", "Name or service", "--inception_weights FILE",
            fidelity.URL_INCEPTION_V3)


def test_weights_that_are_none(checkpoint, tmp_path):
    pytest.importorskip("torch_fidelity")
    for path in (tmp_path / "missing.pth", checkpoint):
        line = ("--metric", "fid", "--inception_weights", path)
        result = evaluate(checkpoint, tmp_path, *line)
        refused(result, 1, str(path), "does not hold them", "--inception_weights FILE")
