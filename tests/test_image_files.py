"""One decoder for data, edited images and masks; and which files of a folder are images."""

import os
import struct

import numpy as np
import pytest
from PIL import Image

from ddpm_jax import configs
from ddpm_jax.files import data, image_files
from ddpm_jax.runs import edit

# A picture no two of whose quarters, rows or columns are alike: JPEG keeps its blocks.
UPRIGHT = np.kron(np.array([[0, 80, 160], [240, 40, 120]]), np.ones((16, 16))).astype(np.uint8)
# How a camera stores it, from what EXIF 2.3 says of tag 0x0112: where on the picture the row 0 and
# the column 0 of the file are.
STORED = {
    1: lambda x: x,  # top, left
    2: lambda x: x[:, ::-1],  # top, right
    3: lambda x: x[::-1, ::-1],  # bottom, right
    4: lambda x: x[::-1],  # bottom, left
    5: lambda x: x.T,  # left, top
    6: lambda x: x[:, ::-1].T,  # right, top
    7: lambda x: x[::-1, ::-1].T,  # right, bottom
    8: lambda x: x[::-1].T,  # left, bottom
}


def save_rotated(path, orientation, pixels=UPRIGHT):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if path.suffix == ".webp" else {}
    Image.fromarray(np.ascontiguousarray(STORED[orientation](pixels))).save(
        path, exif=exif, **options
    )


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_every_orientation_of_exif(tmp_path, orientation, suffix):
    path = tmp_path / f"x.{suffix}"
    save_rotated(path, orientation)
    found = np.asarray(image_files.decode(path, 1))
    assert found.shape == UPRIGHT.shape
    assert np.abs(found - UPRIGHT.astype(int)).max() <= (3 if suffix == "jpg" else 0)


def test_all_readers_decode_alike(tmp_path):
    """A square image that is stored sideways: to train on, to edit, and as a mask."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    (tmp_path / "x").mkdir()
    save_rotated(tmp_path / "x" / "a.png", 6, pixels)
    config = configs.named_config("digits")
    with config.unlocked():
        config.data.update(name="folder", path=str(tmp_path / "x"), split="train")
    trained_on = data.open_source(config.data).read(np.arange(1)).images
    np.testing.assert_array_equal(trained_on[0, ..., 0], pixels)
    np.testing.assert_array_equal(edit.read_images(config, [tmp_path / "x"]), trained_on)
    known = edit.read_mask(config, str(tmp_path / "x" / "a.png"), 1)
    np.testing.assert_array_equal(known[0, ..., 0], pixels < 128)


def kinds():
    """(name, image, options of its file, levels of gray, RGBA of the second pixel).

    Each image is of two pixels: opaque of level 51, and one that differs.
    """
    sixteen = Image.fromarray(np.array([[51 * 257, 65535]], np.uint16))
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([51, 51, 51, 255, 0, 0])
    cmyk = Image.new("CMYK", (2, 1), (0, 0, 0, 204))  # K of 0.8 leaves 0.2 of 255
    cmyk.putpixel((1, 0), (0, 255, 255, 0))  # magenta and yellow absorb green and blue
    clear = (255, 0, 0, 0)  # red below an alpha of 0
    rgba = Image.new("RGBA", (2, 1), (51, 51, 51, 255))
    rgba.putpixel((1, 0), clear)
    la = Image.new("LA", (2, 1), (51, 255))
    la.putpixel((1, 0), (7, 0))
    half = Image.new("LA", (2, 1), (51, 255))
    half.putpixel((1, 0), (55, 128))  # 55 · 128/255 + 255 · 127/255 = 154.6
    gray = Image.fromarray(np.array([[51, 200]], np.uint8))
    red, white = (76, (255, 0, 0, 255)), (255, (255, 255, 255, 255))  # 0.299 · 255 = 76.2
    yield "bits.png", Image.fromarray(np.array([[False, True]])), {}, 0, *white
    yield "gray.png", gray, {}, 51, 200, (200, 200, 200, 255)
    yield "gray.tga", gray, {}, 51, 200, (200, 200, 200, 255)
    yield "gray.pgm", gray, {}, 51, 200, (200, 200, 200, 255)
    yield "sixteen.png", sixteen, {}, 51, *white
    yield "sixteen.tif", sixteen, {}, 51, *white
    yield "sixteen.pgm", sixteen, {}, 51, *white
    yield "sixteen.jp2", sixteen, {}, 51, *white
    yield "sixteen_clear.png", sixteen, {"transparency": 65535}, 51, 255, (255, 255, 255, 0)
    yield "palette.png", palette, {}, 51, *red
    yield "palette_clear.png", palette, {"transparency": 1}, 51, 255, clear
    yield "palette_clear.gif", palette, {"transparency": 1}, 51, 255, clear
    yield "key.png", gray, {"transparency": 200}, 51, 255, (200, 200, 200, 0)
    yield "la.png", la, {}, 51, 255, (7, 7, 7, 0)
    yield "half.png", half, {}, 51, 155, (55, 55, 55, 128)
    yield "rgba.png", rgba, {}, 51, 255, clear
    yield "rgba.tif", rgba, {}, 51, 255, clear
    yield "rgba.webp", rgba, {"lossless": True, "exact": True}, 51, 255, clear
    yield "rgb.bmp", rgba.convert("RGB"), {}, 51, *red
    yield "cmyk.tif", cmyk, {}, 51, *red
    lab = Image.new("LAB", (2, 1), (54, 128, 128))  # L* = 21 of 100: 51 in sRGB
    lab.putpixel((1, 0), (255, 128, 128))
    yield "lab.tif", lab, {}, 51, *white
    yield "animated.gif", gray, {"save_all": True, "append_images": [la.convert("L")]}, 51, 200, ...
    yield "animated.png", gray, {"save_all": True, "append_images": [la.convert("L")]}, 51, 200, ...


@pytest.mark.parametrize(
    "name, image, options, first, second, rgba",
    list(kinds()),
    ids=lambda v: v if type(v) is str else "",
)
def test_every_kind_of_pixel(tmp_path, name, image, options, first, second, rgba):
    path = tmp_path / name
    image.save(path, **options)
    gray = np.asarray(image_files.decode(path, 1))
    np.testing.assert_allclose(gray[0], [first, second], atol=1)
    if rgba is not ...:
        alpha = np.array(rgba) / 255
        on_white = 255 * (alpha[:3] * alpha[3] + 1 - alpha[3])
        rgb = np.asarray(image_files.decode(path, 3))[0, 1]
        np.testing.assert_allclose(rgb, on_white, atol=1)
        found = np.asarray(image_files.decode(path, 4))[0, 1]
        np.testing.assert_allclose(found, rgba, atol=1)  # LAB, by way of a colour profile


def test_a_jpeg_in_the_colours_of_print(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "x.jpg")
    rgb = np.asarray(image_files.decode(tmp_path / "x.jpg", 3))
    np.testing.assert_allclose(rgb, np.broadcast_to([255, 0, 0], (8, 8, 3)), atol=4)


def test_a_check_says_why_a_file_cannot_be_read(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)
    Image.fromarray(noise).save(tmp_path / "short.png")
    whole = (tmp_path / "short.png").read_bytes()
    (tmp_path / "short.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no image")
    Image.fromarray(noise.astype(np.float32)).save(tmp_path / "float.tif")
    (tmp_path / "nowhere.png").symlink_to("gone")
    # A texture whose pixels are in a format that Pillow does not know.
    numbers = (124, 0x1007, 8, 8, 0, 0, 0, *[0] * 11, 32, 4, 0x58585858, *[0] * 10)
    (tmp_path / "texture.dds").write_bytes(struct.pack("<4s31I", b"DDS ", *numbers) + bytes(64))
    for name, error in (
        ("short.png", "truncated"),
        ("text.png", "not an image"),
        ("float.tif", "no known range"),
        ("nowhere.png", "No such file"),
        ("texture.dds", "Unimplemented pixel format"),
    ):
        assert error in image_files.check(tmp_path / name, 1).error


def test_large_images_are_refused_before_decoding(tmp_path, monkeypatch):
    """Pillow's own limit, which other code of the program may rely on, stays as it is."""
    Image.new("L", (5, 4)).save(tmp_path / "x.png")
    monkeypatch.setattr(image_files, "MAX_PIXELS", 20)
    assert image_files.check(tmp_path / "x.png", 1).error == ""
    monkeypatch.setattr(image_files, "MAX_PIXELS", 19)
    assert image_files.check(tmp_path / "x.png", 1).error == "it has more than 19 pixels"
    assert Image.MAX_IMAGE_PIXELS == 2**30 // 12  # Pillow's default


def test_find_follows_links_and_counts_what_it_leaves_out(tmp_path):
    """Links to folders, one of them around it; hidden ones; and files of other kinds."""
    top, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    for folder in ("dog", ".ipynb_checkpoints", "__MACOSX"):
        (top / folder).mkdir(parents=True)
    elsewhere.mkdir()
    names = ("dog/a.png", ".ipynb_checkpoints/a.png", "__MACOSX/a.png", "dog/.hidden.png")
    names += ("dog/notes.txt", "dog/labels.txt", "dog/README")
    others = ("b.PNG", "c.jfif", "d.jpe", "e.ppm", "f.pgm", "g.jp2", "h.avif", "i.tga", "j.webp")
    for path in [top / name for name in names] + [elsewhere / name for name in others]:
        path.touch()
    (top / "cat").symlink_to(elsewhere)
    (top / "dog" / "around").symlink_to(top)
    os.mkfifo(top / "pipe.png")
    (top / "nowhere.png").symlink_to("gone")
    found = image_files.find(top)
    expected = [f"cat/{name}" for name in others] + ["dog/a.png", "nowhere.png"]
    assert [str(path.relative_to(top)) for path in found.images] == expected
    for kind in ("3 hidden", "2 .txt", "1 without a suffix", "1 link to a parent folder", "1 .png"):
        assert kind in found.others
    assert image_files.find(elsewhere).others == ""


@pytest.mark.parametrize(
    "checks, channels, expected",
    [
        ([(False, 0, 255)], 3, []),
        ([(False, 100, 120), (False, 0, 31)], 1, []),  # 0 to 120 of all
        ([(False, 0, 15), (False, 0, 12)], 1, ["levels 0 to 15 of 255"]),
        ([(True, 0, 255), (False, 0, 255), (True, 0, 255)], 3, ["white, in 2 images"]),
        ([(True, 0, 255)], 4, []),
    ],
)
def test_warnings(checks, channels, expected):
    checks = [image_files.Check("", *check) for check in checks]
    found = list(image_files.warnings_of(checks, "", channels))
    assert len(found) == len(expected)
    assert all(text in remark for text, remark in zip(expected, found, strict=True))


def test_twelve_bits_in_files_of_sixteen_are_noticed(tmp_path):
    """And a transparent pixel among opaque ones."""
    Image.fromarray(np.array([[0, 4095]], np.uint16)).save(tmp_path / "x.png")
    assert image_files.check(tmp_path / "x.png", 1) == ("", False, 0, 15)
    for alpha in (255, 254):
        Image.new("RGBA", (2, 2), (0, 0, 0, alpha)).save(tmp_path / "y.png")
        assert image_files.check(tmp_path / "y.png", 3).transparent == (alpha < 255)
