"""Weights to and from diffusers, bit for bit.

    python convert.py to_diffusers checkpoints/final_model.pth DIR
    python convert.py from_diffusers DIR model.pth

to_diffusers writes the averaged weights, from which
DDPMPipeline.from_pretrained(DIR)(num_inference_steps=T) samples; from_diffusers
takes such a folder, or one downloaded from the Hub (google/ddpm-cifar10-32),
and inference.py samples from model.pth.  What the other side cannot express is
refused by name.
"""

import inspect
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from checkpoint import load_network, load_weights, save_checkpoint
from config import CommandLine, Config, UserError
from device import run
from model import ResBlock, UNet

SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
# A positional time embedding has no use for T, the betas are read instead of compared, the rest is for fewer steps.
NOT_COMPARED = {"num_train_timesteps", "beta_start", "beta_end", "timestep_spacing", "steps_offset",
                "dynamic_thresholding_ratio", "sample_max_value"}

# The layers of a ResBlock here and there, as the i-th of its level; three there where one here holds all three.
RES_BLOCK = {"norm1": ["resnets.{i}.norm1"], "conv1": ["resnets.{i}.conv1"], "emb_proj": ["resnets.{i}.time_emb_proj"],
             "norm2": ["resnets.{i}.norm2"], "conv2": ["resnets.{i}.conv2"], "shortcut": ["resnets.{i}.conv_shortcut"],
             "attention.norm": ["attentions.{i}.group_norm"], "attention.proj": ["attentions.{i}.to_out.0"],
             "attention.qkv": ["attentions.{i}.to_q", "attentions.{i}.to_k", "attentions.{i}.to_v"]}


def layer_names(model: UNet) -> dict[str, list[str]]:
    """Each layer of model -> its name, or names, in UNet2DModel."""
    names = {"time_embedding.linear1": ["time_embedding.linear_1"], "conv_in": ["conv_in"],
             "time_embedding.linear2": ["time_embedding.linear_2"], "norm_out": ["conv_norm_out"],
             "conv_out": ["conv_out"]}
    for path in ("down", "middle", "up"):
        level = i = 0
        for number, block in enumerate(getattr(model, path)):
            there = "mid_block" if path == "middle" else f"{path}_blocks.{level}"
            if isinstance(block, ResBlock):
                for layer, its_names in RES_BLOCK.items():
                    names[f"{path}.{number}.{layer}"] = [f"{there}.{name.format(i=i)}" for name in its_names]
                i += 1
            else:  # a change of size ends the level
                names[f"{path}.{number}.conv"] = [f"{there}.{path}samplers.0.conv"]
                level, i = level + 1, 0
    weights = model.state_dict()
    return {layer: its_names for layer, its_names in names.items() if f"{layer}.weight" in weights}


def unet_settings(config: Config) -> dict[str, Any]:
    """The arguments of UNet2DModel.  Raises UserError where it has no such network."""
    if config.dim_mults[0] != 1:
        raise UserError(f"dim_mults={config.dim_mults} cannot be expressed in diffusers: its first level is as wide as "
                        "the input convolution, so the first factor must be 1")
    attention = [config.image_size >> level in config.attn_resolutions for level in range(len(config.dim_mults))]
    with torch.device("meta"):
        groups = UNet(config).norm_out.num_groups
    return dict(
        sample_size=config.image_size, in_channels=config.channels, out_channels=config.channels,
        block_out_channels=[config.dim * mult for mult in config.dim_mults], layers_per_block=config.num_res_blocks,
        down_block_types=["AttnDownBlock2D" if attends else "DownBlock2D" for attends in attention],
        up_block_types=["AttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(attention)],
        dropout=config.dropout, norm_num_groups=groups, norm_eps=1e-6, downsample_padding=0,
        attention_head_dim=None,  # one head of the full width
        time_embedding_type="positional", flip_sin_to_cos=False, freq_shift=1)


def scheduler_settings(config: Config) -> dict[str, Any]:
    """The arguments of DDPMScheduler."""
    scale = 1000 / config.timesteps
    return dict(num_train_timesteps=config.timesteps, beta_schedule=SCHEDULES[config.beta_schedule],
                beta_start=config.beta_start * scale, beta_end=config.beta_end * scale,
                variance_type=config.variance, prediction_type="epsilon", clip_sample=True)


def read_config(unet: dict[str, Any], scheduler: dict[str, Any]) -> Config:
    """The Config nearest to the settings of the other side.  Raises TypeError or ValueError where there is none."""
    size, widths, timesteps = unet["sample_size"], unet["block_out_channels"], scheduler["num_train_timesteps"]
    if not isinstance(size, int):
        raise ValueError(f"sample_size={size!r} is not the side of a square")
    schedules = {there: here for here, there in SCHEDULES.items()}
    return Config(
        image_size=size, channels=unet["in_channels"], dim=widths[0], dim_mults=[w // widths[0] for w in widths],
        num_res_blocks=unet["layers_per_block"], dropout=unet["dropout"],
        attn_resolutions=[size >> i for i, block in enumerate(unet["down_block_types"]) if block == "AttnDownBlock2D"],
        timesteps=timesteps, beta_schedule=schedules.get(scheduler["beta_schedule"], scheduler["beta_schedule"]),
        beta_start=scheduler["beta_start"] * timesteps / 1000, beta_end=scheduler["beta_end"] * timesteps / 1000,
        variance=scheduler["variance_type"])


def read_settings(kind: type, folder: Path) -> dict[str, Any]:
    """All arguments of the UNet2DModel or DDPMScheduler in the folder, the defaults among them."""
    try:
        settings = kind.load_config(str(folder), local_files_only=True)
    except OSError as error:
        raise UserError(f"{folder} holds no {kind.__name__}: {one_line(error)}") from error
    if settings.get("_class_name") != kind.__name__:
        raise UserError(f"{folder} holds a {settings.get('_class_name')}: only a {kind.__name__} can be converted")
    return {**{name: argument.default for name, argument in inspect.signature(kind).parameters.items()}, **settings}


def refuse_differences(kind: type, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raises UserError naming the first setting of theirs that no Config gives: ours come from the nearest one."""
    for name, argument in inspect.signature(kind).parameters.items():
        expected = ours.get(name, argument.default)
        if name not in NOT_COMPARED and theirs[name] != expected:
            raise UserError(f"{name}={theirs[name]!r} of a {kind.__name__} cannot be expressed here, {expected!r} can")


def to_diffusers(path: Path, folder: Path, diffusers: ModuleType) -> None:
    """The averaged weights of the checkpoint at path -> a folder for DDPMPipeline.from_pretrained."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder: choose another name")
    model, config, _ = load_network(path, torch.device("cpu"))
    unet, weights = diffusers.UNet2DModel(**unet_settings(config)), model.state_dict()
    unet.load_state_dict({
        f"{name}.{kind}": piece for layer, names in layer_names(model).items() for kind in ("weight", "bias")
        for name, piece in zip(names, weights[f"{layer}.{kind}"].chunk(len(names)), strict=True)})
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(**scheduler_settings(config))).save_pretrained(folder)


def from_diffusers(folder: Path, path: Path, diffusers: ModuleType) -> None:
    """A folder with a UNet2DModel and its DDPMScheduler, in unet/ and scheduler/ or side by side -> a checkpoint."""
    if path.exists():
        raise UserError(f"{path} exists: choose another name")
    if not folder.is_dir():  # diffusers would look for that name on the Hub
        raise UserError(f"{folder} is not a folder")
    unet_folder, scheduler_folder = ((folder / "unet", folder / "scheduler") if (folder / "unet").is_dir()
                                     else (folder, folder))
    unet = read_settings(diffusers.UNet2DModel, unet_folder)
    scheduler = read_settings(diffusers.DDPMScheduler, scheduler_folder)
    try:
        config = read_config(unet, scheduler)
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder} cannot be expressed here: {one_line(error)}") from error
    refuse_differences(diffusers.UNet2DModel, unet, unet_settings(config))
    refuse_differences(diffusers.DDPMScheduler, scheduler, scheduler_settings(config))
    try:
        network, problems = diffusers.UNet2DModel.from_pretrained(
            str(unet_folder), output_loading_info=True, local_files_only=True)
    except Exception as error:  # of what a damaged file may raise there is no list
        raise UserError(f"{unet_folder}: its weights cannot be read: {one_line(error)}") from error
    if any(problems.values()):  # diffusers fills what is missing with random numbers
        raise UserError(f"{unet_folder}: its weights are not those of its settings: {one_line(problems)}")
    theirs, model = network.state_dict(), UNet(config)
    load_weights(model, {f"{layer}.{kind}": torch.cat([theirs[f"{name}.{kind}"] for name in names])
                         for layer, names in layer_names(model).items() for kind in ("weight", "bias")}, folder)
    save_checkpoint({"config": asdict(config), "step": 0, "ema": model.state_dict()}, path)


def one_line(error: Any) -> str:
    return " ".join(str(error).split())[:300]


def main(argv: list[str] | None = None) -> None:
    parser = CommandLine(__doc__, "python convert.py to_diffusers FILE DIR | from_diffusers DIR FILE")
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
    try:
        directions[args.direction](args.source, args.target, diffusers)
    except OSError as error:
        raise UserError(f"{args.target} cannot be written: {one_line(error)}") from error
    print(args.target)


if __name__ == "__main__":
    run(main)
