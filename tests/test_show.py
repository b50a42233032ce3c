"""All visualizations of a config and of a run, and the report."""

import html.parser
import re

import imageio.v3 as imageio
import jax
import numpy as np
import pytest
import videos

from ddpm_jax import cli, configs
from ddpm_jax.core import schedules, unet
from ddpm_jax.errors import UserError
from ddpm_jax.files import checkpoint, data, images, run_files
from ddpm_jax.runs import frames, generate, samplers, show, train

OF_CONFIG = {"schedule.png", "data.png", "forward.png"}
OF_RUN = {"samples.png", "denoising.png", "denoising_x0.png", "reverse.gif", "reverse.mp4"}


def written(workdir):
    return {path.name for path in (workdir / "show").iterdir()}


class Page(html.parser.HTMLParser):
    """Notes what a page would load, and that its tags match."""

    def __init__(self, text):
        super().__init__()
        self.sources, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.sources += [attributes[name] for name in ("src", "href") if name in attributes]
        if tag not in ("meta", "img", "tr", "td"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_config_without_a_run(tmp_path, config):
    show.show(config, tmp_path)
    assert written(tmp_path) == OF_CONFIG
    page = Page((tmp_path / "report.html").read_text())
    assert len(page.sources) == 3 and not page.open


def test_a_run_shows_itself_after_training(tmp_path, config):
    config.show.update(num_images=3, num_frames=7, timesteps=(19, 10, 0))
    config.show.update(sampler="ancestral", num_steps=0)
    train.train(config, tmp_path)
    show.show(config, tmp_path)
    assert written(tmp_path) == OF_CONFIG | OF_RUN | {"losses.png"}
    folder = tmp_path / "show"
    # Rows of 3 images, 64 pixels and a line of 8 each; above them the titles.
    assert imageio.imread(folder / "denoising.png").shape == (18 + 3 * 72 + 8, 3 * 72 + 8)
    assert imageio.imread(folder / "forward.png").shape == (18 + 3 * 72 + 8, 4 * 72 + 8)
    gif = imageio.imread(folder / "reverse.gif", index=None)
    video = videos.read(folder / "reverse.mp4", *gif.shape[1:3])
    assert len(video) == 7 + 40
    # Lossy, but the same pictures: the last is what it ends with.
    assert np.abs(video[-1].astype(float) - gif[-1].astype(float)).mean() < 12
    assert np.abs(video[0].astype(float) - gif[-1].astype(float)).mean() > 20

    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert not page.open and len(page.sources) == 3 + 5 - 1 + 1 + 1  # no .gif; losses; a grid
    assert all(re.match(r"data:(image/png|video/mp4);base64,", s) for s in page.sources)
    assert "model.channels" in text and "step 4" in text and "eval_loss" in text

    # Of a shorter chain, what is nearest.
    cli.run(["main.py", "--mode=show", f"--workdir={tmp_path}", "--config.show.num_steps=4",
              "--config.show.sampler=heun"])  # fmt: skip
    assert imageio.imread(folder / "denoising.png").shape[1] == 3 * 72 + 8
    with pytest.raises(UserError, match=r"show\.timesteps=\(20,\): must be whole numbers below 20"):
        cli.run(
            ["main.py", "--mode=show", f"--workdir={tmp_path}", "--config.show.timesteps=(20,)"]
        )
    with pytest.raises(UserError, match=r"model\.channels"):
        cli.run(["main.py", "--mode=show", f"--workdir={tmp_path}", "--config.model.channels=16"])


@pytest.mark.parametrize("channels, shape", [(1, (8, 8)), (3, (8, 16)), (4, (16, 8))])
def test_forward_process_of_every_kind_of_image(tmp_path, config, channels, shape):
    """White images; the first column is the image itself, the last one nearly noise."""
    config.data.update(image_size=shape, channels=channels)
    x = np.full((65, *shape, channels), 255, np.uint8)
    show.draw_data(config, tmp_path, data.Source(65, lambda i: data.Batch(x[i], None), ()))
    picture = imageio.imread(tmp_path / "forward.png")
    assert picture.ndim == (2 if channels == 1 else 3)
    column = picture.shape[1] // 11  # the image, and ten steps
    assert picture[18:, :column].min() == 255
    assert (picture[18:, -column:] < 128).mean() > 0.2
    assert imageio.imread(tmp_path / "data.png").ndim == picture.ndim


def test_without_ffmpeg_there_is_all_but_the_video(tmp_path, config, monkeypatch, caplog):
    config.show.update(num_images=1, num_frames=2)
    shapes = unet.param_shapes(configs.make_model(config), (8, 8, 1))
    params = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
    checkpoint.save_imported(tmp_path, params)
    run_files.save_config(config, tmp_path)

    def refuse(*_, **__):
        raise RuntimeError("no such program")

    monkeypatch.setattr(images.imageio_ffmpeg, "write_frames", refuse)
    cli.run(["main.py", "--mode=show", f"--workdir={tmp_path}"])
    assert written(tmp_path) == (OF_CONFIG | OF_RUN) - {"reverse.mp4"}
    assert "no reverse.mp4: no such program" in caplog.text and (tmp_path / "report.html").exists()
    # Nor does a lost dataset hide a run.
    cli.run(["main.py", "--mode=show", f"--workdir={tmp_path}", "--config.data.split=tset"])
    assert "the report has no data: data.split='tset'" in caplog.text


def test_losses_of_a_line_that_is_not_whole(tmp_path):
    text = '{"step": 1, "loss": 0.5, "loss_q1": 0.9}\n{"step": 2, "loss": 0.4}\n{"step": 3, "lo'
    (tmp_path / "metrics.jsonl").write_text(text)
    lines = run_files.read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2]
    show.draw_losses(tmp_path / "losses.png", lines)
    assert imageio.imread(tmp_path / "losses.png").ndim == 3
    assert run_files.read_metrics(tmp_path / "nowhere") == []


def test_losses_that_are_not_finite(tmp_path, config):
    """Of some steps, or of all; as null, or as a bare NaN, which older runs wrote."""
    text = '{"step": 1, "loss": null, "eval_loss": NaN, "loss_q1": 0.9}\n'
    text += '{"step": 2, "loss": 0.4, "epoch_loss": null}\n'
    (tmp_path / "metrics.jsonl").write_text(text)
    lines = run_files.read_metrics(tmp_path)
    show.draw_losses(tmp_path / "losses.png", lines)
    assert imageio.imread(tmp_path / "losses.png").ndim == 3
    show.write_report(config, tmp_path, None, lines)
    assert "<td>epoch_loss<td>nan" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("num_timesteps", [1, 2, 1000])
def test_schedules_of_every_length(tmp_path, num_timesteps):
    show.draw_schedule(tmp_path / "s.png", schedules.make_schedule("cosine", num_timesteps))
    assert imageio.imread(tmp_path / "s.png").shape[:2] == (300, 1200)


def test_what_the_config_says_is_text_in_the_report(tmp_path, config):
    config.data.path = "<script>alert(1)</script>\udcff"  # and a byte that is not UTF-8
    show.write_report(config, tmp_path, None, [])
    assert "<script>" not in (tmp_path / "report.html").read_text()


def test_the_report_has_the_grids_of_training(tmp_path, config):
    """And no other files beside them."""
    for name in ("step_000010", "step_000010 copy", "step_x", "step_1000000", "step_30"):
        images.write_png(tmp_path / "samples" / f"{name}.png", np.zeros((4, 4, 3), np.uint8))
    show.write_report(config, tmp_path, None, [])
    page = (tmp_path / "report.html").read_text()
    assert len(Page(page).sources) == 3
    assert all(f"step {step}<" in page for step in ("10", "30", "1,000,000"))


def test_an_evaluation_is_in_the_report(tmp_path, config):
    """The pictures that it drew."""
    for name in (
        "evaluation.png",
        "evaluation_progressive.png",
        "evaluation_steps.png",
        "evaluation_neighbours.png",
        "evaluation_neighbours_features.png",
    ):
        show.write_report(config, tmp_path, None, [])
        assert f'alt="{name[:-4]}"' not in (tmp_path / "report.html").read_text()
        images.write_png(tmp_path / name, np.zeros((4, 4, 3), np.uint8))
        show.write_report(config, tmp_path, None, [])
        page = (tmp_path / "report.html").read_text()
        assert f'alt="{name[:-4]}"' in page and "<h2>Evaluation" in page
    assert len(Page(page).sources) == 5


@pytest.mark.parametrize("columns, shape", [(4, (2, 4)), (8, (1, 8)), (0, (3, 3))])
def test_columns_of_a_grid(config, tmp_path, columns, shape):
    """8×8 images are shown at 64×64, with lines of one pixel in eight of an image's."""
    config.sample.columns = columns
    generate.write_grid(tmp_path / "grid.png", config, np.zeros((8, 8, 8, 1), np.uint8))
    height, width = imageio.imread(tmp_path / "grid.png").shape
    assert (height // 72, width // 72) == shape


def test_frames_are_of_whole_steps(config, tmp_path, monkeypatch):
    """Heun calls the network at the steps 3, 2, 2, 1, 1, 0, 0: each second call ends a step."""
    config.show.update(sampler="heun", num_steps=4, timesteps=(15, 0), num_frames=2)
    asked = []

    def restore_sampler(config, workdir, **options):
        asked.append(options)
        raise UserError("enough")

    monkeypatch.setattr(show.generate, "restore_sampler", restore_sampler)
    with pytest.raises(UserError, match="enough"):
        show.draw_reverse(config, tmp_path, tmp_path)
    assert asked == [{"frames_at": {1, 6}, "x0_at": {0, 6}}]


def test_frames_of_the_strip_and_of_the_animation(config):
    """With T = 20: the sampler returns the frames of the steps 19, 13, 6, 5, 0, in this order."""
    config.show.update(sampler="ancestral", num_steps=20, timesteps=(19, 5), num_frames=4)
    shown = frames.of_reverse(configs.for_show(config))
    assert (shown.strip, shown.animation) == ([19, 5], [19, 13, 6, 0])
    assert shown.numbers(shown.strip) == [0, 3]
    assert shown.numbers(shown.animation) == [0, 1, 2, 4]


def test_grids_and_report_share_a_program(config, tmp_path, monkeypatch):
    asked = []

    def make_sampler(config, **options):
        asked.append((config.to_json(), {"task": samplers.from_noise} | options))
        raise UserError("enough")

    monkeypatch.setattr(samplers, "make_sampler", make_sampler)
    monkeypatch.setattr(checkpoint, "restore_params", lambda *_: (1, None))
    with pytest.raises(UserError, match="enough"):
        train.make_grid_sampler(config, generate.guidance_for_run(config, tmp_path))
    with pytest.raises(UserError, match="enough"):
        show.draw_reverse(config, tmp_path, tmp_path)
    assert asked[0] == asked[1]
