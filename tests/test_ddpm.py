"""ddpm.py: the mathematics of the paper against closed forms."""

import math

import pytest
import torch
from helpers import Constant, ConstantImage, Gaussian, tiny
from torch import Tensor, nn
from torch.testing import assert_close

from config import Config
from ddpm import DDPM, beta_schedule, cosine_beta_schedule, linear_beta_schedule


def t_of(*values: int) -> Tensor:
    return torch.tensor(values)


# Schedules

def test_linear_schedule_has_the_papers_numbers():
    ddpm = DDPM(nn.Identity(), Config())
    assert ddpm.alphas_cumprod.dtype == torch.float32
    for t, value in ((0, 0.9999), (249, 0.5241), (499, 0.07859), (999, 4.0358e-5)):
        assert ddpm.alphas_cumprod[t].item() == pytest.approx(value, rel=1e-4)
    assert ddpm.sqrt_alphas_cumprod[999].item() == pytest.approx(0.0063528, rel=1e-5)
    assert ddpm.sqrt_recip_alphas_cumprod[999].item() == pytest.approx(157.41, rel=1e-4)
    # Built in float32, it is off by 8e-5.
    assert ddpm.sqrt_one_minus_alphas_cumprod[0].item() == pytest.approx(0.01, rel=2e-7)


def test_cosine_schedule_follows_its_formula_and_is_clipped_once():
    betas = cosine_beta_schedule(1000)
    assert betas[-1] == 0.999
    assert (betas == 0.999).sum() == 1
    alphas_cumprod = torch.cumprod(1 - betas, dim=0)

    def abar(t: float) -> float:
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in (0, 300, 700, 998):
        assert alphas_cumprod[t].item() == pytest.approx(abar(t + 1) / abar(0), rel=1e-9)
    assert alphas_cumprod[-1].item() == pytest.approx(2.43e-9, rel=2e-3)


@pytest.mark.parametrize("schedule", [linear_beta_schedule, cosine_beta_schedule])
@pytest.mark.parametrize("timesteps", [25, 100, 500, 4000])
def test_another_number_of_timesteps_ends_in_noise_too(timesteps, schedule):
    # Unscaled, linear betas leave 0.60 at T = 100.
    alphas_cumprod = torch.cumprod(1 - schedule(timesteps), dim=0)
    assert alphas_cumprod[-1].sqrt() < 0.01


def test_a_schedule_without_a_formula_is_refused():
    config = Config()
    config.beta_schedule = "sine"
    with pytest.raises(ValueError, match="sine"):
        beta_schedule(config)


# The forward process

@pytest.mark.parametrize("t", [0, 1, 500, 999])
def test_q_sample_has_the_moments_of_eq_4(t):
    ddpm = DDPM(nn.Identity(), Config())
    x_start = torch.full((64, 3, 32, 32), 0.7)
    x_t = ddpm.q_sample(x_start, torch.full((64,), t)).double()
    a = ddpm.alphas_cumprod_float64[t]
    five_errors = 5 * math.sqrt((1 - a) / x_t.numel())
    assert x_t.mean().item() == pytest.approx(0.7 * math.sqrt(a), abs=five_errors + 1e-6)
    assert x_t.std().item() == pytest.approx(math.sqrt(1 - a), rel=0.01)


@pytest.mark.parametrize("t", [-1, 1000])
def test_a_t_that_is_not_there_is_refused(t):
    ddpm = DDPM(nn.Identity(), Config())
    with pytest.raises(IndexError):
        ddpm.q_sample(torch.zeros(2, 3), torch.tensor([0, t]))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("t", [1, 7, 29])
def test_q_posterior_is_bayes_rule(schedule, t):
    """The expected moments are those of the product of two densities, integrated on a grid."""
    ddpm = DDPM(nn.Identity(), tiny(beta_schedule=schedule))
    a, a_prev = ddpm.alphas_cumprod_float64[t], ddpm.alphas_cumprod_float64[t - 1]
    alpha, x_start, x_t = a / a_prev, 0.4, -0.3
    grid = torch.linspace(-6, 6, 400_001, dtype=torch.float64)
    step_from = (x_t - math.sqrt(alpha) * grid) ** 2 / (2 * (1 - alpha))
    step_to = (grid - math.sqrt(a_prev) * x_start) ** 2 / (2 * (1 - a_prev))
    density = torch.softmax(-step_from - step_to, dim=0)
    mean = (density * grid).sum()
    variance = (density * (grid - mean) ** 2).sum()

    got_mean, got_variance = ddpm.q_posterior(
        torch.full((1, 1, 1, 1), x_start), torch.full((1, 1, 1, 1), x_t), t_of(t))
    assert got_mean.item() == pytest.approx(mean.item(), abs=1e-5)
    assert got_variance.item() == pytest.approx(variance.item(), rel=1e-4)


# The loss (in training: test_train.py)

def test_the_loss_is_the_mean_over_the_elements_of_each_image(shape):
    ddpm, noise = DDPM(Constant(0.5), tiny()), torch.randn(shape)
    given = t_of(0, 1, 2, 3)
    losses, t = ddpm.training_losses(torch.zeros(shape), given, noise)
    expected = (noise - 0.5).square().mean(dim=(1, 2, 3))
    assert torch.equal(t, given)
    assert_close(losses, expected)
    loss = ddpm.training_loss(torch.zeros(shape), given, noise)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected.mean().item())


# The reverse process

def test_predict_x_start_inverts_q_sample(shape):
    noise = torch.randn(shape)
    ddpm = DDPM(lambda x_t, t: noise, Config())
    x_start, t = torch.rand(shape) * 1.8 - 0.9, t_of(0, 100, 500, 900)
    x_t = ddpm.q_sample(x_start, t, noise)
    assert_close(ddpm.predict_x_start(x_t, t), x_start, rtol=0, atol=2e-5)


def test_the_mean_by_way_of_x_start_is_eq_11(shape):
    pred_noise = torch.randn(shape)
    ddpm = DDPM(lambda x_t, t: pred_noise, Config())
    t = t_of(1, 10, 200, 400)
    x_t = ddpm.q_sample(torch.zeros(shape), t, pred_noise)  # so that no x_0 is clipped
    mean, _ = ddpm.p_mean_variance(x_t, t)
    betas = linear_beta_schedule(1000)[t].view(-1, 1, 1, 1)
    a = ddpm.alphas_cumprod.double()[t].view(-1, 1, 1, 1)
    eq_11 = (x_t - betas / (1 - a).sqrt() * pred_noise) / (1 - betas).sqrt()
    assert_close(mean.double(), eq_11, rtol=0, atol=2e-5)


def test_model_variance(shape):
    t = t_of(0, 1, 500, 999)
    large = DDPM(Constant(), Config(variance="fixed_large"))
    _, variance = large.p_mean_variance(torch.zeros(shape), t)
    assert torch.equal(variance.flatten()[1:], large.betas[t[1:]])
    assert variance[0] == large.posterior_variance[1]
    small = DDPM(Constant(), Config(variance="fixed_small"))
    _, variance = small.p_mean_variance(torch.zeros(shape), t)
    assert torch.equal(variance.flatten(), small.posterior_variance[t])


def test_x_start_is_clipped_before_the_mean_is_formed(shape):
    # Missing, or without effect, in three codebases.
    ddpm = DDPM(Constant(1e4), Config())
    t, x_t = t_of(10, 400, 800, 999), torch.randn(shape)
    mean, _ = ddpm.p_mean_variance(x_t, t)
    from_x_start = mean - ddpm.posterior_mean_coef2[t].view(-1, 1, 1, 1) * x_t
    largest = ddpm.posterior_mean_coef1[t].view(-1, 1, 1, 1)
    assert (from_x_start.abs() <= largest + 1e-6).all()


def test_a_step_draws_from_the_mean_and_variance(shape):
    ddpm = DDPM(Constant(), tiny())
    x_t, noise, t = torch.randn(shape), torch.randn(shape), t_of(1, 5, 20, 29)
    mean, variance = ddpm.p_mean_variance(x_t, t)
    expected = mean + variance.sqrt() * noise
    assert_close(ddpm.p_sample(x_t, t, noise), expected, rtol=0, atol=1e-6)
    drawn = torch.stack([ddpm.p_sample(x_t, t) - mean for _ in range(200)])
    deviation = drawn.std(dim=(0, 2, 3, 4))
    assert_close(deviation, variance.sqrt().flatten(), rtol=0.03, atol=0)


def test_no_noise_at_the_last_step_image_by_image(shape):
    ddpm = DDPM(Constant(), tiny())
    x_t = torch.rand(shape) * 0.5
    t = t_of(0, 5, 0, 5)
    mean, _ = ddpm.p_mean_variance(x_t, t)
    x = ddpm.p_sample(x_t, t)
    assert torch.equal(x[::2], mean[::2])
    assert not (x[1::2] == mean[1::2]).any()


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_the_whole_chain_recovers_gaussian_data(variance):
    """With the perfect network for N(0.2, 0.15) the pixels have that mean and deviation."""
    config = Config(variance=variance)
    ddpm = DDPM(Gaussian(config, 0.2, 0.15), config)
    x = ddpm.sample(torch.randn(16, 1, 16, 16))
    assert x.mean().item() == pytest.approx(0.2, abs=0.01)
    assert x.std().item() == pytest.approx(0.15, rel=0.05)


def test_a_constant_image_is_reached_exactly(shape):
    # A deviation of 0.01 stays in it where the last step adds noise.
    config, x_start = tiny(), torch.rand(shape) - 0.5
    ddpm = DDPM(ConstantImage(config, x_start), config)
    assert_close(ddpm.sample(torch.randn(shape)), x_start, rtol=0, atol=1e-5)


def test_the_chain_is_one_step_after_another(shape):
    """Each step asks for noise like its x_t, the last one too, and takes that noise."""
    config = tiny()
    ddpm = DDPM(Gaussian(config, 0.1, 0.3), config)
    draws, asked = torch.randn(30, *shape), []
    timesteps = []

    def randn_like(x_t: Tensor) -> Tensor:
        asked.append(x_t)
        return draws[len(asked) - 1]

    x_t = torch.randn(shape)
    for t, x in ddpm.p_sample_loop(x_t, 20, randn_like):
        timesteps.append(t)
        assert asked[-1] is x_t
        noise = draws[len(asked) - 1]
        assert torch.equal(x, ddpm.p_sample(x_t, t_of(t, t, t, t), noise))
        x_t = x
    assert timesteps == list(range(20, -1, -1))
    assert len(asked) == 21


# Data of any shape

def everything(ddpm: DDPM, x_start: Tensor, x_t: Tensor, draws: Tensor) -> dict[str, Tensor]:
    """Return what the diffusion makes of four examples, each at a t of its own."""
    t, noise = t_of(0, 5, 20, 29), draws[0]
    mean, variance = ddpm.q_posterior(x_start, x_t, t)
    losses, _ = ddpm.training_losses(x_start, t, noise)
    numbers = iter(draws)
    chain = ddpm.p_sample_loop(x_t, randn_like=lambda x_t: next(numbers))
    found = {
        "q_sample": ddpm.q_sample(x_start, t, noise),
        "q_posterior": mean,
        "p_sample": ddpm.p_sample(x_t, t, noise),
    }
    found.update({f"p_sample_loop {t}": x for t, x in chain})
    for name, x in found.items():
        assert x.shape == x_start.shape, name
    assert losses.shape == (4,)
    return {**found, "variance": variance, "losses": losses}


@pytest.mark.parametrize("shape", [(4, 2), (4, 3, 5), (4, 3, 2, 3, 2)])
def test_points_sounds_and_volumes_are_diffused_as_images_are(shape):
    """The same numbers as images [B, N, 1, 1] give the same."""
    ddpm = DDPM(lambda x_t, t: x_t.sin(), tiny())
    x_start, x_t, *draws = torch.randn(32, *shape)
    got = everything(ddpm, x_start, x_t, torch.stack(draws))
    x_start, x_t, *draws = (x.view(4, -1, 1, 1) for x in (x_start, x_t, *draws))
    expected = everything(ddpm, x_start, x_t, torch.stack(draws))
    assert len(got) == 35
    for name in expected:
        numbers, of_images = got[name].view(4, -1), expected[name].view(4, -1)
        assert_close(numbers, of_images, rtol=0, atol=1e-6)


def test_an_answer_of_another_shape_is_refused():
    for shape, model in (((5, 1), lambda x, t: x[:, 0]), ((2, 3, 8, 8), lambda x, t: x[:, :1])):
        ddpm = DDPM(model, tiny())
        with pytest.raises(ValueError, match="the network returns"):
            ddpm.training_loss(torch.randn(shape))
        with pytest.raises(ValueError, match="the network returns"):
            ddpm.sample(torch.randn(shape))


def test_numbers_have_a_loss_each():
    losses, t = DDPM(lambda x, t: x, tiny()).training_losses(torch.randn(6))
    assert losses.shape == t.shape == (6,)
