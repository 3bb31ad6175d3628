"""The same numbers as diffusers, from random weights.

U-Net outputs agree within 1e-5, each gradient within 1e-4 of the largest number in its tensor.

The schedulers there multiply alphas_cumprod up in float32, so that 1 - alphas_cumprod[0] is off by
2e-4 of itself.  Betas, q_sample and a pipeline's images are compared with theirs as it is; so is
p_sample, within 1e-3.  On the same product in float64 their formulas agree within 1e-5 in p_sample
and whole chains, 1e-4 in DDIM, and 5e-4 in DDIM with the cosine schedule, whose x_0 at T - 1 is the
rounding of x_t times 20,291.

DDIM is the same thing in both with uniform spacing here, and there timestep_spacing="trailing"
(from T - 1 down), set_alpha_to_one=True (to x_0 at the end), clip_sample=True and
use_clipped_model_output=True (eps from the clipped x_0), for numbers of steps that divide T: else
DDIMScheduler takes T // steps for the way to the next timestep.
"""

from collections.abc import Callable

import pytest
import torch
from conversion import CONFIGS, diffusers, exported
from helpers import Gaussian, random_unet, tiny
from torch import Tensor, nn
from torch.testing import assert_close

import ddim
from config import Config
from ddpm import DDPM, RandnLike
from tools import convert


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def from_generator() -> RandnLike:
    """Draw what the schedulers there draw from a seeded generator."""
    generator = seeded()
    return lambda x_t: torch.randn(x_t.shape, generator=generator)


def scheduler(config: Config, exact: bool = False) -> diffusers.DDPMScheduler:
    """Return theirs; exact gives it alphas_cumprod in float64."""
    theirs = diffusers.DDPMScheduler(**convert.scheduler_settings(config))
    if exact:
        theirs.alphas_cumprod = exact_alphas_cumprod(config)
    return theirs


def exact_alphas_cumprod(config: Config) -> Tensor:
    return torch.tensor(diffusion(config).alphas_cumprod_float64, dtype=torch.float64)


def diffusion(config: Config, model: Callable | None = None) -> DDPM:
    return DDPM(model or nn.Identity(), config)


# The network

@pytest.mark.parametrize("name", CONFIGS)
def test_unet_outputs_and_gradients(name, tmp_path):
    config = CONFIGS[name]
    ours = random_unet(config)
    folder = exported(ours, config, tmp_path)
    theirs = diffusers.UNet2DModel.from_pretrained(folder / "unet").eval()

    x_t = torch.randn(2, config.channels, config.image_size, config.image_size)
    t = torch.tensor([3, config.timesteps - 1])
    our_noise = ours(x_t, t)
    their_noise = theirs(x_t, t).sample
    assert 0.1 < our_noise.std() < 10
    assert_close(our_noise, their_noise, rtol=0, atol=1e-5)

    target = torch.randn_like(x_t)
    (our_noise - target).square().mean().backward()
    (their_noise - target).square().mean().backward()
    names = convert.weight_names(ours)
    for our_name, parameter in ours.named_parameters():
        pieces = [theirs.get_parameter(name).grad for name in names[our_name]]
        tolerance = 1e-4 * parameter.grad.abs().max().item()
        assert_close(parameter.grad, torch.cat(pieces), rtol=0, atol=tolerance)
    compared = sum(map(len, names.values()))
    assert compared == len(list(theirs.parameters()))


# The schedule and the samplers

@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("timesteps", [1000, 100, 4000])
def test_betas(schedule, timesteps):
    config = Config(beta_schedule=schedule, timesteps=timesteps)
    betas = scheduler(config).betas
    assert_close(diffusion(config).betas, betas, rtol=0, atol=1e-7)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_q_sample(schedule):
    config = Config(beta_schedule=schedule)
    t = torch.tensor([0, 1, 10, 250, 500, 900, 998, 999])
    x_start = torch.rand(8, 3, 16, 16) * 2 - 1
    noise = torch.randn_like(x_start)
    ours = diffusion(config).q_sample(x_start, t, noise)
    theirs = scheduler(config).add_noise(x_start, noise, t)
    assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("t", [0, 1, 2, 100, 500, 900, 999])
def test_p_sample(variance, t):
    config = Config(variance=variance)
    x_t, pred_noise = torch.randn(2, 4, 3, 16, 16)
    ddpm = diffusion(config, lambda x_t, t: pred_noise)
    noise = torch.randn(x_t.shape, generator=seeded())
    ours = ddpm.p_sample(x_t, torch.full((4,), t), noise)
    for exact, tolerance in ((True, 1e-5), (False, 1e-3)):
        theirs = scheduler(config, exact).step(pred_noise, t, x_t, seeded())
        some_are_clipped = theirs.pred_original_sample.abs() == 1
        assert some_are_clipped.any()
        assert_close(ours, theirs.prev_sample, rtol=0, atol=tolerance)


def network_for(config: Config) -> nn.Module:
    """Return a U-Net for a short chain, the perfect one of Gaussian data for T = 1000."""
    if config.timesteps < 1000:
        return random_unet(config)
    return Gaussian(config, 0.2, 0.5)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("timesteps", [30, 1000])
@torch.no_grad()
def test_the_whole_chain(timesteps, schedule, variance, shape):
    config = tiny(timesteps=timesteps, beta_schedule=schedule, variance=variance)
    model = network_for(config)
    x_t = torch.randn(shape)
    ours = diffusion(config, model).sample(x_t, from_generator())
    theirs, generator = scheduler(config, exact=True), seeded()
    for t in theirs.timesteps.tolist():
        pred_noise = model(x_t, torch.full((4,), t))
        x_t = theirs.step(pred_noise, t, x_t, generator).prev_sample
    assert_close(ours, x_t, rtol=0, atol=1e-5)


def sampled_with(
    theirs, config: Config, model: nn.Module, x_t: Tensor, steps: int, **options
) -> Tensor:
    """Return what their scheduler of fewer steps makes of x_t, on our alphas_cumprod."""
    theirs.alphas_cumprod = exact_alphas_cumprod(config)
    theirs.set_timesteps(steps)
    timesteps = theirs.timesteps.tolist()
    assert timesteps == ddim.spaced_timesteps(config.timesteps, steps, "uniform")
    randn_like = from_generator()
    for t in timesteps:
        pred_noise = model(x_t, torch.full((4,), t))
        noise = randn_like(x_t)
        x_t = theirs.step(pred_noise, t, x_t, variance_noise=noise, **options).prev_sample
    return x_t


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(
    ("timesteps", "steps"), [(30, 10), (30, 30), (1000, 10), (1000, 50), (1000, 1000)])
@torch.no_grad()
def test_ddim(timesteps, steps, schedule, eta, shape):
    config = tiny(timesteps=timesteps, beta_schedule=schedule)
    model = network_for(config)
    x_t = torch.randn(shape)
    ours = ddim.sample(
        diffusion(config, model), x_t, steps, eta, spacing="uniform", order=1,
        randn_like=from_generator())

    settings = convert.scheduler_settings(config)
    del settings["variance_type"]
    theirs = diffusers.DDIMScheduler(
        **settings, timestep_spacing="trailing", set_alpha_to_one=True)
    x_t = sampled_with(
        theirs, config, model, x_t, steps, eta=eta, use_clipped_model_output=True)
    tolerance = 5e-4 if schedule == "cosine" else 1e-4
    assert_close(ours, x_t, rtol=0, atol=tolerance)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(("timesteps", "steps"), [(30, 10), (1000, 10), (1000, 50)])
@torch.no_grad()
def test_order_2(timesteps, steps, schedule, eta, shape):
    """In DPMSolverMultistepScheduler thresholding with sample_max_value 1 is the clip."""
    config = tiny(timesteps=timesteps, beta_schedule=schedule)
    model = network_for(config)
    x_t = torch.randn(shape)
    ours = ddim.sample(
        diffusion(config, model), x_t, steps, eta, spacing="uniform", order=2,
        randn_like=from_generator())

    settings = convert.scheduler_settings(config)
    for name in ("variance_type", "clip_sample"):
        del settings[name]
    theirs = diffusers.DPMSolverMultistepScheduler(
        **settings, solver_order=2, algorithm_type="sde-dpmsolver++" if eta else "dpmsolver++",
        solver_type="midpoint", timestep_spacing="trailing", final_sigmas_type="zero",
        thresholding=True, dynamic_thresholding_ratio=1.0, sample_max_value=1.0)
    x_t = sampled_with(theirs, config, model, x_t, steps)
    assert_close(ours, x_t, rtol=0, atol=5e-4)


# Both programs sample from what was converted

def test_the_pipeline_gives_our_images(tmp_path, shape):
    config = tiny()
    model = random_unet(config)
    pipeline = diffusers.DDPMPipeline.from_pretrained(exported(model, config, tmp_path))
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(4, seeded(), num_inference_steps=30, output_type="np").images

    randn_like = from_generator()
    x_T = randn_like(torch.empty(shape))
    ours = diffusion(config, model).sample(x_T, randn_like)
    from_0_to_1 = (ours / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert_close(from_0_to_1, torch.from_numpy(theirs), rtol=0, atol=1e-4)
