"""data.py: the order of the batches, and every source of images."""

import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, called, flags, succeeded, tiny

import data
from data import Batches, data_order, load_images, mirror_half, to_float, to_uint8
from utils.cli import UserError

CPU = torch.device("cpu")


def test_all_256_values_survive_the_round_trip():  # truncation gets 63 of them wrong
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(values)), values)
    assert to_float(values)[[0, 255]].tolist() == [-1, 1]
    assert to_uint8(torch.tensor([-3.0, 3.0, float("inf")])).tolist() == [0, 255, 255]


def test_importing_takes_no_longer_than_torch():
    """torchvision brings the whole compiler along: as many seconds again for every start."""
    line = "import sys, train, inference, evaluate; sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", line], cwd=ROOT, check=False).returncode == 0


# Order

@pytest.mark.parametrize(("num_images", "batch_size"), [(10, 4), (1, 4), (3, 8), (8, 8), (7, 1)])
def test_every_epoch_shows_every_image_once(num_images, batch_size):
    batches = [data_order(0, k * batch_size, batch_size, num_images) for k in range(60)]
    stream = np.concatenate(batches)
    epochs = [stream[i:i + num_images] for i in range(0, 60 * batch_size, num_images)]
    if len(epochs[-1]) < num_images:
        epochs.pop()
    for epoch in epochs:
        assert sorted(epoch) == list(range(num_images))
    if num_images > 5:
        assert not np.array_equal(epochs[0], epochs[1])


def test_the_order_depends_on_the_seed():
    orders = {tuple(data_order(seed, 0, 10, 10)) for seed in range(3)}
    assert len(orders) == 3


@pytest.fixture
def counted() -> np.ndarray:
    """Return eleven images, each of another value."""
    values = np.arange(11, dtype=np.uint8).reshape(11, 1, 1, 1)
    return np.tile(values, (1, 3, 8, 8))


def test_the_batch_of_a_step_is_shared_among_ranks(counted):
    config = tiny(batch_size=6)
    whole = Batches(counted, config, CPU)(5)
    parts = [Batches(counted, config, CPU, rank, 3)(5) for rank in range(3)]
    assert whole.shape == (6, 3, 8, 8)
    assert torch.equal(whole, torch.cat(parts))


def test_a_batch_depends_on_the_images_seen_alone(counted):
    whole = Batches(counted, tiny(batch_size=6), CPU)(20)
    halves = Batches(counted, tiny(batch_size=3), CPU)
    assert torch.equal(whole, torch.cat([halves(20), halves(23)]))


def test_a_batch_is_the_images_in_their_order(counted):
    batch = Batches(counted, tiny(batch_size=6), CPU)(3)
    expected = counted[data_order(0, 3, 6, 11)]
    assert batch.dtype == torch.float32
    assert torch.equal(batch, to_float(torch.from_numpy(expected)))


@pytest.mark.parametrize("images", [
    np.zeros((4, 3, 8, 8), np.float32),  # another range
    np.zeros((4, 3, 10, 8), np.uint8),  # another size: the network would train on any
    np.zeros((4, 8, 8, 3), np.uint8)])
def test_other_images_than_the_settings_say_are_refused(images):
    with pytest.raises(TypeError, match="uint8 .N, 3, 8, 8. from 0 to 255, not"):
        Batches(images, tiny(), CPU)


@pytest.mark.parametrize(("batch_size", "world_size"), [(4, 1), (6, 3), (11, 1), (30, 2)])
def test_images_that_lie_on_a_gpu_come_in_the_same_order(batch_size, world_size, counted):
    """The code for a GPU runs with tensors on the CPU."""
    config = tiny(batch_size=batch_size)
    for rank in range(world_size):
        expected = Batches(counted, config, CPU, rank, world_size)
        batches = Batches(counted, config, CPU, rank, world_size)
        batches.images = torch.tensor(counted)
        for images_seen in [*range(0, 20 * batch_size, batch_size), 3, 100, 0]:
            assert torch.equal(batches(images_seen), expected(images_seen))


def test_half_of_the_images_are_mirrored():
    images = torch.zeros(400, 3, 2, 3)
    images[..., 2] = 1
    mirrored = mirror_half(images)
    is_mirrored = mirrored[:, 0, 0, 0] == 1
    assert 140 < is_mirrored.sum() < 260
    assert torch.equal(mirrored[is_mirrored], images.flip(-1)[is_mirrored])
    assert torch.equal(mirrored[~is_mirrored], images[~is_mirrored])


# The built-in shapes

def test_shapes_are_always_the_same_and_splits_differ():
    train, test = load_images(tiny()), load_images(tiny(), "test")
    assert train.shape == (10_000, 3, 8, 8)
    assert train.dtype == np.uint8
    again = data.draw_shapes.__wrapped__(100, 8, 3, "train")  # not the cached ones (conftest.py)
    assert np.array_equal(train[:100], again)
    assert not np.array_equal(train[:len(test)], test)


def test_shapes_in_grey():
    assert load_images(tiny(channels=1), "test").shape == (1_000, 1, 8, 8)


# A folder (the rest: test_image_cache.py)

@pytest.mark.parametrize("split", ["train", "test"])
def test_a_folder_is_the_data_of_either_split(split, pictures):
    places = {name: str(path) for name, path in pictures.items()}
    config = tiny(**places, image_size=16, attn_resolutions=(), channels=1)
    images = load_images(config, split)
    assert images.shape == (10, 1, 16, 16)
    assert images.dtype == np.uint8
    (cache,) = pictures["data_dir"].iterdir()
    assert cache.name.startswith("pictures-")


def test_a_folder_named_as_a_data_set_is_pointed_out(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    load_images(tiny())
    assert capsys.readouterr().err == ""
    Path("shapes").mkdir()
    load_images(tiny())
    assert "for the folder, --data ./shapes" in capsys.readouterr().err


def test_another_split_is_refused():
    with pytest.raises(ValueError, match="'training' is impossible: train or test"):
        load_images(tiny(), "training")


def test_a_damaged_download_is_one_line(monkeypatch, tmp_path):
    def truncated(*arguments, **options):
        raise ValueError("invalid literal for int() with base 16: b''")

    monkeypatch.setattr("torchvision.datasets.MNIST", truncated)
    with pytest.raises(UserError, match="remove what there is of it"):
        load_images(tiny(data="mnist", data_dir=str(tmp_path)))


def test_neither_a_folder_nor_a_known_name(tmp_path):
    (tmp_path / "file").touch()
    for name in ("nowhere", "file"):
        with pytest.raises(UserError, match=f"{name}' is neither a folder.*cifar10.*shapes"):
            load_images(tiny(data=str(tmp_path / name)))


# Downloads

@pytest.mark.parametrize(("name", "archive"), [
    ("cifar10", "cifar-10-python.tar.gz"), ("mnist", "MNIST/raw"),
    ("fashion_mnist", "FashionMNIST/raw")])
def test_no_network_says_what_to_do(name, archive, monkeypatch, tmp_path):
    def unreachable(*args, **options):
        raise OSError("no\nnetwork")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    with pytest.raises(UserError) as error:
        load_images(tiny(data=name, data_dir=str(tmp_path)))
    for word in (archive, str(tmp_path), "--data shapes"):
        assert word in str(error.value)
    assert str(error.value).isprintable()  # one line, whatever torchvision says


def test_a_downloaded_data_set(monkeypatch, tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    asked = []

    class Fake:
        def __init__(self, root: str, train: bool, download: bool) -> None:
            asked.append((root, train, download))
            self.data = pictures

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Fake)
    config = tiny(data="cifar10", data_dir=str(tmp_path))
    images = load_images(config)
    assert images.dtype == np.uint8
    assert np.array_equal(images, pictures.transpose(0, 3, 1, 2))
    load_images(config, "test")
    assert asked == [(str(tmp_path), True, True), (str(tmp_path), False, True)]


def test_the_mnist_preset_trains_on_the_files_of_mnist(tmp_path):
    raw = tmp_path / "data/MNIST/raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, count in (("train", 40), ("t10k", 5)):
        write_idx(raw / f"{name}-images-idx3-ubyte", rng.integers(0, 256, (count, 28, 28)))
        write_idx(raw / f"{name}-labels-idx1-ubyte", rng.integers(0, 10, count))
    line = flags(dim=8, max_steps=2, num_samples=2, sample_steps=2, device="cpu",
                 precision="fp32")
    result = succeeded(called("train.py", "--preset", "mnist", *line, cwd=tmp_path))
    assert "on 40 images of mnist (28 x 28 x 1)" in result.stdout
    assert (tmp_path / "runs/mnist/checkpoints/final_model.pth").is_file()


def write_idx(path: Path, values: np.ndarray) -> None:
    """Write values in the format that MNIST is published in."""
    header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    path.write_bytes(header + values.astype(np.uint8).tobytes())
