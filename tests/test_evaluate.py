"""The likelihood against closed forms in float64, and evaluate.py from the command line."""

import json
import math
import sys
import urllib.error
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import Gaussian, called, refused, tiny
from PIL import Image
from test_ddpm import Constant
from torch import nn
from torch.distributions import Normal, kl_divergence

from checkpoint import save_checkpoint
from config import Config
from data import to_float
from ddpm import DDPM, cosine_beta_schedule, discretized_log_likelihood, linear_beta_schedule
from evaluate import random_timesteps
from model import UNet

LEVELS = to_float(torch.arange(256))
FIELDS = ["metric", "checkpoint", "step", "data", "num_images", "timesteps_per_image", "seed", "precision", "total",
          "standard_error", "prior", "rate", "distortion", "rmse"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A network with random weights everywhere."""
    config = tiny()
    torch.manual_seed(1)
    model = UNet(config)
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    path = tmp_path_factory.mktemp("evaluate") / "model.pth"
    save_checkpoint({"config": asdict(config), "step": 7, "ema": model.state_dict()}, path)
    return path


def evaluate(checkpoint, tmp_path, *arguments):
    line = ["--checkpoint", str(checkpoint), "--device", "cpu", *map(str, arguments)]
    return called("evaluate.py", *line, cwd=tmp_path)


def fields(checkpoint, tmp_path, *arguments) -> dict:
    result = evaluate(checkpoint, tmp_path, "--json", "result.json", *arguments)
    assert result.returncode == 0, result.stderr
    return json.loads((tmp_path / "result.json").read_text())


def pictures(*shape: int) -> torch.Tensor:
    return LEVELS[torch.randint(256, shape)]


def bits(nats: torch.Tensor) -> torch.Tensor:
    return nats.double().mean(dim=(1, 2, 3)) / math.log(2)


# The terms of the bound

@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_every_term_is_what_the_paper_writes(variance, schedule):
    """Eq. 5 term by term in float64 by torch.distributions, with the same noise, for a network that returns zero."""
    ddpm = DDPM(Constant(), tiny(timesteps=50, variance=variance, beta_schedule=schedule))
    x, noise = pictures(4, 3, 8, 8), torch.randn(50, 4, 3, 8, 8)
    got = ddpm.bits_per_dim(x, noise=lambda t: noise[t])

    betas = linear_beta_schedule(50) if schedule == "linear" else cosine_beta_schedule(50)
    alphas_cumprod, x = torch.cumprod(1 - betas, 0), x.double()
    last = Normal(alphas_cumprod[-1].sqrt() * x, (1 - alphas_cumprod[-1]).sqrt())
    prior = bits(kl_divergence(last, Normal(0.0, 1.0)))
    rate = torch.zeros(4, dtype=torch.float64)
    for t in range(50):
        a, a_prev, beta = alphas_cumprod[t], alphas_cumprod[t - 1] if t else torch.tensor(1.0), betas[t]
        x_t = a.sqrt() * x + (1 - a).sqrt() * noise[t]
        pred_x_start = (x_t / a.sqrt()).clamp(-1, 1)

        def mean(x_start):
            return (a_prev.sqrt() * beta * x_start + (1 - beta).sqrt() * (1 - a_prev) * x_t) / (1 - a)  # noqa: B023

        posterior_variance = beta * (1 - a_prev) / (1 - a)
        if t == 0:
            posterior_1 = betas[1] * (1 - a) / (1 - alphas_cumprod[1])
            decoder = Normal(mean(pred_x_start), posterior_1.sqrt())
            above, below = decoder.cdf(x + 1 / 255), decoder.cdf(x - 1 / 255)
            mass = torch.where(x > 0.999, 1, above) - torch.where(x < -0.999, 0, below)
            # Where the mass is not a number any more: the tail of the normal density, e^(-z^2/2) / (z sqrt(2 pi)).
            z = ((x - decoder.mean).abs() - 1 / 255) / decoder.stddev
            tail = -z**2 / 2 - torch.log(z * math.sqrt(2 * math.pi))
            distortion = bits(-torch.where(z > 6, tail, mass.log()))
            mse = (x - pred_x_start).square().mean(dim=(1, 2, 3))
        else:
            model_variance = beta if variance == "fixed_large" else posterior_variance
            rate += bits(kl_divergence(Normal(mean(x), posterior_variance.sqrt()),
                                       Normal(mean(pred_x_start), model_variance.sqrt())))
    expected = {"total": prior + rate + distortion, "prior": prior, "rate": rate, "distortion": distortion, "mse": mse}
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == torch.float32
        torch.testing.assert_close(got[name].double(), value, rtol=1e-3 if name == "distortion" else 2e-5, atol=0)


def test_the_perfect_network_for_gaussian_data_costs_its_exact_integrals():
    """x_0 given x_t is normal with a known variance, which every L_t and the decoder's mass integrate to."""
    mean, std, config = 0.1, 0.15, Config()
    grey = ((mean + std * torch.randn(16, 1, 32, 32)) * 127.5 + 127.5).round().long().clamp(0, 255)
    got = DDPM(Gaussian(config, mean, std), config).bits_per_dim(LEVELS[grey])

    betas = linear_beta_schedule(1000)
    a = torch.cumprod(1 - betas, 0)
    a_prev = torch.cat([torch.ones(1), a[:-1]])
    error = std**2 * (1 - a) / (a * std**2 + 1 - a)
    ratio = ((1 - a_prev) / (1 - a))[1:]  # posterior variance / beta_t
    coef1 = (a_prev.sqrt() * betas / (1 - a))[1:]
    rate = ((ratio - 1 - ratio.log() + coef1**2 * error[1:] / betas[1:]) / 2).sum() / math.log(2)
    sigma, z = 5.4532e-5**0.5, torch.linspace(-8, 8, 10_001, dtype=torch.float64)
    weights, off = torch.softmax(-z**2 / 2, 0), (z * error[0].sqrt()).abs()
    mass = (torch.erfc((off - 1 / 255) / sigma / 2**0.5) - torch.erfc((off + 1 / 255) / sigma / 2**0.5)) / 2
    distortion = -(weights * mass.log()).sum() / math.log(2)

    assert got["rate"].mean().item() == pytest.approx(rate.item(), rel=0.005)
    assert got["distortion"].mean().item() == pytest.approx(distortion.item(), rel=0.01)
    assert got["mse"].mean().item() == pytest.approx(error[0].item(), rel=0.03)
    # No code is shorter than the data's entropy; the perfect network's is little longer.
    entropy = math.log2(std * math.sqrt(2 * math.pi * math.e) * 127.5)
    assert entropy < got["total"].mean().item() < entropy + 0.2


def test_the_prior_is_about_1e_5():  # 1 - A in float32 alone would be 1e-7 off
    x = pictures(64, 3, 32, 32)
    got = DDPM(Constant(), Config()).bits_per_dim(x, torch.ones(1, 64, dtype=torch.int64))["prior"]
    a = 4.0358e-5
    expected = (a * x.double().square().mean(dim=(1, 2, 3)) - a - math.log1p(-a)) / 2 / math.log(2)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=0)
    assert got.mean().item() == pytest.approx(1e-5, rel=0.1)


@pytest.mark.parametrize("std", [0.00738, 0.1, 2.0])
@pytest.mark.parametrize("mean", [-1.0, -0.3, 0.999, 1.0])
def test_the_decoders_256_bins_sum_to_one(mean, std):
    log_mass = discretized_log_likelihood(LEVELS, torch.full((256,), mean), torch.tensor(std))
    assert log_mass.double().exp().sum().item() == pytest.approx(1, abs=2e-6)
    # The edge bins reach to infinity.
    decoder = Normal(torch.tensor(mean).double(), std)
    assert log_mass[0].exp().item() == pytest.approx(decoder.cdf(LEVELS[0] + 1 / 255).item(), abs=1e-6)
    assert log_mass[-1].exp().item() == pytest.approx(1 - decoder.cdf(LEVELS[-1] - 1 / 255).item(), abs=1e-6)


@pytest.mark.parametrize("x, mean", [(-1.0, 1.0), (1.0, -1.0)])
def test_the_likelihood_far_from_the_mean_is_neither_infinite_nor_cut_off(x, mean):
    z = (2 - 1 / 255) / 0.00738
    got = discretized_log_likelihood(torch.tensor([x]), torch.tensor([mean]), torch.tensor(0.00738))
    assert got.item() == pytest.approx(-z**2 / 2 - math.log(z * math.sqrt(2 * math.pi)), rel=1e-5)


# An estimate from K timesteps

def test_the_estimate_of_the_rate_is_unbiased():
    """40,000 estimates of one image from two timesteps each, against the whole sum: within three standard errors."""
    config = tiny()
    ddpm, x = DDPM(Constant(), config), pictures(1, 1, 2, 2).expand(40_000, -1, -1, -1)
    exact = ddpm.bits_per_dim(x[:4000])
    estimate = ddpm.bits_per_dim(x, random_timesteps(0, range(40_000), 2, 30))
    for name in ("rate", "total"):
        errors = [value[name].double().std().item() / math.sqrt(len(value[name])) for value in (exact, estimate)]
        difference = (estimate[name].double().mean() - exact[name].double().mean()).item()
        assert abs(difference) < 3 * math.hypot(*errors)
        assert 3 * math.hypot(*errors) < exact["rate"].mean() / 30  # T / K would be off by 1 / 29


def test_an_estimate_from_all_timesteps_is_the_sum():
    ddpm, x, noise = DDPM(Constant(), tiny()), pictures(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    exact = ddpm.bits_per_dim(x, noise=lambda n: noise)
    estimate = ddpm.bits_per_dim(x, random_timesteps(0, range(4), 29, 30), lambda n: noise)
    for name in exact:
        torch.testing.assert_close(estimate[name], exact[name], rtol=1e-5, atol=0)


def test_random_timesteps_depend_on_seed_and_image_alone():
    drawn = random_timesteps(0, range(2000), 3, 30)
    assert drawn.shape == (3, 2000) and set(drawn.flatten().tolist()) == set(range(1, 30))
    assert torch.equal(drawn[:, 5:9], random_timesteps(0, range(5, 9), 3, 30))
    assert all(len(set(column)) == 3 for column in drawn.T.tolist())
    assert not torch.equal(drawn[:, 1:], random_timesteps(1, range(1999), 3, 30))
    counts = torch.bincount(drawn.flatten(), minlength=30)[1:]
    assert (counts - 6000 / 29).abs().max() < 5 * math.sqrt(6000 / 29)


# How the network is called

def test_one_call_a_timestep_in_eval_mode_and_the_modes_restored():
    model = Constant()
    model.frozen = nn.Dropout().eval()
    ddpm, asked = DDPM(model, tiny()), []
    x = pictures(4, 3, 8, 8).requires_grad_()

    def noise(n: int) -> torch.Tensor:
        asked.append(n)
        return torch.zeros(4, 3, 8, 8)

    got = ddpm.bits_per_dim(x, noise=noise)
    assert [(t.tolist(), training) for t, training in model.calls] == [([t] * 4, False) for t in range(30)]
    assert asked == list(range(30)) and not any(value.requires_grad for value in got.values())
    assert ddpm.training and model.training and not model.frozen.training


def test_dropout_is_off():
    config = tiny(dropout=0.9)
    ddpm, noise = DDPM(UNet(config), config), torch.randn(30, 2, 3, 8, 8)
    for p in ddpm.parameters():
        nn.init.normal_(p, std=0.1)
    x = pictures(2, 3, 8, 8)
    first, second = (ddpm.bits_per_dim(x, noise=lambda t: noise[t])["total"] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("K", [None, 2])
def test_it_stays_on_the_device(K):  # on the meta device a tensor left on the CPU, and every read-back, raises
    config = tiny()
    with torch.device("meta"):
        ddpm, x = DDPM(UNet(config), config).to("meta"), torch.randn(4, 3, 8, 8)
        timesteps = K and torch.ones(K, 4, dtype=torch.int64)
    got = ddpm.bits_per_dim(x, timesteps)
    assert {(value.device.type, tuple(value.shape)) for value in got.values()} == {("meta", (4,))}


# evaluate.py --metric bpd

@pytest.mark.parametrize("K", [(), ("--timesteps_per_image", 4)])
def test_the_result_does_not_depend_on_the_batch_size(checkpoint, tmp_path, K):
    results = [fields(checkpoint, tmp_path, "--metric", "bpd", "--num_images", 7, "--batch_size", size, *K)
               for size in (1, 3, 64)]
    for result in results[1:]:
        for name in FIELDS:
            exact = isinstance(result[name], str)
            assert result[name] == (results[0][name] if exact else pytest.approx(results[0][name], rel=1e-4))
    other = fields(checkpoint, tmp_path, "--metric", "bpd", "--num_images", 7, "--seed", 1, *K)
    assert other["rate"] != pytest.approx(results[0]["rate"], rel=1e-4)


def test_the_json_is_what_is_printed(checkpoint, tmp_path):
    result = evaluate(checkpoint, tmp_path, "--metric", "bpd", "--num_images", 5, "--json", "result.json")
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / "result.json").read_text())
    printed = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert list(written) == list(printed) == FIELDS
    for name, value in written.items():
        assert printed[name].startswith(str(value))
    assert (written["num_images"], written["timesteps_per_image"], written["data"]) == (5, 30, "shapes, test set")
    assert written["total"] == pytest.approx(sum(written[name] for name in ("prior", "rate", "distortion")), rel=1e-4)
    assert 0 < written["standard_error"] < written["total"] and written["rmse"] > 0
    assert "paper: 3.75" in printed["total"] and "paper: 0.95" in printed["rmse"]
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_another_data_set_and_the_newest_checkpoint(checkpoint, tmp_path):
    folder, run = tmp_path / "folder", tmp_path / "run" / "checkpoints"
    folder.mkdir()
    run.mkdir(parents=True)
    (run / "final_model.pth").write_bytes(checkpoint.read_bytes())
    Image.fromarray(np.full((9, 9, 3), 90, dtype=np.uint8)).save(folder / "a.png")
    result = called("evaluate.py", "--metric", "bpd", "--run_dir", str(tmp_path / "run"), "--data", "folder",
                    "--data_dir", "cache", "--json", "x.json", "--device", "cpu", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / "x.json").read_text())
    assert written["data"] == "folder, the whole folder" and list((tmp_path / "cache").glob("*.npy"))
    assert (written["num_images"], written["standard_error"]) == (1, None)  # of one image there is none


@pytest.mark.parametrize("status, words, arguments", [
    (2, ["--metric"], []),
    (2, ["num_images=0", "at least 1"], ["--metric", "bpd", "--num_images", "0"]),
    (2, ["timesteps_per_image=0"], ["--metric", "bpd", "--timesteps_per_image", "0"]),
    (1, ["timesteps_per_image=30", "1 to 29"], ["--metric", "bpd", "--timesteps_per_image", "30"]),
    (2, ["batch_size=0"], ["--metric", "bpd", "--batch_size", "0"]),
    (2, ["eta=2.0"], ["--metric", "fid", "--eta", "2"]),
    (1, ["neither a folder"], ["--metric", "bpd", "--data", "nowhere"]),
])
def test_mistakes_are_answered_in_one_line(checkpoint, tmp_path, status, words, arguments):
    refused(evaluate(checkpoint, tmp_path, *arguments), status, *words)


def test_no_checkpoint(tmp_path):
    refused(called("evaluate.py", "--metric", "bpd", cwd=tmp_path), 1, "no checkpoint", "--checkpoint FILE")


def test_a_json_file_that_cannot_be_written(checkpoint, tmp_path):
    result = evaluate(checkpoint, tmp_path, "--metric", "bpd", "--num_images", 1, "--json", "nowhere/x.json")
    assert result.returncode == 1 and "cannot be written" in result.stderr and "Traceback" not in result.stderr
    assert "total" in result.stdout  # what took hours is not lost


# evaluate.py --metric fid

@pytest.fixture
def inception(tmp_path_factory, monkeypatch):
    """A file of random weights; and the features are those of the first layers, which have 64 numbers, not 2048."""
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    network = fidelity.FeatureExtractorInceptionV3
    monkeypatch.setattr(network, "get_default_feature_layer_for_metric", staticmethod(lambda metric: "64"))
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    with monkeypatch.context() as patch:
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(network, "load_state_dict", lambda *_: None)
        torch.save(network("inception-v3-compat", ["64"]).state_dict(), path)
    return path


def test_fid_of_generated_images(checkpoint, inception, tmp_path, monkeypatch):
    monkeypatch.setattr("data.draw_shapes", lambda count, size, channels, split: shapes[split])
    shapes = {"train": np.random.default_rng(0).integers(256, size=(5, 3, 8, 8), dtype=np.uint8)}
    common = ("--metric", "fid", "--num_samples", 3, "--inception_weights", inception)
    chain = fields(checkpoint, tmp_path, *common)
    assert chain["sampler"] == "Algorithm 2, 30 of 30 steps, seed 0, fp32" and chain["step"] == 7
    assert (chain["reference"], chain["num_reference"], chain["num_samples"]) == ("shapes, train set", 5, 3)
    assert math.isfinite(chain["fid"]) and chain["fid"] > 0
    ddim = fields(checkpoint, tmp_path, *common, "--steps", 3, "--batch_size", 2)
    assert ddim["sampler"] == "DDIM, eta 0, quadratic spacing, 3 of 30 steps, seed 0, fp32"
    assert ddim["fid"] != chain["fid"]


@pytest.mark.parametrize("channels", [1, 3])
def test_fid_of_equal_images_is_zero_and_of_others_is_not(inception, tmp_path, channels):
    config = tiny(channels=channels, data="same", data_dir="cache")
    path = tmp_path / "model.pth"
    save_checkpoint({"config": asdict(config), "step": 7, "ema": UNet(config).state_dict()}, path)
    pixels = np.random.default_rng(0).integers(256, size=(6, 8, 8), dtype=np.uint8)
    for folder in ("same", "other"):
        (tmp_path / folder).mkdir()
        for i, image in enumerate(pixels if folder == "same" else pixels // 2):
            Image.fromarray(image).save(tmp_path / folder / f"{i}.png")
    (tmp_path / "same" / "sampled_with.json").write_text('{"steps": 50}')
    common = ("--metric", "fid", "--inception_weights", inception, "--images")
    same = fields(path, tmp_path, *common, "same")
    other = fields(path, tmp_path, *common, "other", "--num_samples", 5)
    assert other["fid"] > 1e-4 and abs(same["fid"]) < other["fid"] / 100
    assert same["sampler"] == 'same, {"steps": 50}' and other["sampler"] == "other, of unknown origin"
    assert (same["num_samples"], other["num_samples"]) == (6, 5)


def test_fid_without_torch_fidelity(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    refused(evaluate(checkpoint, tmp_path, "--metric", "fid"), 1, "pip install torch-fidelity")


def test_fid_without_network(checkpoint, tmp_path, monkeypatch):
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")

    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(fidelity, "load_state_dict_from_url", unreachable)
    refused(evaluate(checkpoint, tmp_path, "--metric", "fid"), 1, "could not be downloaded", "Name or service",
            "--inception_weights FILE", fidelity.URL_INCEPTION_V3)


def test_weights_that_are_none(checkpoint, tmp_path):
    pytest.importorskip("torch_fidelity")
    for path in (tmp_path / "missing.pth", checkpoint):
        refused(evaluate(checkpoint, tmp_path, "--metric", "fid", "--inception_weights", path), 1, str(path),
                "does not hold them", "--inception_weights FILE")
