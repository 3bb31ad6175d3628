"""train_step is Algorithm 1: what it gives the network, what it makes of the answer."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import SHORT, Constant, metrics_rows, random_unet, succeeded, tiny, train
from PIL import Image
from torch import Tensor

from config import Config
from data import Batches, load_images, to_float
from ddpm import DDPM, linear_beta_schedule
from model import UNet
from train import (
    TrainingState,
    count_steps,
    ema_decay,
    learning_rate,
    sample_grid,
    train_step,
)
from utils.device import LossScaler
from utils.randomness import derive_seed

CPU = torch.device("cpu")
GREY = 51  # of the images in most tests; to_float makes -0.6 of it


def noiseless(**settings) -> Config:
    """Settings with which x_t is x_start but for 0.01; Config would refuse the betas."""
    config = tiny(**settings)
    config.beta_start = config.beta_end = 1e-8
    return config


class Training:
    """It is what train.py sets up, and records what each step does."""

    def __init__(
        self, config: Config, images: np.ndarray | None = None, rank: int = 0, world_size: int = 1,
        device: torch.device = CPU,
    ) -> None:
        if images is None:
            images = np.full((1, 3, 8, 8), GREY, np.uint8)
        self.config = config
        self.batches = Batches(images, config, device, rank, world_size)
        self.state = TrainingState(config, device)
        torch.manual_seed(1)
        self.state.model.load_state_dict(random_unet(config).state_dict())
        self.ddpm = DDPM(self.state.model, config).to(device)
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []  # x_t, t, pred_noise
        self.gradients: list[list[Tensor]] = []  # that the optimizer gets
        self.rates: list[float] = []
        self.state.model.register_forward_hook(self.note_call)
        self.state.optimizer.register_step_pre_hook(self.note_update)

    def note_call(self, model: UNet, inputs: tuple[Tensor, Tensor], pred_noise: Tensor) -> None:
        assert model.training
        x_t, t = inputs
        self.seen.append((x_t, t, pred_noise.detach()))

    def note_update(self, optimizer: torch.optim.Adam, *_) -> None:
        (group,) = optimizer.param_groups
        self.gradients.append([p.grad.clone() for p in group["params"]])
        self.rates.append(group["lr"])

    def step(self) -> tuple[Tensor, Tensor, Tensor]:
        return train_step(self.ddpm, self.state, self.batches, self.config)

    def recorded(self) -> tuple[Tensor, Tensor, Tensor]:
        """All x_t, t and pred_noise that the network saw or said."""
        x_t, t, pred_noise = zip(*self.seen, strict=True)
        return torch.cat(x_t), torch.cat(t), torch.cat(pred_noise)


def noise_in(x_t: Tensor, t: Tensor, config: Config) -> Tensor:
    """The noise in images of x_t whose x_start is GREY, by Eq. 4, in float64."""
    betas = linear_beta_schedule(config.timesteps, config.beta_start, config.beta_end)
    a = torch.cumprod(1 - betas, dim=0)[t].view(-1, 1, 1, 1)
    return (x_t.double() - a.sqrt() * -0.6) / (1 - a).sqrt()


# What the network gets

@pytest.fixture(scope="module")
def many_steps() -> Training:
    training = Training(tiny(batch_size=64, dropout=0.0))
    for _ in range(40):
        training.step()
    return training


def test_t_is_uniform_over_every_timestep(many_steps):
    _, t, _ = many_steps.recorded()
    counts = torch.bincount(t, minlength=30).double()
    expected = len(t) / 30
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert len(counts) == 30
    assert counts.min() > 0
    assert chi_square < 60  # 29 on average, over 60 once in 1,500 tries


def test_x_t_is_eq_4_with_standard_normal_noise(many_steps):
    x_t, t, _ = many_steps.recorded()
    noise = noise_in(x_t, t, many_steps.config)
    for step in range(30):
        at_step = noise[t == step]
        five_errors = 5 / math.sqrt(at_step.numel())
        assert at_step.mean().item() == pytest.approx(0, abs=five_errors)
        assert at_step.std().item() == pytest.approx(1, abs=five_errors)


def test_no_two_images_share_noise(many_steps):
    x_t, t, _ = many_steps.recorded()
    noise = noise_in(x_t, t, many_steps.config).flatten(1)
    correlation = noise @ noise.T / noise.shape[1]
    correlation.fill_diagonal_(0)
    assert correlation.abs().max() < 0.6


@pytest.mark.parametrize(("flip", "least", "most"), [(True, 140, 260), (False, 0, 0)])
def test_half_of_the_images_are_mirrored_or_none(flip, least, most):
    images = np.zeros((1, 3, 8, 8), np.uint8)
    images[..., 4:] = 255  # white on the right
    training = Training(noiseless(batch_size=400, horizontal_flip=flip), images)
    training.step()
    x_t, _, _ = training.recorded()
    assert least <= (x_t[:, 0, 0, 0] > 0).sum() <= most
    expected = to_float(torch.tensor(images))
    is_mirrored = x_t[:, :1, :1, :1] > 0
    restored = torch.where(is_mirrored, x_t.flip(-1), x_t)
    assert (restored - expected).abs().max() < 0.02


def test_an_epoch_shows_every_image_once():
    images = np.zeros((6, 3, 8, 8), np.uint8)
    images += np.arange(0, 240, 40, dtype=np.uint8).reshape(6, 1, 1, 1)
    training = Training(noiseless(batch_size=2), images)
    orders = []
    for _ in range(4):
        training.seen.clear()
        for _ in range(3):
            training.step()
        x_t, _, _ = training.recorded()
        values = (x_t.mean(dim=(1, 2, 3)) + 1) * 127.5 / 40
        orders.append(values.round().int().tolist())
    assert all(sorted(order) == list(range(6)) for order in orders)
    assert len(set(map(tuple, orders))) > 1


# What it makes of the answer

@pytest.mark.parametrize("grad_accum", [1, 4])
def test_the_losses_are_the_squared_errors_at_the_timesteps_returned(grad_accum):
    training = Training(tiny(batch_size=8, grad_accum=grad_accum))
    losses, t, _ = training.step()
    x_t, given_t, pred_noise = training.recorded()
    assert len(training.seen) == grad_accum
    assert torch.equal(t, given_t)
    error = noise_in(x_t, t, training.config) - pred_noise
    expected = error.square().mean(dim=(1, 2, 3)).float()
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=0)
    assert not losses.requires_grad


def whole_gradient(training: Training, before: UNet) -> list[Tensor]:
    """That of the mean loss of Eq. 14 over all images of the step, in one piece."""
    x_t, t, _ = training.recorded()
    noise = noise_in(x_t, t, training.config)
    loss = (noise - before(x_t, t)).square().mean()
    return list(torch.autograd.grad(loss, list(before.parameters())))


def norm_of(gradients: list[Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in gradients]).norm()


@pytest.mark.parametrize("grad_accum", [1, 4])
def test_the_gradient_is_that_of_the_mean_loss_of_the_batch(grad_accum):
    settings = {"batch_size": 8, "grad_accum": grad_accum, "grad_clip": 0.0, "dropout": 0.0}
    training = Training(tiny(**settings))
    before = copy.deepcopy(training.state.model)
    _, _, grad_norm = training.step()
    expected = whole_gradient(training, before)
    assert len(training.gradients) == 1  # one update, however many micro-batches
    for got, gradient in zip(training.gradients[0], expected, strict=True):
        torch.testing.assert_close(got, gradient, rtol=1e-3, atol=1e-5)
    assert grad_norm.item() == pytest.approx(norm_of(expected).item(), rel=1e-4)


@pytest.mark.parametrize("grad_clip", [0.01, 1000.0])  # the latter leaves it as it is
@pytest.mark.parametrize("grad_accum", [1, 4])
def test_the_gradient_is_clipped_to_its_norm(grad_accum, grad_clip):
    settings = {"batch_size": 8, "grad_accum": grad_accum, "dropout": 0.0}
    free = Training(tiny(grad_clip=0.0, **settings))
    clipped = Training(tiny(grad_clip=grad_clip, **settings))
    _, _, free_norm = free.step()
    _, _, clipped_norm = clipped.step()
    assert free_norm > 0.1
    assert clipped_norm == free_norm  # metrics.csv has the norm before
    factor = min(1, grad_clip / free_norm.item())
    for a, b in zip(free.gradients[0], clipped.gradients[0], strict=True):
        torch.testing.assert_close(a * factor, b, rtol=1e-3, atol=1e-9)


def test_no_gradient_is_left_for_the_next_step():
    training = Training(tiny(grad_clip=0.0, dropout=0.0))
    for _ in range(2):
        training.seen.clear()
        before = copy.deepcopy(training.state.model)
        training.step()
    expected = norm_of(whole_gradient(training, before))
    assert norm_of(training.gradients[1]).item() == pytest.approx(expected.item(), rel=1e-3)


# The learning rate

def test_warm_up_starts_above_zero_and_ends_at_the_learning_rate():
    config = Config(learning_rate=1e-3, warmup_steps=10)
    rates = [learning_rate(config, step) for step in (0, 4, 9, 10, 10_000)]
    assert rates == pytest.approx([1e-4, 5e-4, 1e-3, 1e-3, 1e-3])
    assert learning_rate(Config(learning_rate=1e-3, warmup_steps=0), 0) == 1e-3


def test_each_step_is_taken_with_its_learning_rate():
    training = Training(tiny(learning_rate=1e-3, warmup_steps=4))
    before = training.state.model.conv_in.weight.clone()
    training.step()
    # The first update of Adam is as large as the learning rate.
    moved = (training.state.model.conv_in.weight - before).abs()
    assert moved.max().item() == pytest.approx(2.5e-4, rel=1e-2)
    for _ in range(5):
        training.step()
    assert training.rates == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3])


# The average

def test_the_average_is_ramped_so_that_it_forgets_the_random_start():
    # Without the ramp 90 % of it would be the first weights at step 1,000.
    training = Training(tiny(learning_rate=0.01))
    expected = {name: p.clone() for name, p in training.state.ema.named_parameters()}
    for decay in (1 / 10, 2 / 11, 3 / 12):
        training.step()
        for name, p in training.state.model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * p
    for name, p in training.state.ema.named_parameters():
        torch.testing.assert_close(p, expected[name], atol=1e-6, rtol=0)
        assert not torch.equal(p, training.state.model.get_parameter(name))


def test_the_ramp_ends_at_ema_decay():
    config = Config(ema_decay=0.999)
    assert ema_decay(config, 8_000) < 0.999
    assert ema_decay(config, 8_990) == ema_decay(config, 10**6) == 0.999


# Random numbers

def draws_of(training: Training) -> tuple[Tensor, Tensor]:
    """t and x_t of a step."""
    training.step()
    x_t, t, _ = training.recorded()
    return t, x_t


def test_ranks_draw_different_timesteps_and_noise():
    """Both see one image alone, so that nothing else tells their batches apart."""
    config = tiny(batch_size=32)
    draws = [draws_of(Training(config, rank=rank, world_size=2)) for rank in (0, 1)]
    (t_0, x_t_0), (t_1, x_t_1) = draws
    assert len(t_0) == len(t_1) == 16
    assert (t_0 == t_1).sum() < 8
    noise_0 = noise_in(x_t_0, t_0, config).flatten()
    noise_1 = noise_in(x_t_1, t_1, config).flatten()
    assert abs((noise_0 * noise_1).mean()) < 0.1


def test_another_seed_draws_something_else():
    t, _ = draws_of(Training(tiny(batch_size=32)))
    other, _ = draws_of(Training(tiny(batch_size=32, seed=1)))
    assert (t == other).sum() < 10


def test_the_first_weights_follow_from_the_seed():
    config = tiny()
    torch.manual_seed(derive_seed("weights", config.seed))
    expected = UNet(config).state_dict()
    torch.manual_seed(5)
    state = TrainingState(config, CPU)
    for weights in (state.model.state_dict(), state.ema.state_dict()):
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in expected)


# 16 bits

@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_in_16_bits_the_losses_and_the_weights_are_fp32(precision, device):
    training = Training(tiny(precision=precision), device=device)
    losses, _, grad_norm = training.step()
    assert losses.dtype == grad_norm.dtype == torch.float32
    for weights in (training.state.model, training.state.ema):
        assert {p.dtype for p in weights.parameters()} == {torch.float32}


def test_fp16_gives_the_optimizer_the_gradient_without_its_scale(device):
    plain = Training(tiny(dropout=0.0), device=device)
    scaled = Training(tiny(dropout=0.0, precision="fp16"), device=device)
    assert scaled.state.scaler.get_scale() > 1000
    _, _, plain_norm = plain.step()
    _, _, scaled_norm = scaled.step()
    assert scaled_norm.item() == pytest.approx(plain_norm.item(), rel=0.05)
    assert norm_of(scaled.gradients[0]).item() == pytest.approx(1, rel=0.01)  # grad_clip


def test_a_grid_that_is_not_finite_is_not_drawn(capsys):
    stop = SimpleNamespace(number=0)
    assert sample_grid(DDPM(Constant(0.1), tiny()), tiny(), stop) is not None
    assert sample_grid(DDPM(Constant(math.nan), tiny()), tiny(), stop) is None
    assert capsys.readouterr().err == "warning: the network overflows in fp32: no grid is drawn\n"


def test_a_grid_is_drawn_in_batches_of_the_training():
    grids, sizes = [], []
    stop = SimpleNamespace(number=0)
    for batch_size in (8, 4):
        config = tiny(num_samples=5, batch_size=batch_size, grad_accum=2)
        torch.manual_seed(0)
        model = random_unet(config)
        model.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
        grids.append(sample_grid(DDPM(model, config), config, stop).tobytes())
    assert set(sizes[:6]) == {4, 1}
    assert set(sizes[6:]) == {2, 1}
    assert grids[0] == grids[1]


def test_a_step_that_overflows_in_fp16_counts_and_changes_no_weight(device, capsys):
    training = Training(tiny(precision="fp16"), device=device)
    scaler = LossScaler(device.type, init_scale=1e38)
    training.state.scaler = scaler
    before = {name: p.clone() for name, p in training.state.model.named_parameters()}
    losses, _, grad_norm = training.step()
    assert (training.state.step, training.state.images_seen) == (1, 4)
    assert torch.isfinite(losses).all()
    assert grad_norm == 0
    assert scaler.get_scale() == pytest.approx(5e37)
    for name, p in training.state.model.named_parameters():
        assert torch.equal(p, before[name])
    training.step()
    assert scaler.get_scale() == pytest.approx(2.5e37)
    assert capsys.readouterr().err.count("overflowed in fp16") == 1


# Progress, by images seen

@pytest.mark.parametrize(("settings", "step", "images_seen", "total"), [
    ({}, 0, 0, 10),  # 4 epochs of 10 images, 4 of them per step
    ({"epochs": 3}, 0, 0, 8),  # the last one shows 2 more
    ({"batch_size": 16}, 0, 0, 3),
    ({"batch_size": 2}, 5, 20, 15),  # after steps of 4
    ({"batch_size": 8}, 5, 20, 8),
    ({"max_steps": 7}, 5, 20, 7),
    ({}, 10, 40, 10),
    ({"batch_size": 16}, 3, 48, 3),  # the last step went beyond the last epoch
])
def test_epochs_are_counted_in_images(settings, step, images_seen, total):
    config = tiny(**{"epochs": 4, **settings})
    state = TrainingState(config, CPU)
    state.step, state.images_seen = step, images_seen
    assert count_steps(config, state, num_images=10) == total


# It learns

def test_the_loss_falls():
    training = Training(tiny(learning_rate=3e-3, batch_size=16), load_images(tiny(), "test"))
    training.state.model.initialise()
    losses = [training.step()[0].mean().item() for _ in range(60)]
    assert losses[0] == pytest.approx(1, abs=0.1)
    assert np.mean(losses[-10:]) < 0.6


# The script

def test_grids_become_training_data_with_a_warning_alone(pictures, tmp_path):
    inside = pictures["data"] / "run"
    result = succeeded(train(inside, SHORT, pictures, max_steps=1, sample_every=1))
    assert "will be among the images" in result.stderr
    of_its_grids = {**pictures, "data": inside / "samples", "max_steps": 2}
    result = succeeded(train(inside, SHORT, "--resume", of_its_grids))
    assert "will be among the images" in result.stderr
    result = succeeded(train(tmp_path / "run", SHORT, pictures, max_steps=1))
    assert "will be among the images" not in result.stderr


@pytest.mark.parametrize("settings", [
    {"beta_schedule": "cosine", "channels": 1, "variance": "fixed_small"},
    {"batch_size": 6, "grad_accum": 3},
    {"precision": "bf16"},
    {"precision": "fp16"},
    {"batch_size": 1, "save_minutes": 0.0},
    {"sample_every": 0, "save_every": 0, "grad_clip": 0.0, "attn_resolutions": ()},
    {"horizontal_flip": False, "sample_steps": 30},
    {"sample_steps": 100},  # more than there are timesteps: the whole chain
])
def test_settings_that_run(settings, tmp_path):
    common = {"max_steps": 3, "log_every": 1, "sample_every": 2}
    succeeded(train(tmp_path / "run", common, settings))
    assert len(metrics_rows(tmp_path / "run")) == 3


def test_a_single_image(tmp_path):  # fewer than a batch
    Image.new("RGB", (5, 5)).save(tmp_path / "one.png")
    succeeded(train(tmp_path / "run", data=tmp_path, epochs=8, log_every=1))
    assert [row[:2] for row in metrics_rows(tmp_path / "run")] == [["1", "4"], ["2", "8"]]


def test_the_same_settings_give_the_same_run_and_others_another(tmp_path):
    losses = {}
    for name, settings in {
        "first": {},
        "second": {},
        "seed": {"seed": 1},
        "flip": {"horizontal_flip": False},
        "warm-up": {"warmup_steps": 5},
    }.items():
        succeeded(train(tmp_path / name, settings, max_steps=6, log_every=6))
        losses[name] = metrics_rows(tmp_path / name)[0][2]
    assert losses["first"] == losses["second"]
    assert len(set(losses.values())) == 4
