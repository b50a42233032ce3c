"""Images between disk and the model: uint8 ↔ [-1, 1], and pictures of many of them."""

import imageio.v3 as imageio
import jax.numpy as jnp
import numpy as np

from ddpm_jax.workdir import atomic_write


def to_float(images):
    """uint8 [0, 255] to float32 [-1, 1] (Ho et al., Sec. 3.3): x / 127.5 - 1."""
    return images.astype(jnp.float32) / 127.5 - 1


def to_uint8(x):
    """[-1, 1] to the nearest of the 256 levels, uint8; what lies outside is clipped."""
    return jnp.round(jnp.clip((x + 1) * 127.5, 0, 255)).astype(jnp.uint8)


def grid(images, columns=None):
    """Lays images out in rows, with white lines between them.

    Small images are enlarged by a whole factor (nearest neighbour) so that one can look at them.

    Args:
      images: uint8 [N, H, W, C], C = 1, 3 or 4.
      columns: images a row; by default about as many as rows.

    Returns:
      uint8 [height, width, C].
    """
    count, height, width, channels = images.shape
    columns = min(columns or int(np.ceil(np.sqrt(count))), count)
    rows = -(-count // columns)
    scale = max(1, 64 // max(height, width))
    line = max(1, scale)
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


def strips(frames):
    """A row for each image, from its first frame to its last.

    Args:
      frames: uint8 [K, N, H, W, C].

    Returns:
      uint8 [height, width, C].
    """
    rows = np.swapaxes(frames, 0, 1)
    return grid(rows.reshape(-1, *rows.shape[2:]), columns=len(frames))


def write_png(path, image):
    """Writes uint8 [H, W, C] to path, whole or not at all."""
    image = image[..., 0] if image.shape[-1] == 1 else image
    with atomic_write(path) as temporary:
        imageio.imwrite(temporary, image, extension=".png")
