"""Config: what is possible, what is refused and how, and the round trip that checkpoints make."""

import inspect
import os
import re
from dataclasses import asdict
from enum import Enum

import numpy as np
import pytest

from config import PRESETS, Config
from model import UNet
from utils.checkpoint import read_config
from utils.cli import CommandLine


def test_defaults():
    config = Config()
    assert (config.data, config.image_size) == ("cifar10", 32)
    assert (config.dim, config.dim_mults) == (64, (1, 2, 4, 8))
    assert (config.timesteps, config.beta_schedule) == (1000, "linear")
    assert (config.beta_start, config.beta_end) == (1e-4, 0.02)
    assert (config.batch_size, config.learning_rate) == (32, 2e-4)
    assert (config.epochs, config.ema_decay) == (100, 0.9999)


def test_paper_preset_is_800_000_steps():
    config = Config(**PRESETS["paper"])
    assert config.epochs * 50_000 == 800_000 * config.batch_size
    assert (config.dim, config.dim_mults) == (128, (1, 2, 2, 2))
    assert (config.attn_resolutions, config.dropout) == ((16,), 0.1)


def test_every_preset_is_possible_and_has_a_run_dir_of_its_own():
    run_dirs = {Config(**preset).run_dir for preset in PRESETS.values()}
    assert "." not in run_dirs
    assert len(run_dirs) == len(PRESETS)


def test_round_trip_through_a_dict():
    config = Config(dim_mults=[1, 2], attn_resolutions=[], seed=5)
    assert config.dim_mults == (1, 2)
    assert Config(**asdict(config)) == config


def test_a_checkpoint_without_a_fixed_field_gets_its_default_and_a_warning(tmp_path, capsys):
    """What is not fixed is left to this version without a word."""
    older = asdict(Config(seed=5))
    for name in ("beta_end", "compile"):
        del older[name]
    assert read_config({"config": older}, tmp_path / "old.pth") == Config(seed=5)
    told = f"warning: {tmp_path}/old.pth does not say beta_end: the default is taken\n"
    assert capsys.readouterr().err == told
    assert read_config({"config": asdict(Config())}, tmp_path / "new.pth") == Config()
    assert capsys.readouterr().err == ""


def test_paths_and_numbers_of_numpy_are_what_a_file_can_hold(tmp_path):
    config = Config(data=tmp_path, dim=np.int64(32), dim_mults=np.array([1, 2]),
                    attn_resolutions=[np.int32(16)], dropout=np.float32(0.5),
                    channels=np.int64(1))
    expected = Config(data=str(tmp_path), dim=32, dim_mults=(1, 2), attn_resolutions=(16,),
                      dropout=0.5, channels=1)
    assert repr(config) == repr(expected)


def test_a_string_is_the_string_itself(tmp_path):
    class Name(str, Enum):
        SHAPES = "shapes"

    (tmp_path / "pictures").mkdir()
    (entry,) = os.scandir(tmp_path)
    config = Config(data=entry, data_dir=Name.SHAPES)
    assert config.data == str(tmp_path / "pictures")
    assert type(config.data_dir) is str
    assert config.data_dir == "shapes"


def test_numbers_of_few_bits_are_taken_without_a_warning(recwarn):
    assert Config(learning_rate=np.float32(0.5), dropout=np.float16(0.5)).dropout == 0.5
    assert not recwarn.list


def test_digits_are_never_mirrored():  # a flip is right for photographs and wrong for digits
    assert not Config(data="mnist").horizontal_flip
    assert Config(data="fashion_mnist").horizontal_flip


@pytest.mark.parametrize(("name", "value", "remedy"), [
    ("data", "", "cifar10"),
    ("image_size", 30, "32"),
    ("channels", 2, "3"),
    ("horizontal_flip", "no", "bool"),
    ("dim", 7, "even"),
    ("dim", 2, "4"),
    ("dim", "64", "whole number"),
    ("num_res_blocks", True, "whole number"),
    ("dim_mults", (), "1 2 4 8"),
    ("dim_mults", 2, "list"),
    ("attn_resolutions", None, "list"),
    ("dim_mults", (1, 0), "at least 1"),
    ("attn_resolutions", (16, 5), "[32, 16, 8, 4]"),
    ("attn_resolutions", (64,), "or none"),
    ("norm_groups", 3, "divide dim=64"),
    ("dropout", 1.0, "0.1"),
    ("timesteps", 20, "21"),
    ("timesteps", 1, "2"),
    ("beta_schedule", "quadratic", "cosine"),
    ("beta_start", 0.5, "beta_end"),
    ("beta_start", 1e-17, "at least 1e-08"),
    ("beta_end", 0.9, "nothing of the image"),
    ("beta_end", 0.0015, "too much of it at T"),
    ("variance", "learned", "fixed_small"),
    ("batch_size", 0, "at least 1"),
    ("learning_rate", 0.0, "0.0002"),
    ("learning_rate", float("nan"), "number"),
    ("epochs", 0, "at least 1"),
    ("max_steps", -1, "at least 0"),
    ("grad_accum", 5, "divide"),
    ("ema_decay", 1.0, "0.9999"),
    ("seed", -1, "at least 0"),
    ("device", "tpu", "cuda"),
    ("precision", "fp8", "bf16"),
    ("save_minutes", -1, "at least 0"),
    ("image_size", 10_000_000, "at most 4,096"),
    ("dim", 10**9, "at most 4,096"),
    ("max_steps", 10**19, "at most 1,000,000,000"),
    ("epochs", 10**400, "at most"),
    ("dim_mults", (1, 10**19), "at most"),
    ("timesteps", 10**400, "at most"),
    ("beta_end", 1e308, "at most"),
    ("learning_rate", float("inf"), "at most"),
])
def test_an_impossible_value_is_named_with_a_remedy(name, value, remedy):
    with pytest.raises(ValueError) as error:
        Config(**{name: value})
    assert f"{name}={value!r}" in str(error.value)
    assert remedy in str(error.value)


@pytest.mark.parametrize("sizes", [(32,), (16, 8), (4, 32), ()])
def test_attention_at_the_size_of_any_level_or_none(sizes):
    assert Config(attn_resolutions=sizes).attn_resolutions == sizes


@pytest.mark.parametrize(("dim", "groups"), [
    (4, 2), (8, 4), (24, 12), (32, 16), (34, 17), (40, 20), (48, 24), (64, 32), (96, 32), (128, 32),
    (74, 2), (256, 32)])
def test_groups_of_group_norm_have_two_channels_or_more(dim, groups):
    assert Config(dim=dim).norm_groups == groups
    assert UNet(Config(dim=dim)).norm_out.num_groups == groups
    assert Config(dim=dim, norm_groups=2).norm_groups == 2


@pytest.mark.parametrize(("image_size", "attends"), [
    (8, ()), (16, (16,)), (48, ()), (64, (16,)), (96, ()), (128, (16,)), (256, ())])
def test_the_default_attention_is_at_16_if_a_level_has_that_size(image_size, attends):
    assert Config(image_size=image_size).attn_resolutions == attends


@pytest.mark.parametrize("image_size", [20, 28])
def test_a_size_that_the_levels_do_not_divide_names_levels_that_do(image_size):
    with pytest.raises(ValueError, match="--dim_mults 1 2 4$"):
        Config(image_size=image_size)
    assert Config(image_size=image_size, dim_mults=(1, 2, 4)).attn_resolutions == ()


def test_help_has_the_groups_of_config_py(capsys):
    """Blank lines part the fields there; each group is a heading of --help."""
    source = inspect.getsource(Config).split("def __post_init__")[0]
    groups = []
    for block in source.split("\n\n")[1:]:
        names = re.findall(r"^    (\w+): .*= (?:setting|fixed)\(", block, re.MULTILINE)
        if names:
            groups.append(names)
    parser = CommandLine("", "")
    parser.add_settings()
    parser.print_help()
    told = capsys.readouterr().out.split("\n\n")
    found = [re.findall(r"^  --(\w+)", block, re.MULTILINE) for block in told]
    assert [names for names in found if names][1:] == groups
    assert len(groups) == 6
