"""Images in, images out: what stays, what changes, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ddpm_jax import cli, configs
from ddpm_jax.core import diffusion, sampling, unet
from ddpm_jax.errors import UserError
from ddpm_jax.files import checkpoint, disk, run_files
from ddpm_jax.runs import edit as edit_module
from ddpm_jax.runs import generate, samplers


@pytest.fixture
def run(config, tmp_path):
    """A run that was not trained, but whose network depends on its input: its folder."""
    config.diffusion.update(schedule="linear", beta_end=0.4)
    shapes = unet.param_shapes(configs.make_model(config), configs.image_shape(config))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: 0.1 * rng.standard_normal(s.shape, np.float32), shapes)
    checkpoint.save_imported(tmp_path / "run", params)
    run_files.save_config(config, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def pictures(tmp_path):
    """A folder of four gray 8×8 images: (the folder, uint8 [4, 8, 8, 1])."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    array = np.random.default_rng(1).integers(0, 256, (4, 8, 8), np.uint8)
    for i, image in enumerate(array):
        Image.fromarray(image).save(folder / f"{i}.png")
    return folder, array[..., None]


def edit(mode, run, images, *arguments):
    """The arrays that a mode writes; the one .npz in samples/ that was not there before."""
    before = set((run / "samples").glob("*.npz"))
    cli.run(["main.py", f"--mode={mode}", f"--workdir={run}", f"--images={images}", *arguments])
    (path,) = set((run / "samples").glob("*.npz")) - before
    assert path.with_suffix(".png").exists()
    with np.load(path) as arrays:
        return dict(arrays)


@pytest.mark.parametrize("resamplings", [1, 3])
@pytest.mark.parametrize("sampler", ["ancestral", "ddim"])
def test_inpainting_leaves_known_pixels_bit_for_bit(run, pictures, tmp_path, sampler, resamplings):
    folder, given = pictures
    mask = np.zeros((8, 8), np.uint8)
    mask[2:6, 3:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    out = edit(
        "inpaint", run, folder, f"--mask={tmp_path / 'mask.png'}",
        f"--config.sample.sampler={sampler}", f"--config.sample.resamplings={resamplings}",
        "--config.sample.jump_length=4",
    )["images"]  # fmt: skip
    assert out.shape == given.shape and out.dtype == np.uint8
    known = mask == 0
    np.testing.assert_array_equal(out[:, known], given[:, known])
    assert (out[:, ~known] != given[:, ~known]).mean() > 0.5


def test_only_what_starts_from_noise_warns_of_the_chain(run, config, pictures, tmp_path, caplog):
    folder, _ = pictures
    config.diffusion.beta_end = 0.02  # ᾱ_T = 0.8
    run_files.save_config(config, run)
    edit("img2img", run, folder)
    edit("invert", run, folder)
    assert "does not end in noise" not in caplog.text
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save(tmp_path / "mask.png")
    edit("inpaint", run, folder, f"--mask={tmp_path / 'mask.png'}")
    assert caplog.text.count("does not end in noise") == 1


def test_imported_weights_have_no_average(run, pictures):
    """So a config with another decay may be given, as for its data."""
    edit("img2img", run, pictures[0], "--config.optim.ema_decay=0.5")


def test_another_mask_writes_other_files(run, tmp_path):
    """Also where the pixels between the masks are as gray as those that are left out."""
    Image.fromarray(np.full((8, 8), 128, np.uint8)).save(tmp_path / "gray.png")
    for rows in (2, 4):
        mask = np.zeros((8, 8), np.uint8)
        mask[:rows] = 255
        Image.fromarray(mask).save(tmp_path / "mask.png")
        out = edit("inpaint", run, tmp_path / "gray.png", f"--mask={tmp_path / 'mask.png'}")
        assert (out["images"][:, rows:] == 128).all()


def test_img2img_keeps_more_of_an_image_the_earlier_it_starts(run, pictures):
    folder, given = pictures
    changes = []
    for t in (1, 10, 19):
        out = edit("img2img", run, folder, f"--config.sample.t={t}")["images"]
        changes.append(np.abs(out - np.float64(given)).mean())
    assert changes == sorted(changes) and changes[0] < 30 < changes[2]


def test_interpolation_begins_and_ends_at_the_images(run, pictures):
    """λ = 0 is img2img of the first image of a pair; the noise is the same for every λ."""
    folder, given = pictures
    found = edit("interpolate", run, folder, "--config.sample.t=12")
    assert found["images"].shape == (2, 11, 8, 8, 1)
    np.testing.assert_allclose(found["weights"], np.arange(11) / 10)
    disk.write_npz(folder.parent / "firsts.npz", images=given[::2])
    firsts = edit("img2img", run, folder.parent / "firsts.npz", "--config.sample.t=12")["images"]
    np.testing.assert_array_equal(found["images"][:, 0], firsts)
    # λ = 1 is another image's, denoised with the same noise but for its own q-sample's.
    assert (found["images"][:, -1] != found["images"][:, 0]).mean() > 0.5
    # Neighbours are closer than the two ends.
    steps = np.abs(np.diff(found["images"].astype(float), axis=1)).mean(axis=(0, 2, 3, 4))
    ends = np.abs(found["images"][:, 0].astype(float) - found["images"][:, -1]).mean()
    assert steps.max() < ends


def test_to_noise_and_back(run, pictures, caplog):
    """DDIM inversion: more steps give a smaller error; the noise alone is enough, whatever η is."""
    folder, given = pictures
    caplog.set_level("INFO")
    errors = []
    for steps, eta in ((5, 0), (20, 1)):
        more = ["--config.sample.sampler=ddim", f"--config.sample.eta={eta}"]
        found = edit("invert", run, folder, f"--config.sample.num_steps={steps}", *more)
        assert found["noise"].shape == given.shape and found["noise"].dtype == np.float32
        errors.append(np.sqrt(np.mean((found["images"] - np.float64(given)) ** 2)))
        assert f"{steps} steps and back: RMSE {errors[-1]:.3g} of 255" in caplog.text
    assert errors[1] < errors[0]


def test_both_directions_of_inversion_have_the_same_parameters(run, pictures, monkeypatch):
    """Also if training saves a newer checkpoint between them."""
    restore, asked = generate.restore_sampler, []

    def spy(config, *args, **options):
        asked.append(config.sample.checkpoint)
        return restore(config, *args, **options)

    monkeypatch.setattr(generate, "restore_sampler", spy)
    edit("invert", run, pictures[0], "--config.sample.num_steps=2")
    assert asked[0] == "newest" and int(asked[1]) == checkpoint.latest_step(run)


def test_interpolation_with_hardly_any_noise_is_a_mixture(run, pictures):
    """Of a pair of equal images, and of a pair of others."""
    folder, given = pictures
    disk.write_npz(folder.parent / "pairs.npz", images=given[[0, 0, 1, 2]])
    found = edit("interpolate", run, folder.parent / "pairs.npz", "--config.sample.t=0")["images"]
    weights = np.linspace(0, 1, 11).reshape(11, 1, 1, 1)
    for images, (one, other) in zip(found, (given[[0, 0]], given[[1, 2]]), strict=True):
        assert np.abs(images - (1 - weights) * one - weights * other).max() < 30


def test_where_img2img_and_interpolation_start(config):
    """At the noisiest of five steps that is not above t: τ = 12, with ᾱ_12 of the whole chain.

    A mixture of q-samples has the mixture of their means, and (1 - λ)² + λ² of their variance.
    """
    config.diffusion.update(schedule="linear", beta_end=0.4)
    config.sample.update(num_steps=5, t=13)
    chain = samplers.make_chain(config)
    a = np.cumprod(1 - np.linspace(1e-4, 0.4, 20))[12]
    keys = sampling.image_keys(0, jnp.arange(256))
    white, black = (np.full((256, 8, 8, 1), level, np.uint8) for level in (255, 0))
    inputs = {"image": white, "other": black, "weight": np.full(256, 0.25, np.float32)}
    for task, mean, share in (
        (edit_module.img2img_task, 1, 1),
        (edit_module.interpolate_task, 0.75 - 0.25, 0.75**2 + 0.25**2),
    ):
        solver, start, _ = task(config, chain)
        np.testing.assert_array_equal(solver.steps, [3, 2, 1, 0])
        x = np.asarray(start(keys, inputs))
        # The standard errors of 16,384 values: 0.008 and 1.1 %.
        assert x.mean() == pytest.approx(mean * np.sqrt(a), abs=0.04)
        assert x.var() == pytest.approx(share * (1 - a), rel=0.05)


def test_a_start_between_or_below_the_steps(config, caplog):
    """Between two steps it is the lower one, and a line says so; below all it is refused."""
    config.sample.update(sampler="dpmpp", num_steps=4, t=9)  # 4, 8, 12, 16
    assert edit_module.start_t(config) == 8
    assert "sample.t=9 is none of the 4 steps: starting at t = 8" in caplog.text
    caplog.clear()
    config.sample.t = 12
    assert edit_module.start_t(config) == 12 and not caplog.text
    config.sample.t = 3
    with pytest.raises(UserError, match=r"sample\.t=3: must be at least 4, the lowest of the sam"):
        edit_module.start_t(config)


def test_inpainting_draws_new_noise_at_every_visit(config):
    config.sample.update(resamplings=2, jump_length=4)
    solver, _, step_of = edit_module.inpaint_task(config, samplers.make_chain(config))
    up = solver.steps < 0
    inputs = {"image": np.zeros((2, 8, 8, 1), np.uint8), "known_mask": np.ones((2, 8, 8, 1), bool)}
    zeros = jnp.zeros((2, 8, 8, 1))

    def predict_fn(x_t, t):
        return diffusion.Prediction(zeros, None)

    step = jax.jit(step_of(predict_fn, sampling.image_keys(0, jnp.arange(2)), inputs))
    for visits in (np.flatnonzero(solver.steps == 3), np.flatnonzero(up)):
        first, again = (step((zeros,), n)[0][0] for n in visits[:2])
        assert (first != again).all()


def test_known_and_generated_pixels_have_their_own_noise(config):
    """x0 = 0 and is predicted so: both are N(0, 1 - ᾱ_{t-1}) or less, and independent."""
    config.sample.update(sampler="ddim", eta=1.0)
    chain = samplers.make_chain(config)
    _, _, step_of = edit_module.inpaint_task(config, chain)
    zeros, keys = jnp.zeros((64, 8, 8, 1)), sampling.image_keys(0, jnp.arange(64))
    image = np.full((64, 8, 8, 1), 127.5, np.float32)  # 0 in [-1, 1]
    known, generated = (
        np.asarray(
            step_of(
                lambda *_: diffusion.Prediction(zeros, None),
                keys,
                {"image": image, "known_mask": np.full((64, 8, 8, 1), is_known)},
            )((zeros,), 5)[0][0]
        ).ravel()
        for is_known in (True, False)
    )
    # The standard errors of 4,096 values: 2.2 % and 0.016.
    assert known.var() == pytest.approx(1 - chain.alpha_bars[13], rel=0.1)
    assert abs(np.corrcoef(known, generated)[0, 1]) < 0.08


def test_below_128_is_known(config, tmp_path):
    levels = np.tile(np.array([0, 100, 127, 128, 129, 255, 1, 254], np.uint8), (8, 1))
    Image.fromarray(levels).save(tmp_path / "mask.png")
    known = edit_module.read_mask(config, str(tmp_path / "mask.png"), 2)
    assert known.shape == (2, 8, 8, 1)
    np.testing.assert_array_equal(known[1, 5, :, 0], [1, 1, 1, 0, 0, 0, 1, 0])


def test_what_is_made_of_other_images_is_another_file(config, tmp_path):
    run_files.save_config(config, tmp_path)
    given = np.random.default_rng(0).integers(0, 256, (2, 1, 8, 8, 1), np.uint8)
    for images in (*given, given[0]):
        edit_module.write(config, tmp_path, 3, "img2img_t5", images, images[:, None], images=images)
    found = {np.load(path)["images"].tobytes() for path in (tmp_path / "samples").glob("*.npz")}
    assert found == {images.tobytes() for images in given}


def test_resampling_needs_more_steps_than_a_jump(run, pictures, tmp_path):
    Image.new("L", (8, 8), 255).save(tmp_path / "mask.png")
    more = ["--config.sample.resamplings=2", "--config.sample.num_steps=10"]
    with pytest.raises(
        UserError, match=r"sample\.jump_length=10: must be below the 10 sampling steps"
    ):
        edit("inpaint", run, pictures[0], f"--mask={tmp_path / 'mask.png'}", *more)


def test_images_that_do_not_fit(run, pictures, tmp_path):
    folder, _ = pictures
    before = {p.name for p in run.iterdir()}
    Image.new("L", (8, 9)).save(tmp_path / "tall.png")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "float.npz", images=np.zeros((2, 8, 8, 1)))
    (tmp_path / "none.npz").write_bytes(b"")
    (tmp_path / "part.npz").write_bytes((tmp_path / "float.npz").read_bytes()[:100])
    np.savez(tmp_path / "other.npz", pictures=np.zeros((2, 8, 8, 1), np.uint8))
    for path, message in (
        ("tall.png", r"tall\.png: is 9x8x1 \(height, width, channels\), not 8x8x1"),
        ("text.png", "cannot be read"),
        ("nowhere.png", "cannot be read"),
        ("empty", "holds no images"),
        ("float.npz", "not uint8"),
        ("other.npz", "images"),
        ("none.npz", ""),
        ("part.npz", ""),
    ):
        for mode in ("img2img", "invert"):
            with pytest.raises(UserError, match=f"--images=.*{message}") as error:
                edit(mode, run, tmp_path / path)
            assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"holds 1 images; interpolate needs pairs"):
        edit("interpolate", run, folder / "0.png")
    with pytest.raises(UserError, match=r"--mask=.*tall\.png: is 9x8x1"):
        edit("inpaint", run, folder, f"--mask={tmp_path / 'tall.png'}")
    with pytest.raises(UserError, match="--mask: is missing"):
        edit("inpaint", run, folder)
    with pytest.raises(UserError, match="--mask: is only for --mode=inpaint"):
        edit("img2img", run, folder, "--mask=x.png")
    with pytest.raises(UserError, match="--images: is missing"):
        cli.run(["main.py", "--mode=img2img", f"--workdir={run}"])
    assert {p.name for p in run.iterdir()} == before


@pytest.mark.parametrize(
    "level, pixels", [(0, "no pixel"), (1, "no pixel"), (255, "all pixels"), (None, "all pixels")]
)
def test_a_mask_of_one_kind_is_named_in_a_warning(run, tmp_path, caplog, level, pixels):
    """Zeros and ones rather than zeros and 255; white on what is transparent."""
    mask = np.zeros((8, 8, 4), np.uint8)
    mask[2:5, 2:5] = 255 if level is None else (level, level, level, 255)
    image = Image.fromarray(mask, "RGBA") if level is None else Image.fromarray(mask[..., 0])
    if level == 255:
        image = Image.new("L", (8, 8), 255)
    image.save(tmp_path / "mask.png")
    config = run_files.load_config(run)
    edit_module.read_mask(config, str(tmp_path / "mask.png"), 1)
    highest = 255 if level is None else level
    lowest = {"no pixel": 0, "all pixels": 255}[pixels]
    text = f"its values are {lowest} to {highest} of 255, so {pixels}"
    assert text in caplog.text
    caplog.clear()
    Image.fromarray(np.eye(8, dtype=bool)).save(tmp_path / "mask.png")
    known = edit_module.read_mask(config, str(tmp_path / "mask.png"), 1)
    assert known.sum() == 56 and not caplog.text
