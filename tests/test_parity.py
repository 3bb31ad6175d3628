"""The same numbers as diffusers, from random weights; and the way there and back.

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

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Gaussian, called, random_unet, refused, succeeded, tiny
from torch import Tensor, nn

from config import PRESETS, Config
from ddpm import DDPM, spaced_timesteps
from model import UNet
from tools import convert
from utils.checkpoint import load_checkpoint, load_network, save_checkpoint

if "CI" in os.environ:  # there, without diffusers, these tests fail
    import diffusers
else:
    diffusers = pytest.importorskip("diffusers")
from safetensors.torch import save_file

CPU = torch.device("cpu")

# Each with several channels per group: with one, group norm leaves the layers before it no gradient
# to compare.
CONFIGS = {
    "paper": Config(**PRESETS["paper"]),
    "two levels attend": Config(
        image_size=16,
        dim=48,
        dim_mults=(1, 2, 3),
        num_res_blocks=1,
        attn_resolutions=(16, 4),
        timesteps=200,
        beta_schedule="cosine",
        variance="fixed_small",
    ),
    "greyscale": Config(
        image_size=16,
        channels=1,
        dim=40,
        dim_mults=(1, 2),
        attn_resolutions=(),
        dropout=0.0,
    ),
}


def save(model: UNet, config: Config, path: Path) -> None:
    content = {"config": asdict(config), "step": 7, "ema": model.state_dict()}
    save_checkpoint(content, path)


def to_diffusers(cwd: Path, source: str = "ours.pth", target: str = "theirs"):
    return called("tools.convert", "to_diffusers", source, target, cwd=cwd)


def from_diffusers(cwd: Path, source: str = "theirs", target: str = "back.pth"):
    return called("tools.convert", "from_diffusers", source, target, cwd=cwd)


def exported(model: UNet, config: Config, tmp_path: Path) -> Path:
    """The folder that to_diffusers makes."""
    save(model, config, tmp_path / "ours.pth")
    result = succeeded(to_diffusers(tmp_path))
    said = result.stderr.splitlines()
    if torch.__version__.startswith("2.4."):  # it warns of the missing GPU
        said = [line for line in said if "CUDA is not available" not in line]
    assert said == []
    return tmp_path / "theirs"


def noise_like(x_t: Tensor) -> Callable[[int], Tensor]:
    """Its draws depend on t alone."""
    return lambda t: torch.randn(x_t.shape, generator=seeded_with(t))


def seeded_with(t: int) -> torch.Generator:
    return torch.Generator().manual_seed(t)


def scheduler(config: Config, exact: bool = False) -> diffusers.DDPMScheduler:
    """Theirs; exact: with alphas_cumprod in float64."""
    theirs = diffusers.DDPMScheduler(**convert.scheduler_settings(config))
    if exact:
        theirs.alphas_cumprod = exact_alphas_cumprod(config)
    return theirs


def exact_alphas_cumprod(config: Config) -> Tensor:
    return torch.tensor(diffusion(config).alphas_cumprod_float64, dtype=torch.float64)


def diffusion(config: Config, model: Callable | None = None) -> DDPM:
    return DDPM(model or nn.Identity(), config)


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)


# The network

@pytest.mark.parametrize("name", CONFIGS)
def test_unet_outputs_gradients_and_the_way_back(name, tmp_path):
    config = CONFIGS[name]
    ours = random_unet(config)
    folder = exported(ours, config, tmp_path)
    theirs = diffusers.UNet2DModel.from_pretrained(folder / "unet").eval()

    x_t = torch.randn(2, config.channels, config.image_size, config.image_size)
    t = torch.tensor([3, config.timesteps - 1])
    our_noise = ours(x_t, t)
    their_noise = theirs(x_t, t).sample
    assert 0.1 < our_noise.std() < 10
    close(our_noise, their_noise, 1e-5)

    target = torch.randn_like(x_t)
    (our_noise - target).square().mean().backward()
    (their_noise - target).square().mean().backward()
    names = convert.weight_names(ours)
    for our_name, parameter in ours.named_parameters():
        pieces = [theirs.get_parameter(name).grad for name in names[our_name]]
        tolerance = 1e-4 * parameter.grad.abs().max().item()
        close(parameter.grad, torch.cat(pieces), tolerance)
    compared = sum(map(len, names.values()))
    assert compared == len(list(theirs.parameters()))

    result = succeeded(from_diffusers(tmp_path))
    assert result.stderr == ""
    back, back_config, step = load_network(tmp_path / "back.pth", CPU)
    assert step == 0
    assert back.state_dict().keys() == ours.state_dict().keys()
    for key, tensor in ours.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[key]), key
    for field in ("image_size", "channels", "dim", "dim_mults", "num_res_blocks",
                  "attn_resolutions", "dropout", "timesteps", "beta_schedule", "variance"):
        assert getattr(back_config, field) == getattr(config, field)
    assert back_config.beta_start == pytest.approx(config.beta_start)
    assert back_config.beta_end == pytest.approx(config.beta_end)


# The schedule and the samplers

@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("timesteps", [1000, 100, 4000])
def test_betas(schedule, timesteps):
    config = Config(beta_schedule=schedule, timesteps=timesteps)
    close(diffusion(config).betas, scheduler(config).betas, 1e-7)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_q_sample(schedule):
    config = Config(beta_schedule=schedule)
    t = torch.tensor([0, 1, 10, 250, 500, 900, 998, 999])
    x_start = torch.rand(8, 3, 16, 16) * 2 - 1
    noise = torch.randn_like(x_start)
    ours = diffusion(config).q_sample(x_start, t, noise)
    theirs = scheduler(config).add_noise(x_start, noise, t)
    close(ours, theirs, 1e-5)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("t", [0, 1, 2, 100, 500, 900, 999])
def test_p_sample(variance, t):
    config = Config(variance=variance)
    x_t, pred_noise = torch.randn(2, 4, 3, 16, 16)
    ddpm = diffusion(config, lambda x_t, t: pred_noise)
    ours = ddpm.p_sample(x_t, torch.full((4,), t), noise_like(x_t)(t))
    for exact, tolerance in ((True, 1e-5), (False, 1e-3)):
        theirs = scheduler(config, exact).step(pred_noise, t, x_t, seeded_with(t))
        some_are_clipped = theirs.pred_original_sample.abs() == 1
        assert some_are_clipped.any()
        close(ours, theirs.prev_sample, tolerance)


def network_for(config: Config) -> nn.Module:
    """A U-Net for a short chain, the perfect network of Gaussian data for T = 1000."""
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
    ours = diffusion(config, model).sample(x_t, noise=noise_like(x_t))
    theirs = scheduler(config, exact=True)
    for t in theirs.timesteps.tolist():
        pred_noise = model(x_t, torch.full((4,), t))
        x_t = theirs.step(pred_noise, t, x_t, seeded_with(t)).prev_sample
    close(ours, x_t, 1e-5)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(
    ("timesteps", "steps"), [(30, 10), (30, 30), (1000, 10), (1000, 50), (1000, 1000)])
@torch.no_grad()
def test_ddim(timesteps, steps, schedule, eta, shape):
    config = tiny(timesteps=timesteps, beta_schedule=schedule)
    model = network_for(config)
    x_t = torch.randn(shape)
    noise = noise_like(x_t)
    ours = diffusion(config, model).sample(
        x_t, steps=steps, eta=eta, spacing="uniform", order=1, noise=noise)

    settings = convert.scheduler_settings(config)
    del settings["variance_type"]
    theirs = diffusers.DDIMScheduler(
        **settings, timestep_spacing="trailing", set_alpha_to_one=True)
    theirs.alphas_cumprod = exact_alphas_cumprod(config)
    theirs.set_timesteps(steps)
    assert theirs.timesteps.tolist() == spaced_timesteps(timesteps, steps, "uniform")
    for t in theirs.timesteps.tolist():
        pred_noise = model(x_t, torch.full((4,), t))
        x_t = theirs.step(
            pred_noise, t, x_t, eta, use_clipped_model_output=True, variance_noise=noise(t),
        ).prev_sample
    close(ours, x_t, 5e-4 if schedule == "cosine" else 1e-4)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(("timesteps", "steps"), [(30, 10), (1000, 10), (1000, 50)])
@torch.no_grad()
def test_order_2(timesteps, steps, schedule, eta, shape):
    """DPMSolverMultistepScheduler, whose thresholding with sample_max_value 1 is the clip."""
    config = tiny(timesteps=timesteps, beta_schedule=schedule)
    model = network_for(config)
    x_t = torch.randn(shape)
    noise = noise_like(x_t)
    ours = diffusion(config, model).sample(x_t, steps, eta, "uniform", 2, noise)

    settings = convert.scheduler_settings(config)
    for name in ("variance_type", "clip_sample"):
        del settings[name]
    theirs = diffusers.DPMSolverMultistepScheduler(
        **settings, solver_order=2, algorithm_type="sde-dpmsolver++" if eta else "dpmsolver++",
        solver_type="midpoint", timestep_spacing="trailing", final_sigmas_type="zero",
        thresholding=True, dynamic_thresholding_ratio=1.0, sample_max_value=1.0)
    theirs.alphas_cumprod = exact_alphas_cumprod(config)
    theirs.set_timesteps(steps)
    assert theirs.timesteps.tolist() == spaced_timesteps(timesteps, steps, "uniform")
    for t in theirs.timesteps.tolist():
        pred_noise = model(x_t, torch.full((4,), t))
        x_t = theirs.step(pred_noise, t, x_t, variance_noise=noise(t)).prev_sample
    close(ours, x_t, 5e-4)


# Both programs sample from what was converted

def test_the_pipeline_gives_our_images(tmp_path, shape):
    config = tiny()
    model = random_unet(config)
    pipeline = diffusers.DDPMPipeline.from_pretrained(exported(model, config, tmp_path))
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(4, seeded_with(5), num_inference_steps=30, output_type="np").images

    generator = seeded_with(5)
    x_T = torch.randn(shape, generator=generator)
    ours = diffusion(config, model).sample(
        x_T, noise=lambda t: torch.randn(shape, generator=generator))
    from_0_to_1 = (ours / 2 + 0.5).clamp(0, 1)
    close(from_0_to_1.permute(0, 2, 3, 1), torch.from_numpy(theirs), 1e-4)


def test_inference_samples_from_a_converted_checkpoint(tmp_path):
    exported(random_unet(tiny()), tiny(), tmp_path)
    succeeded(from_diffusers(tmp_path))
    pictures = []
    for name in ("ours", "back"):
        succeeded(called(
            "inference.py", "--checkpoint", f"{name}.pth", "--output_dir", name,
            "--num_samples", "2", "--device", "cpu", "--precision", "fp32", cwd=tmp_path))
        pictures.append((tmp_path / name / "samples.png").read_bytes())
    assert pictures[0] == pictures[1]


def test_evaluate_asks_what_a_converted_checkpoint_was_trained_on(tmp_path):
    exported(random_unet(tiny()), tiny(), tmp_path)
    succeeded(from_diffusers(tmp_path))
    line = ("--metric", "bpd", "--checkpoint", "back.pth", "--device", "cpu")
    refused(called("evaluate.py", *line, cwd=tmp_path), 1, "data='unknown'")


OF_2022 = {
    "to_q": "query",
    "to_k": "key",
    "to_v": "value",
    "to_out.0": "proj_attn",
}
UNET_OF_2022 = {
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.0.4",
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [8, 16],
    "center_input_sample": False,
    "down_block_types": ["AttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-6,
    "norm_num_groups": 8,
    "out_channels": 3,
    "sample_size": 8,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D"],
}
SCHEDULER_OF_2022 = {
    "_class_name": "DDPMScheduler",
    "_diffusers_version": "0.1.1",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "clip_sample": True,
    "num_train_timesteps": 1000,
    "variance_type": "fixed_large",
}


@pytest.mark.parametrize("names", ["of 2022", "of today"])
@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_a_folder_laid_out_like_google_ddpm_cifar10_32(suffix, names, tmp_path):
    """Settings and weights side by side, few settings, attention layers by their first names."""
    config = tiny(num_res_blocks=2, attn_resolutions=(8,))
    model = random_unet(config)
    unet = diffusers.UNet2DModel.from_pretrained(exported(model, config, tmp_path) / "unet")
    weights = unet.state_dict()
    if names == "of 2022":
        for new, old in OF_2022.items():
            weights = {key.replace(f".{new}.", f".{old}."): w for key, w in weights.items()}
        queries = [key for key in weights if ".query." in key]
        assert len(queries) == 2 * (2 + 1 + 3)

    folder = tmp_path / "downloaded"
    folder.mkdir()
    write = torch.save if suffix == "bin" else save_file
    write(weights, folder / f"diffusion_pytorch_model.{suffix}")
    (folder / "config.json").write_text(json.dumps(UNET_OF_2022))
    (folder / "scheduler_config.json").write_text(json.dumps(SCHEDULER_OF_2022))

    result = succeeded(from_diffusers(tmp_path, "downloaded", "new/model.pth"))
    assert result.stderr == ""
    content = load_checkpoint(tmp_path / "new" / "model.pth")
    for key, tensor in model.state_dict().items():
        assert torch.equal(content["ema"][key], tensor), key
    got = Config(**content["config"])
    assert (got.timesteps, got.beta_start, got.beta_end) == (1000, 0.0001, 0.02)
    assert got.variance == "fixed_large"


# Refusals

UNET = "unet/config.json"
SCHEDULER = "scheduler/scheduler_config.json"

# file, setting, a value that this project lacks
LACKING = [
    (UNET, "class_embed_type", "timestep"),
    (UNET, "num_class_embeds", 10),
    (UNET, "attention_head_dim", 8),
    (UNET, "attention_head_dim", 4),
    (UNET, "down_block_types", ["DownBlock2D", "ResnetDownsampleBlock2D"]),
    (UNET, "up_block_types", ["UpBlock2D", "UpBlock2D"]),
    (UNET, "up_block_types", ["AttnUpBlock2D", "AttnUpBlock2D"]),
    (UNET, "mid_block_type", None),
    (UNET, "add_attention", False),
    (UNET, "time_embedding_type", "fourier"),
    (UNET, "time_embedding_dim", 64),
    (UNET, "freq_shift", 0),
    (UNET, "flip_sin_to_cos", True),
    (UNET, "downsample_padding", 1),
    (UNET, "downsample_type", "resnet"),
    (UNET, "upsample_type", "resnet"),
    (UNET, "norm_eps", 1e-5),
    (UNET, "norm_num_groups", 4),
    (UNET, "attn_norm_num_groups", 4),
    (UNET, "act_fn", "gelu"),
    (UNET, "in_channels", 4),
    (UNET, "out_channels", 6),
    (UNET, "resnet_time_scale_shift", "scale_shift"),
    (UNET, "center_input_sample", True),
    (UNET, "mid_block_scale_factor", 2),
    (UNET, "block_out_channels", [8, 20]),
    (UNET, "block_out_channels", []),
    (UNET, "block_out_channels", [0, 0]),
    (UNET, "sample_size", None),
    (UNET, "sample_size", [8, 16]),
    (UNET, "_class_name", "UNet1DModel"),
    (SCHEDULER, "prediction_type", "v_prediction"),
    (SCHEDULER, "clip_sample", False),
    (SCHEDULER, "clip_sample_range", 2.0),
    (SCHEDULER, "thresholding", True),
    (SCHEDULER, "trained_betas", [0.1, 0.1]),
    (SCHEDULER, "rescale_betas_zero_snr", True),
    (SCHEDULER, "beta_schedule", "scaled_linear"),
    (SCHEDULER, "variance_type", "learned_range"),
    (SCHEDULER, "_class_name", "DDIMScheduler"),
]
NONSENSE = [
    (UNET, "block_out_channels", 8),
    (UNET, "block_out_channels", [8, "16"]),
    (UNET, "block_out_channels", [10**9, 10**9]),
    (UNET, "down_block_types", None),
    (UNET, "layers_per_block", "two"),
    (SCHEDULER, "num_train_timesteps", None),
    (SCHEDULER, "num_train_timesteps", 10**400),
    (SCHEDULER, "beta_schedule", ["linear"]),
]
OURS = {"in_channels": "channels", "variance_type": "variance", "_class_name": ""}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    return exported(random_unet(tiny()), tiny(), tmp_path_factory.mktemp("parity"))


def converted_with(folder: Path, tmp_path: Path, file: str, name: str, value: Any):
    """from_diffusers of the folder with one setting changed."""
    shutil.copytree(folder, tmp_path / "theirs")
    path = tmp_path / "theirs" / file
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, name: value}))
    return from_diffusers(tmp_path)


@pytest.mark.parametrize(("file", "name", "value"), LACKING)
def test_a_setting_that_this_project_lacks_is_refused_by_name(
    file, name, value, folder, tmp_path
):
    result = converted_with(folder, tmp_path, file, name, value)
    shown = value if name == "_class_name" else repr(value)
    refused(result, 1, OURS.get(name, name), shown)
    assert not (tmp_path / "back.pth").exists()


@pytest.mark.parametrize(("file", "name", "value"), NONSENSE)
def test_a_setting_without_a_sense_is_refused_in_one_line(file, name, value, folder, tmp_path):
    result = converted_with(folder, tmp_path, file, name, value)
    refused(result, 1, "theirs cannot be expressed here")
    assert not (tmp_path / "back.pth").exists()


def test_a_network_that_diffusers_lacks_is_refused_by_name(tmp_path):
    config = tiny(dim_mults=(2, 4))
    save(UNet(config), config, tmp_path / "ours.pth")
    refused(to_diffusers(tmp_path), 1, "dim_mults=(2, 4)")
    assert not (tmp_path / "theirs").exists()


def without_a_layer(folder: Path) -> None:
    """diffusers itself would fill it with random numbers."""
    weights = diffusers.UNet2DModel.from_pretrained(folder / "unet").state_dict()
    del weights["mid_block.attentions.0.to_k.weight"]
    save_file(weights, folder / "unet/diffusion_pytorch_model.safetensors")


def truncated(folder: Path) -> None:
    os.truncate(folder / "unet/diffusion_pytorch_model.safetensors", 1000)


def without_weights(folder: Path) -> None:
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()


def without_scheduler(folder: Path) -> None:
    (folder / SCHEDULER).unlink()


def not_json(folder: Path) -> None:
    (folder / UNET).write_text("{")


def a_list(folder: Path) -> None:
    (folder / UNET).write_text("[]")


@pytest.mark.parametrize(("damage", "word"), [
    (without_a_layer, "mid_block.attentions.0.to_k.weight"),
    (truncated, "weights"),
    (without_weights, "weights"),
    (without_scheduler, "DDPMScheduler"),
    (not_json, "JSON"),
    (a_list, "UNet2DModel"),
])
def test_a_damaged_folder_is_refused(damage, word, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "theirs")
    damage(tmp_path / "theirs")
    refused(from_diffusers(tmp_path), 1, word)
    assert not (tmp_path / "back.pth").exists()


def test_what_exists_is_not_overwritten(folder, tmp_path):
    save(random_unet(tiny()), tiny(), tmp_path / "ours.pth")
    before = (tmp_path / "ours.pth").read_bytes()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").touch()
    for target in ("full", "ours.pth"):
        refused(to_diffusers(tmp_path, target=target), 1, target, "exists")
    refused(from_diffusers(tmp_path, str(folder), "ours.pth"), 1, "ours.pth", "exists")
    assert (tmp_path / "ours.pth").read_bytes() == before
    assert len(list(tmp_path.rglob("*"))) == 3

    (tmp_path / "empty").mkdir()
    succeeded(to_diffusers(tmp_path, target="empty"))


def test_what_cannot_be_written_is_named_and_nothing_stays_behind(tmp_path, monkeypatch):
    save(random_unet(tiny()), tiny(), tmp_path / "ours.pth")
    refused(to_diffusers(tmp_path, target="ours.pth/theirs"), 1, "ours.pth/theirs")

    def full_disk(pipeline: diffusers.DDPMPipeline, folder: Path) -> None:
        folder.mkdir()
        (folder / "half").touch()
        raise RuntimeError("no space left")

    monkeypatch.setattr(diffusers.DDPMPipeline, "save_pretrained", full_disk)
    refused(to_diffusers(tmp_path), 1, "theirs cannot be written: no space left")
    assert not (tmp_path / "theirs").exists()


def test_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(pipeline: diffusers.DDPMPipeline, folder: Path) -> None:
        folder.mkdir()
        (folder / "half").touch()
        raise KeyboardInterrupt

    save(random_unet(tiny()), tiny(), tmp_path / "ours.pth")
    monkeypatch.setattr(diffusers.DDPMPipeline, "save_pretrained", interrupted)
    refused(to_diffusers(tmp_path), 130, "interrupted")
    assert not (tmp_path / "theirs").exists()


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    refused(to_diffusers(tmp_path, "none.pth"), 1, "none.pth")
    refused(from_diffusers(tmp_path, "org/x"), 1, "org/x is not a folder")
    (tmp_path / "empty").mkdir()
    refused(from_diffusers(tmp_path, "empty"), 1, "empty", "UNet2DModel")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    refused(to_diffusers(tmp_path, "none.pth"), 1, "pip install diffusers")


@pytest.mark.parametrize("line", [
    (),
    ("to_diffusers", "a"),
    ("sideways", "a", "b"),
    ("to_diffusers", "a", "b", "c"),
    ("to_diffusers", "a", "b", "--force"),
])
def test_a_wrong_command_line_is_one_line(line, tmp_path):
    refused(called("tools.convert", *line, cwd=tmp_path), 2, "error")
