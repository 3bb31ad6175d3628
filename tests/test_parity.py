"""The same numbers as diffusers, an implementation that others wrote, from random weights; and the way there and back.

U-Net outputs agree within 1e-5, each gradient within 1e-4 of the largest number in its tensor.

The schedulers there multiply alphas_cumprod up in float32, so that 1 - alphas_cumprod[0] is off by 2e-4 of itself.
Betas, q_sample and a pipeline's images are compared with theirs as it is; so is p_sample, within 1e-3.  On the same
product in float64 their formulas agree within 1e-5 in p_sample and whole chains, 1e-4 in DDIM, and 5e-4 in DDIM with
the cosine schedule, whose x_0 at T - 1 is the rounding of x_t times 20,291.

DDIM is the same thing in both with uniform spacing here, and there timestep_spacing="trailing" (from T - 1 down),
set_alpha_to_one=True (to x_0 at the end), clip_sample=True and use_clipped_model_output=True (eps from the clipped
x_0), for numbers of steps that divide T: else DDIMScheduler takes T // steps for the way to the next timestep.
"""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from conftest import Gaussian, called, refused, tiny
from torch import Tensor

from checkpoint import load_checkpoint, load_network, save_checkpoint
from config import PRESETS, Config
from ddpm import DDPM, spaced_timesteps
from model import UNet

diffusers = pytest.importorskip("diffusers")
convert = pytest.importorskip("convert")

# Each with several channels a group: with one, group norm leaves the layers before it no gradient to compare.
CONFIGS = {
    "paper": Config(**PRESETS["paper"]),
    "two levels attend": Config(image_size=16, dim=48, dim_mults=(1, 2, 3), num_res_blocks=1, attn_resolutions=(16, 4),
                                beta_schedule="cosine", variance="fixed_small", timesteps=200),
    "greyscale": Config(image_size=16, channels=1, dim=40, dim_mults=(1, 2), attn_resolutions=(), dropout=0.0),
}


def random_unet(config: Config) -> UNet:
    """No parameter at 0 or 1, where a mistake could hide; widened by its fan, so that the output is of order 1."""
    model = UNet(config).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.1 if parameter.ndim == 1 else 0.7 / math.sqrt(parameter[0].numel()))
        if "norm" in name and name.endswith("weight"):
            parameter.data += 1
    return model


def save(model: UNet, config: Config, path: Path) -> None:
    save_checkpoint({"config": vars(config), "step": 7, "ema": model.state_dict()}, path)


def exported(model: UNet, config: Config, tmp_path: Path) -> Path:
    """The folder that to_diffusers makes."""
    save(model, config, tmp_path / "ours.pth")
    result = called("convert.py", "to_diffusers", "ours.pth", "theirs", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    return tmp_path / "theirs"


def noise_at(t: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(t))


def scheduler(config: Config, kind: str = "DDPMScheduler", exact: bool = False, **settings):
    """Theirs; exact: with alphas_cumprod in float64."""
    settings = {**convert.scheduler_settings(config), **settings}
    if kind == "DDIMScheduler":
        del settings["variance_type"]
    theirs = getattr(diffusers, kind)(**settings)
    if exact:
        theirs.alphas_cumprod = torch.tensor(DDPM(torch.nn.Identity(), config).alphas_cumprod_float64,
                                             dtype=torch.float64)
    return theirs


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)


# The network

@pytest.mark.parametrize("name", CONFIGS)
def test_unet_outputs_gradients_and_the_way_back(name, tmp_path):
    config = CONFIGS[name]
    ours = random_unet(config)
    folder = exported(ours, config, tmp_path)
    theirs = diffusers.UNet2DModel.from_pretrained(folder / "unet").eval()
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())

    x_t = torch.randn(2, config.channels, config.image_size, config.image_size)
    t = torch.tensor([3, config.timesteps - 1])
    ours_out, theirs_out = ours(x_t, t), theirs(x_t, t).sample
    assert 0.1 < ours_out.std() < 10
    close(ours_out, theirs_out, 1e-5)

    target = torch.randn_like(x_t)
    (ours_out - target).square().mean().backward()
    (theirs_out - target).square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for layer, names in convert.layer_names(ours).items():
        for kind in ("weight", "bias"):
            gradient = ours.get_parameter(f"{layer}.{kind}").grad
            close(gradient, torch.cat([gradients[f"{n}.{kind}"] for n in names]), 1e-4 * gradient.abs().max().item())

    result = called("convert.py", "from_diffusers", "theirs", "back.pth", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    back, back_config, step = load_network(tmp_path / "back.pth", torch.device("cpu"))
    assert step == 0 and back.state_dict().keys() == ours.state_dict().keys()
    for key, tensor in ours.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[key]), key
    for field in ("image_size", "channels", "dim", "dim_mults", "num_res_blocks", "attn_resolutions", "dropout",
                  "timesteps", "beta_schedule", "variance"):
        assert getattr(back_config, field) == getattr(config, field)
    assert (back_config.beta_start, back_config.beta_end) == pytest.approx((config.beta_start, config.beta_end))


# The schedule and the samplers

@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("timesteps", [1000, 100, 4000])
def test_betas(schedule, timesteps):
    config = Config(beta_schedule=schedule, timesteps=timesteps)
    close(DDPM(torch.nn.Identity(), config).betas, scheduler(config).betas, 1e-7)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_q_sample(schedule):
    config, t = Config(beta_schedule=schedule), torch.tensor([0, 1, 10, 250, 500, 900, 998, 999])
    x_start, noise = torch.rand(8, 3, 16, 16) * 2 - 1, torch.randn(8, 3, 16, 16)
    close(DDPM(torch.nn.Identity(), config).q_sample(x_start, t, noise),
          scheduler(config).add_noise(x_start, noise, t), 1e-5)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("t", [0, 1, 2, 100, 500, 900, 999])
def test_p_sample(variance, t):
    config, shape = Config(variance=variance), (4, 3, 16, 16)
    x_t, pred_noise = torch.randn(shape), torch.randn(shape)
    ours = DDPM(lambda x_t, t: pred_noise, config).p_sample(x_t, torch.full((4,), t), noise_at(t, shape))
    for exact, tolerance in ((True, 1e-5), (False, 1e-3)):
        theirs = scheduler(config, exact=exact).step(pred_noise, t, x_t, torch.Generator().manual_seed(t))
        assert (theirs.pred_original_sample.abs() == 1).any()  # some are clipped
        close(ours, theirs.prev_sample, tolerance)


def network_of(config: Config) -> torch.nn.Module:
    """A U-Net for a short chain, the perfect network of Gaussian data for T = 1000."""
    return random_unet(config) if config.timesteps < 1000 else Gaussian(config, 0.2, 0.5)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("timesteps", [30, 1000])
@torch.no_grad()
def test_the_whole_chain(timesteps, schedule, variance):
    config = tiny(timesteps=timesteps, beta_schedule=schedule, variance=variance)
    model, x_T = network_of(config), torch.randn(4, 3, 8, 8)
    ours = DDPM(model, config).sample(x_T, noise=lambda t: noise_at(t, x_T.shape))
    theirs, x_t = scheduler(config, exact=True), x_T
    for t in theirs.timesteps.tolist():
        x_t = theirs.step(model(x_t, torch.full((4,), t)), t, x_t, torch.Generator().manual_seed(t)).prev_sample
    close(ours, x_t, 1e-5)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(("timesteps", "steps"), [(30, 10), (30, 30), (1000, 10), (1000, 50), (1000, 1000)])
@torch.no_grad()
def test_ddim(timesteps, steps, schedule, eta):
    config = tiny(timesteps=timesteps, beta_schedule=schedule)
    model, x_T = network_of(config), torch.randn(4, 3, 8, 8)
    ours = DDPM(model, config).sample(x_T, steps, eta, "uniform", lambda t: noise_at(t, x_T.shape))
    theirs = scheduler(config, "DDIMScheduler", exact=True, timestep_spacing="trailing", set_alpha_to_one=True)
    x_t = x_T
    theirs.set_timesteps(steps)
    assert theirs.timesteps.tolist() == spaced_timesteps(timesteps, steps, "uniform")
    for t in theirs.timesteps.tolist():
        x_t = theirs.step(model(x_t, torch.full((4,), t)), t, x_t, eta, use_clipped_model_output=True,
                          variance_noise=noise_at(t, x_T.shape)).prev_sample
    close(ours, x_t, 5e-4 if schedule == "cosine" else 1e-4)


# Both programs sample from what was converted

def test_the_pipeline_gives_our_images(tmp_path):
    config = tiny()
    model = random_unet(config)
    pipeline = diffusers.DDPMPipeline.from_pretrained(exported(model, config, tmp_path))
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(4, torch.Generator().manual_seed(5), num_inference_steps=30, output_type="np").images
    generator, shape = torch.Generator().manual_seed(5), (4, 3, 8, 8)
    ours = DDPM(model, config).sample(torch.randn(shape, generator=generator),
                                      noise=lambda t: torch.randn(shape, generator=generator))
    close((ours / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1), torch.from_numpy(theirs), 1e-4)


def test_inference_samples_from_a_converted_checkpoint(tmp_path):
    exported(random_unet(tiny()), tiny(), tmp_path)
    assert called("convert.py", "from_diffusers", "theirs", "back.pth", cwd=tmp_path).returncode == 0
    pictures = []
    for name in ("ours", "back"):
        result = called("inference.py", "--checkpoint", f"{name}.pth", "--output_dir", name, "--num_samples", "2",
                        "--device", "cpu", "--precision", "fp32", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        pictures.append((tmp_path / name / "samples.png").read_bytes())
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize("names", ["of 2022", "of today"])
@pytest.mark.parametrize("file", ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"])
def test_a_folder_laid_out_like_google_ddpm_cifar10_32(file, names, tmp_path):
    """Settings and weights side by side, few settings, attention layers by their first names, perhaps a pickle."""
    config = tiny(num_res_blocks=2, attn_resolutions=(8,))
    model, folder = random_unet(config), tmp_path / "downloaded"
    weights = diffusers.UNet2DModel.from_pretrained(exported(model, config, tmp_path) / "unet").state_dict()
    if names == "of 2022":
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            weights = {key.replace(f".{new}.", f".{old}."): tensor for key, tensor in weights.items()}
        assert sum(".query." in key for key in weights) == 2 * (2 + 1 + 3)
    folder.mkdir()
    if file.endswith(".bin"):
        torch.save(weights, folder / file)
    else:
        pytest.importorskip("safetensors.torch").save_file(weights, folder / file)
    (folder / "config.json").write_text(json.dumps(dict(
        _class_name="UNet2DModel", _diffusers_version="0.0.4", act_fn="silu", attention_head_dim=None,
        block_out_channels=[8, 16], center_input_sample=False, down_block_types=["AttnDownBlock2D", "DownBlock2D"],
        downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, in_channels=3, layers_per_block=2,
        mid_block_scale_factor=1, norm_eps=1e-6, norm_num_groups=8, out_channels=3, sample_size=8,
        time_embedding_type="positional", up_block_types=["UpBlock2D", "AttnUpBlock2D"])))
    (folder / "scheduler_config.json").write_text(json.dumps(dict(
        _class_name="DDPMScheduler", _diffusers_version="0.1.1", beta_end=0.02, beta_schedule="linear",
        beta_start=0.0001, clip_sample=True, num_train_timesteps=1000, variance_type="fixed_large")))

    result = called("convert.py", "from_diffusers", "downloaded", "new/model.pth", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    state = load_checkpoint(tmp_path / "new" / "model.pth")
    assert all(torch.equal(tensor, state["ema"][key]) for key, tensor in model.state_dict().items())
    got = Config(**state["config"])
    assert (got.timesteps, got.beta_start, got.beta_end, got.variance) == (1000, 0.0001, 0.02, "fixed_large")


# Refusals

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    return exported(random_unet(tiny()), tiny(), tmp_path_factory.mktemp("parity"))


@pytest.mark.parametrize(("name", "value"), [
    ("class_embed_type", "timestep"), ("num_class_embeds", 10), ("attention_head_dim", 8), ("attention_head_dim", 4),
    ("down_block_types", ["DownBlock2D", "ResnetDownsampleBlock2D"]),
    ("up_block_types", ["UpBlock2D"] * 2), ("up_block_types", ["AttnUpBlock2D"] * 2), ("mid_block_type", None),
    ("add_attention", False), ("time_embedding_type", "fourier"), ("time_embedding_dim", 64), ("freq_shift", 0),
    ("flip_sin_to_cos", True), ("downsample_padding", 1), ("downsample_type", "resnet"), ("upsample_type", "resnet"),
    ("norm_eps", 1e-5), ("norm_num_groups", 4), ("attn_norm_num_groups", 4), ("act_fn", "gelu"), ("out_channels", 6),
    ("resnet_time_scale_shift", "scale_shift"), ("center_input_sample", True), ("mid_block_scale_factor", 2),
    ("block_out_channels", [8, 20]), ("sample_size", None), ("sample_size", [8, 16]), ("_class_name", "UNet1DModel"),
    ("prediction_type", "v_prediction"), ("clip_sample", False), ("clip_sample_range", 2.0), ("thresholding", True),
    ("trained_betas", [0.1] * 30), ("rescale_betas_zero_snr", True), ("beta_schedule", "scaled_linear"),
    ("variance_type", "learned_range"), ("in_channels", 4), ("_class_name", "DDIMScheduler"),
])
def test_a_setting_that_this_project_lacks_is_refused_by_name(name, value, folder, tmp_path):
    there = folder / ("scheduler/scheduler_config.json" if name in scheduler(tiny()).config or "Sch" in str(value)
                      else "unet/config.json")
    before = there.read_text()
    there.write_text(json.dumps({**json.loads(before), name: value}))
    try:
        result = called("convert.py", "from_diffusers", str(folder), "model.pth", cwd=tmp_path)
    finally:
        there.write_text(before)
    ours = {"in_channels": "channels", "variance_type": "variance", "_class_name": ""}.get(name, name)
    refused(result, 1, ours, str(value) if ours == "" else repr(value))
    assert not (tmp_path / "model.pth").exists()


def test_a_network_that_diffusers_lacks_is_refused_by_name(tmp_path):
    config = tiny(dim_mults=(2, 4))
    save(UNet(config), config, tmp_path / "ours.pth")
    refused(called("convert.py", "to_diffusers", "ours.pth", "theirs", cwd=tmp_path), 1, "dim_mults=(2, 4)")
    assert not (tmp_path / "theirs").exists()


@pytest.mark.parametrize("damage", ["incomplete", "truncated", "absent", "no scheduler", "not JSON"])
def test_a_damaged_folder_is_refused(damage, tmp_path):
    """diffusers itself would fill an incomplete network with random numbers."""
    folder = exported(random_unet(tiny()), tiny(), tmp_path)
    weights, settings = folder / "unet/diffusion_pytorch_model.safetensors", folder / "unet/config.json"
    word = "weights"
    if damage == "incomplete":
        tensors = diffusers.UNet2DModel.from_pretrained(folder / "unet").state_dict()
        del tensors["mid_block.attentions.0.to_k.weight"]
        weights.unlink()
        torch.save(tensors, folder / "unet/diffusion_pytorch_model.bin")
        word = "mid_block.attentions.0.to_k.weight"
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "absent":
        weights.unlink()
    elif damage == "no scheduler":
        (folder / "scheduler/scheduler_config.json").unlink()
        word = "DDPMScheduler"
    else:
        settings.write_text("{")
        word = "JSON"
    refused(called("convert.py", "from_diffusers", "theirs", "back.pth", cwd=tmp_path), 1, word)
    assert not (tmp_path / "back.pth").exists()


def test_what_exists_is_not_overwritten(folder, tmp_path):
    save(random_unet(tiny()), tiny(), tmp_path / "ours.pth")
    before = (tmp_path / "ours.pth").read_bytes()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").touch()
    for target in ("full", "ours.pth"):
        refused(called("convert.py", "to_diffusers", "ours.pth", target, cwd=tmp_path), 1, target, "exists")
    refused(called("convert.py", "from_diffusers", str(folder), "ours.pth", cwd=tmp_path), 1, "ours.pth", "exists")
    assert (tmp_path / "ours.pth").read_bytes() == before and len(list(tmp_path.rglob("*"))) == 3
    (tmp_path / "empty").mkdir()
    assert called("convert.py", "to_diffusers", "ours.pth", "empty", cwd=tmp_path).returncode == 0


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    refused(called("convert.py", "to_diffusers", "none.pth", "theirs", cwd=tmp_path), 1, "none.pth")
    refused(called("convert.py", "from_diffusers", "org/x", "model.pth", cwd=tmp_path), 1, "org/x is not a folder")
    (tmp_path / "empty").mkdir()
    refused(called("convert.py", "from_diffusers", "empty", "model.pth", cwd=tmp_path), 1, "empty", "UNet2DModel")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    refused(called("convert.py", "to_diffusers", "none.pth", "theirs", cwd=tmp_path), 1, "pip install diffusers")


@pytest.mark.parametrize("line", [(), ("to_diffusers", "a"), ("sideways", "a", "b"), ("to_diffusers", "a", "b", "c"),
                                  ("to_diffusers", "a", "b", "--force")])
def test_a_wrong_command_line_is_one_line(line, tmp_path):
    refused(called("convert.py", *line, cwd=tmp_path), 2, "error")
