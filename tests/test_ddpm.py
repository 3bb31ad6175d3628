"""The mathematics against closed forms."""

import math

import pytest
import torch
from conftest import Gaussian, tiny
from torch import nn

from config import Config
from ddpm import DDPM, ImageNoise, cosine_beta_schedule, linear_beta_schedule, spaced_timesteps
from model import UNet


class Constant(nn.Module):
    """A network that returns the same number everywhere and notes how it was called."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.value, self.calls = value, []

    def forward(self, x_t, t):
        self.calls.append((t.clone(), self.training))
        return torch.full_like(x_t, self.value)


class ConstantImage(nn.Module):
    """A network whose x_0 is the same picture at every step."""

    def __init__(self, config: Config, x_start: torch.Tensor) -> None:
        super().__init__()
        self.x_start, self.alphas_cumprod = x_start, DDPM(nn.Identity(), config).alphas_cumprod

    def forward(self, x_t, t):
        a = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        return (x_t - a.sqrt() * self.x_start) / (1 - a).sqrt()


def t_of(*values: int) -> torch.Tensor:
    return torch.tensor(values)


# Schedules

def test_linear_schedule_has_the_papers_numbers():  # built in float32, sqrt(1 - A_0) is off by 8e-5
    ddpm = DDPM(nn.Identity(), Config())
    assert ddpm.alphas_cumprod.dtype == torch.float32
    for t, value in ((0, 0.9999), (249, 0.5241), (499, 0.07859), (999, 4.0358e-5)):
        assert ddpm.alphas_cumprod[t].item() == pytest.approx(value, rel=1e-4)
    assert ddpm.sqrt_alphas_cumprod[999].item() == pytest.approx(0.0063528, rel=1e-5)
    assert ddpm.sqrt_recip_alphas_cumprod[999].item() == pytest.approx(157.41, rel=1e-4)
    assert ddpm.sqrt_one_minus_alphas_cumprod[0].item() == pytest.approx(0.01, rel=2e-7)


def test_cosine_schedule_follows_its_formula_and_is_clipped_once():
    betas = cosine_beta_schedule(1000)
    assert (betas == 0.999).sum() == 1 and betas[-1] == 0.999
    alphas_cumprod = torch.cumprod(1 - betas, 0)

    def abar(t: float) -> float:
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in (0, 300, 700, 998):
        assert alphas_cumprod[t].item() == pytest.approx(abar(t + 1) / abar(0), rel=1e-9)
    assert alphas_cumprod[-1].item() == pytest.approx(2.43e-9, rel=2e-3)


@pytest.mark.parametrize("timesteps", [25, 100, 500, 4000])
def test_another_number_of_timesteps_ends_in_noise_too(timesteps):  # unscaled betas leave 0.60 at T = 100
    assert torch.cumprod(1 - linear_beta_schedule(timesteps), 0)[-1].sqrt() < 0.01
    assert torch.cumprod(1 - cosine_beta_schedule(timesteps), 0)[-1].sqrt() < 0.01


# The forward process

@pytest.mark.parametrize("t", [0, 1, 500, 999])
def test_q_sample_has_the_moments_of_eq_4(t):
    ddpm = DDPM(nn.Identity(), Config())
    x_start = torch.full((64, 3, 32, 32), 0.7)
    x_t = ddpm.q_sample(x_start, torch.full((64,), t)).double()
    a = ddpm.alphas_cumprod_float64[t]
    assert x_t.mean().item() == pytest.approx(0.7 * math.sqrt(a), abs=5 * math.sqrt((1 - a) / x_t.numel()) + 1e-6)
    assert x_t.std().item() == pytest.approx(math.sqrt(1 - a), rel=0.01)


def test_q_sample_takes_one_timestep_an_image(shape):
    ddpm, x_start, noise = DDPM(nn.Identity(), tiny()), torch.randn(shape), torch.randn(shape)
    together = ddpm.q_sample(x_start, t_of(0, 3, 29, 3), noise)
    for i, t in enumerate((0, 3, 29, 3)):
        assert torch.equal(together[i], ddpm.q_sample(x_start[i:i + 1], t_of(t), noise[i:i + 1])[0])


def test_training_draws_every_timestep(shape):  # t = 0 never trained, in some codebases
    model = Constant()
    ddpm = DDPM(model, tiny())
    for _ in range(200):
        ddpm.training_loss(torch.zeros(shape))
    assert set(torch.cat([t for t, _ in model.calls]).tolist()) == set(range(30))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("t", [1, 7, 29])
def test_q_posterior_is_bayes_rule(schedule, t):
    """q(x_{t-1} | x_t, x_0) as the product of the two densities, integrated on a grid."""
    ddpm = DDPM(nn.Identity(), tiny(beta_schedule=schedule))
    a, a_prev = ddpm.alphas_cumprod_float64[t], ddpm.alphas_cumprod_float64[t - 1]
    alpha, x_start, x_t = a / a_prev, 0.4, -0.3
    grid = torch.linspace(-6, 6, 400_001, dtype=torch.float64)
    log_density = (-(x_t - math.sqrt(alpha) * grid) ** 2 / (2 * (1 - alpha))
                   - (grid - math.sqrt(a_prev) * x_start) ** 2 / (2 * (1 - a_prev)))
    density = torch.softmax(log_density, 0)
    mean = (density * grid).sum()
    got_mean, got_variance = ddpm.q_posterior(torch.full((1, 1, 1, 1), x_start), torch.full((1, 1, 1, 1), x_t), t_of(t))
    assert got_mean.item() == pytest.approx(mean.item(), abs=1e-5)
    assert got_variance.item() == pytest.approx((density * (grid - mean) ** 2).sum().item(), rel=1e-4)


def test_posterior_numbers():
    ddpm = DDPM(nn.Identity(), Config())
    assert ddpm.posterior_variance[0] == 0
    assert ddpm.posterior_variance[1].item() == pytest.approx(5.4532e-5, rel=1e-4)
    assert ddpm.posterior_variance[999].item() == pytest.approx(0.0199999835, rel=1e-6)
    assert (ddpm.posterior_mean_coef1[0], ddpm.posterior_mean_coef2[0]) == (1, 0)


# The reverse process

def test_predict_x_start_inverts_q_sample(shape):
    ddpm, noise = DDPM(nn.Identity(), Config()), torch.randn(shape)
    x_start, t = torch.rand(shape) * 1.8 - 0.9, t_of(0, 100, 500, 900)
    torch.testing.assert_close(ddpm.predict_x_start(ddpm.q_sample(x_start, t, noise), t, noise), x_start,
                               atol=2e-5, rtol=0)


def test_the_mean_by_way_of_x_start_is_eq_11(shape):
    config = Config()
    pred_noise = torch.randn(shape)
    ddpm = DDPM(lambda x_t, t: pred_noise, config)
    t = t_of(1, 10, 200, 400)
    x_t = ddpm.q_sample(torch.zeros(shape), t, pred_noise)  # so that no x_0 is clipped
    mean, _ = ddpm.p_mean_variance(x_t, t)
    betas, a = linear_beta_schedule(1000)[t].view(-1, 1, 1, 1), ddpm.alphas_cumprod.double()[t].view(-1, 1, 1, 1)
    eq_11 = (x_t - betas / (1 - a).sqrt() * pred_noise) / (1 - betas).sqrt()
    torch.testing.assert_close(mean.double(), eq_11, atol=2e-5, rtol=0)


@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
def test_model_variance(variance, shape):
    ddpm = DDPM(Constant(), Config(variance=variance))
    _, got = ddpm.p_mean_variance(torch.zeros(shape), t_of(0, 1, 500, 999))
    large = [ddpm.posterior_variance[1], *ddpm.betas[[1, 500, 999]]]
    expected = large if variance == "fixed_large" else ddpm.posterior_variance[[0, 1, 500, 999]]
    assert torch.equal(got.flatten(), torch.stack(list(expected)))


def test_x_start_is_clipped_before_the_mean_is_formed(shape):  # missing, or without effect, in three codebases
    ddpm = DDPM(Constant(1e4), Config())
    t, x_t = t_of(10, 400, 800, 999), torch.randn(shape)
    mean, _ = ddpm.p_mean_variance(x_t, t)
    off = (mean - ddpm.posterior_mean_coef2[t].view(-1, 1, 1, 1) * x_t).abs()
    assert (off <= ddpm.posterior_mean_coef1[t].view(-1, 1, 1, 1) + 1e-6).all()


def test_x_t_is_never_clamped(shape):
    x_t = torch.full(shape, 4.0)
    mean, _ = DDPM(Constant(), Config()).p_mean_variance(x_t, t_of(900, 900, 900, 900))
    assert (mean > 3).all()


def test_no_noise_at_the_last_step_image_by_image(shape):
    config = tiny()
    ddpm, x_t = DDPM(Constant(), config), torch.rand(shape) * 0.5
    t = t_of(0, 5, 0, 5)
    mean, _ = ddpm.p_mean_variance(x_t, t)
    x = ddpm.p_sample(x_t, t)
    assert torch.equal(x[::2], mean[::2]) and not torch.isclose(x[1::2], mean[1::2]).all(dim=(1, 2, 3)).any()


def test_the_whole_chain_recovers_gaussian_data():
    """With the perfect network for N(0.2, 0.15), 4,096 pixels must come out with that mean and deviation."""
    config = Config()
    noise = torch.randn(16, 1, 16, 16)
    for variance, rel in (("fixed_small", 0.05), ("fixed_large", 0.05)):
        ddpm = DDPM(Gaussian(config, 0.2, 0.15), Config(variance=variance))
        x = ddpm.sample(noise)
        assert x.mean().item() == pytest.approx(0.2, abs=0.01)
        assert x.std().item() == pytest.approx(0.15, rel=rel)


def test_a_constant_image_is_reached_exactly(shape):  # sigma 0.01 stays in it where the last step adds noise
    config, x_start = tiny(), torch.rand(4, 3, 8, 8) - 0.5
    ddpm = DDPM(ConstantImage(config, x_start), config)
    torch.testing.assert_close(ddpm.sample(torch.randn(shape)), x_start, atol=1e-5, rtol=0)


def test_the_chain_calls_the_network_once_a_timestep_in_eval_mode(shape):
    model = Constant()
    model.frozen = nn.Dropout().eval()
    ddpm = DDPM(model, tiny())
    steps = [t for t, _, _ in ddpm.p_sample_loop(torch.randn(shape), t_start=20)]
    assert steps == list(range(20, -1, -1))
    assert [(t.tolist(), training) for t, training in model.calls] == [([t] * 4, False) for t in steps]
    assert model.training and not model.frozen.training


def test_the_mode_is_restored_after_an_exception(shape):
    class Broken(nn.Module):
        def forward(self, x_t, t):
            raise RuntimeError("broken")

    ddpm = DDPM(Broken(), tiny())
    with pytest.raises(RuntimeError, match="broken"):
        ddpm.sample(torch.randn(shape))
    assert ddpm.training and ddpm.model.training


def test_dropout_is_off_while_sampling():
    config = tiny(dropout=0.9)
    ddpm, x_T = DDPM(UNet(config), config), torch.randn(2, 3, 8, 8)
    nn.init.normal_(ddpm.model.conv_out.weight)
    for block in ddpm.model.down:
        if hasattr(block, "conv2"):
            nn.init.normal_(block.conv2.weight)
    t = t_of(5, 5)
    assert torch.equal(ddpm.p_mean_variance(x_T, t)[0], ddpm.p_mean_variance(x_T, t)[0])


# The loss

def test_loss_is_the_mean_over_all_elements(shape):
    ddpm, noise = DDPM(Constant(0.5), tiny()), torch.randn(shape)
    loss = ddpm.training_loss(torch.zeros(shape), t_of(0, 1, 2, 3), noise)
    assert loss.shape == () and loss.item() == pytest.approx((noise - 0.5).square().mean().item())


def test_loss_is_fp32_under_autocast(shape):
    config = tiny()
    with torch.autocast("cpu", torch.bfloat16):
        losses = DDPM(UNet(config), config).loss_per_image(torch.zeros(shape), t_of(0, 1, 2, 3), torch.randn(shape))
    assert losses.dtype == torch.float32 and losses.shape == (4,)


# Fewer steps

@pytest.mark.parametrize("spacing", ["quadratic", "uniform"])
@pytest.mark.parametrize("steps", [1, 2, 10, 50, 300, 999, 1000])
def test_spaced_timesteps_are_exactly_as_many_and_start_at_the_end(spacing, steps):
    timesteps = spaced_timesteps(1000, steps, spacing)
    assert len(timesteps) == len(set(timesteps)) == steps
    assert timesteps == sorted(timesteps, reverse=True) and timesteps[0] == 999 and timesteps[-1] >= 0


# Noise

def test_image_noise_depends_on_seed_and_index_alone():
    def draws(seed, indices, count=70):
        noise = ImageNoise(seed, indices, (3, 8, 8), "cpu")
        return torch.stack([noise() for _ in range(count)], dim=1)

    together = draws(0, range(7))
    assert torch.equal(together[4:6], draws(0, [4, 5])) and torch.equal(together[:, :3], draws(0, range(7), 3))
    assert not torch.equal(together[1], draws(1, [0])[0])  # seed + i would make them equal
    assert len({draw.numpy().tobytes() for draw in together.flatten(0, 1)}) == 7 * 70
    assert together.mean().abs() < 0.02 and abs(together.std() - 1) < 0.02


# A GPU that the tests never saw: on the meta device a tensor left on the CPU, and every read-back, raises

def test_the_step_and_the_samplers_stay_on_the_device():
    config = tiny()
    with torch.device("meta"):
        ddpm = DDPM(UNet(config), config).to("meta")
        x = torch.randn(4, 3, 8, 8)
        t = torch.zeros(4, dtype=torch.int64)
    loss = ddpm.training_loss(x)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(ddpm.parameters(), 1.0)
    ddpm.p_sample(x, t)
    for _ in ddpm.p_sample_loop(x):
        pass
    for steps, eta in ((10, 0.0), (10, 1.0), (30, 1.0)):
        x = ddpm.sample(x, steps, eta)
    assert {loss.device.type, norm.device.type, x.device.type} == {"meta"}


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_the_kl_of_the_posterior_is_the_weighted_error_of_the_noise(variance):  # Eq. 8 is Eq. 12, up to a constant
    config = Config(variance=variance)
    ddpm = DDPM(nn.Identity(), config).double()
    betas = linear_beta_schedule(1000)
    x_start, error = torch.randn(2, 5, 1, 2, 2, dtype=torch.float64)
    t = t_of(1, 10, 200, 700, 999)
    alpha, beta = (value.view(-1, 1, 1, 1) for value in (torch.cumprod(1 - betas, 0)[t], betas[t]))
    pred_x_start = x_start - ((1 - alpha) / alpha).sqrt() * error  # Eq. 15 of a noise that is off by error
    kl = ddpm.posterior_kl(x_start, pred_x_start, t) - ddpm.posterior_kl(x_start, x_start, t)
    sigma2 = ddpm.model_variance[t].view(-1, 1, 1, 1)
    assert torch.allclose(kl, beta**2 / (2 * sigma2 * (1 - beta) * (1 - alpha)) * error**2, rtol=1e-4)
