"""Images in and out: every source, every kind of picture, the order of the batches."""

import io
import os
import time

import numpy as np
import pytest
import torch
from conftest import tiny
from PIL import Image
from shape_checker import find_shape, share_of_shapes

import data
from config import UserError
from data import Batches, data_order, load_images, to_float, to_square, to_uint8

CPU = torch.device("cpu")


def test_all_256_values_survive_the_round_trip():  # truncation gets 63 of them wrong
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(values)), values)
    assert to_float(values)[[0, 255]].tolist() == [-1, 1]
    assert to_uint8(torch.tensor([-3.0, 3.0, float("inf")])).tolist() == [0, 255, 255]


# Order

@pytest.mark.parametrize("num_images, batch_size", [(10, 4), (1, 4), (3, 8), (8, 8), (7, 1)])
def test_every_epoch_shows_every_image_once(num_images, batch_size):
    stream = np.concatenate([data_order(0, k * batch_size, batch_size, num_images) for k in range(60)])
    for epoch in range(len(stream) // num_images):
        assert sorted(stream[epoch * num_images:(epoch + 1) * num_images]) == list(range(num_images))
    if num_images > 5:
        assert not np.array_equal(stream[:num_images], stream[num_images:2 * num_images])


def test_the_batch_of_a_step_is_shared_among_ranks():
    images, config = np.arange(11, dtype=np.uint8).reshape(11, 1, 1, 1), tiny(batch_size=6, horizontal_flip=False)
    whole = Batches(images, config, CPU)(5)
    parts = [Batches(images, config, CPU, rank, 3)(5) for rank in range(3)]
    assert torch.equal(whole, torch.cat(parts)) and whole.shape == (6, 1, 1, 1)


def test_half_of_the_images_are_mirrored():
    images = np.zeros((400, 1, 1, 2), np.uint8)
    images[..., 1] = 255
    batch = Batches(images, tiny(batch_size=400), CPU)(0)
    assert 140 < (batch[:, 0, 0, 0] == 1).sum() < 260
    assert (Batches(images, tiny(batch_size=400, horizontal_flip=False), CPU)(0)[:, 0, 0, 0] == -1).all()


# The built-in shapes and their checker

@pytest.mark.parametrize("size", [16, 32])
def test_the_checker_accepts_the_shapes_and_nothing_else(size):
    shapes = load_images(tiny(image_size=size))[:1000]
    assert share_of_shapes(shapes) > 0.99
    assert {find_shape(image) for image in shapes[:50]} == {"circle", "square", "triangle"}
    rng = np.random.default_rng(0)
    assert share_of_shapes(rng.integers(0, 256, (200, 3, size, size), np.uint8)) == 0
    assert share_of_shapes(np.full((2, 3, size, size), 20, np.uint8)) == 0
    blends = (shapes[:500].astype(int) + shapes[500:]) // 2
    assert share_of_shapes(blends.astype(np.uint8)) < 0.06  # of the same kind, colour and place are some pairs
    noisy = (shapes[:200] + rng.normal(0, 40, (200, 3, size, size))).clip(0, 255)
    assert share_of_shapes(noisy.astype(np.uint8)) < 0.02
    two = np.maximum(shapes[:500], shapes[500:])
    assert share_of_shapes(two) < 0.1


def test_shapes_are_always_the_same_and_splits_differ():
    config = tiny()
    train, test = load_images(config), load_images(config, "test")
    assert train.shape == (10_000, 3, 8, 8) and train.dtype == np.uint8 and np.array_equal(train, load_images(config))
    assert not np.array_equal(train[:len(test)], test)
    assert load_images(tiny(channels=1)).shape == (10_000, 1, 8, 8)


# Folders

@pytest.fixture
def folder(tmp_path):
    """Nested, with upper-case and lower-case endings; one image of each colour value 10, 20, ..."""
    root = tmp_path / "pictures"
    (root / "a" / "b").mkdir(parents=True)
    for i, name in enumerate(["x.png", "a/y.JPG", "a/b/z.WebP", "a/b/u.bmp", "a/v.tiff", "w.gif", "a/q.JPEG"]):
        Image.new("RGB", (20, 12), (10 * i + 10,) * 3).save(root / name, lossless=True)
    (root / "notes.txt").write_text("not an image")
    return root


def folder_config(folder, **changes):
    return tiny(data=str(folder), data_dir=str(folder.parent / "data"), **changes)


def test_a_folder_nested_and_of_any_format(folder):
    images = load_images(folder_config(folder))
    assert images.shape == (7, 3, 8, 8) and images.dtype == np.uint8
    assert sorted(int(image.mean() + 0.5) for image in images) == pytest.approx([10, 20, 30, 40, 50, 60, 70], abs=2)
    assert load_images(folder_config(folder, channels=1, image_size=16)).shape == (7, 1, 16, 16)


def test_a_folder_is_decoded_once(folder, monkeypatch):
    first = np.array(load_images(folder_config(folder)))
    monkeypatch.setattr(data, "to_square", None)
    assert np.array_equal(load_images(folder_config(folder)), first)
    monkeypatch.undo()
    Image.new("RGB", (20, 20)).save(folder / "new.png")
    assert len(load_images(folder_config(folder))) == 8


@pytest.mark.parametrize("damage", [lambda cache: cache.write_bytes(cache.read_bytes()[:-100]),
                                    lambda cache: cache.write_bytes(b"")])
def test_a_truncated_cache_is_made_anew(folder, damage):
    first = np.array(load_images(folder_config(folder)))
    (cache,) = (folder.parent / "data").glob("*.npy")
    damage(cache)
    assert np.array_equal(load_images(folder_config(folder)), first)
    assert [path.suffix for path in cache.parent.iterdir()] == [".npy"]


def test_left_overs_of_a_killed_process_are_removed_once_they_are_old(folder):
    cache = folder.parent / "data"
    cache.mkdir()
    for name, age in (("old.npy.1.tmp", 7200), ("young.npy.2.tmp", 60)):
        (cache / name).write_bytes(b"half")
        os.utime(cache / name, (time.time() - age,) * 2)
    load_images(folder_config(folder))
    assert [path.name for path in cache.glob("*.tmp")] == ["young.npy.2.tmp"]


def test_a_few_damaged_images_are_skipped_and_named(folder, capfd):
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (folder / "half.jpg").write_bytes((folder / "a/y.JPG").read_bytes()[:200])
    assert len(load_images(folder_config(folder))) == 7
    assert "broken.png" in (err := capfd.readouterr().err) and "half.jpg" in err


@pytest.mark.parametrize("make, words", [
    (lambda f: f / "nowhere", ("nowhere", "cifar10")), (lambda f: f, ("no image",)),
    (lambda f: (f / "bad.png").write_bytes(b"junk") and f, ("bad.png",))])
def test_a_folder_without_images_is_refused(tmp_path, make, words):
    root = tmp_path / "empty"
    root.mkdir()
    with pytest.raises(UserError) as error:
        load_images(folder_config(make(root)))
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


# Every kind of picture

def corner(image: Image.Image, **save) -> np.ndarray:
    """The picture saved as a file, opened again and brought to 8 x 8."""
    file = io.BytesIO()
    image.save(file, **save)
    return to_square(Image.open(file), 8, 3)


def test_kinds_of_pictures():
    ramp = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    grey = Image.fromarray(ramp)
    assert np.array_equal(corner(grey, format="PNG"), np.stack([ramp] * 3))
    sixteen = Image.fromarray(ramp.astype(np.uint16) * 257)
    assert np.array_equal(corner(sixteen, format="PNG"), np.stack([ramp] * 3))  # Pillow would clip it to white
    assert np.array_equal(corner(sixteen, format="TIFF"), np.stack([ramp] * 3))
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    assert corner(palette, format="PNG")[:, 0, 0].tolist() == [10, 200, 30]
    assert corner(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), format="PNG")[:, 0, 0].tolist() == [255, 255, 255]
    assert corner(Image.new("RGBA", (8, 8), (9, 8, 7, 255)), format="PNG")[:, 0, 0].tolist() == [9, 8, 7]
    assert corner(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), format="TIFF")[:, 0, 0].tolist() == [255, 0, 0]
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    assert corner(frames[0], format="GIF", save_all=True, append_images=frames[1:])[:, 0, 0].tolist() == [255, 0, 0]
    with pytest.raises(ValueError, match="floating-point"):
        corner(Image.fromarray(ramp.astype(np.float32)), format="TIFF")


def test_a_photograph_taken_sideways_is_turned_upright():
    image = Image.new("RGB", (8, 8), "black")
    image.paste("white", (0, 0, 8, 4))  # white above
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned = corner(image, format="PNG", exif=exif)
    assert turned[0, 0, 0] == 0 and turned[0, 7, 0] == 255


def test_resized_and_centre_cropped():
    image = Image.new("RGB", (48, 16), "black")
    image.paste("white", (16, 0, 32, 16))  # the middle third
    assert (to_square(image, 16, 3) == 255).all()
    assert to_square(image, 32, 1).shape == (1, 32, 32)


def test_no_network_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: (_ for _ in ()).throw(OSError("no\nnetwork")))
    for name, archive in (("cifar10", "cifar-10-python.tar.gz"), ("mnist", "MNIST/raw")):
        with pytest.raises(UserError) as error:
            load_images(tiny(data=name, data_dir=str(tmp_path)))
        assert all(word in str(error.value) for word in (archive, str(tmp_path), "--data shapes"))
        assert str(error.value).isprintable()  # one line, whatever torchvision says


def test_a_downloaded_data_set(monkeypatch, tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    fake = type("Fake", (), {"__init__": lambda self, root, train, download: setattr(self, "data", pictures)})
    monkeypatch.setitem(data.DOWNLOADS, "cifar10", (fake, ""))
    images = load_images(tiny(data="cifar10", data_dir=str(tmp_path)))
    assert images.dtype == np.uint8 and np.array_equal(images, pictures.transpose(0, 3, 1, 2))
