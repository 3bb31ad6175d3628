"""The mathematics against closed forms."""

import math

import pytest
import torch
from helpers import Constant, ConstantImage, Gaussian, half_frozen, modes, random_unet, tiny
from torch import Tensor, nn

from config import Config
from ddpm import (
    DDPM,
    beta_schedule,
    cosine_beta_schedule,
    linear_beta_schedule,
    spaced_timesteps,
)
from utils.randomness import ImageNoise, derive_seed


def t_of(*values: int) -> Tensor:
    return torch.tensor(values)


def close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=0)


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


def test_q_sample_takes_one_timestep_per_image(shape):
    ddpm = DDPM(nn.Identity(), tiny())
    x_start, noise = torch.randn(shape), torch.randn(shape)
    together = ddpm.q_sample(x_start, t_of(0, 3, 29, 3), noise)
    for i, t in enumerate((0, 3, 29, 3)):
        alone = ddpm.q_sample(x_start[i:i + 1], t_of(t), noise[i:i + 1])
        assert torch.equal(together[i:i + 1], alone)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("t", [1, 7, 29])
def test_q_posterior_is_bayes_rule(schedule, t):
    """q(x_{t-1} | x_t, x_0) as the product of the two densities, integrated on a grid."""
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


def test_posterior_numbers():
    ddpm = DDPM(nn.Identity(), Config())
    assert ddpm.posterior_variance[0] == 0
    assert ddpm.posterior_variance[1].item() == pytest.approx(5.4532e-5, rel=1e-4)
    assert ddpm.posterior_variance[999].item() == pytest.approx(0.0199999835, rel=1e-6)
    assert ddpm.posterior_mean_coef1[0] == 1
    assert ddpm.posterior_mean_coef2[0] == 0


# The loss (in training: test_train.py)

def test_the_loss_is_the_mean_over_the_elements_of_each_image(shape):
    ddpm, noise = DDPM(Constant(0.5), tiny()), torch.randn(shape)
    given = t_of(0, 1, 2, 3)
    losses, t = ddpm.training_losses(torch.zeros(shape), given, noise)
    expected = (noise - 0.5).square().mean(dim=(1, 2, 3))
    assert torch.equal(t, given)
    torch.testing.assert_close(losses, expected)
    loss = ddpm.training_loss(torch.zeros(shape), given, noise)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected.mean().item())


def test_the_losses_are_of_the_timesteps_that_were_drawn(shape):
    model = Constant()
    ddpm = DDPM(model, tiny())
    drawn = []
    for _ in range(200):
        _, t = ddpm.training_losses(torch.zeros(shape))
        drawn.append(t.tolist())
    assert drawn == model.timesteps
    assert {t for batch in drawn for t in batch} == set(range(30))


def test_the_loss_is_fp32_under_autocast(shape):
    config = tiny()
    ddpm = DDPM(random_unet(config), config)
    with torch.autocast("cpu", torch.bfloat16):
        losses, _ = ddpm.training_losses(torch.zeros(shape))
    assert losses.dtype == torch.float32
    assert losses.shape == (4,)


# The reverse process

def test_predict_x_start_inverts_q_sample(shape):
    noise = torch.randn(shape)
    ddpm = DDPM(lambda x_t, t: noise, Config())
    x_start, t = torch.rand(shape) * 1.8 - 0.9, t_of(0, 100, 500, 900)
    x_t = ddpm.q_sample(x_start, t, noise)
    close(ddpm.predict_x_start(x_t, t), x_start, 2e-5)


def test_the_mean_by_way_of_x_start_is_eq_11(shape):
    pred_noise = torch.randn(shape)
    ddpm = DDPM(lambda x_t, t: pred_noise, Config())
    t = t_of(1, 10, 200, 400)
    x_t = ddpm.q_sample(torch.zeros(shape), t, pred_noise)  # so that no x_0 is clipped
    mean, _ = ddpm.p_mean_variance(x_t, t)
    betas = linear_beta_schedule(1000)[t].view(-1, 1, 1, 1)
    a = ddpm.alphas_cumprod.double()[t].view(-1, 1, 1, 1)
    eq_11 = (x_t - betas / (1 - a).sqrt() * pred_noise) / (1 - betas).sqrt()
    close(mean.double(), eq_11, 2e-5)


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


def test_x_t_is_never_clamped(shape):
    x_t = torch.full(shape, 4.0)
    mean, _ = DDPM(Constant(), Config()).p_mean_variance(x_t, t_of(900, 900, 900, 900))
    assert (mean > 3).all()


def test_a_step_draws_from_the_mean_and_variance(shape):
    ddpm = DDPM(Constant(), tiny())
    x_t, noise, t = torch.randn(shape), torch.randn(shape), t_of(1, 5, 20, 29)
    mean, variance = ddpm.p_mean_variance(x_t, t)
    close(ddpm.p_sample(x_t, t, noise), mean + variance.sqrt() * noise, 1e-6)
    drawn = torch.stack([ddpm.p_sample(x_t, t) - mean for _ in range(200)])
    deviation = drawn.std(dim=(0, 2, 3, 4))
    torch.testing.assert_close(deviation, variance.sqrt().flatten(), rtol=0.03, atol=0)


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
    close(ddpm.sample(torch.randn(shape)), x_start, 1e-5)


def test_the_chain_calls_the_network_once_per_timestep(shape):
    model = Constant()
    chain = DDPM(model, tiny()).p_sample_loop(torch.randn(shape), t_start=20)
    assert [t for t, _ in chain] == list(range(20, -1, -1))
    assert model.timesteps == [[t] * 4 for t in range(20, -1, -1)]


# Fewer steps

@pytest.mark.parametrize("spacing", ["quadratic", "uniform"])
@pytest.mark.parametrize("steps", [1, 2, 10, 50, 300, 999, 1000])
def test_spaced_timesteps_are_exactly_as_many_and_start_at_the_end(spacing, steps):
    timesteps = spaced_timesteps(1000, steps, spacing)
    assert len(set(timesteps)) == steps
    assert timesteps == sorted(timesteps, reverse=True)
    assert timesteps[0] == 999
    assert timesteps[-1] >= 0


def test_spacings_that_are_impossible():
    for steps in (0, 11):
        with pytest.raises(ValueError, match=f"steps={steps}"):
            spaced_timesteps(10, steps)
    with pytest.raises(ValueError, match="quadratic, uniform"):
        spaced_timesteps(10, 5, "cubic")


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(("steps", "eta", "spacing"), [
    (2, 1.0, "uniform"), (10, 0.0, "quadratic"), (50, 0.5, "uniform"),
    (7, 1.0, "quadratic"), (1000, 1.0, "uniform")])
def test_fewer_steps_end_exactly_at_a_constant_image(steps, eta, spacing, order, shape):
    # Where eps is not re-derived after the clip, they do not.
    config, x_start = Config(), torch.rand(shape) * 3 - 1.5
    ddpm = DDPM(ConstantImage(config, x_start), config)
    x = ddpm.sample(torch.randn(shape), steps, eta, spacing, order)
    close(x, x_start.clamp(-1, 1), 1e-5)


@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_a_ddim_step_is_eq_12_of_its_paper(eta, shape):
    """With Eq. 16's deviation, in float64, from a network whose x_0 is clipped here and there."""
    ddpm = DDPM(Constant(0.3), Config())
    x_t, noise, (t, s) = torch.randn(shape), torch.randn(shape), (600, 350)
    loop = ddpm.ddim_sample_loop(x_t, [t, s], eta, 1, lambda t: noise)
    step_t, x = next(loop)
    assert step_t == t

    a_t, a_s = ddpm.alphas_cumprod_float64[t], ddpm.alphas_cumprod_float64[s]
    x_t = x_t.double()
    x_0 = ((x_t - math.sqrt(1 - a_t) * 0.3) / math.sqrt(a_t)).clamp(-1, 1)
    eps = (x_t - math.sqrt(a_t) * x_0) / math.sqrt(1 - a_t)
    sigma = eta * math.sqrt((1 - a_s) / (1 - a_t) * (1 - a_t / a_s))
    direction = math.sqrt(1 - a_s - sigma**2) * eps
    close(x.double(), math.sqrt(a_s) * x_0 + direction + sigma * noise, 1e-5)


def test_ddim_with_eta_1_at_full_length_is_the_fixed_small_chain(shape):
    config = tiny(variance="fixed_small")
    ddpm = DDPM(Gaussian(config, 0.2, 0.3), config)
    x_T, draws = torch.randn(shape), torch.randn(config.timesteps, *shape)
    chain = ddpm.p_sample_loop(x_T, noise=lambda t: draws[t])
    ddim = ddpm.ddim_sample_loop(x_T, range(29, -1, -1), 1.0, 1, lambda t: draws[t])
    for (t, x), (ddim_t, ddim_x) in zip(chain, ddim, strict=True):
        assert t == ddim_t
        close(x, ddim_x, 2e-5)


@pytest.mark.parametrize(("steps", "tolerance"), [(1000, 0.02), (100, 0.04), (20, 0.15)])
def test_ddim_recovers_gaussian_data(steps, tolerance):
    """Mean within 0.01 and deviation within 2, 4 and 15 % at 1000, 100 and 20 steps."""
    config = Config()
    ddpm = DDPM(Gaussian(config, 0.2, 0.15), config)
    x = ddpm.sample(torch.randn(16, 1, 16, 16), steps, 0.0, "quadratic", order=1)
    assert x.mean().item() == pytest.approx(0.2, abs=0.01)
    assert x.std().item() == pytest.approx(0.15, rel=tolerance)


def test_ddim_calls_the_network_with_the_original_timesteps(shape):
    model = Constant()
    DDPM(model, Config()).sample(torch.randn(shape), 10)
    assert model.timesteps == [[t] * 4 for t in spaced_timesteps(1000, 10)]
    assert model.timesteps[0] == [999] * 4


def published_dpm_solver(
    ddpm: DDPM, x: Tensor, timesteps: list[int], stochastic: bool, draws: Tensor
) -> Tensor:
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2) or its SDE variant, in float64.

    In their words: alpha_t = sqrt(abar), sigma_t = sqrt(1 - abar), lambda = ln(alpha / sigma); the
    last step, to sigma = 0, returns x_0.
    """
    abar = torch.tensor(ddpm.alphas_cumprod_float64, dtype=torch.float64)
    alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
    lambdas = torch.log(alpha / sigma)
    x, before = x.double(), None
    for i, t in enumerate(timesteps):
        x_0 = ddpm.predict_x_start(x.float(), torch.full((len(x),), t)).double()
        if i == len(timesteps) - 1:
            return x_0
        s = timesteps[i + 1]
        h = lambdas[s] - lambdas[t]
        D = x_0
        if before is not None:
            r = (lambdas[t] - lambdas[timesteps[i - 1]]) / h
            D = (1 + 1 / (2 * r)) * x_0 - 1 / (2 * r) * before
        if stochastic:
            decay = 1 - torch.exp(-2 * h)
            x = sigma[s] / sigma[t] * torch.exp(-h) * x + alpha[s] * decay * D
            x = x + sigma[s] * decay.sqrt() * draws[t]
        else:
            x = sigma[s] / sigma[t] * x - alpha[s] * (torch.exp(-h) - 1) * D
        before = x_0


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(("steps", "spacing"), [(10, "uniform"), (20, "quadratic")])
def test_order_2_is_dpm_solver_as_published(steps, spacing, schedule, eta, shape):
    config = Config(beta_schedule=schedule)
    ddpm = DDPM(Gaussian(config, 0.2, 0.5), config)
    x_T, draws = torch.randn(shape), torch.randn(1000, *shape)
    x = ddpm.sample(x_T, steps, eta, spacing, 2, lambda t: draws[t])
    timesteps = spaced_timesteps(1000, steps, spacing)
    expected = published_dpm_solver(ddpm, x_T, timesteps, eta == 1, draws)
    close(x.double(), expected, 1e-4 if schedule == "cosine" else 2e-5)


def test_the_error_of_order_2_falls_with_the_square_of_the_step():
    """Of the ordinary differential equation, from t = 600 to 200, against 400 small steps."""
    config = Config()
    ddpm = DDPM(Gaussian(config, 0.1, 0.3), config)
    x_t = 0.3 * torch.randn(1, 1, 16, 16)

    def at_200(step: int, order: int) -> Tensor:
        loop = ddpm.ddim_sample_loop(x_t, range(600, 199 - step, -step), 0.0, order)
        return next(x for t, x in loop if t == 200 + step)

    exact = at_200(1, 2)
    errors = {}
    for order in (1, 2):
        for step in (80, 40, 20):
            errors[order, step] = (at_200(step, order) - exact).abs().mean().item()
    assert 1.6 < errors[1, 40] / errors[1, 20] < 2.6
    assert 3 < errors[2, 40] / errors[2, 20] < 6
    assert errors[2, 20] < errors[1, 20] / 3


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize(("steps", "tolerance"), [(50, 0.04), (20, 0.12), (10, 0.15)])
def test_order_2_recovers_gaussian_data(steps, tolerance, eta):
    """By quadratic spacing, which ends with small steps: the last one takes the mean of x_0."""
    config = Config()
    ddpm = DDPM(Gaussian(config, 0.2, 0.15), config)
    x = ddpm.sample(torch.randn(16, 1, 16, 16), steps, eta, "quadratic", 2)
    assert x.mean().item() == pytest.approx(0.2, abs=0.01)
    assert x.std().item() == pytest.approx(0.15, rel=tolerance)


def test_fewer_steps_are_eta_1_order_2_quadratic_unless_told(shape):
    config = tiny()
    ddpm = DDPM(Gaussian(config, 0, 0.3), config)
    x_T, z = torch.randn(shape), torch.randn(shape)
    for _, expected in ddpm.ddim_sample_loop(x_T, [29, 12, 2], 1.0, 2, lambda t: z):
        pass
    assert torch.equal(ddpm.sample(x_T, 3, noise=lambda t: z), expected)


# Either of the two

def test_full_length_without_eta_is_algorithm_2(shape):
    config = tiny()
    ddpm = DDPM(Gaussian(config, 0, 0.3), config)
    x_T, z = torch.randn(shape), torch.randn(shape)
    for _, expected in ddpm.p_sample_loop(x_T, noise=lambda t: z):
        pass
    for steps in (None, 30):
        assert torch.equal(ddpm.sample(x_T, steps, noise=lambda t: z), expected)
    assert not torch.equal(ddpm.sample(x_T, 30, 0.0), expected)


def test_from_the_middle_too(shape):
    """t_start + 1 is the length that counts there."""
    config = tiny()
    ddpm = DDPM(Gaussian(config, 0, 0.3), config)
    x_t, z = torch.randn(shape), torch.randn(shape)

    def steps_of(steps: int | None, eta: float | None = None) -> list[tuple[int, bytes]]:
        loop = ddpm.sample_loop(x_t, steps, eta, noise=lambda t: z, t_start=12)
        return [(t, x.numpy().tobytes()) for t, x in loop]

    chain = ddpm.p_sample_loop(x_t, 12, lambda t: z)
    assert steps_of(None) == steps_of(13) == [(t, x.numpy().tobytes()) for t, x in chain]
    assert [t for t, _ in steps_of(5)] == spaced_timesteps(13, 5)
    assert steps_of(13, 0.0) != steps_of(13)


def loop_of(name: str, ddpm: DDPM, x_T: Tensor, noise=None):
    if name == "p_sample_loop":
        return ddpm.p_sample_loop(x_T, noise=noise)
    return ddpm.ddim_sample_loop(x_T, range(29, -1, -1), 1.0, 2, noise)


LOOPS = ["p_sample_loop", "ddim_sample_loop"]


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_yields_the_timestep_and_the_image_after_it(name, shape):
    config = tiny()
    ddpm = DDPM(Gaussian(config, 0.1, 0.3), config)
    steps = list(loop_of(name, ddpm, torch.randn(shape)))
    assert [t for t, _ in steps] == list(range(29, -1, -1))
    assert all(isinstance(t, int) for t, _ in steps)
    assert all(x.shape == shape for _, x in steps)
    assert steps[-1][1].abs().max() <= 1


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_has_no_dropout_and_restores_each_mode(name, shape):
    ddpm = half_frozen(tiny())
    before = modes(ddpm)
    for _ in loop_of(name, ddpm, torch.randn(shape)):
        pass
    assert ddpm.model.modes == [False] * 30
    assert modes(ddpm) == before


@pytest.mark.parametrize("name", LOOPS)
def test_the_modes_are_restored_after_an_exception(name, shape):
    def noise(t: int) -> Tensor:
        if t < 20:
            raise RuntimeError("broken")
        return torch.zeros(shape)

    ddpm = half_frozen(tiny())
    before = modes(ddpm)
    with pytest.raises(RuntimeError, match="broken"):
        list(loop_of(name, ddpm, torch.randn(shape), noise))
    assert len(ddpm.model.modes) > 5
    assert modes(ddpm) == before


@pytest.mark.parametrize("name", LOOPS)
def test_the_modes_are_restored_when_a_loop_is_abandoned(name, shape):
    ddpm = half_frozen(tiny())
    before = modes(ddpm)
    for t, _ in loop_of(name, ddpm, torch.randn(shape)):
        if t == 25:
            break
    assert len(ddpm.model.modes) == 5
    assert modes(ddpm) == before


# Noise

def draws(seed: int, indices: list[int] | range, count: int = 70) -> Tensor:
    noise = ImageNoise(seed, indices, (3, 8, 8), "cpu")
    return torch.stack([noise.next() for _ in range(count)], dim=1)


def test_image_noise_depends_on_seed_and_index_alone():
    together = draws(0, range(7))
    assert torch.equal(together[4:6], draws(0, [4, 5]))
    assert torch.equal(together[:, :3], draws(0, range(7), 3))
    assert not torch.equal(together[1], draws(1, [0])[0])  # seed + i would make them equal


def test_image_noise_is_standard_normal_and_never_the_same():
    together = draws(0, range(7))
    assert together.mean().abs() < 0.02
    assert abs(together.std() - 1) < 0.02
    assert len({draw.numpy().tobytes() for draw in together.flatten(0, 1)}) == 7 * 70


def test_image_noise_answers_the_samplers_with_its_next_draw():
    noise = ImageNoise(0, [4], (3, 8, 8), "cpu")
    expected = draws(0, [4], 3)[0]
    got = torch.cat([noise.next(), noise(29), noise(28)])
    assert torch.equal(got, expected)


def test_seeds_of_different_uses_do_not_meet():
    seeds = set()
    for use in ("step", "epoch", "image"):
        for numbers in ((0,), (5,), (0, 5), (5, 0), (0, 5, 1)):
            seeds.add(derive_seed(use, *numbers))
    assert len(seeds) == 15
    assert derive_seed("step", 3, 4) == derive_seed("step", 3, 4)


# A GPU that the tests never saw: on the meta device a tensor left on the CPU, and every read-back,
# raises

def test_the_step_and_the_samplers_stay_on_the_device():
    config = tiny(timesteps=4, beta_schedule="cosine")
    with torch.device("meta"):
        ddpm = DDPM(random_unet(config), config).to("meta")
        x = torch.randn(4, 3, 8, 8)
        t = torch.zeros(4, dtype=torch.int64)
    losses, drawn = ddpm.training_losses(x)
    losses.mean().backward()
    norm = torch.nn.utils.clip_grad_norm_(ddpm.parameters(), 1.0)
    x = ddpm.p_sample(x, t)
    for steps, eta in ((None, None), (2, 0.0), (2, 1.0), (4, 1.0)):
        x = ddpm.sample(x, steps, eta)
    for tensor in (losses, drawn, norm, x):
        assert tensor.device.type == "meta"
