"""From images to images: interpolation, inpainting, image-to-image, and to noise and back.

Each is a task of generate.make_sampler: where the reverse process starts, what a step is, and which
steps are taken. Images and masks come from files of exactly the model's size.
"""

import contextlib
import hashlib
import logging
import lzma
import math
import os
import pathlib
import struct
import tokenize
import warnings
import zipfile
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import configs
from ddpm_jax.core import diffusion, sampling
from ddpm_jax.errors import UserError, one_line, printable
from ddpm_jax.files import image_files, images
from ddpm_jax.files import workdir as run_files
from ddpm_jax.runs import generate

log = logging.getLogger(__name__)

WEIGHTS = np.linspace(0, 1, 11)  # λ of the paper's figure 8, and both ends
MOST_BYTES = 2**31  # of the images of an .npz file
# What reading an array from an archive raises that is damaged, or of another kind.
ARCHIVE_ERRORS = (
    ArithmeticError,
    EOFError,
    KeyError,
    OSError,
    RuntimeError,
    TypeError,
    UserWarning,
    ValueError,
    lzma.LZMAError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)


def start_index(config, chain):
    """A chain's step for `sample.t`: the noisiest that is not above it."""
    t = config.sample.t if config.sample.t >= 0 else config.diffusion.num_timesteps // 2
    return int(np.searchsorted(chain.timesteps, t, side="right")) - 1


def start_t(config):
    """The network's step at which that is."""
    chain = generate.make_chain(config)
    return int(chain.timesteps[start_index(config, chain)])


def noised(chain, t, image, keys, number):
    """x_t ~ q(x_t | image) for uint8 images, with the noise of this number of their keys."""
    x0 = images.to_float(image)
    eps = sampling.noise(keys, number, x0.shape[1:])
    return diffusion.q_sample(chain.schedule, x0, jnp.full(len(x0), t), eps)


def img2img_task(config, chain):
    """Denoises x_t ~ q(x_t | image); inputs are {"image": uint8 [B, H, W, C]}."""
    first = start_index(config, chain)
    _, step_of, _ = generate.from_noise(config, chain)

    def start(keys, inputs):
        return noised(chain, first, inputs["image"], keys, config.diffusion.num_timesteps)

    return start, step_of, np.arange(first + 1)[::-1]


def interpolate_task(config, chain):
    """Denoises (1 - λ) x_t + λ x'_t, two images' q-samples (Ho et al., Sec. 4.4 and Fig. 8).

    The inputs are {"image", "other": uint8 [B, H, W, C], "weight": λ [B]}. The noise is that of an
    image's number, whatever λ is.
    """
    first = start_index(config, chain)
    _, step_of, steps = img2img_task(config, chain)
    total = config.diffusion.num_timesteps

    def start(keys, inputs):
        one = noised(chain, first, inputs["image"], keys, total)
        other = noised(chain, first, inputs["other"], keys, total + 1)
        weight = inputs["weight"][:, None, None, None]
        return (1 - weight) * one + weight * other

    return start, step_of, steps


def inpaint_task(config, chain):
    """Paints where a mask says; inputs are {"image": uint8 [B, H, W, C], "known": [B, H, W, 1]}."""
    start, _, _ = generate.from_noise(config, chain)
    wanted, total = config.sample, config.diffusion.num_timesteps
    plan = sampling.inpaint_plan(len(chain.timesteps), wanted.jump_length, wanted.resamplings)
    ts, ups = map(jnp.asarray, plan)

    def step_of(predict_fn, keys, inputs):
        x0 = images.to_float(inputs["image"])

        def step(x, n):
            # Steps are taken more than once, each time with noise of its own.
            own = jax.vmap(jax.random.fold_in, (0, None))(keys, total + 1 + n)
            eps = sampling.prior(own, total, x.shape[1:])
            reverse = generate.make_step(config, chain, predict_fn, own)
            return sampling.inpaint_step(
                chain.schedule, reverse, x, ts[n], ups[n], x0, inputs["known"], eps
            )

        return step

    return start, step_of, np.arange(len(plan[0]))


def encode_task(config, chain):
    """DDIM's way from an image to noise; inputs are {"image": uint8 [B, H, W, C]}."""

    def start(keys, inputs):
        return images.to_float(inputs["image"])

    def step_of(predict_fn, keys, inputs):
        return lambda x, t: sampling.ddim_inverse_step(chain.schedule, predict_fn, x, t)

    return start, step_of, np.arange(len(chain.timesteps))


def decode_task(config, chain):
    """The way back; inputs are {"noise": [B, H, W, C]}."""
    _, step_of, steps = generate.from_noise(config, chain)
    return lambda keys, inputs: inputs["noise"], step_of, steps


def img2img(config, workdir, paths):
    """Noises images to `sample.t`, and denoises them again.

    Writes samples/img2img_t<t>_….npz (`images`, uint8) and a .png: on the left what went in, on the
    right what came out. The other functions here do the same under their names.

    Args:
      config: the run's config, checked.
      workdir: the run's folder.
      paths: image files, folders of them, or .npz files with `images`.

    Raises:
      UserError: for images that do not fit the run; nothing is written then.
    """
    given = read_images(config, paths)
    step, sampler = generate.restore_sampler(config, workdir, task=img2img_task, in_turn=False)
    out = sampler(np.arange(len(given)), {"image": given}).x
    rows = np.stack([given, out], axis=1)
    write(config, workdir, step, f"img2img_t{start_t(config)}", given, rows, images=out)


def interpolate(config, workdir, paths):
    """Interpolates between the first and second image, the third and fourth, and so on."""
    given = read_images(config, paths)
    if len(given) % 2:
        raise UserError(f"--images: holds {len(given)} images; interpolate needs pairs")
    step, sampler = generate.restore_sampler(config, workdir, task=interpolate_task, in_turn=False)
    pairs, count = len(given) // 2, len(WEIGHTS)
    inputs = {
        "image": given[::2].repeat(count, axis=0),
        "other": given[1::2].repeat(count, axis=0),
        "weight": np.tile(WEIGHTS.astype(np.float32), pairs),
    }
    out = sampler(np.arange(pairs).repeat(count), inputs).x
    out = out.reshape(pairs, count, *out.shape[1:])
    rows = np.concatenate([given[::2, None], out, given[1::2, None]], axis=1)
    name = f"interpolate_t{start_t(config)}"
    write(config, workdir, step, name, given, rows, images=out, weights=WEIGHTS)


def inpaint(config, workdir, paths, mask):
    """Paints the white parts of a mask anew; what is black stays, bit for bit."""
    given = read_images(config, paths)
    known = read_mask(config, mask, len(given))
    jump, steps = config.sample.jump_length, len(generate.make_chain(config).timesteps)
    if config.sample.resamplings > 1 and jump >= steps:
        raise UserError(
            f"sample.jump_length={jump}: must be below the {steps} steps that are taken"
        )
    step, sampler = generate.restore_sampler(config, workdir, task=inpaint_task, in_turn=False)
    out = sampler(np.arange(len(given)), {"image": given, "known": known}).x
    wanted, masked = config.sample, np.where(known, given, 128).astype(np.uint8)
    repeats = f"_r{wanted.resamplings}j{wanted.jump_length}" if wanted.resamplings > 1 else ""
    rows = np.stack([given, masked, out], axis=1)
    write(config, workdir, step, f"inpaint{repeats}", masked, rows, images=out)


def invert(config, workdir, paths):
    """Encodes images to noise with DDIM, decodes that, and says how far off it comes back.

    The .npz holds `noise` (x_T, float32), too.
    """
    config = config.copy_and_resolve_references()
    config.sample.update(sampler="ddim", eta=0.0)  # randomness could not be undone
    given = read_images(config, paths)
    options = {"task": encode_task, "in_turn": False, "finish": lambda x: x}
    step, encode = generate.restore_sampler(config, workdir, **options)
    _, decode = generate.restore_sampler(config, workdir, task=decode_task, in_turn=False)
    numbers = np.arange(len(given))
    noise = encode(numbers, {"image": given}).x
    out = decode(numbers, {"noise": noise}).x
    rmse = float(np.sqrt(np.mean(np.square(np.float64(out) - given))))
    steps = config.sample.num_steps or config.diffusion.num_timesteps
    log.info("%d steps and back: RMSE %.3g of 255", steps, rmse)
    rows = np.stack([given, out], axis=1)
    write(config, workdir, step, "invert", given, rows, images=out, noise=noise)


def write(config, workdir, step, name, given, rows, **arrays):
    """Writes samples/<name>_<step>_<settings>_<digest of the inputs>.npz, and a picture.

    Args:
      config: the run's config.
      workdir: the run's folder.
      step: of the checkpoint.
      name: what was done.
      given: the inputs, which decide the digest.
      rows: uint8 [N, columns, H, W, C], the picture.
      **arrays: of the .npz.
    """
    # The inputs have no name of their own; what is made of others goes to another file.
    digest = hashlib.sha256(given.tobytes()).hexdigest()[:8]
    settings = f"{step:06d}_{generate.settings(config, workdir)}_{digest}"
    path = pathlib.Path(workdir) / "samples" / f"{name}_{settings}.npz"
    run_files.write_npz(path, **arrays)
    shown = rows[: max(1, generate.GRID_IMAGES // rows.shape[1])]
    images.write_png(path.with_suffix(".png"), images.strips(shown.swapaxes(0, 1)))
    log.info("wrote %s and .png", path)


def read_images(config, paths):
    """Reads images of exactly the config's shape.

    Args:
      config: its data section is used.
      paths: image files, folders of them, or .npz files with `images`, in this order. Files are
        decoded as training data are: upright, and with the channels of the model.

    Returns:
      uint8 [N, H, W, C].

    Raises:
      UserError: for a path that is not there, an image that cannot be read, or one of another size.
    """
    shape, found = configs.image_shape(config), []
    for path in map(pathlib.Path, paths):
        if path.suffix == ".npz":
            found += [(path, image) for image in _arrays(path, shape)]
            continue
        is_folder = os.path.isdir(path)  # no error for a long name
        files = image_files.find(path) if is_folder else image_files.Files([path], "")
        found += [(p, _pixels("images", p, shape[-1])) for p in files.images]
        checks = [image_files.check(p, shape[-1]) for p in files.images]
        for remark in image_files.remarks(checks, files.left_out, shape[-1]):
            log.warning("%s", printable(f"--images={path}: {remark}"))
    if not found:
        raise UserError(f"--images={','.join(map(str, paths))}: holds no images")
    for path, image in found:
        _check_shape("images", path, image.shape, shape)
    return np.stack([image for _, image in found])


def read_mask(config, path, count):
    """Reads a mask of the images' size: black (below 128) is known, white is to be painted.

    Returns:
      bool [count, H, W, 1], True where known.
    """
    mask = _pixels("mask", path, 1)
    _check_shape("mask", path, mask.shape, (*config.data.image_size, 1))
    known = mask < 128
    if known.all() or not known.any():
        low, high = int(mask.min()), int(mask.max())
        paints = "nothing" if known.all() else "everything (what is transparent counts as white)"
        text = f"its values are {low} to {high} of 255, so it paints {paints}"
        log.warning("%s", printable(f"--mask={path}: {text}; white from 128 on is painted"))
    return np.broadcast_to(known, (count, *known.shape))


def _arrays(path, wanted):
    """`images` of an .npz file, uint8 [N, *wanted]; read only if their header says that they are.

    Nothing is unpickled, and what else the archive holds is not looked at.
    """
    with _images_of(path) as (file, size):
        shape, dtype = _header(file)
    if dtype != np.uint8 or len(shape) < 4:
        raise UserError(f"--images={path}: `images` is {dtype} {shape}, not uint8 [N, H, W, C]")
    _check_shape("images", path, shape[-3:], wanted)
    if math.prod(shape) > min(size, MOST_BYTES):
        text = f"`images` claims to be {shape} in {size} bytes; {MOST_BYTES} are allowed"
        raise UserError(f"--images={path}: {text}")
    with _images_of(path) as (file, _):
        return np.lib.format.read_array(file).reshape(-1, *wanted)


@contextlib.contextmanager
def _images_of(path):
    """Opens `images` in an .npz file: (the file of it, its size)."""
    if not os.path.isfile(path):  # a pipe would be waited for
        raise UserError(f"--images={path}: no such file")
    try:
        with warnings.catch_warnings(), zipfile.ZipFile(path) as archive:
            warnings.simplefilter("error", UserWarning)  # of headers that Python 2 wrote
            member = archive.getinfo("images.npy")
            with archive.open(member) as file:
                yield file, member.file_size
    except ARCHIVE_ERRORS as error:
        raise UserError(f"--images={path}: {one_line(error)}") from None


def _header(file):
    """(shape, dtype) of an .npy file."""
    if np.lib.format.read_magic(file) != (1, 0):  # later ones have headers of any length
        raise ValueError("must be of version 1.0 of the .npy format")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    return shape, dtype


def _pixels(flag, path, channels):
    """uint8 [H, W, channels] of an image file, decoded as training data are."""
    if not os.path.isfile(path):  # a pipe would be waited for
        raise UserError(f"--{flag}={path}: cannot be read (no such file)")
    try:
        array = np.asarray(image_files.decode(path, channels))
    except image_files.ERRORS as error:
        text = f"cannot be read ({image_files.reason(error)})"
        raise UserError(f"--{flag}={path}: {text}") from None
    return array.reshape(*array.shape[:2], channels)


def _check_shape(flag, path, found, wanted):
    if found != wanted:
        found, wanted = ("x".join(map(str, shape)) for shape in (found, wanted))
        raise UserError(f"--{flag}={path}: is {found} (height, width, channels), not {wanted}")
