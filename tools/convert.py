"""Weights to and from diffusers, bit for bit.

    python -m tools.convert to_diffusers checkpoints/final_model.pth DIR
    python -m tools.convert from_diffusers DIR model.pth

to_diffusers writes the averaged weights, from which
DDPMPipeline.from_pretrained(DIR)(num_inference_steps=T) samples.
from_diffusers takes such a folder, or one downloaded from the Hub
(google/ddpm-cifar10-32), and inference.py samples from model.pth.  No such
folder says what its network was trained on: evaluate.py needs --data then.
What the other side cannot express is refused by name.
"""

import inspect
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also without -m

from config import Config, level_sizes
from model import ResBlock, UNet
from utils.checkpoint import load_network, save_checkpoint
from utils.cli import CommandLine, UserError, brief
from utils.process import run_script

# Our layer name -> diffusers' name(s); qkv is one layer here and three there.
OUTER_LAYERS = {
    "time_embedding.linear1": ["time_embedding.linear_1"],
    "time_embedding.linear2": ["time_embedding.linear_2"],
    "conv_in": ["conv_in"],
    "norm_out": ["conv_norm_out"],
    "conv_out": ["conv_out"],
}
RES_BLOCK_LAYERS = {  # i: the number of the block in its level
    "norm1": ["resnets.{i}.norm1"],
    "conv1": ["resnets.{i}.conv1"],
    "emb_proj": ["resnets.{i}.time_emb_proj"],
    "norm2": ["resnets.{i}.norm2"],
    "conv2": ["resnets.{i}.conv2"],
    "shortcut": ["resnets.{i}.conv_shortcut"],
    "attention.norm": ["attentions.{i}.group_norm"],
    "attention.qkv": ["attentions.{i}.to_q", "attentions.{i}.to_k", "attentions.{i}.to_v"],
    "attention.proj": ["attentions.{i}.to_out.0"],
}

SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
NOT_COMPARED = {
    "num_train_timesteps",  # of a UNet2DModel: a positional embedding has no use for it
    "beta_start", "beta_end",  # read, and scaled on the way there and back
    "timestep_spacing", "steps_offset",  # of fewer steps
    "dynamic_thresholding_ratio", "sample_max_value",  # of thresholding, which is refused
}


def weight_names(model: UNet) -> dict[str, list[str]]:
    """Each weight and bias of model -> its name, or names, in UNet2DModel."""
    layers = dict(OUTER_LAYERS)
    for path in ("down", "middle", "up"):
        level = i = 0
        for number, block in enumerate(getattr(model, path)):
            ours = f"{path}.{number}"
            theirs = "mid_block" if path == "middle" else f"{path}_blocks.{level}"
            if isinstance(block, ResBlock):
                for layer, names in RES_BLOCK_LAYERS.items():
                    layers[f"{ours}.{layer}"] = [f"{theirs}.{name.format(i=i)}" for name in names]
                i += 1
            else:  # a change of size ends the level
                layers[f"{ours}.conv"] = [f"{theirs}.{path}samplers.0.conv"]
                level += 1
                i = 0

    found = {}
    for name in model.state_dict():
        layer, _, kind = name.rpartition(".")
        found[name] = [f"{their_layer}.{kind}" for their_layer in layers[layer]]
    return found


# Settings

def unet_settings(config: Config) -> dict[str, Any]:
    """The arguments of UNet2DModel.  Raises UserError if diffusers has no such network."""
    if config.dim_mults[0] != 1:
        raise UserError(
            f"dim_mults={config.dim_mults} cannot be expressed in diffusers: its first level is as "
            "wide as the input convolution, so the first factor must be 1")
    down_block_types = []
    for size in level_sizes(config.image_size, config.dim_mults):
        attends = size in config.attn_resolutions
        down_block_types.append("AttnDownBlock2D" if attends else "DownBlock2D")
    return {
        "sample_size": config.image_size,
        "in_channels": config.channels,
        "out_channels": config.channels,
        "block_out_channels": [config.dim * mult for mult in config.dim_mults],
        "layers_per_block": config.num_res_blocks,
        "down_block_types": down_block_types,
        "up_block_types": [name.replace("Down", "Up") for name in reversed(down_block_types)],
        "attention_head_dim": None,  # one head of the full width
        "dropout": config.dropout,
        "norm_num_groups": config.norm_groups,
        "norm_eps": 1e-6,
        "downsample_padding": 0,
        "time_embedding_type": "positional",
        "flip_sin_to_cos": False,
        "freq_shift": 1,
    }


def scheduler_settings(config: Config) -> dict[str, Any]:
    """The arguments of DDPMScheduler.  Raises UserError if diffusers has no such schedule."""
    if config.beta_schedule not in SCHEDULES:
        raise UserError(f"beta_schedule={config.beta_schedule} cannot be expressed in diffusers")
    scale = 1000 / config.timesteps
    return {
        "num_train_timesteps": config.timesteps,
        "beta_schedule": SCHEDULES[config.beta_schedule],
        "beta_start": config.beta_start * scale,
        "beta_end": config.beta_end * scale,
        "variance_type": config.variance,
        "prediction_type": "epsilon",
        "clip_sample": True,
    }


def nearest_config(unet: dict[str, Any], scheduler: dict[str, Any]) -> Config:
    """The Config that comes nearest to their settings.

    It may raise anything if these make no sense.
    """
    size = unet["sample_size"]
    widths = unet["block_out_channels"]
    if not isinstance(size, int):
        raise ValueError(f"sample_size={size!r} is not the side of a square")
    if not widths or not widths[0]:
        raise ValueError(f"block_out_channels={widths!r} has no first width")
    attn_resolutions = []
    for level, block in enumerate(unet["down_block_types"]):
        if block == "AttnDownBlock2D":
            attn_resolutions.append(size // 2**level)
    schedules = {theirs: ours for ours, theirs in SCHEDULES.items()}
    beta_schedule = scheduler["beta_schedule"]
    scale = scheduler["num_train_timesteps"] / 1000
    return Config(
        data="unknown",  # no name of a data set, so evaluate.py asks for one
        image_size=size,
        channels=unet["in_channels"],
        dim=widths[0],
        dim_mults=[width // widths[0] for width in widths],
        num_res_blocks=unet["layers_per_block"],
        attn_resolutions=attn_resolutions,
        norm_groups=unet["norm_num_groups"],
        dropout=unet["dropout"],
        timesteps=scheduler["num_train_timesteps"],
        beta_schedule=schedules.get(beta_schedule, beta_schedule),
        beta_start=scheduler["beta_start"] * scale,
        beta_end=scheduler["beta_end"] * scale,
        variance=scheduler["variance_type"],
    )


def default_settings(kind: type) -> dict[str, Any]:
    """All arguments of a UNet2DModel or a DDPMScheduler, and their defaults."""
    parameters = inspect.signature(kind).parameters
    return {name: parameter.default for name, parameter in parameters.items()}


def read_settings(kind: type, folder: Path) -> dict[str, Any]:
    """All arguments of the UNet2DModel or DDPMScheduler in the folder."""
    try:
        settings = kind.load_config(str(folder), local_files_only=True)
        name = settings.get("_class_name")
    except Exception as error:  # of what a damaged file may raise there is no list
        raise UserError(f"{folder} holds no {kind.__name__}: {brief(error)}") from error
    if name != kind.__name__:
        raise UserError(f"{folder} holds a {name}: only a {kind.__name__} can be converted")
    return {**default_settings(kind), **settings}


def refuse_differences(kind: type, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raises UserError naming the first setting of theirs that the nearest Config does not give."""
    for name, expected in {**default_settings(kind), **ours}.items():
        if name not in NOT_COMPARED and theirs[name] != expected:
            raise UserError(f"{name}={brief(repr(theirs[name]))} of a {kind.__name__} cannot be "
                            f"expressed here, {expected!r} can")


# Both ways

def to_diffusers(path: Path, folder: Path, diffusers: ModuleType) -> None:
    """The averaged weights of a checkpoint -> a folder for DDPMPipeline.from_pretrained."""
    is_free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if not is_free:
        raise UserError(f"{folder} exists and is not an empty folder: choose another name")
    model, config, _ = load_network(path, torch.device("cpu"))
    weights = model.state_dict()
    their_weights = {}
    for name, their_names in weight_names(model).items():
        pieces = weights[name].chunk(len(their_names))
        their_weights.update(zip(their_names, pieces, strict=True))
    unet = diffusers.UNet2DModel(**unet_settings(config))
    unet.load_state_dict(their_weights)
    scheduler = diffusers.DDPMScheduler(**scheduler_settings(config))
    try:
        diffusers.DDPMPipeline(unet, scheduler).save_pretrained(folder)
    except BaseException as error:  # a signal too: rather no network than half of one
        shutil.rmtree(folder, ignore_errors=True)
        if not isinstance(error, Exception):
            raise
        raise UserError(f"{folder} cannot be written: {brief(error)}") from error


def from_diffusers(folder: Path, path: Path, diffusers: ModuleType) -> None:
    """A folder with a UNet2DModel and its DDPMScheduler -> a checkpoint.

    They may be in unet/ and scheduler/, or side by side.
    """
    if path.exists():
        raise UserError(f"{path} exists: choose another name")
    if not folder.is_dir():  # diffusers would look for that name on the Hub
        raise UserError(f"{folder} is not a folder")
    unet_folder = folder / "unet" if (folder / "unet").is_dir() else folder
    scheduler_folder = folder / "scheduler" if (folder / "scheduler").is_dir() else folder
    unet = read_settings(diffusers.UNet2DModel, unet_folder)
    scheduler = read_settings(diffusers.DDPMScheduler, scheduler_folder)
    try:
        config = nearest_config(unet, scheduler)
        our_unet, our_scheduler = unet_settings(config), scheduler_settings(config)
    except Exception as error:
        raise UserError(f"{folder} cannot be expressed here: {brief(error)}") from error
    refuse_differences(diffusers.UNet2DModel, unet, our_unet)
    refuse_differences(diffusers.DDPMScheduler, scheduler, our_scheduler)

    their_weights = read_weights(unet_folder, diffusers)
    model = UNet(config)
    weights = {}
    for name, their_names in weight_names(model).items():
        weights[name] = torch.cat([their_weights[their_name] for their_name in their_names])
    model.load_state_dict(weights)
    save_checkpoint({"config": asdict(config), "step": 0, "ema": model.state_dict()}, path)


def read_weights(folder: Path, diffusers: ModuleType) -> dict[str, torch.Tensor]:
    """The weights of the UNet2DModel in the folder.  Raises UserError if one is missing."""
    has_whole_weights = any(folder.glob("diffusion_pytorch_model.[bs]*"))
    variant = None if has_whole_weights else "fp16"  # a folder may hold the halved ones alone
    try:
        unet, problems = diffusers.UNet2DModel.from_pretrained(
            str(folder), output_loading_info=True, local_files_only=True, variant=variant)
    except Exception as error:  # of what a damaged file may raise there is no list
        raise UserError(f"{folder}: its weights cannot be read: {brief(error)}") from error
    if any(problems.values()):  # diffusers fills what is missing with random numbers
        raise UserError(
            f"{folder}: its weights are not those of its settings: {brief(problems)}")
    return unet.state_dict()


def main(argv: list[str] | None = None) -> int:
    usage = "python -m tools.convert to_diffusers FILE DIR | from_diffusers DIR FILE"
    parser = CommandLine(__doc__, usage)
    directions = {"to_diffusers": to_diffusers, "from_diffusers": from_diffusers}
    parser.add_argument("direction", choices=directions)
    parser.add_argument("source", type=Path, help="a checkpoint; from_diffusers: a folder")
    parser.add_argument("target", type=Path, help="a new folder; from_diffusers: a new checkpoint")
    args = parser.parse_args(argv)
    try:
        import diffusers
    except ImportError as error:
        raise UserError("diffusers is not installed: pip install diffusers") from error
    diffusers.logging.set_verbosity_error()
    directions[args.direction](args.source, args.target, diffusers)
    print(args.target)
    return 0


if __name__ == "__main__":
    run_script(main)
