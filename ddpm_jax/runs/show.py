"""Pictures of a config and of its run: schedule, data, both processes, losses; and one page of all.

show/schedule.png          β, ᾱ, SNR, β̃
show/data.png              images that it is trained on
show/forward.png           some of them at a few steps of q
show/samples.png           images from the newest checkpoint
show/denoising.png         some of them on their way, x_t
show/denoising_x0.png      and the x0 that the network takes them for
show/reverse.gif, .mp4     the whole way
show/losses.png            from metrics.jsonl
report.html                all of it, with the settings, in one file
"""

import base64
import html
import logging
import pathlib

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from ddpm_jax import configs
from ddpm_jax.core import diffusion, sampling
from ddpm_jax.errors import UserError
from ddpm_jax.files import checkpoint, data, images
from ddpm_jax.files import workdir as run_files
from ddpm_jax.runs import generate

log = logging.getLogger(__name__)

GRIDS = 6  # of those that training drew, in the report

# What the report shows, and what it says of each.
SECTIONS = {
    "Samples": {"samples.png": "from the newest checkpoint"},
    "The reverse process": {
        "reverse.mp4": "from noise to images",
        "denoising.png": "x<sub>t</sub>, after the step from t",
        "denoising_x0.png": "the image that the network takes it for",
    },
    "Losses": {"losses.png": "on a logarithmic scale"},
    "Data": {
        "data.png": "what it is trained on",
        "forward.png": "the forward process",
    },
    "Schedule": {"schedule.png": "over t"},
}
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
img, video {{ max-width: 100%; }}
figure {{ margin: 1.5rem 0; overflow-x: auto; }}
.grids {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); gap: 1rem; }}
.grids figure {{ margin: 0; }}
table {{ border-collapse: collapse; font-size: 14px; }}
td {{ border-bottom: 1px solid #ddd; padding: 0.1rem 1rem 0.1rem 0; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def show(config, workdir, source=None):
    """Draws everything that there is to draw, and writes report.html.

    Args:
      config: checked; its `show` section says how much.
      workdir: the run's folder; without a run in it, only the config is drawn.
      source: the images that are trained on, if they are open already.

    Raises:
      UserError: for a dataset that cannot be opened.
    """
    workdir = pathlib.Path(workdir)
    folder = workdir / "show"
    step = checkpoint.latest_step(workdir)
    if config.data.name and source is None:  # an imported run may have none
        try:
            source = data.open_source(config.data, in_memory=False)
        except UserError as error:
            if step is None:  # else there is more to show
                raise
            log.warning("without the data: %s", error)
    draw_schedule(folder / "schedule.png", configs.make_schedule(config))
    if source is not None:
        draw_data(config, folder, source)
    if step is not None and config.model.kind == "unet":
        draw_reverse(config, workdir, folder)
    else:
        generate.warn_of_chain(config)
    lines = run_files.read_metrics(workdir)
    if any("loss" in line for line in lines):
        draw_losses(folder / "losses.png", lines)
    write_report(config, workdir, step, lines)
    log.info("wrote %s and %s", folder, workdir / "report.html")


def draw_schedule(path, schedule):
    """β, ᾱ, the signal-to-noise ratio ᾱ / (1 - ᾱ), and β̃ over t."""
    ratio = np.square(np.float64(schedule.sqrt_recip_alpha_bars_minus_one)) ** -1.0
    figure = Figure(figsize=(12, 3), layout="constrained")
    panels = (
        ("β", schedule.betas, "linear"),
        ("ᾱ", schedule.alpha_bars, "linear"),
        ("SNR = ᾱ / (1 - ᾱ)", ratio, "log"),
        ("β̃, the posterior's variance", schedule.posterior_variance, "linear"),
    )
    for axes, (title, values, scale) in zip(figure.subplots(1, 4), panels, strict=True):
        axes.plot(np.asarray(values))
        axes.set(title=title, xlabel="t", yscale=scale)
    save(figure, path)


def draw_data(config, folder, source):
    """A grid of the data, and the forward process of its first images."""
    x = source.read(np.arange(min(source.size, config.sample.num_samples, generate.GRID_IMAGES)))
    images.write_png(folder / "data.png", images.grid(x.images, config.sample.columns))
    schedule = configs.make_schedule(config)
    some, ts = x.images[: config.show.num_images], timesteps(config)[::-1]
    keys = sampling.image_keys(config.sample.seed, jnp.arange(len(some)))
    x0, frames = images.to_float(some), [some]
    for t in ts:
        eps = sampling.noise(keys, t, x0.shape[1:])
        x_t = diffusion.q_sample(schedule, x0, jnp.full(len(x0), t), eps)
        frames.append(np.asarray(images.to_uint8(x_t)))
    titles = ["image", *(f"t = {t}" for t in ts)]
    images.write_png(folder / "forward.png", images.strips(np.stack(frames), titles))


def timesteps(config):
    """The steps of the strips, noisiest first."""
    total = config.diffusion.num_timesteps
    tenths = np.linspace(total - 1, 0, min(10, total)).round().astype(int).tolist()
    return sorted(set(config.show.timesteps or tenths), reverse=True)


def draw_reverse(config, workdir, folder):
    """Samples, what they were on the way, and an animation of it."""
    taus = generate.make_chain(config).timesteps
    # Of a shorter chain, the steps that are nearest.
    strip = {int(np.abs(taus - t).argmin()) for t in timesteps(config)}
    last, count = len(taus) - 1, min(config.show.num_frames, len(taus))
    animated = set(np.linspace(0, last, count).round().astype(int).tolist()) | {0}
    frames_at, x0_at = (sorted(steps, reverse=True) for steps in (strip | animated, strip))
    _, sample = generate.restore_sampler(config, workdir, frames_at=frames_at, x0_at=x0_at)
    found = sample(np.arange(min(config.sample.num_samples, generate.GRID_IMAGES)))
    generate.write_grid(folder / "samples.png", config, found.x)

    titles = [f"t = {taus[i]}" for i in x0_at]
    seen, moving = (
        [frames_at.index(i) for i in steps] for steps in (x0_at, sorted(animated)[::-1])
    )
    for name, frames in (("denoising", found.frames[seen]), ("denoising_x0", found.x0_frames)):
        some = frames[:, : config.show.num_images]
        images.write_png(folder / f"{name}.png", images.strips(some, titles))
    columns = generate.grid_columns(config)
    for suffix in ("gif", "mp4"):
        pictures = (images.grid(found.frames[i], columns, smallest=32) for i in moving)
        try:
            images.write_animation(folder / f"reverse.{suffix}", pictures)
        except (IndexError, OSError, RuntimeError) as error:  # ffmpeg is missing, or fails
            log.warning("no reverse.%s: %s", suffix, error)


def draw_losses(path, lines):
    """The loss over steps, and by quarter of t."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    over_steps, over_t = figure.subplots(1, 2)
    for name, label in (
        ("loss", "training"),
        ("epoch_loss", "training, mean of an epoch"),
        ("eval_loss", "held out"),
        ("eval_loss_ema", "held out, averaged parameters"),
    ):
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            over_steps.plot(*zip(*points, strict=True), label=label)
    for i in range(1, 5):
        name, label = f"loss_q{i}", f"{(i - 1) / 4:g} T ≤ t < {i / 4:g} T"
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            over_t.plot(*zip(*points, strict=True), label=label)
    for axes, title in ((over_steps, "loss"), (over_t, "loss by quarter of t")):
        axes.set(title=title, xlabel="step", yscale="log")
        axes.legend()
    save(figure, path)


def save(figure, path):
    """Writes a figure as PNG, whole or not at all."""
    with run_files.atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def write_report(config, workdir, step, lines):
    """Puts what was drawn into report.html; it needs no other file."""
    folder, parts = workdir / "show", []
    if step is not None:
        parts.append(f"<p>Checkpoint of step {step:,}.</p>")
    last = {name: value for line in lines for name, value in line.items()}
    if lines:
        step_text = {"step": f"{last.pop('step'):,}"}
        values = step_text | {name: f"{value:.5g}" for name, value in last.items()}
        parts.append(f"<h2>Last values</h2>{rows(values)}")
    for title, pictures in SECTIONS.items():
        drawn = {folder / name: text for name, text in pictures.items()}
        drawn = [embedded(path, text) for path, text in drawn.items() if path.exists()]
        parts += [f"<h2>{title}</h2>", *drawn] if drawn else []
    grids = sorted((workdir / "samples").glob("step_*.png"), key=lambda p: int(p.stem[5:]))
    if grids:
        chosen = np.unique(np.linspace(0, len(grids) - 1, min(GRIDS, len(grids))).round())
        shown = "".join(
            embedded(grids[int(i)], f"step {int(grids[int(i)].stem[5:]):,}") for i in chosen
        )
        parts.append(f'<h2>Samples while training</h2><div class="grids">{shown}</div>')
    parts.append(f"<h2>Settings</h2>{rows(configs.flatten(config))}")
    title = html.escape(f"{config.data.name or 'imported'}: {workdir.name}")
    with run_files.atomic_write(workdir / "report.html") as path:
        path.write_text(PAGE.format(title=title, body="\n".join(parts)))


def rows(fields):
    """A table of names and values."""
    cells = (f"<tr><td>{html.escape(str(k))}<td>{html.escape(str(v))}" for k, v in fields.items())
    return f"<table>{''.join(cells)}</table>"


def embedded(path, caption):
    """A picture or a video as part of a page."""
    content = base64.b64encode(path.read_bytes()).decode()
    if path.suffix == ".mp4":
        inner = (
            f'<video controls autoplay loop muted src="data:video/mp4;base64,{content}"></video>'
        )
    else:
        inner = f'<img alt="{path.stem}" src="data:image/png;base64,{content}">'
    return f"<figure>{inner}<figcaption>{caption}</figcaption></figure>"
