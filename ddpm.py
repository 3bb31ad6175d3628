"""The mathematics of DDPM (arXiv 2006.11239): schedules, q(x_t | x_0), the loss, and the samplers.

    ddpm = DDPM(UNet(config), config)
    loss = ddpm.training_loss(x_start)                  # Algorithm 1
    x_0 = ddpm.sample(torch.randn(16, 3, 32, 32))       # Algorithm 2

Images are float tensors [B, C, H, W] in [-1, 1]; t is an int64 tensor [B] in 0..T-1.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config, derive_seed

Noise = Callable[[int], Tensor]  # t -> standard normal noise like x_t
Step = tuple[int, Tensor, Tensor]  # (t, x after the step, pred_x_start)


def linear_beta_schedule(timesteps: int, start: float = 1e-4, end: float = 0.02) -> Tensor:
    """The beta_t of Eq. 2, [T] float64, section 4: equal steps, scaled by 1000 / T so that x_T is noise for any T."""
    scale = 1000 / timesteps
    return torch.linspace(scale * start, scale * end, timesteps, dtype=torch.float64, device="cpu")


def cosine_beta_schedule(timesteps: int, s: float = 0.008) -> Tensor:
    """The beta_t of Eq. 2, [T] float64, such that alphas_cumprod is a squared cosine (arXiv 2102.09672, Eq. 17)."""
    steps = torch.arange(timesteps + 1, dtype=torch.float64, device="cpu") / timesteps
    alphas_cumprod = torch.cos((steps + s) / (1 + s) * math.pi / 2) ** 2
    return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=0.999)


class DDPM(nn.Module):
    """The diffusion around a network model(x_t, t) -> predicted noise.

    t is 0-based: x_t at t = 0 has taken one step of noise, at t = T - 1 all T of them.  x_start has taken none, and
    is what a step back from t = 0 leads to.
    """

    def __init__(self, model: Callable[[Tensor, Tensor], Tensor], config: Config) -> None:
        super().__init__()
        self.model = model
        self.timesteps = config.timesteps

        if config.beta_schedule == "linear":
            betas = linear_beta_schedule(config.timesteps, config.beta_start, config.beta_end)
        else:
            betas = cosine_beta_schedule(config.timesteps)
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
        keep("posterior_variance", posterior_variance)
        keep("posterior_mean_coef1", betas * alphas_cumprod_prev.sqrt() / (1 - alphas_cumprod))
        keep("posterior_mean_coef2", alphas.sqrt() * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod))

        # p(x_{t-1} | x_t): at t = 0 beta_0 makes the likelihood poor; sampling never uses that entry
        fixed_large = torch.cat([posterior_variance[1:2], betas[1:]])
        keep("model_variance", fixed_large if config.variance == "fixed_large" else posterior_variance)

        # DDIM jumps between any two timesteps: its coefficients are formed in float64, one by one
        self.alphas_cumprod_float64: list[float] = alphas_cumprod.tolist()

    # The forward process

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_t drawn from q(x_t | x_0), Eq. 4.  One t an image; noise like x_start."""
        noise = torch.randn_like(x_start) if noise is None else noise
        return at(self.sqrt_alphas_cumprod, t) * x_start + at(self.sqrt_one_minus_alphas_cumprod, t) * noise

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [B, C, H, W] and variance [B, 1, 1, 1] of q(x_{t-1} | x_t, x_0), Eq. 6-7."""
        mean = at(self.posterior_mean_coef1, t) * x_start + at(self.posterior_mean_coef2, t) * x_t
        return mean, at(self.posterior_variance, t)

    # Training

    def training_loss(self, x_start: Tensor, t: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """The loss of Algorithm 1, Eq. 14: the mean over all elements of (noise - pred_noise)^2, a scalar."""
        if t is None:
            t = torch.randint(self.timesteps, x_start.shape[:1], device=x_start.device)
        noise = torch.randn_like(x_start) if noise is None else noise
        return self.loss_per_image(x_start, t, noise).mean()

    def loss_per_image(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The loss of Eq. 14 for each image [B], float32."""
        pred_noise = self.model(self.q_sample(x_start, t, noise), t)
        return (noise - pred_noise.float()).square().mean(dim=(1, 2, 3))

    # The reverse process

    def predict_x_start(self, x_t: Tensor, t: Tensor, pred_noise: Tensor) -> Tensor:
        """x_0 from x_t and its noise, Eq. 15, clipped to [-1, 1]: near T errors of the noise are multiplied by 157."""
        x_start = at(self.sqrt_recip_alphas_cumprod, t) * x_t - at(self.sqrt_recipm1_alphas_cumprod, t) * pred_noise
        return x_start.clamp(-1, 1)

    def p_mean_variance(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [B, C, H, W] and variance [B, 1, 1, 1] of p(x_{t-1} | x_t), Eq. 11 by way of the clipped x_0."""
        mean, _ = self.q_posterior(self._denoise(x_t, t), x_t, t)
        return mean, at(self.model_variance, t)

    @torch.no_grad()
    def p_sample(self, x_t: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """One step of Algorithm 2: x_{t-1} drawn from p(x_{t-1} | x_t).  noise like x_t; not used where t = 0."""
        return self._p_step(x_t, t, noise)[0]

    @torch.no_grad()
    def p_sample_loop(self, x_t: Tensor, t_start: int | None = None, noise: Noise | None = None) -> Iterator[Step]:
        """Algorithm 2 from x_t at t_start (T - 1 where None) down to 0: yields (t, x_{t-1}, pred_x_start)."""
        for t in reversed(range(self.timesteps if t_start is None else t_start + 1)):
            z = noise(t) if noise is not None and t > 0 else None
            x_t, pred_x_start = self._p_step(x_t, self._batch_of(t, x_t), z)
            yield t, x_t, pred_x_start

    @torch.no_grad()
    def ddim_sample_loop(self, x_t: Tensor, timesteps: Sequence[int], eta: float = 0.0,
                         noise: Noise | None = None) -> Iterator[Step]:
        """DDIM (arXiv 2010.02502, Eq. 12 and 16) over falling timesteps: yields (t, x at the next one, pred_x_start).

        eta 0 draws no noise; eta 1 over all timesteps is Algorithm 2 with fixed_small variance.
        """
        for t, s in zip(timesteps, [*timesteps[1:], None]):
            abar_t = self.alphas_cumprod_float64[t]
            abar_s = 1.0 if s is None else self.alphas_cumprod_float64[s]
            pred_x_start = self._denoise(x_t, self._batch_of(t, x_t))
            # The network's own noise no longer fits once x_0 is clipped.
            eps = (x_t - math.sqrt(abar_t) * pred_x_start) / math.sqrt(1 - abar_t)
            variance = eta**2 * (1 - abar_t / abar_s) * (1 - abar_s) / (1 - abar_t)
            x_t = math.sqrt(abar_s) * pred_x_start + math.sqrt(max(0.0, 1 - abar_s - variance)) * eps
            if variance > 0:
                x_t = x_t + math.sqrt(variance) * (torch.randn_like(x_t) if noise is None else noise(t))
            yield t, x_t, pred_x_start

    def sample_loop(self, x_T: Tensor, steps: int | None = None, eta: float | None = None,
                    spacing: str = "quadratic", noise: Noise | None = None) -> Iterator[Step]:
        """Algorithm 2 where steps is None or T and no eta is given; DDIM (eta 0 unless given) otherwise."""
        if steps in (None, self.timesteps) and eta is None:
            return self.p_sample_loop(x_T, noise=noise)
        timesteps = spaced_timesteps(self.timesteps, steps or self.timesteps, spacing)
        return self.ddim_sample_loop(x_T, timesteps, eta or 0.0, noise)

    def sample(self, x_T: Tensor, steps: int | None = None, eta: float | None = None,
               spacing: str = "quadratic", noise: Noise | None = None) -> Tensor:
        """x_T [B, C, H, W], standard normal -> x_0 in [-1, 1].  The arguments are those of sample_loop."""
        for _, x, _ in self.sample_loop(x_T, steps, eta, spacing, noise):
            pass
        return x

    def _denoise(self, x_t: Tensor, t: Tensor) -> Tensor:
        """pred_x_start by one call of the network, without dropout."""
        with evaluating(self):
            pred_noise = self.model(x_t, t).float()
        return self.predict_x_start(x_t, t, pred_noise)

    def _p_step(self, x_t: Tensor, t: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        pred_x_start = self._denoise(x_t, t)
        mean, _ = self.q_posterior(pred_x_start, x_t, t)
        noise = torch.randn_like(x_t) if noise is None else noise
        # At t = 0 the mean is the image: noise added there would stay in it.
        std = at(self.model_variance, t).sqrt() * (t > 0).view(-1, 1, 1, 1)
        return mean + std * noise, pred_x_start

    def _batch_of(self, t: int, x_t: Tensor) -> Tensor:
        return torch.full(x_t.shape[:1], t, dtype=torch.int64, device=x_t.device)

    # The likelihood

    @torch.no_grad()
    def bits_per_dim(self, x_start: Tensor, timesteps: Tensor | None = None,
                     noise: Noise | None = None) -> dict[str, Tensor]:
        """The variational bound of Eq. 5 on 8-bit images, for each image [B] in bits per dimension.

        total = prior (L_T) + rate (L_1..L_{T-1}) + distortion (L_0, Eq. 13); mse: of the x_0 predicted at t = 0.
        timesteps [K, B], each uniform in 1..T-1, make rate an unbiased estimate from K of its T - 1 terms.
        noise(n) is asked for once an evaluation: 0 for L_0, then 1, 2, ...; without timesteps that is its t.
        """
        def predict(t: Tensor, n: int) -> Tensor:
            return self._denoise(self.q_sample(x_start, t, noise(n) if noise else None), t)

        def bits(nats: Tensor) -> Tensor:
            return nats.mean(dim=(1, 2, 3)) / math.log(2)

        # q(x_T | x_0) against a standard normal
        abar_T = self.alphas_cumprod_float64[-1]
        prior = bits((abar_T * x_start.square() - abar_T - math.log1p(-abar_T)) / 2)

        # At t = 0 the mean is pred_x_start.  fixed_small has no variance there: fixed_large's serves both.
        pred_x_start = predict(self._batch_of(0, x_start), 0)
        distortion = bits(-discretized_log_likelihood(x_start, pred_x_start, self.posterior_variance[1].sqrt()))
        mse = (x_start - pred_x_start).square().mean(dim=(1, 2, 3))

        if timesteps is None:
            timesteps = torch.arange(1, self.timesteps, device=x_start.device)[:, None].expand(-1, len(x_start))
        rate = torch.zeros_like(prior)
        for n, t in enumerate(timesteps, start=1):
            rate = rate + bits(self.posterior_kl(x_start, predict(t, n), t))
        rate = rate * ((self.timesteps - 1) / len(timesteps))
        return {"total": prior + rate + distortion, "prior": prior, "rate": rate, "distortion": distortion, "mse": mse}

    def posterior_kl(self, x_start: Tensor, pred_x_start: Tensor, t: Tensor) -> Tensor:
        """KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) of each pixel [B, C, H, W], in nats, for t > 0: Eq. 8.

        Without the clip of x_0 its part that the network can change is Eq. 12, the weighted error of the noise.
        """
        variance = at(self.model_variance, t)
        # The two means differ by x_0 alone; log1p keeps the digits where the two variances are nearly equal.
        difference = at(self.posterior_mean_coef1, t) * (x_start - pred_x_start)
        excess = (at(self.posterior_variance, t) - variance) / variance
        return (excess - torch.log1p(excess) + difference.square() / variance) / 2


def at(coefficients: Tensor, t: Tensor) -> Tensor:
    """coefficients [T] at t [B] -> [B, 1, 1, 1], to broadcast against images."""
    return coefficients[t].view(-1, 1, 1, 1)


def discretized_log_likelihood(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """ln of the normal density integrated over the 1/127.5 wide bin around x, Eq. 13; x: 8-bit values in [-1, 1]."""
    lower = torch.where(x < -0.999, -math.inf, (x - 1 / 255 - mean) / std)
    upper = torch.where(x > 0.999, math.inf, (x + 1 / 255 - mean) / std)
    # Mirrored to the left of the mean: only there the logarithm of the integral keeps its digits, however far away.
    right = x > mean
    lower, upper = torch.where(right, -upper, lower), torch.where(right, -lower, upper)
    log_upper = log_normal_cdf(upper)
    return log_upper + torch.log(-torch.expm1(log_normal_cdf(lower) - log_upper))


def log_normal_cdf(x: Tensor) -> Tensor:
    """ln Phi(x), exact in both tails.  torch.special.log_ndtr is the same, but not there on an Apple GPU."""
    x = x / math.sqrt(2)
    return torch.where(x < 0, torch.log(torch.special.erfcx(-x) / 2) - x**2, torch.log1p(-torch.erfc(x) / 2))


def spaced_timesteps(T: int, S: int, spacing: str = "quadratic") -> list[int]:
    """S distinct timesteps falling from T - 1; quadratic: closer together near 0.  ValueError: S not in 1..T."""
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
    """Without dropout inside; every submodule's own mode again afterwards, on an exception too."""
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        yield
    finally:
        for m in training:
            m.training = True


class ImageNoise:
    """Standard normal noise for a batch of images, each drawn from a generator of its own: (seed, image index).

    noise = ImageNoise(seed, range(8), (3, 32, 32), device); every call noise() returns the next draw [8, 3, 32, 32].
    An image's draws do not depend on the batch around it.  Equal indices share all their noise.
    """

    def __init__(self, seed: int, indices: Sequence[int], shape: Sequence[int], device: torch.device | str) -> None:
        # Hashed once per seed, then counted up: on a CPU torch keeps 32 bits of a seed, and hashes of those collide.
        base = derive_seed("image", seed)
        self.generators = [torch.Generator(device).manual_seed((base + i) % 2**64) for i in indices]
        # One draw serves many steps: its size hangs on the image alone, so the stream does not depend on the batch.
        self.draws = max(1, min(32, 2**20 // math.prod(shape)))
        self.shape, self.device, self.used, self.buffer = tuple(shape), device, self.draws, None

    def __call__(self, t: int | None = None) -> Tensor:
        if self.used == self.draws:
            self.buffer = torch.stack([torch.randn(self.draws, *self.shape, generator=g, device=self.device)
                                       for g in self.generators], dim=1)
            self.used = 0
        self.used += 1
        return self.buffer[self.used - 1]
