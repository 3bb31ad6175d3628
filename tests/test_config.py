"""Config: what is possible, what is refused and how, and the round trip that checkpoints make."""

from dataclasses import asdict

import pytest

from config import PRESETS, Config, derive_seed


def test_defaults():
    config = Config()
    assert (config.data, config.image_size, config.dim, config.dim_mults) == ("cifar10", 32, 64, (1, 2, 4, 8))
    assert (config.timesteps, config.beta_schedule, config.beta_start, config.beta_end) == (1000, "linear", 1e-4, 0.02)
    assert (config.batch_size, config.learning_rate, config.epochs, config.ema_decay) == (32, 2e-4, 100, 0.9999)


def test_paper_preset_is_800_000_steps():
    config = Config(**PRESETS["paper"])
    assert config.epochs * 50_000 == 800_000 * config.batch_size
    assert (config.dim, config.dim_mults, config.attn_resolutions, config.dropout) == (128, (1, 2, 2, 2), (16,), 0.1)


def test_every_preset_is_possible_and_has_a_run_dir_of_its_own():
    run_dirs = [Config(**preset).run_dir for preset in PRESETS.values()]
    assert len({".", *run_dirs}) == len(PRESETS) + 1


def test_round_trip_through_a_dict():
    config = Config(dim_mults=[1, 2], attn_resolutions=[], seed=5)
    assert Config(**asdict(config)) == config and config.dim_mults == (1, 2)
    older = asdict(config)
    del older["compile"]
    assert Config(**older) == config
    with pytest.raises(TypeError, match="wings"):
        Config(**asdict(config), wings=2)


def test_digits_are_never_mirrored():  # a flip is right for photographs and wrong for digits
    assert not Config(data="mnist").horizontal_flip
    assert Config(data="fashion_mnist").horizontal_flip


@pytest.mark.parametrize("settings, remedy", [
    (dict(image_size=30), "32"), (dict(dim=7), "even"), (dict(dim=2), "4"), (dict(dim_mults=()), "1 2 4 8"),
    (dict(dim_mults=(1, 0)), "at least 1"), (dict(timesteps=20), "21"), (dict(timesteps=1), "2"),
    (dict(dropout=1.0), "0.1"),
    (dict(beta_schedule="quadratic"), "cosine"), (dict(variance="learned"), "fixed_small"), (dict(channels=2), "3"),
    (dict(batch_size=0), "at least 1"), (dict(batch_size=-4), "at least 1"), (dict(learning_rate=0.0), "0.0002"),
    (dict(learning_rate=float("nan")), "number"), (dict(epochs=0), "at least 1"), (dict(max_steps=-1), "at least 0"),
    (dict(grad_accum=5), "divide"), (dict(ema_decay=1.0), "0.9999"), (dict(seed=-1), "at least 0"),
    (dict(data=""), "cifar10"), (dict(beta_start=0.5), "beta_end"), (dict(dim="64"), "whole number"),
    (dict(horizontal_flip="no"), "bool"),
    (dict(save_minutes=-1), "at least 0"),
    (dict(precision="fp8"), "bf16"), (dict(device="tpu"), "cuda")])
def test_an_impossible_value_is_named_with_a_remedy(settings, remedy):
    (name, value), = settings.items()
    with pytest.raises(ValueError) as error:
        Config(**settings)
    assert f"{name}={value!r}" in str(error.value) and remedy in str(error.value)


def test_seeds_of_different_uses_do_not_meet():
    seeds = {derive_seed(use, *numbers) for use in ("step", "epoch", "image")
             for numbers in ((0,), (5,), (0, 5), (5, 0), (0, 5, 1))}
    assert len(seeds) == 15
    assert derive_seed("step", 3, 4) == derive_seed("step", 3, 4)
