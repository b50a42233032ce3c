"""Image editing: interpolation, inpainting, image-to-image, and DDIM inversion.

Each is a task of samplers.make_sampler, which defines the first x, the step, and the order of the
steps. Images and masks are files of exactly the model's size.
"""

import contextlib
import functools
import hashlib
import logging
import math
import os
import pathlib
import warnings
import zipfile

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import configs
from ddpm_jax.core import diffusion, sampling, solvers
from ddpm_jax.errors import UserError, one_line, printable
from ddpm_jax.files import disk, image_files, images
from ddpm_jax.runs import generate, samplers

log = logging.getLogger(__name__)

WEIGHTS = np.linspace(0, 1, 11)  # λ: 0, 1 and the values of the paper's figure 8
MAX_BYTES = 2**31  # of the images of an .npz file


def start_index(config, chain):
    """The index in a chain of `sample.t`: of the last step with τ ≤ t.

    Raises:
      UserError: if all steps are above t.
    """
    t = config.sample.t if config.sample.t >= 0 else config.diffusion.num_timesteps // 2
    if t < chain.timesteps[0]:
        allowed = f"must be at least {chain.timesteps[0]}, the lowest of the sampler's steps"
        raise UserError(f"sample.t={t}: {allowed}")
    return int(np.searchsorted(chain.timesteps, t, side="right")) - 1


def start_t(config):
    """The network's t at start_index; warns if it is not `sample.t`."""
    chain = samplers.make_chain(config)
    t, steps = int(chain.timesteps[start_index(config, chain)]), len(chain.timesteps)
    if t != config.sample.t >= 0:
        text = "sample.t=%d is none of the %d steps: starting at t = %d, the next lower one"
        log.warning(text, config.sample.t, steps, t)
    return t


def diffuse_images(chain, i, image, keys, key_step):
    """x ~ q(x | image) at step i of a chain, for uint8 images; the keys are folded with key_step
    for the noise."""
    x0, t = images.to_float(image), int(chain.timesteps[i])
    eps = sampling.noise(keys, key_step, x0.shape[1:])
    return diffusion.q_sample(chain.schedule, x0, jnp.full(len(x0), t), eps)


def img2img_task(config, chain):
    """The task of denoising x_t ~ q(x_t | image); inputs are {"image": uint8 [B, H, W, C]}."""
    first = start_index(config, chain)

    def start(keys, inputs):
        return diffuse_images(chain, first, inputs["image"], keys, config.diffusion.num_timesteps)

    return samplers.from_noise(config, chain.until(first + 1))._replace(start=start)


def interpolate_task(config, chain):
    """The task of denoising (1 - λ) x_t + λ x'_t, with x_t and x'_t diffused from two images (Ho et
    al., Sec. 4.4 and Fig. 8).

    The inputs are {"image", "other": uint8 [B, H, W, C], "weight": λ [B]}. The noise depends on an
    image's index, not on λ.
    """
    first, total = start_index(config, chain), config.diffusion.num_timesteps

    def start(keys, inputs):
        one = diffuse_images(chain, first, inputs["image"], keys, total)
        other = diffuse_images(chain, first, inputs["other"], keys, total + 1)
        weight = inputs["weight"][:, None, None, None]
        return (1 - weight) * one + weight * other

    return img2img_task(config, chain)._replace(start=start)


def inpaint_task(config, chain):
    """The task of inpainting; inputs are {"image": uint8 [B, H, W, C], "known_mask": [B, H, W, 1]}.

    Pixels where known_mask is False are generated.
    """
    task, section = samplers.from_noise(config, chain), config.sample
    repaint, levels = solvers.repaint(
        task.solver, chain.alpha_bars, section.jump_length, section.resamplings
    )

    def step_of(predict_fn, keys, inputs):
        def noise_of(purpose):
            # A t may occur more than once, each time with other noise.
            def noise_fn(n, shape):
                row_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 2 * n + purpose)
                return sampling.noise(row_keys, config.diffusion.num_timesteps, shape)

            return noise_fn

        step = sampling.make_step(repaint, predict_fn, noise_of(0))
        x0, known_mask = images.to_float(inputs["image"]), inputs["known_mask"]
        return sampling.keep_known(step, levels, x0, known_mask, noise_of(1))

    return task._replace(solver=repaint, step_of=step_of)


def ddim_inversion_task(config, chain):
    """The task of DDIM inversion; inputs are {"image": uint8 [B, H, W, C]}."""
    solver = solvers.ddim_inversion(chain.alpha_bars)

    def start(keys, inputs):
        return images.to_float(inputs["image"])

    step_of = functools.partial(samplers.make_step, solver, chain)
    return samplers.Task(solver, start, step_of)


def ddim_sampling_task(config, chain):
    """The task of sampling from given noise; inputs are {"noise": [B, H, W, C]}."""
    task = samplers.from_noise(config, chain)
    return task._replace(start=lambda keys, inputs: inputs["noise"])


def img2img(config, workdir, paths):
    """Diffuses images to `sample.t`, and denoises them.

    Writes samples/img2img_t<t>_….npz (`images`, uint8) and a .png with the inputs on the left and
    the results on the right. The other functions here write such files under their own names.

    Args:
      config: the run's config, checked.
      workdir: the run's folder.
      paths: image files, folders of them, or .npz files with `images`.

    Raises:
      UserError: for images that do not fit the run; nothing is written then.
    """
    x, name = read_images(config, paths), f"img2img_t{start_t(config)}"
    step, sampler = generate.restore_sampler(config, workdir, img2img_task)
    out = sampler(np.arange(len(x)), {"image": x}).x
    write(config, workdir, step, name, x, np.stack([x, out], axis=1), images=out)


def interpolate(config, workdir, paths):
    """Interpolates between the first and second image, the third and fourth, and so on."""
    x, name = read_images(config, paths), f"interpolate_t{start_t(config)}"
    if len(x) % 2:
        raise UserError(f"--images: holds {len(x)} images; interpolate needs pairs")
    step, sampler = generate.restore_sampler(config, workdir, interpolate_task)
    pairs, count = len(x) // 2, len(WEIGHTS)
    inputs = {
        "image": x[::2].repeat(count, axis=0),
        "other": x[1::2].repeat(count, axis=0),
        "weight": np.tile(WEIGHTS.astype(np.float32), pairs),
    }
    out = sampler(np.arange(pairs).repeat(count), inputs).x
    out = out.reshape(pairs, count, *out.shape[1:])
    rows = np.concatenate([x[::2, None], out, x[1::2, None]], axis=1)
    write(config, workdir, step, name, x, rows, images=out, weights=WEIGHTS)


def inpaint(config, workdir, paths, mask):
    """Generates the pixels where a mask is white; the other pixels do not change."""
    x = read_images(config, paths)
    known_mask = read_mask(config, mask, len(x))
    jump, steps = config.sample.jump_length, len(samplers.make_chain(config).timesteps)
    if config.sample.resamplings > 1 and jump >= steps:
        raise UserError(f"sample.jump_length={jump}: must be below the {steps} sampling steps")
    generate.warn_of_chain(config)  # it starts from noise
    step, sampler = generate.restore_sampler(config, workdir, inpaint_task)
    out = sampler(np.arange(len(x)), {"image": x, "known_mask": known_mask}).x
    section, masked = config.sample, np.where(known_mask, x, 128).astype(np.uint8)
    repeats = f"_r{section.resamplings}j{section.jump_length}" if section.resamplings > 1 else ""
    rows = np.stack([x, masked, out], axis=1)
    inputs = np.stack([masked, np.broadcast_to(known_mask, x.shape)])
    write(config, workdir, step, f"inpaint{repeats}", inputs, rows, images=out)


def invert(config, workdir, paths):
    """DDIM inversion: encodes images to noise, decodes the noise, and logs the RMSE.

    The .npz also has `noise` (x_T, float32).
    """
    config = config.copy_and_resolve_references()
    config.sample.update(sampler="ddim", eta=0.0)  # only the deterministic sampler is invertible
    x = read_images(config, paths)
    to_noise = {"task": ddim_inversion_task, "finish": lambda x: x}
    step, encode = generate.restore_sampler(config, workdir, **to_noise)
    config.sample.checkpoint = str(step)  # training may save a newer one meanwhile
    _, decode = generate.restore_sampler(config, workdir, ddim_sampling_task)
    indices = np.arange(len(x))
    noise = encode(indices, {"image": x}).x
    out = decode(indices, {"noise": noise}).x
    rmse = float(np.sqrt(np.mean(np.square(np.float64(out) - x))))
    steps = configs.sampling_steps(config)
    log.info("DDIM inversion, %d steps and back: RMSE %.3g of 255", steps, rmse)
    rows = np.stack([x, out], axis=1)
    write(config, workdir, step, "invert", x, rows, images=out, noise=noise)


def write(config, workdir, step, name, inputs, rows, **arrays):
    """Writes samples/<name>_<step>_<settings>_<digest of the inputs>.npz, and a picture.

    Args:
      config: the run's config.
      workdir: the run's folder.
      step: of the checkpoint.
      name: the beginning of the files' names.
      inputs: an array, for the digest.
      rows: uint8 [N, columns, H, W, C], the picture.
      **arrays: of the .npz.
    """
    # Results for other inputs must have another name.
    digest = hashlib.sha256(inputs.tobytes()).hexdigest()[:8]
    settings = f"{step:06d}_{generate.settings(config, workdir)}_{digest}"
    path = pathlib.Path(workdir) / "samples" / f"{name}_{settings}.npz"
    disk.write_npz(path, **arrays)
    rows = rows[: max(1, generate.GRID_IMAGES // rows.shape[1])]
    images.write_png(path.with_suffix(".png"), images.strips(rows.swapaxes(0, 1)))
    log.info("wrote %s and .png", path)


def read_images(config, paths):
    """Reads images of exactly the config's shape.

    Args:
      config: its data section is used.
      paths: image files, folders of them, or .npz files with `images`, in this order. Files are
        decoded as training data are: upright, and with the model's channels.

    Returns:
      uint8 [N, H, W, C].

    Raises:
      UserError: for a missing path, an unreadable image, or an image of another size.
    """
    shape, pairs = configs.image_shape(config), []  # (path, image)
    for path in map(pathlib.Path, paths):
        if path.suffix == ".npz":
            pairs += [(path, image) for image in _arrays(path, shape)]
            continue
        is_folder = os.path.isdir(path)  # no error for a long name
        files = image_files.find(path) if is_folder else image_files.Files([path], "")
        pairs += [(p, _pixels("images", p, shape[-1])) for p in files.images]
        checks = [image_files.check(p, shape[-1]) for p in files.images]
        for warning in image_files.warnings_of(checks, files.others, shape[-1]):
            log.warning("%s", printable(f"--images={path}: {warning}"))
    if not pairs:
        raise UserError(f"--images={','.join(map(str, paths))}: holds no images")
    for path, image in pairs:
        _check_shape("images", path, image.shape, shape)
    return np.stack([image for _, image in pairs])


def read_mask(config, path, count):
    """Reads a mask of the images' size: black pixels (below 128) are known, white ones generated.

    Returns:
      bool [count, H, W, 1], True where known.
    """
    mask = _pixels("mask", path, 1)
    _check_shape("mask", path, mask.shape, (*config.data.image_size, 1))
    known = mask < 128
    if known.all() or not known.any():
        low, high = int(mask.min()), int(mask.max())
        pixels = "no pixel" if known.all() else "all pixels (transparent counts as white)"
        text = f"its values are {low} to {high} of 255, so {pixels} will be generated"
        log.warning("%s", printable(f"--mask={path}: {text}; those from 128 on are generated"))
    return np.broadcast_to(known, (count, *known.shape))


def _arrays(path, shape_of_image):
    """Reads `images` of an .npz file, uint8 [N, *shape_of_image]; its header is checked first.

    Nothing is unpickled, and no other array of the archive is read.
    """
    with _images_of(path) as (file, size):
        shape, dtype = _header(file)
    if dtype != np.uint8 or len(shape) < 4:
        raise UserError(f"--images={path}: `images` is {dtype} {shape}, not uint8 [N, H, W, C]")
    _check_shape("images", path, shape[-3:], shape_of_image)
    if math.prod(shape) > min(size, MAX_BYTES):
        text = f"`images` has shape {shape} but {size} bytes; {MAX_BYTES} are allowed"
        raise UserError(f"--images={path}: {text}")
    with _images_of(path) as (file, _):
        return np.lib.format.read_array(file).reshape(-1, *shape_of_image)


@contextlib.contextmanager
def _images_of(path):
    """Opens `images` in an .npz file: (file, size in bytes)."""
    if not os.path.isfile(path):  # opening a pipe would block
        raise UserError(f"--images={path}: no such file")
    try:
        with warnings.catch_warnings(), zipfile.ZipFile(path) as archive:
            warnings.simplefilter("error", UserWarning)  # for headers written by Python 2
            member = archive.getinfo("images.npy")
            with archive.open(member) as file:
                yield file, member.file_size
    except disk.ARCHIVE_ERRORS as error:
        raise UserError(f"--images={path}: {one_line(error)}") from None


def _header(file):
    """(shape, dtype) of an .npy file."""
    if np.lib.format.read_magic(file) != (1, 0):  # later versions have headers of any length
        raise ValueError("must be of version 1.0 of the .npy format")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    return shape, dtype


def _pixels(flag, path, channels):
    """uint8 [H, W, channels] of an image file, decoded as training data are."""
    if not os.path.isfile(path):  # opening a pipe would block
        raise UserError(f"--{flag}={path}: cannot be read (no such file)")
    try:
        array = np.asarray(image_files.decode(path, channels))
    except image_files.ERRORS as error:
        text = f"cannot be read ({image_files.reason(error)})"
        raise UserError(f"--{flag}={path}: {text}") from None
    return array.reshape(*array.shape[:2], channels)


def _check_shape(flag, path, shape, expected):
    if shape != expected:
        shape, expected = ("x".join(map(str, s)) for s in (shape, expected))
        raise UserError(f"--{flag}={path}: is {shape} (height, width, channels), not {expected}")
