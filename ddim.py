"""Fewer steps than T: DDIM (arXiv 2010.02502), and DPM-Solver++ (arXiv 2211.01095) as an addition.

    x_0 = ddim.sample(ddpm, x_T, steps=50, eta=0, order=1)    # DDIM
    x_0 = ddim.sample(ddpm, x_T, steps=50)      # the defaults: order 2, eta 1, quadratic spacing

The network is the one that DDPM trains.  A step jumps from t to any t_next below it; abar stands
for alphas_cumprod at a t.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ddpm import DDPM, RandnLike, batch_of, last_image
from utils.modes import evaluating

# The defaults of fewer steps: the best on CIFAR-10 (docs/fewer-steps.md).
ETA, ORDER, SPACING = 1.0, 2, "quadratic"


@torch.no_grad()
def ddim_sample_loop(
    ddpm: DDPM, x_t: Tensor, timesteps: Sequence[int], eta: float = ETA, order: int = ORDER,
    randn_like: RandnLike = torch.randn_like,
) -> Iterator[tuple[int, Tensor]]:
    """From x_t over falling timesteps to x_0: yields (t, x after the step at t).

    Order 1 is DDIM, Eq. 12 and 16: eta 0 draws no noise; eta 1 over all timesteps is Algorithm 2
    with fixed_small.  Order 2 at eta 0 is DPM-Solver++(2M), at eta 1 its SDE variant.
    """
    abars = [ddpm.alphas_cumprod_float64[t] for t in timesteps] + [1.0]  # x_0 has no noise
    pred_x_start_before = None
    for i, t in enumerate(timesteps):
        abar, abar_next = abars[i], abars[i + 1]
        with evaluating(ddpm):
            pred_x_start = ddpm.predict_x_start(x_t, batch_of(t, x_t))
        x_start = pred_x_start
        # The first step has no prediction before it, the last one ends at its prediction.
        if order == 2 and 0 < i < len(timesteps) - 1:
            x_start = extrapolate(
                pred_x_start, pred_x_start_before, abars[i - 1], abar, abar_next)
        pred_x_start_before = pred_x_start

        # Not pred_noise: it does not match an x_0 that was clipped or extrapolated.
        eps = (x_t - math.sqrt(abar) * x_start) / math.sqrt(1 - abar)
        # At eta 1 it is the variance of q(x_next | x_t, x_0): Eq. 7 for a jump.
        variance = eta**2 * (1 - abar / abar_next) * (1 - abar_next) / (1 - abar)
        eps_variance = max(0.0, 1 - abar_next - variance)  # rounding could take it below 0
        x_t = math.sqrt(abar_next) * x_start + math.sqrt(eps_variance) * eps
        if variance > 0:
            x_t = x_t + math.sqrt(variance) * randn_like(x_t)
        yield t, x_t


def extrapolate(
    pred_x_start: Tensor, pred_x_start_before: Tensor,
    abar_before: float, abar: float, abar_next: float,
) -> Tensor:
    """Order 2: x_0 in the middle of this step, by a line through the last two predictions.

    It is a line over half_log_snr.  The result is not clipped again.
    """
    h_before = half_log_snr(abar) - half_log_snr(abar_before)
    h = half_log_snr(abar_next) - half_log_snr(abar)
    return pred_x_start + (pred_x_start - pred_x_start_before) * h / (2 * h_before)


def half_log_snr(abar: float) -> float:
    """Half the logarithm of signal over noise, abar / (1 - abar): lambda in DPM-Solver."""
    return math.log(abar / (1 - abar)) / 2


def spaced_timesteps(T: int, S: int, spacing: str = SPACING) -> list[int]:
    """S distinct timesteps falling from T - 1 to about T / S, or if quadratic to T / S^2.

    For T = 1000, S = 5: 999, 639, 359, 159, 39 (quadratic) or 999, 799, 599, 399, 199 (uniform).
    Raises ValueError if S is not in 1..T, or for another spacing.
    """
    if not 1 <= S <= T:
        raise ValueError(f"steps={S} is impossible: a chain of {T} timesteps has 1 to {T}")
    if spacing == "uniform":
        rising = [round(T * i / S) - 1 for i in range(1, S + 1)]
    elif spacing == "quadratic":  # near 0 the squares would coincide, but for the max
        rising = [max(i, round(T * (i / S) ** 2)) - 1 for i in range(1, S + 1)]
    else:
        raise ValueError(f"spacing={spacing!r} is impossible: choose from quadratic, uniform")
    return rising[::-1]


def is_algorithm_2(num_timesteps: int, steps: int | None, eta: float | None) -> bool:
    """The rule that says which sampler runs: all timesteps, and no eta given, is Algorithm 2."""
    return steps in (None, num_timesteps) and eta is None


def sample_loop(
    ddpm: DDPM, x_t: Tensor, steps: int | None = None,
    eta: float | None = None, spacing: str = SPACING, order: int = ORDER,
    randn_like: RandnLike = torch.randn_like, t_start: int | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """From x_t at t_start (T - 1 if None) to x_0: yields (t, x after the step at t).

    It is Algorithm 2 or fewer steps (is_algorithm_2).  An impossible argument raises ValueError.
    """
    num_timesteps = ddpm.timesteps if t_start is None else t_start + 1
    if not 1 <= num_timesteps <= ddpm.timesteps:
        raise ValueError(f"t_start={t_start} is impossible: from 0 to {ddpm.timesteps - 1}")
    if order not in (1, 2) or not 0 <= (eta or 0) <= 1:
        raise ValueError(f"order={order}, eta={eta} is impossible: 1 or 2, and from 0 to 1")
    if is_algorithm_2(num_timesteps, steps, eta):
        return ddpm.p_sample_loop(x_t, t_start, randn_like)
    eta = ETA if eta is None else eta
    steps = num_timesteps if steps is None else steps
    timesteps = spaced_timesteps(num_timesteps, steps, spacing)
    return ddim_sample_loop(ddpm, x_t, timesteps, eta, order, randn_like)


def sample(
    ddpm: DDPM, x_T: Tensor, steps: int | None = None,
    eta: float | None = None, spacing: str = SPACING, order: int = ORDER,
    randn_like: RandnLike = torch.randn_like,
) -> Tensor:
    """x_T, standard normal -> x_0 in [-1, 1].  The arguments are those of sample_loop."""
    return last_image(sample_loop(ddpm, x_T, steps, eta, spacing, order, randn_like))
