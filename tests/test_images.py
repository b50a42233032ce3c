"""Between bytes and [-1, 1], and pictures of awkward numbers of images."""

import imageio.v3 as imageio
import numpy as np
import pytest
import videos

from ddpm_jax.files import disk, images


def test_range():
    x = images.to_float(np.array([0, 255, 51], np.uint8))
    np.testing.assert_allclose(x, [-1, 1, -0.6], atol=1e-7)
    assert x.dtype == np.float32


def test_all_256_levels_survive():
    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(images.to_uint8(images.to_float(levels)), levels)


def test_out_of_range_is_clipped_and_halves_round():
    x = np.array([-7.0, 3.0, -1 + 0.9 / 127.5, -1 + 0.4 / 127.5], np.float32)
    np.testing.assert_array_equal(images.to_uint8(x), [0, 255, 1, 0])


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("count", [1, 7, 65])
def test_grid_and_png(tmp_path, count, channels):
    x = np.random.default_rng(0).integers(0, 255, (count, 8, 16, channels), np.uint8)
    picture = images.grid(x, columns=8)
    # Enlarged 4 times; 4 pixels of white around each.
    columns, rows = min(8, count), -(-count // 8)
    assert picture.shape == (rows * 36 + 4, columns * 68 + 4, channels)
    path = tmp_path / "a" / "grid.png"
    images.write_png(path, picture)
    back = imageio.imread(path).reshape(picture.shape)
    np.testing.assert_array_equal(back, picture)
    for i in range(count):
        y, left = 4 + i // 8 * 36, 4 + i % 8 * 68
        np.testing.assert_array_equal(back[y : y + 32 : 4, left : left + 64 : 4], x[i])


def test_large_images_keep_their_size():
    assert images.grid(np.zeros((4, 256, 256, 3), np.uint8)).shape == (2 * 257 + 1, 2 * 257 + 1, 3)


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), disk.atomic_write(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"


def test_two_writers_at_the_same_time(tmp_path):
    """The last one wins, whole."""
    path = tmp_path / "file"
    with disk.atomic_write(path) as one:
        one.write_text("one")
        with disk.atomic_write(path) as two:
            two.write_text("two")
        assert path.read_text() == "two"
    assert path.read_text() == "one" and [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("count", [1, 7, 65])
def test_strips(count, channels):
    """A row for each image, a column for each frame; above them their titles, in black on white."""
    frames = np.zeros((3, count, 8, 16, channels), np.uint8)
    frames += np.arange(3, dtype=np.uint8).reshape(3, 1, 1, 1, 1)
    picture = images.strips(frames, ["t = 2", "t = 1", "t = 0"])
    assert picture.shape == (18 + count * 36 + 4, 3 * 68 + 4, channels)
    for column in range(3):
        assert (picture[22:54, column * 68 + 4 : column * 68 + 68] == column).all()
        title = picture[:18, column * 68 : (column + 1) * 68]
        assert title[..., 0].min() < 100 and title[..., 0].max() == 255
    assert channels < 4 or (picture[:18, :, 3] == 255).all()
    np.testing.assert_array_equal(images.strips(frames), picture[18:])


@pytest.mark.parametrize("suffix", ["gif", "mp4"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_animation(tmp_path, suffix, channels):
    """Odd sizes; every picture, and the last one for two seconds. Transparency is on white."""
    pictures = [np.full((33, 47, channels), 50 * i, np.uint8) for i in range(5)]
    path = tmp_path / f"x.{suffix}"
    images.write_animation(path, iter(pictures), seconds=0.1)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    if suffix == "mp4":
        frames = videos.read(path, 34, 48)
        assert len(frames) == 25
    else:  # equal frames may be stored as one that is shown longer
        frames = imageio.imread(path, index=None)
        assert frames.shape[1:] == (34, 48, 3)
    alpha = 200 / 255
    last = 200 if channels < 4 else 200 * alpha + 255 * (1 - alpha)
    np.testing.assert_allclose(frames[-1, :33, :47].astype(int), last, atol=6)


def test_a_failed_animation_leaves_nothing(tmp_path):
    def pictures():
        yield np.zeros((8, 8, 1), np.uint8)
        raise ZeroDivisionError

    for suffix in ("gif", "mp4"):
        with pytest.raises(ZeroDivisionError):
            images.write_animation(tmp_path / f"x.{suffix}", pictures())
    assert not list(tmp_path.iterdir())
