"""DDPM (arXiv 2006.11239): the schedules, q(x_t | x_0), the loss, sampling by the whole chain.

    ddpm = DDPM(UNet(config), config)
    losses, t = ddpm.training_losses(x_start)           # Eq. 14
    x_0 = ddpm.sample(torch.randn(16, 3, 32, 32))       # Algorithm 2

x_start, x_t and noise are float tensors [B, ...], here images [B, C, H, W] in [-1, 1]; t is an
int64 tensor [B] in 0..T-1.  Everything but the network is calculated in fp32.
"""

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config
from utils.modes import evaluating

RandnLike = Callable[[Tensor], Tensor]  # called with x_t -> standard normal noise like it


def linear_beta_schedule(timesteps: int, start: float = 1e-4, end: float = 0.02) -> Tensor:
    """The beta_t of Eq. 2, [T] float64, section 4: equal steps.

    Scaled by 1000 / T, so that x_T is noise for any T.
    """
    scale = 1000 / timesteps
    # On the CPU whatever torch.set_default_device says: an Apple GPU has no float64.
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
    """The betas [T] float64 of config.  Raises ValueError for a name without a formula."""
    if config.beta_schedule == "linear":
        return linear_beta_schedule(config.timesteps, config.beta_start, config.beta_end)
    if config.beta_schedule == "cosine":
        return cosine_beta_schedule(config.timesteps)
    raise ValueError(f"beta_schedule={config.beta_schedule!r} has no formula in ddpm.py")


class DDPM(nn.Module):
    """The diffusion around a network model(x_t, t) -> predicted noise.

    t is 0-based: x_t at t = 0 has taken one step of noise; x_start, the paper's x_0, has none.
    Sampling can switch dropout off only in an nn.Module: wrap a network in one, not in a function.
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
            # Not persistent: the schedule follows from the config, so no checkpoint holds it.
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

        # The variance of p(x_{t-1} | x_t).  Sampling does not use the entry at t = 0, since it adds
        # no noise there; the likelihood needs one above 0 there, whatever the setting.
        #
        #                      t > 0                    t = 0
        #     fixed_large      betas[t]                 posterior_variance[1]
        #     fixed_small      posterior_variance[t]    0
        #     the likelihood   one of these two         posterior_variance[1]
        fixed_large = torch.cat([posterior_variance[1:2], betas[1:]])
        is_large = config.variance == "fixed_large"
        keep("model_variance", fixed_large if is_large else posterior_variance)
        keep("decoder_variance", posterior_variance[1])  # the likelihood's at t = 0

        # For what needs more digits than a float32 has (ddim.py, and L_T in evaluate.py).
        self.alphas_cumprod_float64: list[float] = alphas_cumprod.tolist()

    # The forward process

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_t drawn from q(x_t | x_0), Eq. 4.  One t per image; noise like x_start."""
        noise = torch.randn_like(x_start) if noise is None else noise
        signal_scale = at(self.sqrt_alphas_cumprod, t, x_start)
        noise_scale = at(self.sqrt_one_minus_alphas_cumprod, t, x_start)
        return signal_scale * x_start + noise_scale * noise

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [B, ...] and variance [B, 1, ...] of q(x_{t-1} | x_t, x_0), Eq. 6-7."""
        coef1 = at(self.posterior_mean_coef1, t, x_t)
        coef2 = at(self.posterior_mean_coef2, t, x_t)
        mean = coef1 * x_start + coef2 * x_t
        return mean, at(self.posterior_variance, t, x_t)

    # Training

    def predict_noise(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The network's answer in float32.  Raises ValueError if it has not the shape of x_t."""
        pred_noise = self.model(x_t, t).float()
        if pred_noise.shape != x_t.shape:  # it would be stretched to another one without a word
            raise ValueError(f"the network returns {[*pred_noise.shape]} for {[*x_t.shape]}")
        return pred_noise

    def training_losses(
        self, x_start: Tensor, t: Tensor | None = None, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The loss of each image, Eq. 14, and the t at which it is taken: [B] float32, [B] int64.

        It is the mean of (noise - pred_noise)^2 over the image's elements.  A t that is not given
        is drawn uniformly from 0..T-1.
        """
        if t is None:
            t = torch.randint(self.timesteps, x_start.shape[:1], device=x_start.device)
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise)
        pred_noise = self.predict_noise(x_t, t)
        squared_errors = (noise - pred_noise).square()
        return mean_of_each(squared_errors), t

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
        pred_noise = self.predict_noise(x_t, t)
        x_t_scale = at(self.sqrt_recip_alphas_cumprod, t, x_t)
        noise_scale = at(self.sqrt_recipm1_alphas_cumprod, t, x_t)
        pred_x_start = x_t_scale * x_t - noise_scale * pred_noise
        return pred_x_start.clamp(-1, 1)

    def p_mean_variance(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [B, ...] and variance [B, 1, ...] of p(x_{t-1} | x_t).

        The mean is Eq. 11 by way of the clipped x_0: without the clip the two are equal.
        """
        pred_x_start = self.predict_x_start(x_t, t)
        mean, _ = self.q_posterior(pred_x_start, x_t, t)
        return mean, at(self.model_variance, t, x_t)

    @torch.no_grad()
    def p_sample(self, x_t: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """One step of Algorithm 2: x_{t-1} drawn from p(x_{t-1} | x_t).  noise like x_t."""
        noise = torch.randn_like(x_t) if noise is None else noise
        mean, variance = self.p_mean_variance(x_t, t)
        # At t = 0 the mean is the image: noise added there would stay in it.
        is_last = (t == 0).view(variance.shape)
        return torch.where(is_last, mean, mean + variance.sqrt() * noise)

    @torch.no_grad()
    def p_sample_loop(
        self, x_t: Tensor, t_start: int | None = None, randn_like: RandnLike = torch.randn_like
    ) -> Iterator[tuple[int, Tensor]]:
        """Algorithm 2 from x_t at t_start (T - 1 if None): yields (t, x after the step at t)."""
        t_start = self.timesteps - 1 if t_start is None else t_start
        for t in range(t_start, -1, -1):
            with evaluating(self):  # not around the yield: a caller may stop there for good
                x_t = self.p_sample(x_t, batch_of(t, x_t), randn_like(x_t))
            yield t, x_t

    def sample(self, x_T: Tensor, randn_like: RandnLike = torch.randn_like) -> Tensor:
        """Algorithm 2: x_T, standard normal -> x_0 in [-1, 1].  ddim.sample takes fewer steps."""
        return last_image(self.p_sample_loop(x_T, randn_like=randn_like))


def at(coefficients: Tensor, t: Tensor, x: Tensor) -> Tensor:
    """coefficients [T] at t [B] -> [B, 1, ...], to broadcast against x [B, ...]."""
    shape = [len(t)] + [1] * (x.ndim - 1)
    # Not coefficients[t], which takes -1 for T - 1.
    return coefficients.index_select(0, t).view(shape)


def mean_of_each(x: Tensor) -> Tensor:
    """x [B, ...] -> the mean of each image [B]."""
    if x.ndim == 1:
        return x
    return x.mean(dim=tuple(range(1, x.ndim)))


def batch_of(t: int, x_t: Tensor) -> Tensor:
    """The same t for every image of x_t: int64 [B]."""
    return torch.full(x_t.shape[:1], t, dtype=torch.int64, device=x_t.device)


def last_image(loop: Iterator[tuple[int, Tensor]]) -> Tensor:
    """What a loop of sampling steps ends with."""
    for _, x in loop:
        pass
    return x
