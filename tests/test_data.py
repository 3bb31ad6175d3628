"""Images in and out: every source, every kind of picture, the order of the batches."""

import io
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, coloured_pictures, tiny
from PIL import Image
from torchvision.utils import make_grid

import data
from config import Config
from data import (
    Batches,
    data_order,
    load_images,
    mirror_half,
    to_float,
    to_picture,
    to_square,
    to_uint8,
)
from tools.shape_checker import find_shape, share_of_shapes
from utils.cli import UserError

CPU = torch.device("cpu")


def test_all_256_values_survive_the_round_trip():  # truncation gets 63 of them wrong
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(values)), values)
    assert to_float(values)[[0, 255]].tolist() == [-1, 1]
    assert to_uint8(torch.tensor([-3.0, 3.0, float("inf")])).tolist() == [0, 255, 255]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("count", "columns"), [(5, 0), (5, 2), (7, 7), (2, 3)])
def test_a_picture_is_the_grid_of_torchvision(count, columns, channels):
    images = torch.rand(count, channels, 6, 8) * 2 - 1
    columns_of_grid = columns or math.ceil(math.sqrt(count))
    grid = make_grid(to_uint8(images), nrow=columns_of_grid, padding=2)
    assert np.array_equal(np.asarray(to_picture(images, columns)), grid.permute(1, 2, 0))


def test_importing_takes_no_longer_than_torch():
    """torchvision brings the whole compiler along: as many seconds again for every start."""
    line = "import sys, train, inference, evaluate; sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", line], cwd=ROOT, check=False).returncode == 0


def test_a_picture_is_rounded_too():
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 3, -1, -1)
    picture = np.asarray(to_picture(to_float(values), columns=2))
    assert picture.shape == (20, 38, 3)
    for left in (2, 20):
        image = picture[2:18, left:left + 16].transpose(2, 0, 1)
        assert np.array_equal(image, values[0].numpy())


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
    """Eleven images of one pixel, all different."""
    return np.arange(11, dtype=np.uint8).reshape(11, 1, 1, 1)


def test_the_batch_of_a_step_is_shared_among_ranks(counted):
    config = tiny(batch_size=6)
    whole = Batches(counted, config, CPU)(5)
    parts = [Batches(counted, config, CPU, rank, 3)(5) for rank in range(3)]
    assert whole.shape == (6, 1, 1, 1)
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


@pytest.mark.parametrize(("batch_size", "world_size"), [(4, 1), (6, 3), (11, 1), (30, 2)])
def test_images_that_lie_on_a_gpu_come_in_the_same_order(batch_size, world_size, counted):
    """By the code for a GPU, with tensors on the CPU."""
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


# The built-in shapes and their checker

@pytest.fixture(params=[16, 32])
def shapes(request) -> np.ndarray:
    return load_images(tiny(image_size=request.param, attn_resolutions=()), "test")


def test_the_checker_accepts_the_shapes(shapes):
    assert share_of_shapes(shapes[:400]) > 0.99
    assert {find_shape(image) for image in shapes[:50]} == {"circle", "square", "triangle"}


def test_the_checker_accepts_nothing_else(shapes):
    rng = np.random.default_rng(0)
    size = shapes.shape[-1]
    random = rng.integers(0, 256, (200, 3, size, size), np.uint8)
    assert share_of_shapes(random) == 0
    blank = np.full((2, 3, size, size), 20, np.uint8)
    assert share_of_shapes(blank) == 0
    blends = (shapes[:500].astype(int) + shapes[500:]) // 2
    assert share_of_shapes(blends.astype(np.uint8)) < 0.06  # some pairs are nearly the same
    noisy = (shapes[:200] + rng.normal(0, 40, (200, 3, size, size))).clip(0, 255)
    assert share_of_shapes(noisy.astype(np.uint8)) < 0.02
    two = np.maximum(shapes[:500], shapes[500:])
    assert share_of_shapes(two) < 0.1


def test_shapes_are_always_the_same_and_splits_differ():
    train, test = load_images(tiny()), load_images(tiny(), "test")
    assert train.shape == (10_000, 3, 8, 8)
    assert train.dtype == np.uint8
    again = data.draw_shapes.__wrapped__(100, 8, 3, "train")  # not the cached ones (conftest.py)
    assert np.array_equal(train[:100], again)
    assert not np.array_equal(train[:len(test)], test)


def test_shapes_in_grey():
    assert load_images(tiny(channels=1), "test").shape == (1_000, 1, 8, 8)


# Folders

@pytest.fixture
def folder(tmp_path) -> Path:
    """Nested, with upper-case and lower-case endings; one image of each grey 10, 20, ..."""
    names = ["x.png", "a/y.JPG", "a/b/z.WebP", "a/b/u.bmp", "a/v.tiff", "w.gif", "a/q.JPEG"]
    root = tmp_path / "pictures"
    (root / "a" / "b").mkdir(parents=True)
    for i, name in enumerate(names):
        grey = 10 * i + 10
        Image.new("RGB", (20, 12), (grey, grey, grey)).save(root / name, lossless=True)
    (root / "notes.txt").write_text("not an image")
    return root


def config_of(folder: Path, **changes) -> Config:
    return tiny(data=str(folder), data_dir=str(folder.parent / "data"), **changes)


def damage(folder: Path) -> None:
    """Add two images that cannot be read."""
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (folder / "half.jpg").write_bytes((folder / "a/y.JPG").read_bytes()[:200])


def test_a_folder_nested_and_of_any_format(folder):
    images = load_images(config_of(folder))
    assert images.shape == (7, 3, 8, 8)
    assert images.dtype == np.uint8
    greys = sorted(image.mean() for image in images)
    assert greys == pytest.approx([10, 20, 30, 40, 50, 60, 70], abs=2)


def test_a_folder_in_grey_and_of_another_size(folder):
    config = config_of(folder, channels=1, image_size=16, attn_resolutions=())
    assert load_images(config).shape == (7, 1, 16, 16)


@pytest.mark.parametrize("damaged", [False, True])
def test_a_folder_is_decoded_once(damaged, folder, monkeypatch):
    if damaged:
        damage(folder)
    first = np.array(load_images(config_of(folder)))
    monkeypatch.setattr(data, "to_square", None)
    again = load_images(config_of(folder))
    assert np.array_equal(again, first)
    assert isinstance(again, np.memmap)  # it may be larger than memory


def test_a_folder_that_changed_is_decoded_anew(folder):
    assert len(load_images(config_of(folder))) == 7
    Image.new("RGB", (20, 20)).save(folder / "new.png")
    assert len(load_images(config_of(folder))) == 8
    (folder / "x.png").unlink()
    assert len(load_images(config_of(folder))) == 7


@pytest.mark.parametrize("lost", [1, 100, 8 * 8 * 3, 10**6])
def test_a_truncated_cache_is_made_anew(lost, folder):
    first = np.array(load_images(config_of(folder)))
    (cache,) = (folder.parent / "data").glob("pictures-*.images")
    whole = cache.read_bytes()
    cache.write_bytes(whole[:-lost])
    assert np.array_equal(load_images(config_of(folder)), first)
    assert list(cache.parent.iterdir()) == [cache]
    assert cache.read_bytes() == whole


def test_left_overs_of_a_killed_process_are_removed_once_they_are_old(folder):
    load_images(config_of(folder))
    (cache,) = (folder.parent / "data").iterdir()
    old = cache.with_name(f"{cache.name}.01234567.tmp")
    young = cache.with_name(f"{cache.name}.89abcdef.tmp")
    of_others = cache.with_name("old.tmp")
    for path, age in ((old, 7200), (young, 60), (of_others, 7200)):
        path.write_bytes(b"half")
        then = time.time() - age
        os.utime(path, (then, then))
    cache.unlink()
    load_images(config_of(folder))
    assert not old.exists()
    assert young.exists()
    assert of_others.exists()


def test_a_few_damaged_images_are_skipped_and_named(folder, capfd):
    damage(folder)
    images = load_images(config_of(folder))
    assert sorted(image.mean() for image in images) == pytest.approx(range(10, 80, 10), abs=2)
    errors = capfd.readouterr().err
    assert "broken.png (not an image)" in errors
    assert "half.jpg" in errors
    load_images(config_of(folder))  # from the cache, where they are missing too
    assert "2 of 9 images" in capfd.readouterr().err


def test_an_image_that_cannot_be_read_today_is_not_left_out_for_ever(folder, monkeypatch):
    read_bytes = Path.read_bytes

    def broken(path: Path) -> bytes:
        if path.name == "y.JPG":
            raise OSError(5, "Input/output error", str(path))
        return read_bytes(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", broken)
        with pytest.raises(OSError, match="y.JPG"):
            load_images(config_of(folder))
    assert len(load_images(config_of(folder))) == 7


def test_linked_folders_belong_to_it_and_a_loop_of_links_ends(folder, tmp_path):
    coloured_pictures(tmp_path / "more", count=3)
    (folder / "linked").symlink_to(tmp_path / "more")
    (folder / "a" / "again").symlink_to(folder)
    assert len(load_images(config_of(folder))) == 10


@pytest.mark.parametrize(("name", "words"), [
    ("nowhere", ["nowhere", "cifar10"]),
    ("empty", ["no image"]),
    ("bad", ["bad.png"]),
])
def test_a_folder_without_images_is_refused(name, words, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/bad.png").write_bytes(b"junk")
    with pytest.raises(UserError) as error:
        load_images(config_of(tmp_path / name))
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


# Every kind of picture

def saved(image: Image.Image, **options) -> np.ndarray:
    """The picture as a file, opened again and brought to 8 x 8."""
    file = io.BytesIO()
    image.save(file, **options)
    return to_square(Image.open(file), 8, 3)


def colour(image: Image.Image, **options) -> list[int]:
    """Of its first pixel."""
    return saved(image, **options)[:, 0, 0].tolist()


RAMP = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


def test_grey():
    grey = Image.fromarray(RAMP)
    assert np.array_equal(saved(grey, format="PNG"), np.stack([RAMP] * 3))


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bits(format):  # Pillow would clip it to white
    sixteen = Image.fromarray(RAMP.astype(np.uint16) * 257)
    assert np.array_equal(saved(sixteen, format=format), np.stack([RAMP] * 3))


def test_32_bits():  # Pillow's mode I: of 8 bits, or of 16
    assert np.array_equal(saved(Image.fromarray(RAMP.astype(np.int32)), format="TIFF")[0], RAMP)
    large = Image.fromarray(RAMP.astype(np.int32) * 257)
    assert np.array_equal(saved(large, format="TIFF")[0], RAMP)
    with pytest.raises(ValueError, match="16 bits"):
        saved(Image.fromarray(RAMP.astype(np.int32) * 1000), format="TIFF")


def test_a_palette():
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    assert colour(palette, format="PNG") == [10, 200, 30]


def test_transparency_is_put_on_white():
    assert colour(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), format="PNG") == [255, 255, 255]
    assert colour(Image.new("RGBA", (8, 8), (9, 8, 7, 255)), format="PNG") == [9, 8, 7]


def test_a_transparent_grey_of_16_bits_is_put_on_white():
    grey = Image.fromarray(np.full((8, 8), 1000, np.uint16))
    assert colour(grey, format="PNG", transparency=1000) == [255, 255, 255]
    assert colour(grey, format="PNG", transparency=2000) == [4, 4, 4]


def test_cmyk():
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert colour(red, format="TIFF") == [255, 0, 0]


def test_of_an_animation_the_first_frame():
    red, blue = (Image.new("RGB", (8, 8), name) for name in ("red", "blue"))
    assert colour(red, format="GIF", save_all=True, append_images=[blue]) == [255, 0, 0]


def test_floating_point_is_refused():
    with pytest.raises(ValueError, match="floating-point"):
        saved(Image.fromarray(RAMP.astype(np.float32)), format="TIFF")


def test_a_photograph_taken_sideways_is_turned_upright():
    image = Image.new("RGB", (8, 8), "black")
    image.paste("white", (0, 0, 8, 4))  # white above
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned = saved(image, format="PNG", exif=exif)
    assert turned[0, 0, 0] == 0
    assert turned[0, 7, 0] == 255


def test_resized_and_centre_cropped():
    image = Image.new("RGB", (48, 16), "black")
    image.paste("white", (16, 0, 32, 16))  # the middle third
    assert (to_square(image, 16, 3) == 255).all()
    assert to_square(image, 32, 1).shape == (1, 32, 32)


# Downloads

def test_a_sub_folder_that_cannot_be_read_is_not_left_out_without_a_word(folder, monkeypatch):
    scandir = os.scandir
    (folder / "locked").mkdir()

    def refusing(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", refusing)
    with pytest.raises(PermissionError, match="locked"):
        load_images(config_of(folder))


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
