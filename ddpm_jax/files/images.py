"""Image arrays: uint8 ↔ [-1, 1], grids and strips of images, PNG files, animations."""

import contextlib
import itertools
import os

import imageio.v3 as imageio
import imageio_ffmpeg
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ddpm_jax.files.disk import atomic_write

# Without this, ffmpeg is started by a fork, for which JAX warns.
os.environ.setdefault("IMAGEIO_FFMPEG_NO_PREVENT_SIGINT", "1")


def to_float(images):
    """uint8 [0, 255] to float32 [-1, 1] (Ho et al., Sec. 3.3): x / 127.5 - 1."""
    return images.astype(jnp.float32) / 127.5 - 1


def to_uint8(x):
    """[-1, 1] to the nearest of the 256 levels, uint8; other values are clipped."""
    return jnp.round(jnp.clip((x + 1) * 127.5, 0, 255)).astype(jnp.uint8)


def grid(images, columns=None, smallest=64):
    """Arranges images in rows, with white lines between them.

    Small images are enlarged by a whole factor (nearest neighbour) to make them visible.

    Args:
      images: uint8 [N, H, W, C], C = 1, 3 or 4.
      columns: images per row; by default about the number of rows.
      smallest: size in pixels up to which images are enlarged.

    Returns:
      uint8 [height, width, C].
    """
    count, height, width, channels = images.shape
    columns = min(columns or int(np.ceil(np.sqrt(count))), count)
    rows = -(-count // columns)
    scale = max(1, smallest // max(height, width))
    line = max(1, scale * smallest // 64)
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    canvas = np.full(
        (rows * (height * scale + line) + line, columns * (width * scale + line) + line, channels),
        255,
        np.uint8,
    )
    for i, image in enumerate(images):
        y = line + i // columns * (height * scale + line)
        x = line + i % columns * (width * scale + line)
        canvas[y : y + height * scale, x : x + width * scale] = image
    return canvas


def strips(frames, titles=()):
    """A row for each image, from its first frame to its last.

    Args:
      frames: uint8 [K, N, H, W, C].
      titles: K short texts, written above the columns.

    Returns:
      uint8 [height, width, C].
    """
    rows = np.swapaxes(frames, 0, 1)
    picture = grid(rows.reshape(-1, *rows.shape[2:]), columns=len(frames))
    if not titles:
        return picture
    height, width, channels = 18, *picture.shape[1:]
    header = Image.new("L", (width, height), 255)
    draw, font = ImageDraw.Draw(header), ImageFont.load_default(12)
    for i, title in enumerate(titles):
        draw.text(((i + 0.5) * width / len(titles), 3), title, 0, font, anchor="ma")
    header = np.asarray(header)[..., None].repeat(channels, axis=-1)
    if channels == 4:
        header[..., 3] = 255
    return np.concatenate([header, picture])


def to_rgb(picture):
    """uint8 [H, W, C] to [H, W, 3]: gray is repeated, transparent pixels are blended with white."""
    if picture.shape[-1] == 4:
        alpha = picture[..., 3:] / np.float32(255)
        return (picture[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)
    return np.broadcast_to(picture, (*picture.shape[:2], 3))


def write_animation(path, pictures, seconds=0.05):
    """Writes pictures as a .gif or .mp4, which shows the last picture for two seconds.

    Args:
      path: its suffix decides the format.
      pictures: iterable of uint8 [H, W, C], all of the same size.
      seconds: duration of each picture.
    """
    write = {".gif": _write_gif, ".mp4": _write_mp4}[path.suffix]
    with atomic_write(path) as temporary:
        write(temporary, map(_to_even_rgb, pictures), seconds)


def _to_even_rgb(picture):
    """Converts a picture to three channels and even height and width, as videos need."""
    height, width, _ = picture.shape
    even = ((0, height % 2), (0, width % 2), (0, 0))
    return np.pad(to_rgb(picture), even, constant_values=255)


def _write_gif(path, pictures, seconds):
    def frames():
        for picture in pictures:
            frame = Image.fromarray(picture)
            frame.info["duration"] = 1000 * seconds
            yield frame
        frame = frame.copy()
        frame.info["duration"] = 2000
        yield frame

    rest = frames()
    next(rest).save(path, "GIF", save_all=True, append_images=rest, loop=0)


def _write_mp4(path, pictures, seconds):
    first = next(pictures)
    options = {"fps": 1 / seconds, "macro_block_size": 2, "output_params": ["-f", "mp4"]}
    video = imageio_ffmpeg.write_frames(str(path), first.shape[1::-1], **options)
    with contextlib.closing(video):
        video.send(None)  # starts ffmpeg
        for last in itertools.chain([first], pictures):
            video.send(last.tobytes())
        for _ in range(round(2 / seconds)):
            video.send(last.tobytes())
    if not path.exists() or path.stat().st_size == 0:
        raise RuntimeError("ffmpeg wrote nothing")


def write_figure(path, figure):
    """Writes a figure of matplotlib as PNG, whole or not at all."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def write_png(path, image):
    """Writes uint8 [H, W, C] to path, whole or not at all."""
    image = image[..., 0] if image.shape[-1] == 1 else image
    with atomic_write(path) as temporary:
        imageio.imwrite(temporary, image, extension=".png")
