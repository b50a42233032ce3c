"""Reads a video without imageio's reader, which leaves pipes open."""

import subprocess

import imageio_ffmpeg
import numpy as np


def read(path, height, width):
    """uint8 [frames, height, width, 3]."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path)]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    out = subprocess.run(command, capture_output=True, check=True)
    assert not out.stderr
    return np.frombuffer(out.stdout, np.uint8).reshape(-1, height, width, 3)
