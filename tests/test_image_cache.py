"""utils/image_cache.py: folders of pictures, decoded once, and every kind of picture."""

import io
import os
import shutil
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import coloured_pictures
from PIL import Image

from utils import image_cache
from utils.cli import UserError
from utils.image_cache import load_folder, read_picture, refuse_other_sizes, to_square


@pytest.fixture
def folder(tmp_path) -> Path:
    """It is nested, its endings are of both cases, and its images are of grey 10, 20, ..."""
    names = ["x.png", "a/y.JPG", "a/b/z.WebP", "a/b/u.bmp", "a/v.tiff", "w.gif", "a/q.JPEG"]
    root = tmp_path / "pictures"
    (root / "a" / "b").mkdir(parents=True)
    for i, name in enumerate(names):
        grey = 10 * i + 10
        Image.new("RGB", (20, 12), (grey, grey, grey)).save(root / name, lossless=True)
    (root / "notes.txt").write_text("not an image")
    return root


def loaded(folder: Path, size: int = 8, channels: int = 3) -> np.ndarray:
    return load_folder(folder, folder.parent / "data", size, channels)


def damage(folder: Path) -> None:
    """Add two images that cannot be read."""
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (folder / "half.jpg").write_bytes((folder / "a/y.JPG").read_bytes()[:200])


def forbid(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the folder, and refuse to list it, to root too."""
    folder.mkdir()
    scandir = os.scandir

    def refusing(path):
        if Path(path) == folder:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", refusing)


def test_a_folder_nested_and_of_any_format(folder):
    images = loaded(folder)
    assert images.shape == (7, 3, 8, 8)
    assert images.dtype == np.uint8
    greys = sorted(image.mean() for image in images)
    assert greys == pytest.approx([10, 20, 30, 40, 50, 60, 70], abs=2)


@pytest.mark.parametrize("damaged", [False, True])
def test_a_folder_is_decoded_once(damaged, folder, monkeypatch):
    if damaged:
        damage(folder)
    first = np.array(loaded(folder))
    monkeypatch.setattr(image_cache, "to_square", None)
    again = loaded(folder)
    assert np.array_equal(again, first)
    assert isinstance(again, np.memmap)  # it may be larger than memory


def test_a_folder_that_changed_is_decoded_anew(folder):
    assert len(loaded(folder)) == 7
    Image.new("RGB", (20, 20)).save(folder / "new.png")
    assert len(loaded(folder)) == 8
    (folder / "x.png").unlink()
    assert len(loaded(folder)) == 7
    Image.new("RGB", (20, 20), "white").save(folder / "new.png")
    assert loaded(folder).max() == 255


@pytest.mark.parametrize("ending", ["bmp", "ppm", "tiff"])  # of one size, whatever they show
def test_a_picture_that_is_replaced_within_its_time_and_size_is_seen(ending, tmp_path, capfd):
    folder = coloured_pictures(tmp_path / "pictures")
    path, then = folder / f"x.{ending}", 10**9
    for number, colour in enumerate(("white", "black")):
        other = tmp_path / path.name
        Image.new("RGB", (8, 8), colour).save(other)
        os.utime(other, (then, then))
        shutil.move(other, path)
        assert loaded(folder)[10].max() == (255, 0)[number]
        assert ("can be deleted" in capfd.readouterr().err) == (number == 1)
    loaded(folder, size=4)
    assert capfd.readouterr().err.count("warning") == 0  # of another size


def test_two_pictures_that_change_places_are_seen(tmp_path):
    folder = coloured_pictures(tmp_path / "pictures")
    for path in folder.iterdir():
        os.utime(path, (10**9, 10**9))
    first = np.array(loaded(folder))
    for old, new in (("000", "x"), ("001", "000"), ("x", "001")):
        (folder / f"{old}.png").rename(folder / f"{new}.png")
    assert np.array_equal(loaded(folder)[:2], first[1::-1])


def test_each_size_and_number_of_channels_has_a_cache_of_its_own(folder):
    for size, channels in ((8, 3), (8, 1), (16, 3), (8, 3)):
        images = loaded(folder, size, channels)
        assert images.shape == (7, channels, size, size)
    assert len(list((folder.parent / "data").iterdir())) == 3


@pytest.mark.parametrize("lost", [1, 100, 8 * 8 * 3, 10**6])
def test_a_truncated_cache_is_made_anew(lost, folder):
    first = np.array(loaded(folder))
    (cache,) = (folder.parent / "data").glob("pictures-*.images")
    whole = cache.read_bytes()
    cache.write_bytes(whole[:-lost])
    assert np.array_equal(loaded(folder), first)
    assert list(cache.parent.iterdir()) == [cache]
    assert cache.read_bytes() == whole


def test_left_overs_of_a_killed_process_are_removed_once_they_are_old(folder):
    loaded(folder)
    (cache,) = (folder.parent / "data").iterdir()
    old = cache.with_name(f"{cache.name}.01234567.tmp")
    young = cache.with_name(f"{cache.name}.89abcdef.tmp")
    of_others = cache.with_name("old.tmp")
    for path, age in ((old, 7200), (young, 60), (of_others, 7200)):
        path.write_bytes(b"half")
        then = time.time() - age
        os.utime(path, (then, then))
    cache.unlink()
    loaded(folder)
    assert not old.exists()
    assert young.exists()
    assert of_others.exists()


def test_a_few_damaged_images_are_skipped_and_named(folder, capfd):
    damage(folder)
    images = loaded(folder)
    assert sorted(image.mean() for image in images) == pytest.approx(range(10, 80, 10), abs=2)
    errors = capfd.readouterr().err
    assert "broken.png (not an image)" in errors
    assert "half.jpg" in errors
    loaded(folder)  # from the cache, where they are missing too
    assert "2 of 9 images" in capfd.readouterr().err


def test_what_is_hidden_is_no_image(folder):
    for name in (".ipynb_checkpoints/x-checkpoint.png", "__MACOSX/a/x.png", "a/._y.jpg",
                 ".x.png", "a/.git/b/x.png", "@eaDir/x.png", "$RECYCLE.BIN/x.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "x.png", folder / name)
    assert len(loaded(folder)) == 7
    assert len(loaded(folder.rename(folder.parent / ".hidden"))) == 7


def test_pictures_of_other_kinds_are_left_out_with_a_word(folder, capfd):
    for name in ("a.heic", "b.AVIF", "c.jpe"):
        (folder / name).write_bytes(b"")
    assert len(loaded(folder)) == 7
    assert f"3 images in {folder}, such as {folder}/a.heic, are left" in capfd.readouterr().err


def test_of_several_pages_the_first_counts_with_a_word(folder, capfd):
    pages = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    pages[0].save(folder / "pages.tiff", save_all=True, append_images=pages[1:])
    assert any(image[:, 0, 0].tolist() == [255, 0, 0] for image in loaded(folder))
    assert f"1 images, such as {folder}/pages.tiff, have several" in capfd.readouterr().err


@pytest.mark.parametrize(("low", "high", "levels"), [
    (0, 4095, 17),  # a camera of 12 bits
    (31768, 33768, 8),  # +-1000 around 32768
    (500, 500, 1),
    (0, 65535, None),
    (0, 10_000, None),
])
def test_16_bits_of_which_few_levels_are_left_are_warned_of(low, high, levels, tmp_path, capfd):
    folder = coloured_pictures(tmp_path / "pictures")  # of 8 bits
    Image.fromarray(np.full((8, 8), low, np.uint16)).save(folder / "low.png")
    Image.fromarray(np.full((8, 8), high, np.uint16)).save(folder / "high.png")
    for _ in range(2):  # from the cache too
        loaded(folder)
        said = capfd.readouterr().err
        assert ("warning" in said) == (levels is not None)
        if levels:
            words = f"the values from {low} to {high} of 0 to 65535, of which {levels} of 256"
            assert words in said


def test_no_more_is_decoded_ahead_than_fits_into_memory(tmp_path, monkeypatch):
    folder = coloured_pictures(tmp_path / "pictures", count=50)
    decoded, ahead = [], []

    def noted(*arguments):
        decoded.append(arguments)
        return to_square(*arguments)

    def slow(pixels, *arguments, **options):
        for number, one in enumerate(pixels):
            time.sleep(0.01)
            ahead.append(len(decoded) - number)
            yield one

    monkeypatch.setattr(image_cache, "to_square", noted)
    monkeypatch.setattr(image_cache, "progress_bar", slow)
    monkeypatch.setattr(image_cache, "AT_A_TIME", 8)
    assert len(loaded(folder)) == 50
    assert max(ahead) <= 8


def test_folders_of_the_system_need_not_be_readable(folder, monkeypatch):
    forbid(folder / "lost+found", monkeypatch)
    assert len(loaded(folder)) == 7


def test_what_is_said_of_a_picture_may_be_damaged(folder, capfd):
    picture = Image.new("RGB", (8, 8), "red")
    picture.save(folder / "exif.webp", exif=b"nonsense", lossless=True)
    file = io.BytesIO()
    picture.save(file, "TIFF")
    tags = struct.unpack("<I", file.getvalue()[4:8])[0]
    next_page = tags + 2 + 12 * struct.unpack("<H", file.getvalue()[tags:tags + 2])[0]
    content = bytearray(file.getvalue())
    content[next_page:next_page + 4] = struct.pack("<I", 5)
    (folder / "page.tiff").write_bytes(content)
    assert len(loaded(folder)) == 9
    assert "warning" not in capfd.readouterr().err


def test_an_image_that_cannot_be_read_today_is_not_left_out_for_ever(folder, monkeypatch):
    read_bytes = Path.read_bytes

    def broken(path: Path) -> bytes:
        if path.name == "y.JPG":
            raise OSError(5, "Input/output error", str(path))
        return read_bytes(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", broken)
        with pytest.raises(OSError, match="y.JPG"):
            loaded(folder)
    assert len(loaded(folder)) == 7


def test_linked_folders_belong_to_it_and_a_loop_of_links_ends(folder, tmp_path):
    coloured_pictures(tmp_path / "more", count=3)
    (folder / "linked").symlink_to(tmp_path / "more")
    (folder / "a" / "again").symlink_to(folder)
    assert len(loaded(folder)) == 10


@pytest.mark.parametrize(("name", "word"), [("empty", "no image"), ("bad", "bad.png")])
def test_a_folder_without_images_is_refused(name, word, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/bad.png").write_bytes(b"junk")
    with pytest.raises(UserError, match=word) as error:
        loaded(tmp_path / name)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("data/*"))


def test_a_sub_folder_that_cannot_be_read_is_not_left_out_without_a_word(folder, monkeypatch):
    forbid(folder / "locked", monkeypatch)
    with pytest.raises(PermissionError, match="locked"):
        loaded(folder)


# Where no image may be resized

def test_a_folder_of_one_size_passes_the_check_of_sizes(tmp_path):
    folder = coloured_pictures(tmp_path / "pictures")
    refuse_other_sizes(folder, 8)
    assert loaded(folder)[3][:, 0, 0].tolist() == [72, 100, 200]


@pytest.mark.parametrize(("make", "told"), [
    (lambda path: Image.new("RGB", (9, 8)).save(path), "is 9 x 8, not 8 x 8"),
    (lambda path: Image.new("RGB", (8, 9)).save(path), "is 8 x 9, not 8 x 8"),
    (lambda path: path.write_bytes(b"junk"), "cannot be read as an image"),
])
def test_an_image_of_another_size_or_of_none_is_refused(make, told, tmp_path):
    folder = coloured_pictures(tmp_path / "pictures")
    make(folder / "other.png")
    with pytest.raises(UserError, match=f"other.png {told}"):
        refuse_other_sizes(folder, 8)


# Every kind of picture

def saved(image: Image.Image, **options) -> np.ndarray:
    """Save the picture, open it again and bring it to 8 x 8."""
    file = io.BytesIO()
    image.save(file, **options)
    return to_square(Image.open(file), 8, 3)


RAMP = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


@pytest.mark.parametrize(("pixels", "format"), [
    (RAMP, "PNG"),
    (RAMP.astype(np.uint16) * 257, "PNG"),  # Pillow would clip it to white
    (RAMP.astype(np.uint16) * 257, "TIFF"),
    (RAMP.astype(np.int32) * 257, "TIFF"),
])
def test_grey_of_8_16_and_32_bits(pixels, format):
    assert np.array_equal(saved(Image.fromarray(pixels), format=format), np.stack([RAMP] * 3))


@pytest.mark.parametrize("value", [255, 256, 1000, 65535])
@pytest.mark.parametrize("most", [1000, 4095, 65535])
def test_the_depth_is_that_of_the_format_whatever_the_pixels(value, most):
    value = min(value, most)
    dark = np.full((8, 8), value, ">u2")
    pgm = f"P5 8 8 {most}\n".encode() + dark.tobytes()
    image = to_square(Image.open(io.BytesIO(pgm)), 8, 1)
    assert np.unique(image).tolist() == [round(255 * value / most)]


def test_a_tiff_says_how_many_bits_it_has_and_whether_white_is_zero():
    value, twelve_bits = 1000, b"\xff\xff\xff" * 32  # two pixels in three bytes
    signed = {258: 16, 339: 2}
    for tags, expected in (({258: 16}, 4), ({258: 16, 262: 0}, 251), ({258: 12}, 255), (signed, 8)):
        pixels = twelve_bits if tags[258] == 12 else np.full((8, 8), value, "<u2").tobytes()
        image = Image.open(io.BytesIO(tiff(pixels, {262: 1, **tags})))
        assert np.unique(to_square(image, 8, 1)).tolist() == [expected]


def tiff(pixels: bytes, tags: dict[int, int]) -> bytes:
    """The file of one grey picture of 8 x 8, uncompressed."""
    tags = {256: 8, 257: 8, 259: 1, 273: 8, 277: 1, 278: 8, 279: len(pixels), **tags}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, tags[tag]) for tag in sorted(tags))
    start = struct.pack("<2sHI", b"II", 42, 8 + len(pixels))
    return start + pixels + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize(("pixels", "said"), [
    (RAMP.astype(np.int32) * 1000, "16 bits"), (RAMP.astype(np.int32) - 1, "negative"),
    (RAMP.astype(np.float32), "floating-point")])
def test_grey_of_no_known_range_is_refused(pixels, said):
    with pytest.raises(ValueError, match=said):
        saved(Image.fromarray(pixels), format="TIFF")


PALETTE = Image.new("P", (8, 8), 1)
PALETTE.putpalette([0, 0, 0, 10, 200, 30])
GREY = Image.fromarray(np.full((8, 8), 1000, np.uint16))
ANIMATION = {"save_all": True, "append_images": [Image.new("RGB", (8, 8), "blue")]}


@pytest.mark.parametrize(("image", "options", "expected"), [
    (PALETTE, {"format": "PNG"}, [10, 200, 30]),
    (Image.new("RGBA", (8, 8), (0, 0, 0, 0)), {"format": "PNG"}, [255, 255, 255]),
    (Image.new("RGBA", (8, 8), (9, 8, 7, 255)), {"format": "PNG"}, [9, 8, 7]),
    (GREY, {"format": "PNG", "transparency": 1000}, [255, 255, 255]),
    (GREY, {"format": "PNG", "transparency": 2000}, [4, 4, 4]),
    (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), {"format": "TIFF"}, [255, 0, 0]),
    (Image.new("RGB", (8, 8), "red"), {"format": "GIF", **ANIMATION}, [255, 0, 0]),
])
def test_any_kind_of_colour_on_white(image, options, expected):
    assert saved(image, **options)[:, 0, 0].tolist() == expected


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


# One picture

def test_a_picture_of_another_size_is_resized_and_that_is_said(tmp_path, capsys):
    path = tmp_path / "a.png"
    Image.new("RGB", (30, 20), (10, 20, 250)).save(path)
    pixels = read_picture(path, 8, 3)
    assert pixels.shape == (3, 8, 8)
    assert pixels[:, 4, 4].tolist() == [10, 20, 250]
    assert capsys.readouterr().out == f"{path}: 30 x 20, resized to 8 x 8\n"


def test_a_picture_of_the_right_size_is_read_as_it_is(tmp_path, capsys):
    path = tmp_path / "a.png"
    Image.fromarray(RAMP).save(path)
    assert np.array_equal(read_picture(path, 8, 1), RAMP[None])
    assert capsys.readouterr().out == ""


def test_a_picture_that_cannot_be_read(tmp_path):
    (tmp_path / "junk.png").write_bytes(b"junk")
    for name in ("junk.png", "missing.png"):
        with pytest.raises(UserError, match=f"{name} cannot be read as an image"):
            read_picture(tmp_path / name, 8, 3)
