"""Visualizes a config and its run: schedule, data, both processes, losses; and a report.

show/schedule.png          β, ᾱ, SNR, β̃
show/data.png              training images
show/forward.png           x_t of some training images at some t (forward process)
show/samples.png           images from the chosen checkpoint (sample.checkpoint)
show/denoising.png         x_t of some samples at some t (reverse process)
show/denoising_x0.png      the x0 predicted at these t
show/reverse.gif, .mp4     the reverse process as an animation
show/losses.png            from metrics.jsonl
show/scores.png            from metrics.jsonl, with train.score_every
report.html                all of these, with the settings, in one file; and what evaluate drew
"""

import base64
import html
import logging
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from ddpm_jax import configs
from ddpm_jax.core import diffusion, sampling
from ddpm_jax.errors import UserError
from ddpm_jax.files import checkpoint, data, disk, images, run_files
from ddpm_jax.runs import frames, generate, samplers

log = logging.getLogger(__name__)

MAX_GRIDS = 6  # of the grids that training drew, in the report

# The report's sections, with their pictures and captions.
SECTIONS = {
    "Samples": {"samples.png": "from this checkpoint"},
    "Reverse process": {
        "reverse.mp4": "from noise to images",
        "denoising.png": "x<sub>t</sub>, after the step at t",
        "denoising_x0.png": "x<sub>0</sub> predicted at t",
    },
    "Losses": {"losses.png": "on a logarithmic scale"},
    "Scores of samples": {"scores.png": "over the images seen, and over the time of training"},
    "Data": {
        "data.png": "training images",
        "forward.png": "forward process",
    },
    "Schedule": {"schedule.png": "over t"},
}
SCORES = {"fid": "FID", "kid": "KID", "distance": "Fréchet distance"}  # of metrics.jsonl
# Pictures of --mode=evaluate, with their captions.
EVALUATION = {
    "evaluation_steps.png": "FID and sFID of checkpoints",
    "evaluation.png": "the terms of the bound over t, and rate against distortion",
    "evaluation_progressive.png": "x<sub>0</sub> predicted along the reverse process",
    "evaluation_neighbours.png": "the samples that are nearest to training images, compared with "
    "held-out images; the nearest five of the former, and the root mean square difference of their "
    "pixels (0 to 255)",
    "evaluation_neighbours_features.png": "the same in Inception's features",
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
td {{ border-bottom: 1px solid #ddd; padding: 0.1rem 1rem 0.1rem 0; overflow-wrap: anywhere; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def show(config, workdir):
    """Visualizes a config, and its run if there is one; writes the pictures and report.html.

    Args:
      config: checked; its `show` section is used.
      workdir: the run's folder; without a run, only the schedule and the data are drawn.

    Raises:
      UserError: for a dataset that cannot be opened.
    """
    workdir = pathlib.Path(workdir)
    folder = workdir / "show"
    step = checkpoint.latest_step(workdir)
    source = None
    if config.data.name:  # imported runs have no dataset
        try:
            source = data.open_source(config.data, in_memory=False)
        except UserError as error:
            if step is None:  # a run can be shown without its data
                raise
            log.warning("the report has no data: %s", error)
    draw_schedule(folder / "schedule.png", configs.make_schedule(config))
    if source is not None:
        draw_data(config, folder, source)
    if step is not None and config.model.kind == "unet":
        step = draw_reverse(config, workdir, folder)
    else:
        generate.warn_of_chain(config)
    lines = run_files.read_metrics(workdir)
    if any("loss" in line for line in lines):
        draw_losses(folder / "losses.png", lines)
    if any(name in line for line in lines for name in run_files.SCORES):
        draw_scores(folder / "scores.png", lines, config.train.batch_size)
    write_report(config, workdir, step, lines)
    log.info("wrote %s and %s", folder, workdir / "report.html")


def draw_schedule(path, schedule):
    """Plots β, ᾱ, the signal-to-noise ratio ᾱ / (1 - ᾱ), and β̃ over t."""
    ratio = np.square(np.float64(schedule.sqrt_recip_alpha_bars_minus_one)) ** -1.0
    figure = Figure(figsize=(12, 3), layout="constrained")
    panels = (
        ("β", schedule.betas, "linear"),
        ("ᾱ", schedule.alpha_bars, "linear"),
        ("SNR = ᾱ / (1 - ᾱ)", ratio, "log"),
        ("β̃, the posterior variance", schedule.posterior_variance, "linear"),
    )
    for axes, (title, values, scale) in zip(figure.subplots(1, 4), panels, strict=True):
        axes.plot(np.asarray(values))
        axes.set(title=title, xlabel="t", yscale=scale)
    images.write_figure(path, figure)


def draw_data(config, folder, source):
    """Draws a grid of the data, and the forward process of its first images."""
    x = source.read(np.arange(min(source.size, config.sample.num_samples, generate.GRID_IMAGES)))
    images.write_png(folder / "data.png", images.grid(x.images, config.sample.columns))
    schedule = configs.make_schedule(config)
    first, ts = x.images[: config.show.num_images], frames.timesteps(config)[::-1]

    @jax.jit  # one program, not one for each operation
    def noisy(x0, t):
        keys = sampling.image_keys(config.sample.seed, jnp.arange(len(x0)))
        eps = sampling.noise(keys, t, x0.shape[1:])
        return images.to_uint8(diffusion.q_sample(schedule, x0, jnp.full(len(x0), t), eps))

    columns = [first, *(np.asarray(noisy(images.to_float(first), t)) for t in ts)]
    titles = ["image", *(f"t = {t}" for t in ts)]
    images.write_png(folder / "forward.png", images.strips(np.stack(columns), titles))


def draw_reverse(config, workdir, folder):
    """Draws samples, their frames during the reverse process, and an animation; returns the step
    of the checkpoint."""
    config = configs.for_show(config)
    log.info("samples: %s", samplers.describe_sampler(config))
    shown = frames.of_reverse(config)
    step, sample = generate.restore_sampler(config, workdir, **shown.options)
    samples = sample(np.arange(min(config.sample.num_samples, generate.GRID_IMAGES)))
    generate.write_grid(folder / "samples.png", config, samples.x)

    titles = [f"t = {shown.timesteps[i]}" for i in shown.strip]
    in_strip = samples.frames[shown.numbers(shown.strip)]
    for name, x in {"denoising": in_strip, "denoising_x0": samples.x0_frames}.items():
        first = x[:, : config.show.num_images]
        images.write_png(folder / f"{name}.png", images.strips(first, titles))
    columns = generate.grid_columns(config)
    for suffix in ("gif", "mp4"):
        numbers = shown.numbers(shown.animation)
        pictures = (images.grid(samples.frames[i], columns, smallest=32) for i in numbers)
        try:
            images.write_animation(folder / f"reverse.{suffix}", pictures)
        except (IndexError, OSError, RuntimeError) as error:  # ffmpeg is missing, or fails
            log.warning("no reverse.%s: %s", suffix, error)
            (folder / f"reverse.{suffix}").unlink(missing_ok=True)  # of an older checkpoint
    return step


def draw_losses(path, lines):
    """Plots the loss over steps, and by quarter of t."""
    losses = {
        "loss": "training",
        "epoch_loss": "training, mean of an epoch",
        "eval_loss": "held out",
        "eval_loss_ema": "held out, EMA",
    }
    quarters = {f"loss_q{i + 1}": f"{i / 4:g} T ≤ t < {(i + 1) / 4:g} T" for i in range(4)}
    panels = {"loss": losses, "loss by quarter of t": quarters}
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, (title, labels) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for name, label in labels.items():
            points = [(line["step"], line[name]) for line in lines if name in line]
            if points:
                marker = "." if len(points) < 30 else ""  # a single point is no line
                axes.plot(*zip(*points, strict=True), marker=marker, label=label)
        axes.set(title=title, xlabel="step", yscale="log")
        axes.legend()
    images.write_figure(path, figure)


def draw_scores(path, lines, batch_size):
    """Plots the scores over the images seen and over minutes; a ring marks the best one."""
    minutes = minutes_at(lines, batch_size)
    names = [name for name in SCORES if any(name in line for line in lines)]
    figure = Figure(figsize=(10, 4 * len(names)), layout="constrained")
    axes = figure.subplots(len(names), 2, sharey="row", squeeze=False)
    for name, row in zip(names, axes, strict=True):
        points = [(line["step"], line[name]) for line in lines if name in line]
        steps, values = map(np.array, zip(*points, strict=True))
        best = np.where(np.isfinite(values), values, np.inf).argmin()
        row[0].set(xlabel="images seen", ylabel=SCORES[name])
        row[1].set(xlabel="minutes of training")
        for panel, x in zip(row, (steps * batch_size, [minutes[s] for s in steps]), strict=True):
            panel.set_yscale("linear" if name == "kid" else "log")  # KID may be below 0
            (line,) = panel.plot(x, values, marker=".")
            ring = dict(markersize=12, fillstyle="none", color=line.get_color())
            panel.plot(x[best], values[best], "o", **ring)
    images.write_figure(path, figure)


def minutes_at(lines, batch_size):
    """{step: minutes of training until then}, from the rates in metrics.jsonl; without what the
    run did besides training."""
    minutes, done, before = {}, 0.0, 0
    for line in lines:
        if "images_per_second" in line:
            done += (line["step"] - before) * batch_size / line["images_per_second"] / 60
            before = line["step"]
        minutes[line["step"]] = done
    return minutes


def write_report(config, workdir, step, lines):
    """Writes report.html, with all pictures embedded."""
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
    drawn = [workdir / name for name in EVALUATION if (workdir / name).exists()]
    if drawn:
        parts.append("<h2>Evaluation: each picture is the last one of its kind</h2>")
        parts += [embedded(path, EVALUATION[path.name]) for path in drawn]
    names = {p: re.fullmatch(r"step_(\d+)", p.stem) for p in (workdir / "samples").glob("*.png")}
    grids = sorted((int(name[1]), path) for path, name in names.items() if name)
    if grids:
        chosen = np.unique(np.linspace(0, len(grids) - 1, min(MAX_GRIDS, len(grids))).round())
        shown = (grids[int(i)] for i in chosen)
        figures = "".join(embedded(path, f"step {step:,}") for step, path in shown)
        parts.append(f'<h2>Samples during training</h2><div class="grids">{figures}</div>')
    settings = rows(configs.flatten(config))
    parts.append(f"<h2>Settings</h2><details><summary>all fields</summary>{settings}</details>")
    title = html.escape(f"{config.data.name or 'imported'}: {workdir.name}")
    with disk.atomic_write(workdir / "report.html") as path:
        text = PAGE.format(title=title, body="\n".join(parts))
        path.write_text(text, "utf-8", errors="replace")  # a path may not be UTF-8


def rows(fields):
    """An HTML table of names and values."""
    cells = (f"<tr><td>{html.escape(str(k))}<td>{html.escape(str(v))}" for k, v in fields.items())
    return f"<table>{''.join(cells)}</table>"


def embedded(path, caption):
    """An HTML figure with an embedded picture or video."""
    content = base64.b64encode(path.read_bytes()).decode()
    if path.suffix == ".mp4":
        inner = (
            f'<video controls autoplay loop muted src="data:video/mp4;base64,{content}"></video>'
        )
    else:
        inner = f'<img alt="{path.stem}" src="data:image/png;base64,{content}">'
    return f"<figure>{inner}<figcaption>{caption}</figcaption></figure>"
