"""ddim.py: fewer steps against the formulas of their papers."""

import math

import pytest
import torch
from helpers import Constant, ConstantImage, Gaussian, half_frozen, modes, tiny
from torch import Tensor
from torch.testing import assert_close

import ddim
from config import Config
from ddim import ddim_sample_loop, spaced_timesteps
from ddpm import DDPM, RandnLike, last_image

# Which steps

@pytest.mark.parametrize("spacing", ["quadratic", "uniform"])
@pytest.mark.parametrize("steps", [1, 2, 10, 50, 300, 999, 1000])
def test_spaced_timesteps_are_exactly_as_many_and_start_at_the_end(spacing, steps):
    timesteps = spaced_timesteps(1000, steps, spacing)
    assert len(set(timesteps)) == steps
    assert timesteps == sorted(timesteps, reverse=True)
    assert timesteps[0] == 999
    assert timesteps[-1] >= 0


def test_quadratic_timesteps_are_closer_together_near_0():
    assert spaced_timesteps(1000, 5, "quadratic") == [999, 639, 359, 159, 39]
    assert spaced_timesteps(1000, 5, "uniform") == [999, 799, 599, 399, 199]


def test_spacings_that_are_impossible():
    for steps in (0, 11):
        with pytest.raises(ValueError, match=f"steps={steps}"):
            spaced_timesteps(10, steps)
    with pytest.raises(ValueError, match="quadratic, uniform"):
        spaced_timesteps(10, 5, "cubic")


# Order 1: DDIM

@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_a_ddim_step_is_eq_12_of_its_paper(eta, shape):
    """Eq. 16 gives the deviation; the network's x_0 is clipped here and there."""
    ddpm = DDPM(Constant(0.3), Config())
    x_t, noise, (t, s) = torch.randn(shape), torch.randn(shape), (600, 350)
    loop = ddim_sample_loop(ddpm, x_t, [t, s], eta, 1, lambda x_t: noise)
    step_t, x = next(loop)
    assert step_t == t

    a_t, a_s = ddpm.alphas_cumprod_float64[t], ddpm.alphas_cumprod_float64[s]
    x_t = x_t.double()
    x_0 = ((x_t - math.sqrt(1 - a_t) * 0.3) / math.sqrt(a_t)).clamp(-1, 1)
    eps = (x_t - math.sqrt(a_t) * x_0) / math.sqrt(1 - a_t)
    sigma = eta * math.sqrt((1 - a_s) / (1 - a_t) * (1 - a_t / a_s))
    direction = math.sqrt(1 - a_s - sigma**2) * eps
    expected = math.sqrt(a_s) * x_0 + direction + sigma * noise
    assert_close(x.double(), expected, rtol=0, atol=1e-5)


def in_turn(draws: Tensor) -> RandnLike:
    """Give one draw after another, whatever x_t is."""
    numbers = iter(draws)
    return lambda x_t: next(numbers)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(("eta", "draws"), [(0.0, 0), (0.5, 9), (1.0, 9)])
def test_noise_is_drawn_in_every_step_but_the_last_or_never(eta, draws, order, shape):
    config, asked = tiny(), []

    def randn_like(x_t: Tensor) -> Tensor:
        asked.append(x_t.shape)
        return torch.randn_like(x_t)

    ddpm = DDPM(Gaussian(config, 0, 0.3), config)
    ddim.sample(ddpm, torch.randn(shape), 10, eta, order=order, randn_like=randn_like)
    assert asked == [shape] * draws


# Order 2: DPM-Solver++

def published_dpm_solver(
    ddpm: DDPM, x: Tensor, timesteps: list[int], stochastic: bool, draws: Tensor
) -> Tensor:
    """This is DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2) or its SDE variant, in float64.

    They write alpha_t = sqrt(abar), sigma_t = sqrt(1 - abar), lambda = ln(alpha / sigma).  The last
    step, to sigma = 0, returns x_0.
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
            x = x + sigma[s] * decay.sqrt() * draws[i]
        else:
            x = sigma[s] / sigma[t] * x - alpha[s] * (torch.exp(-h) - 1) * D
        before = x_0


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(("steps", "spacing"), [(10, "uniform"), (20, "quadratic")])
def test_order_2_is_dpm_solver_as_published(steps, spacing, schedule, eta, shape):
    config = Config(beta_schedule=schedule)
    ddpm = DDPM(Gaussian(config, 0.2, 0.5), config)
    x_T, draws = torch.randn(shape), torch.randn(steps, *shape)
    x = ddim.sample(
        ddpm, x_T, steps, eta, spacing=spacing, order=2, randn_like=in_turn(draws))
    timesteps = spaced_timesteps(1000, steps, spacing)
    expected = published_dpm_solver(ddpm, x_T, timesteps, eta == 1, draws)
    tolerance = 1e-4 if schedule == "cosine" else 2e-5
    assert_close(x.double(), expected, rtol=0, atol=tolerance)


# Either order

@pytest.mark.parametrize(("order", "eta", "steps", "tolerance"), [
    (1, 0.0, 1000, 0.02), (1, 0.0, 100, 0.04), (1, 0.0, 20, 0.15),
    (2, 0.0, 50, 0.04), (2, 0.0, 20, 0.12), (2, 0.0, 10, 0.15),
    (2, 1.0, 50, 0.04), (2, 1.0, 20, 0.12), (2, 1.0, 10, 0.15),
])
def test_fewer_steps_recover_gaussian_data(order, eta, steps, tolerance):
    """Quadratic spacing ends with small steps: the last one takes the mean of x_0."""
    config = Config()
    ddpm = DDPM(Gaussian(config, 0.2, 0.15), config)
    x_T = torch.randn(16, 1, 16, 16)
    x = ddim.sample(ddpm, x_T, steps, eta, spacing="quadratic", order=order)
    assert x.mean().item() == pytest.approx(0.2, abs=0.01)
    assert x.std().item() == pytest.approx(0.15, rel=tolerance)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(("steps", "eta", "spacing"), [
    (2, 1.0, "uniform"), (10, 0.0, "quadratic"), (50, 0.5, "uniform"),
    (7, 1.0, "quadratic"), (1000, 1.0, "uniform")])
def test_fewer_steps_end_exactly_at_a_constant_image(steps, eta, spacing, order, shape):
    # Where eps is not re-derived after the clip, they do not.
    config, x_start = Config(), torch.rand(shape) * 3 - 1.5
    ddpm = DDPM(ConstantImage(config, x_start), config)
    x_T = torch.randn(shape)
    x = ddim.sample(ddpm, x_T, steps, eta, spacing=spacing, order=order)
    assert_close(x, x_start.clamp(-1, 1), rtol=0, atol=1e-5)


def test_fewer_steps_are_eta_1_order_2_quadratic_unless_told(shape):
    config = tiny()
    ddpm = DDPM(Gaussian(config, 0, 0.3), config)
    x_T, z = torch.randn(shape), torch.randn(shape)

    def randn_like(x_t: Tensor) -> Tensor:
        return z

    loop = ddim_sample_loop(ddpm, x_T, [29, 12, 2], 1.0, 2, randn_like)
    expected = last_image(loop)
    assert torch.equal(ddim.sample(ddpm, x_T, 3, randn_like=randn_like), expected)
    loop = ddim_sample_loop(ddpm, x_T, [29, 12, 2], randn_like=randn_like)
    assert torch.equal(last_image(loop), expected)


@pytest.mark.parametrize(("order", "eta"), [(0, 1.0), (3, 1.0), (2, -0.1), (1, 1.1)])
def test_an_impossible_order_or_eta(order, eta, shape):
    ddpm = DDPM(Constant(), tiny())
    with pytest.raises(ValueError, match=f"order={order}, eta={eta} is impossible"):
        ddim.sample(ddpm, torch.randn(shape), 3, eta, order=order)


# Either of the two: Algorithm 2 or fewer steps

@pytest.mark.parametrize(("t_start", "length"), [(None, 30), (12, 13)])
def test_full_length_without_eta_is_algorithm_2(t_start, length, shape):
    """From the middle the length that counts is t_start + 1."""
    config = tiny()
    ddpm = DDPM(Gaussian(config, 0, 0.3), config)
    x_t, z = torch.randn(shape), torch.randn(shape)

    def steps_of(steps: int | None, eta: float | None = None) -> list[tuple[int, bytes]]:
        loop = ddim.sample_loop(
            ddpm, x_t, steps, eta, randn_like=lambda x_t: z, t_start=t_start)
        return [(t, x.numpy().tobytes()) for t, x in loop]

    chain = ddpm.p_sample_loop(x_t, t_start, lambda x_t: z)
    assert steps_of(None) == steps_of(length) == [(t, x.numpy().tobytes()) for t, x in chain]
    assert [t for t, _ in steps_of(5)] == spaced_timesteps(length, 5)
    assert steps_of(length, 0.0) != steps_of(length)


# ddpm.p_sample_loop without eta, ddim_sample_loop with it
LOOPS = pytest.mark.parametrize("eta", [None, 1.0])


@LOOPS
@pytest.mark.parametrize("calls", [30, 5])  # to its end, or abandoned
def test_a_loop_has_no_dropout_and_restores_each_mode(calls, eta, shape):
    ddpm = half_frozen(tiny())
    before = modes(ddpm)
    for t, _ in ddim.sample_loop(ddpm, torch.randn(shape), eta=eta):
        if t > 0 and t == 30 - calls:
            break
    assert ddpm.model.modes == [False] * calls
    assert modes(ddpm) == before


@pytest.mark.parametrize("steps", [None, 5])
def test_a_loop_that_is_left_leaves_the_mode_alone(steps, shape):
    ddpm = DDPM(Constant(), tiny()).train()
    loop = ddim.sample_loop(ddpm, torch.randn(shape), steps)
    for _ in range(3):
        next(loop)
        assert ddpm.training
    ddpm.eval()
    del loop
    assert not ddpm.training
    assert not any(ddpm.model.modes)


@pytest.mark.parametrize("arguments", [
    {"order": 7}, {"eta": 2.0}, {"t_start": -1}, {"t_start": 30}, {"steps": 5, "order": 0}])
def test_what_is_impossible_is_refused_in_any_number_of_steps(arguments, shape):
    with pytest.raises(ValueError, match="impossible"):
        ddim.sample_loop(DDPM(Constant(), tiny()), torch.randn(shape), **arguments)


@LOOPS
@pytest.mark.parametrize("shape", [(4, 2), (4, 3, 5), (4, 3, 2, 3, 2)])
def test_points_sounds_and_volumes_are_sampled_as_images_are(eta, shape):
    """The same numbers as images [B, N, 1, 1] give the same."""
    ddpm = DDPM(lambda x_t, t: x_t.sin(), tiny())
    x_T, z = torch.randn(2, *shape)
    x = ddim.sample(ddpm, x_T, eta=eta, randn_like=lambda x_t: z)
    assert x.shape == shape
    x_T, z = x_T.view(4, -1, 1, 1), z.view(4, -1, 1, 1)
    images = ddim.sample(ddpm, x_T, eta=eta, randn_like=lambda x_t: z)
    assert_close(x.view(images.shape), images, rtol=0, atol=1e-6)
