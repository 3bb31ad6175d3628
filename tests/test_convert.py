"""tools/convert.py: weights to diffusers and back, bit for bit, and what is refused."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conversion import CONFIGS, diffusers, exported, from_diffusers, to_diffusers
from helpers import called, infer, random_unet, refused, save_network, succeeded, tiny
from safetensors.torch import load_file, save_file

from config import Config
from tools.convert import scheduler_settings
from utils.checkpoint import load_checkpoint, load_network
from utils.cli import UserError

# There and back

@pytest.mark.parametrize("name", CONFIGS)
def test_what_comes_back_is_what_went_there(name, tmp_path):
    config = CONFIGS[name]
    ours = random_unet(config)
    exported(ours, config, tmp_path)
    result = succeeded(from_diffusers(tmp_path))
    assert result.stderr == ""
    back, back_config, step = load_network(tmp_path / "back.pth", torch.device("cpu"))
    assert step == 0
    assert back.state_dict().keys() == ours.state_dict().keys()
    for key, tensor in ours.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[key]), key
    for field in ("image_size", "channels", "dim", "dim_mults", "num_res_blocks",
                  "attn_resolutions", "dropout", "timesteps", "beta_schedule", "variance"):
        assert getattr(back_config, field) == getattr(config, field)
    assert back_config.beta_start == pytest.approx(config.beta_start)
    assert back_config.beta_end == pytest.approx(config.beta_end)


def test_the_scripts_take_a_converted_checkpoint(tmp_path):
    exported(random_unet(tiny()), tiny(), tmp_path)
    succeeded(from_diffusers(tmp_path))
    pictures = []
    for name in ("ours", "back"):
        infer(Path(f"{name}.pth"), tmp_path, "--output_dir", name, "--num_samples", 2)
        pictures.append((tmp_path / name / "samples.png").read_bytes())
    assert pictures[0] == pictures[1]
    line = ("--metric", "bpd", "--checkpoint", "back.pth", "--device", "cpu")
    refused(called("evaluate.py", *line, cwd=tmp_path), 1, "data='unknown'")


# A folder from the Hub

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
    "norm_num_groups": 4,
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
    """Settings and weights lie side by side, and attention layers may have older names."""
    config = tiny(num_res_blocks=2, attn_resolutions=(8,), norm_groups=4)
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
    assert got.norm_groups == 4


def test_halved_weights_alone_and_a_scheduler_below(tmp_path):
    model = random_unet(tiny())
    folder = exported(model, tiny(), tmp_path)
    unet = diffusers.UNet2DModel.from_pretrained(folder / "unet")
    unet.half().save_pretrained(tmp_path / "other", variant="fp16")
    shutil.copytree(folder / "scheduler", tmp_path / "other/scheduler")
    succeeded(from_diffusers(tmp_path, "other"))
    content = load_checkpoint(tmp_path / "back.pth")
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(content["ema"][key].float(), tensor, rtol=1e-3, atol=1e-4)


# Refusals

UNET = "unet/config.json"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
SCHEDULER = "scheduler/scheduler_config.json"

# File, setting, a value that this project lacks or that makes no sense, what is said.  One loop
# refuses most of what is lacking; nearest_config itself and Config refuse the others.
NONSENSE = "theirs cannot be expressed here"
REFUSED = [
    (UNET, "_class_name", "UNet1DModel", "UNet1DModel"),
    (UNET, "attention_head_dim", 8, "attention_head_dim=8"),
    (UNET, "act_fn", "gelu", "act_fn='gelu'"),
    (UNET, "in_channels", 4, "channels=4"),
    (UNET, "norm_num_groups", 3, "norm_groups=3"),
    (UNET, "norm_num_groups", 0, "norm_num_groups=0"),
    (UNET, "block_out_channels", [8, 20], "block_out_channels=[8, 20]"),
    (UNET, "block_out_channels", [], "block_out_channels=[]"),
    (UNET, "block_out_channels", [0, 0], "block_out_channels=[0, 0]"),
    (UNET, "sample_size", [8, 16], "sample_size=[8, 16]"),
    (SCHEDULER, "prediction_type", "v_prediction", "prediction_type='v_prediction'"),
    (SCHEDULER, "beta_schedule", "scaled_linear", "beta_schedule='scaled_linear'"),
    (UNET, "block_out_channels", 8, NONSENSE),
    (UNET, "block_out_channels", [8, "16"], NONSENSE),
    (UNET, "block_out_channels", [10**9, 10**9], NONSENSE),
    (UNET, "down_block_types", None, NONSENSE),
    (UNET, "layers_per_block", "two", NONSENSE),
    (SCHEDULER, "num_train_timesteps", None, NONSENSE),
    (SCHEDULER, "num_train_timesteps", 10**400, NONSENSE),
    (SCHEDULER, "beta_schedule", ["linear"], NONSENSE),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    return exported(random_unet(tiny()), tiny(), tmp_path_factory.mktemp("parity"))


@pytest.mark.parametrize(("file", "name", "value", "said"), REFUSED)
def test_a_setting_that_cannot_be_expressed_is_refused_in_one_line(
    file, name, value, said, folder, tmp_path
):
    shutil.copytree(folder, tmp_path / "theirs")
    path = tmp_path / "theirs" / file
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, name: value}))
    refused(from_diffusers(tmp_path), 1, said)
    assert not (tmp_path / "back.pth").exists()


def test_a_network_that_diffusers_lacks_is_refused_by_name(tmp_path):
    save_network(tmp_path / "ours.pth", tiny(dim_mults=(2, 4)))
    refused(to_diffusers(tmp_path), 1, "dim_mults=(2, 4)")
    assert not (tmp_path / "theirs").exists()


def test_a_schedule_that_diffusers_lacks_is_refused_by_name():
    config = tiny()
    config.beta_schedule = "sigmoid"  # of one's own
    with pytest.raises(UserError, match="beta_schedule=sigmoid"):
        scheduler_settings(config)


def without_a_layer(path: Path) -> None:
    """Remove one; diffusers itself would fill it with random numbers."""
    weights = load_file(path)
    del weights["mid_block.attentions.0.to_k.weight"]
    save_file(weights, path)


@pytest.mark.parametrize(("file", "damage", "word"), [
    (WEIGHTS, without_a_layer, "mid_block.attentions.0.to_k.weight"),
    (WEIGHTS, lambda path: os.truncate(path, 1000), "weights"),
    (WEIGHTS, Path.unlink, "weights"),
    (SCHEDULER, Path.unlink, "DDPMScheduler"),
    (UNET, lambda path: path.write_text("{"), "JSON"),
    (UNET, lambda path: path.write_text("[]"), "UNet2DModel"),
])
def test_a_damaged_folder_is_refused(file, damage, word, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "theirs")
    damage(tmp_path / "theirs" / file)
    refused(from_diffusers(tmp_path), 1, word)
    assert not (tmp_path / "back.pth").exists()


def test_what_exists_is_not_overwritten(folder, tmp_path):
    save_network(tmp_path / "ours.pth", tiny())
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


@pytest.mark.parametrize(("error", "status", "said"), [
    (RuntimeError("no space left"), 1, "theirs cannot be written: no space left"),
    (KeyboardInterrupt(), 130, "interrupted"),
])
def test_what_cannot_be_written_leaves_nothing_behind(
    error, status, said, tmp_path, monkeypatch
):
    def half(pipeline: diffusers.DDPMPipeline, folder: Path) -> None:
        folder.mkdir()
        (folder / "half").touch()
        raise error

    save_network(tmp_path / "ours.pth", tiny())
    refused(to_diffusers(tmp_path, target="ours.pth/theirs"), 1, "ours.pth/theirs")
    monkeypatch.setattr(diffusers.DDPMPipeline, "save_pretrained", half)
    refused(to_diffusers(tmp_path), status, said)
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
