"""The mathematics of DDPM (arXiv 2006.11239): schedules, q(x_t | x_0), the loss, the samplers.

    ddpm = DDPM(UNet(config), config)
    losses, t = ddpm.training_losses(x_start)           # Algorithm 1
    x_0 = ddpm.sample(torch.randn(16, 3, 32, 32))       # Algorithm 2

Images are float tensors [B, C, H, W] in [-1, 1]; t is an int64 tensor [B] in 0..T-1.
The schedule, the loss and the sampling arithmetic are fp32 whatever the precision of the network.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config

Noise = Callable[[int], Tensor]  # called with t -> standard normal noise like x_t

# The defaults of fewer steps: best where they were measured (docs/speed.md).
ETA, ORDER, SPACING = 1.0, 2, "quadratic"


def linear_beta_schedule(timesteps: int, start: float = 1e-4, end: float = 0.02) -> Tensor:
    """The beta_t of Eq. 2, [T] float64, section 4: equal steps.

    Scaled by 1000 / T, so that x_T is noise for any T.
    """
    scale = 1000 / timesteps
    return torch.linspace(
        scale * start, scale * end, timesteps, dtype=torch.float64, device="cpu")


def cosine_beta_schedule(timesteps: int, s: float = 0.008) -> Tensor:
    """The beta_t of Eq. 2, [T] float64, that make alphas_cumprod a squared cosine.

    arXiv 2102.09672, Eq. 17.
    """
    steps = torch.arange(timesteps + 1, dtype=torch.float64, device="cpu") / timesteps
    alphas_cumprod = torch.cos((steps + s) / (1 + s) * math.pi / 2) ** 2
    betas = 1 - alphas_cumprod[1:] / alphas_cumprod[:-1]
    return betas.clamp(max=0.999)


def beta_schedule(config: Config) -> Tensor:
    """The betas [T] float64 of config.beta_schedule; ValueError for a name without a formula."""
    if config.beta_schedule == "linear":
        return linear_beta_schedule(config.timesteps, config.beta_start, config.beta_end)
    if config.beta_schedule == "cosine":
        return cosine_beta_schedule(config.timesteps)
    raise ValueError(f"beta_schedule={config.beta_schedule!r} has no formula in ddpm.py")


class DDPM(nn.Module):
    """The diffusion around a network model(x_t, t) -> predicted noise.

    t is 0-based: x_t at t = 0 has taken one step of noise, at t = T - 1 all T of them.  x_start has
    taken none, and is what a step back from t = 0 leads to.
    """

    def __init__(self, model: Callable[[Tensor, Tensor], Tensor], config: Config) -> None:
        super().__init__()
        self.model = model
        self.timesteps = config.timesteps

        # In float64: built in float32, sqrt(1 - alphas_cumprod) is off by 8e-5 of itself at t = 0.
        betas = beta_schedule(config)
        alphas = 1 - betas
        alphas_cumprod = torch.cumprod(alphas, dim=0)
        alphas_cumprod_prev = F.pad(alphas_cumprod[:-1], (1, 0), value=1.0)

        def keep(name: str, tensor: Tensor) -> None:
            self.register_buffer(name, tensor.float(), persistent=False)

        keep("betas", betas)
        keep("alphas_cumprod", alphas_cumprod)

        # q(x_t | x_0)
        keep("sqrt_alphas_cumprod", alphas_cumprod.sqrt())
        keep("sqrt_one_minus_alphas_cumprod", (1 - alphas_cumprod).sqrt())

        # x_0 from x_t and the noise
        keep("sqrt_recip_alphas_cumprod", (1 / alphas_cumprod).sqrt())
        keep("sqrt_recipm1_alphas_cumprod", (1 / alphas_cumprod - 1).sqrt())

        # q(x_{t-1} | x_t, x_0)
        posterior_variance = betas * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod)
        coef1 = betas * alphas_cumprod_prev.sqrt() / (1 - alphas_cumprod)
        coef2 = alphas.sqrt() * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod)
        keep("posterior_variance", posterior_variance)
        keep("posterior_mean_coef1", coef1)
        keep("posterior_mean_coef2", coef2)

        # p(x_{t-1} | x_t).  Sampling adds no noise at t = 0.  The likelihood needs a variance
        # there, and the posterior has none: as in the paper's code it is that of t = 1.
        keep("decoder_variance", posterior_variance[1])
        fixed_large = torch.cat([posterior_variance[1:2], betas[1:]])
        is_large = config.variance == "fixed_large"
        keep("model_variance", fixed_large if is_large else posterior_variance)

        # Fewer steps jump between any two timesteps: their coefficients are formed one by one.
        self.alphas_cumprod_float64: list[float] = alphas_cumprod.tolist()

    # The forward process

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_t drawn from q(x_t | x_0), Eq. 4.  One t per image; noise like x_start."""
        noise = torch.randn_like(x_start) if noise is None else noise
        signal_scale = at(self.sqrt_alphas_cumprod, t)
        noise_scale = at(self.sqrt_one_minus_alphas_cumprod, t)
        return signal_scale * x_start + noise_scale * noise

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [B, C, H, W] and variance [B, 1, 1, 1] of q(x_{t-1} | x_t, x_0), Eq. 6-7."""
        coef1 = at(self.posterior_mean_coef1, t)
        coef2 = at(self.posterior_mean_coef2, t)
        mean = coef1 * x_start + coef2 * x_t
        return mean, at(self.posterior_variance, t)

    # Training

    def training_losses(
        self, x_start: Tensor, t: Tensor | None = None, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The loss of Algorithm 1, Eq. 14, of each image: losses [B] float32, and their t [B].

        A loss is the mean over an image's elements of (noise - pred_noise)^2.  Where it is not
        given, t is uniform in 0..T-1.
        """
        if t is None:
            t = torch.randint(self.timesteps, x_start.shape[:1], device=x_start.device)
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise)
        pred_noise = self.model(x_t, t).float()
        losses = (noise - pred_noise).square().mean(dim=(1, 2, 3))
        return losses, t

    def training_loss(
        self, x_start: Tensor, t: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """The mean of training_losses, a scalar: for a training loop of one's own."""
        losses, _ = self.training_losses(x_start, t, noise)
        return losses.mean()

    # The reverse process

    def predict_x_start(self, x_t: Tensor, t: Tensor) -> Tensor:
        """x_0 from x_t and the noise that the network predicts, Eq. 15, clipped to [-1, 1].

        Without the clip nothing survives the first steps: an error of the noise enters x_0 times
        sqrt(1 / alphas_cumprod - 1), at t = T - 1 times 157 (linear) or 20,291 (cosine, T = 1000).
        """
        pred_noise = self.model(x_t, t).float()
        x_t_scale = at(self.sqrt_recip_alphas_cumprod, t)
        noise_scale = at(self.sqrt_recipm1_alphas_cumprod, t)
        pred_x_start = x_t_scale * x_t - noise_scale * pred_noise
        return pred_x_start.clamp(-1, 1)

    def p_mean_variance(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [B, C, H, W] and variance [B, 1, 1, 1] of p(x_{t-1} | x_t).

        The mean is Eq. 11 by way of the clipped x_0: without the clip the two are equal.
        """
        pred_x_start = self.predict_x_start(x_t, t)
        mean, _ = self.q_posterior(pred_x_start, x_t, t)
        return mean, at(self.model_variance, t)

    @torch.no_grad()
    def p_sample(self, x_t: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """One step of Algorithm 2: x_{t-1} drawn from p(x_{t-1} | x_t).  noise like x_t."""
        mean, variance = self.p_mean_variance(x_t, t)
        noise = torch.randn_like(x_t) if noise is None else noise
        # At t = 0 the mean is the image: noise added there would stay in it.
        is_last = (t == 0).view(-1, 1, 1, 1)
        return torch.where(is_last, mean, mean + variance.sqrt() * noise)

    @torch.no_grad()
    def p_sample_loop(
        self, x_t: Tensor, t_start: int | None = None, noise: Noise | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """Algorithm 2 from x_t at t_start (T - 1 where None) down to 0: yields (t, x_{t-1})."""
        if t_start is None:
            t_start = self.timesteps - 1
        with evaluating(self):
            for t in range(t_start, -1, -1):
                draws = noise is not None and t > 0  # p_sample has no use for it at t = 0
                step_noise = noise(t) if draws else None
                x_t = self.p_sample(x_t, batch_of(t, x_t), step_noise)
                yield t, x_t

    @torch.no_grad()
    def ddim_sample_loop(
        self, x_t: Tensor, timesteps: Sequence[int], eta: float = ETA, order: int = ORDER,
        noise: Noise | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """Fewer steps, over falling timesteps: yields (t, x after the step at t).

        Order 1 is DDIM (arXiv 2010.02502, Eq. 12 and 16).  Order 2 extrapolates x_0 from the last
        two predictions: at eta 0 it is DPM-Solver++(2M) (arXiv 2211.01095), at eta 1 its SDE
        variant.  eta 0 draws no noise; eta 1, order 1 over all timesteps is Algorithm 2 with
        fixed_small.
        """
        x_start_before, h_before = None, 0.0
        with evaluating(self):
            for t, t_next in pairwise([*timesteps, -1]):
                abar = self.alphas_cumprod_float64[t]
                abar_next = self.alphas_cumprod_float64[t_next] if t_next >= 0 else 1.0
                variance = eta**2 * (1 - abar / abar_next) * (1 - abar_next) / (1 - abar)

                pred_x_start = self.predict_x_start(x_t, batch_of(t, x_t))
                x_start = pred_x_start
                if t_next >= 0:  # the last step takes x_0 itself
                    h = log_snr(abar_next) - log_snr(abar)
                    if order == 2 and x_start_before is not None:
                        change = pred_x_start - x_start_before
                        x_start = pred_x_start + change * h / (2 * h_before)
                    x_start_before, h_before = pred_x_start, h

                # Not pred_noise: it does not match an x_0 that was clipped or moved.
                eps = (x_t - math.sqrt(abar) * x_start) / math.sqrt(1 - abar)
                eps_scale = math.sqrt(max(0.0, 1 - abar_next - variance))
                x_t = math.sqrt(abar_next) * x_start + eps_scale * eps
                if variance > 0:
                    step_noise = torch.randn_like(x_t) if noise is None else noise(t)
                    x_t = x_t + math.sqrt(variance) * step_noise
                yield t, x_t

    def sample_loop(
        self, x_t: Tensor, steps: int | None = None, eta: float | None = None,
        spacing: str = SPACING, order: int = ORDER, noise: Noise | None = None,
        t_start: int | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """From x_t at t_start (T - 1 where None) to x_0: yields (t, x after the step at t).

        Algorithm 2 or fewer steps, as is_algorithm_2 says.  For fewer steps eta is from 0 to 1,
        order 1 or 2, spacing as in spaced_timesteps; ValueError for others.
        """
        if t_start is None:
            t_start = self.timesteps - 1
        if is_algorithm_2(t_start + 1, steps, eta):
            return self.p_sample_loop(x_t, t_start, noise)
        steps = t_start + 1 if steps is None else steps
        eta = ETA if eta is None else eta
        if order not in (1, 2) or not 0 <= eta <= 1:
            raise ValueError(f"order={order}, eta={eta} is impossible: 1 or 2, and from 0 to 1")
        timesteps = spaced_timesteps(t_start + 1, steps, spacing)
        return self.ddim_sample_loop(x_t, timesteps, eta, order, noise)

    def sample(
        self, x_T: Tensor, steps: int | None = None, eta: float | None = None,
        spacing: str = SPACING, order: int = ORDER, noise: Noise | None = None,
    ) -> Tensor:
        """x_T [B, C, H, W], standard normal -> x_0 in [-1, 1].  Arguments as in sample_loop."""
        for _, x in self.sample_loop(x_T, steps, eta, spacing, order, noise):
            pass
        return x


def at(coefficients: Tensor, t: Tensor) -> Tensor:
    """coefficients [T] at t [B] -> [B, 1, 1, 1], to broadcast against images."""
    return coefficients[t].view(-1, 1, 1, 1)


def log_snr(abar: float) -> float:
    """Half the logarithm of signal over noise, abar / (1 - abar): lambda in DPM-Solver."""
    return math.log(abar / (1 - abar)) / 2


def batch_of(t: int, x_t: Tensor) -> Tensor:
    """The same t for every image of x_t: int64 [B]."""
    return torch.full(x_t.shape[:1], t, dtype=torch.int64, device=x_t.device)


def is_algorithm_2(num_timesteps: int, steps: int | None, eta: float | None) -> bool:
    """Whether steps is None, or as many as there are timesteps, and no eta is given."""
    return steps in (None, num_timesteps) and eta is None


def spaced_timesteps(T: int, S: int, spacing: str = SPACING) -> list[int]:
    """S distinct timesteps falling from T - 1; quadratic: closer together near 0.

    Raises ValueError where S is not in 1..T, or for another spacing.
    """
    if not 1 <= S <= T:
        raise ValueError(f"steps={S} is impossible: a chain of {T} timesteps has 1 to {T}")
    if spacing == "uniform":
        rising = [round(T * i / S) - 1 for i in range(1, S + 1)]
    elif spacing == "quadratic":
        rising = [max(i, round(T * (i / S) ** 2)) - 1 for i in range(1, S + 1)]
    else:
        raise ValueError(f"spacing={spacing!r} is impossible: choose from quadratic, uniform")
    return rising[::-1]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Dropout off inside; every submodule's own mode again afterwards, on an exception too."""
    in_training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        yield
    finally:
        for m in in_training:
            m.training = True
