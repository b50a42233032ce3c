"""Scores during training: resumed, killed, ranked; the best checkpoint, and choosing one."""

import contextlib
import math
import shutil
import signal

import numpy as np
import pytest

from ddpm_jax import checks, configs, interface
from ddpm_jax.errors import UserError
from ddpm_jax.files import checkpoint, data, images, row_files, run_files
from ddpm_jax.metrics import classifier, distances, features, inception
from ddpm_jax.runs import generate, reference, samplers, scores, show, train

pytestmark = pytest.mark.usefixtures("no_report")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The classifier of the digits is trained once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def scored(config, cache):
    config.train.update(score_every=2, score_samples=6, eval_every=100)
    config.show.num_steps = 2
    config.evaluate.cache_dir = str(cache)
    return config


def scores_in(workdir):
    lines = run_files.read_metrics(workdir)
    return {line["step"]: line["distance"] for line in lines if "distance" in line}


def test_a_cache_that_cannot_be_used(scored, tmp_path):
    """It is found before anything is written."""
    (tmp_path / "file").write_text("")
    scored.evaluate.cache_dir = str(tmp_path / "file" / "cache")
    with pytest.raises(UserError, match=r"evaluate\.cache_dir=.*cannot be used"):
        train.train(scored, tmp_path / "run")
    assert not (tmp_path / "run").exists()


WHOLE = []  # once for all tests


@pytest.fixture
def whole(scored, tmp_path_factory):
    """A run that was not interrupted, only to be read."""
    if not WHOLE:
        WHOLE.append(tmp_path_factory.mktemp("trained") / "whole")
        train.train(scored, WHOLE[0])
    return WHOLE[0]


def test_scores_of_a_resumed_run(scored, whole, tmp_path):
    """Bit for bit those of a run that was not interrupted; nothing else is left in the folder."""
    scored.train.num_steps = 2
    train.train(scored, tmp_path)
    scored.train.num_steps = 4
    train.train(scored, tmp_path)
    assert scores_in(whole) == scores_in(tmp_path)
    assert sorted(scores_in(whole)) == [2, 4]
    assert not (tmp_path / "scores").exists()
    assert checkpoint.latest_step(tmp_path) == 4


def test_a_killed_score_goes_on(scored, whole, tmp_path, monkeypatch):
    """The step is saved before; images that were sampled are not sampled again."""
    make, sampled = samplers.make_sampler, []

    class Killed(BaseException):
        """Which no code of the run catches."""

    def killed_once(*args, **options):
        sample = make(*args, **options)

        def one_batch(params, indices, **rest):
            sampled.append(int(indices[0]))
            if sampled.count(4) == 1 and indices[0] == 4:
                raise Killed
            return sample(params, indices, **rest)

        return one_batch

    monkeypatch.setattr(samplers, "make_sampler", killed_once)
    with pytest.raises(Killed):
        train.train(scored, tmp_path / "parts")
    assert sampled == [0, 4]  # the score's first and second batch after two of four steps
    assert checkpoint.latest_step(tmp_path / "parts") == 2 and scores_in(tmp_path / "parts") == {}
    train.train(scored, tmp_path / "parts")
    assert sampled[2:] == [4, 0, 0, 4]  # the rest; the grid, and the score of the last step
    assert scores_in(tmp_path / "parts") == scores_in(whole)


def test_a_killed_score_of_other_parameters(scored, tmp_path, monkeypatch):
    """Is not finished by a run that took other steps; the checkpoint of its step was lost."""
    scored.train.num_steps = 2
    train.train(scored, tmp_path / "whole")
    collect = row_files.collect

    def stopped(folder, count, size, rows, name, stop):
        collect(folder, count, size, rows, name, lambda: 15)

    scored.seed = 1
    with monkeypatch.context() as patched:
        patched.setattr(row_files, "collect", stopped)
        train.train(scored, tmp_path / "other")
    (folder,) = (tmp_path / "other" / "scores").iterdir()
    shutil.copytree(folder, tmp_path / "parts" / "scores" / folder.name)
    scored.seed = 0
    train.train(scored, tmp_path / "parts")
    assert scores_in(tmp_path / "parts") == scores_in(tmp_path / "whole")


def test_a_killed_score_with_another_sampler(scored, tmp_path, monkeypatch):
    """Is sampled again from the beginning, not finished by other samples."""
    scored.train.num_steps = 2
    collect = row_files.collect

    def stopped(folder, count, size, rows, name, stop):
        collect(folder, count, size, rows, name, lambda: 15)

    with monkeypatch.context() as patched:
        patched.setattr(row_files, "collect", stopped)
        train.train(scored, tmp_path / "parts")
    assert len(list((tmp_path / "parts" / "scores").rglob("rows_*.npy"))) == 1
    scored.show.num_steps = 3
    train.train(scored, tmp_path / "parts")
    train.train(scored, tmp_path / "whole")
    assert scores_in(tmp_path / "parts") == scores_in(tmp_path / "whole")
    assert not (tmp_path / "parts" / "scores").exists()


def test_the_distance_is_that_of_the_samples(scored, whole):
    """As computed here from all images at once, with scikit-learn's own classifier."""
    images = interface.load(whole).sample(6, sampler="dpmpp_sde", num_steps=2)
    source = data.open_labelled(scored.data)
    batch = source.read(np.arange(source.size))
    trained = classifier.train(*batch)
    layer = trained.coefs_[0], trained.intercepts_[0]
    flat = (x.reshape(len(x), -1) / 255 for x in (batch.images, images))
    sets = (np.maximum(x @ layer[0] + layer[1], 0) for x in flat)
    expected = distances.frechet_distance(*(distances.statistics([x]) for x in sets))
    assert scores_in(whole)[4] == pytest.approx(expected, rel=1e-6)


def relabelled(batch):
    return batch._replace(labels=batch.labels % 2)


def test_the_classifier_is_trained_once(scored, tmp_path, monkeypatch):
    """And serves other runs; other labels, and another training split, have their own."""
    sources = [data.open_labelled(scored.data, field) for field in ("split", "eval_split")]
    first = reference.cached_classifier(scored, sources[0], sources)
    monkeypatch.setattr(classifier, "train", None)
    again = reference.cached_classifier(scored, sources[0], sources)
    np.testing.assert_array_equal(first.layer.kernel, again.layer.kernel)
    others = [s._replace(read=lambda i, s=s: relabelled(s.read(i))) for s in sources]
    with pytest.raises(TypeError):
        reference.cached_classifier(scored, sources[0], others)
    scored.data.split = "train[:100]"
    with pytest.raises(TypeError):
        reference.cached_classifier(scored, data.open_labelled(scored.data), sources)


@pytest.mark.parametrize("values, kept", [((5, 1, 4, 3), [2, 4]), ((1, 2, 3, 4), [1, 4])])
def test_the_best_checkpoint_is_kept(scored, tmp_path, monkeypatch, values, kept):
    """Besides the newest; every command can choose it, the newest, or a step."""
    scored.train.update(score_every=1, keep_best=True, keep_checkpoints=1)

    def make_score(*_):
        return lambda step, params, stop: {"distance": float(values[step - 1])}

    monkeypatch.setattr(scores, "make_score", make_score)
    train.train(scored, tmp_path)
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == kept
    for chosen, step in (("newest", 4), ("best", kept[0]), (str(kept[0]), kept[0]), (4, 4)):
        assert interface.load(tmp_path, checkpoint=chosen).step == step
    show.draw_scores(tmp_path / "scores.png", run_files.read_metrics(tmp_path), 8)
    assert (tmp_path / "scores.png").exists()
    scored.sample.checkpoint = "best"
    assert generate.restore_sampler(scored, tmp_path)[0] == kept[0]
    with pytest.raises(UserError, match=f"='3': step 3 is not there; the .* are {kept[0]}, 4$"):
        interface.load(tmp_path, checkpoint=3)
    with pytest.raises(UserError, match="must be newest, best, or a step"):
        interface.load(tmp_path, checkpoint="latest")


def test_a_ring_marks_the_best_score(tmp_path, monkeypatch):
    """Also where a score is not a number, as of samples that are not finite."""
    drawn, scored = [], {10: 5.0, 20: math.nan, 30: 2.0, 40: 3.0}
    monkeypatch.setattr(images, "write_figure", lambda path, figure: drawn.append(figure))
    lines = [{"step": step, "distance": value} for step, value in scored.items()]
    show.draw_scores(tmp_path / "scores.png", lines, 8)
    assert best_points(drawn[0]) == [[[30 * 8, 2.0]]]


def test_fid_and_kid_have_a_curve_each(tmp_path, monkeypatch):
    """Their best steps may differ, and KID may be below 0."""
    drawn, fid, kid = [], (7.0, 2.0, 3.0), (0.02, 0.001, -0.001)
    monkeypatch.setattr(images, "write_figure", lambda path, figure: drawn.append(figure))
    lines = [{"step": n, "fid": a, "kid": b} for n, (a, b) in enumerate(zip(fid, kid, strict=True))]
    show.draw_scores(tmp_path / "scores.png", lines, 10)
    of_fid, _, of_kid, _ = drawn[0].axes
    assert best_points(drawn[0]) == [[[10, 2.0]]]
    assert of_kid.lines[0].get_ydata().tolist() == list(kid)
    assert (of_fid.get_yscale(), of_kid.get_yscale()) == ("log", "linear")
    assert of_kid.get_ylim()[0] < -0.001


def best_points(figure):
    """What the rings of a figure's first panel mark."""
    rings = [line for line in figure.axes[0].lines if line.get_fillstyle() == "none"]
    return [ring.get_xydata().tolist() for ring in rings]


def test_no_best_without_scores(config, tmp_path):
    train.train(config, tmp_path)
    with pytest.raises(UserError, match=r"sample.checkpoint='best': no checkpoint has a score"):
        interface.load(tmp_path, checkpoint="best")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"train.keep_best": True, "train.score_every": 0}, "train.keep_best=True: needs"),
        ({"train.score_samples": 1}, "train.score_samples=1: must be 2 or more"),
        ({"sample.checkpoint": "-1"}, "sample.checkpoint='-1': must be newest, best, or a step"),
        ({"model.kind": "classifier", "data.num_classes": 10}, "train.score_every=2: must be 0"),
    ],
    ids=str,
)
def test_scores_that_cannot_be(scored, changes, message):
    scored.update_from_flattened_dict(changes)
    with pytest.raises(UserError) as error:
        checks.check(scored)
    assert message in str(error.value)


def test_data_without_labels_has_no_score(scored, tmp_path):
    """Nothing is written; a program's own arrays are trained on without."""
    images = np.zeros((20, 8, 8, 1), np.uint8)
    assert interface.train(scored, tmp_path / "run", images).config.train.score_every == 0
    scored.data.update(name="arrays", split="train[:90%]", eval_split="train[90%:]")
    with pytest.raises(UserError, match=r"train.score_every=2: arrays has no classes"):
        train.train(scored, tmp_path / "other", data.Batch(images, None))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "images, message",
    [
        (np.zeros((1, 8, 8, 1), np.uint8), r"arrays train holds 1 image, and FID needs"),
        (np.broadcast_to(np.uint8(0), (5000, 200, 300, 1)), r"images of 200×300 are large for a"),
    ],
)
def test_images_that_no_classifier_is_trained_on(scored, tmp_path, images, message):
    shape, count = images.shape[1:3], len(images)
    scored.data.update(name="arrays", split="train", eval_split="train", image_size=shape)
    scored.data.num_classes = 2
    labels = np.arange(count) % 2
    with pytest.raises(UserError, match=f"train.score_every=2: {message}"):
        scores.choose(scored, data.Batch(images, labels))


@pytest.mark.parametrize("count, warns", [(64, True), (65, False)])
def test_few_samples_are_warned_of(scored, tmp_path, caplog, count, warns):
    scored.train.score_samples = count
    chosen = scores.choose(scored)
    source = data.open_source(scored.data)
    scores.make_score(scored, source, chosen, None, tmp_path, None)
    assert ("train.score_samples=64: not above the 64 features" in caplog.text) == warns


def test_the_measure_that_fits(scored, monkeypatch):
    """Inception for RGB images where its weights are; a file that is not there is an error."""
    monkeypatch.setattr(inception, "load", lambda path: f"weights of {path!r}")
    monkeypatch.setattr(inception, "is_packaged", lambda: True)
    assert scores.choose(scored)[0] is None  # gray
    scored.evaluate.inception_weights = "a.pth"
    assert scores.choose(scored) == ("weights of 'a.pth'", ())
    scored.data.channels = 4
    assert scores.choose(scored)[0] is None  # Inception has no alpha
    scored.evaluate.inception_weights = ""
    scored.data.channels = 3
    assert scores.choose(scored) == ("weights of ''", ())
    monkeypatch.setattr(inception, "is_packaged", lambda: False)
    weights, (train_source, _) = scores.choose(scored)
    assert weights is None and train_source.label_names == tuple("0123456789")
    monkeypatch.undo()
    scored.evaluate.inception_weights = "no.pth"
    with pytest.raises(UserError, match=r"inception_weights='no.pth': no such file"):
        scores.choose(scored)


@pytest.fixture
def linear(scored, tmp_path, monkeypatch):
    """Seven features of RGB images in place of Inception's, of which four are FID's."""
    weights = np.random.default_rng(0).standard_normal((192, 7))

    def extract(images):
        return np.float32(images.reshape(len(images), 192) / 255 @ weights)

    monkeypatch.setattr(inception, "FEATURES", 4)
    monkeypatch.setattr(inception, "is_packaged", lambda: True)
    monkeypatch.setattr(inception, "load", lambda path: inception.Weights({}, None, "linear"))
    monkeypatch.setattr(features, "make_extractor", lambda *_: extract)
    scored.data.channels = 3
    scored.evaluate.cache_dir = str(tmp_path / "cache")
    return extract


def test_fid_and_kid_of_rgb_images(scored, tmp_path, linear):
    """Those of the samples and all training images."""
    train.train(scored, tmp_path / "run")
    last = [line for line in run_files.read_metrics(tmp_path / "run") if "fid" in line][-1]
    images = interface.load(tmp_path / "run").sample(6, sampler="dpmpp_sde", num_steps=2)
    source = data.open_source(scored.data)
    of_both = [linear(x)[:, :4] for x in (source.read(np.arange(source.size)).images, images)]
    fid = distances.frechet_distance(*(distances.statistics([x]) for x in of_both))
    assert last["step"] == 4 and last["fid"] == pytest.approx(fid, rel=1e-5)
    assert last["kid"] == pytest.approx(distances.kernel_distance(*of_both).value, rel=1e-5)
    assert run_files.best_step(tmp_path / "run", [2, 4]) in (2, 4)


def test_a_signal_while_the_training_images_features_are_computed(
    scored, tmp_path, linear, monkeypatch
):
    """Ends the run before its first step; the features go on from there."""
    calls = []

    def extract(images):
        calls.append(len(images))
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return linear(images)

    monkeypatch.setattr(features, "make_extractor", lambda *_: extract)
    monkeypatch.setattr(reference, "IMAGES_PER_FILE", 400)
    assert train.train(scored, tmp_path / "run") == signal.SIGTERM
    assert calls == [400, 400] and checkpoint.latest_step(tmp_path / "run") is None
    assert train.train(scored, tmp_path / "run") == 0
    assert calls[2:5] == [400, 300, scored.sample.batch_size]  # of 1,500; then the samples
    with pytest.raises(KeyboardInterrupt):
        calls.clear()
        scored.evaluate.cache_dir = str(tmp_path / "another")
        interface.train(scored, tmp_path / "other")


@pytest.mark.parametrize("newest, best", [("fid", 300), ("distance", 100)])
def test_the_best_of_one_measure(tmp_path, newest, best):
    """A distance of 3 is not better than a FID of 20; the measure is the newest."""
    lines = [(100, "distance", 3.0), (200, "fid", 40.0), (300, "fid", 20.0)]
    lines += [(400, "distance", 9.0)] if newest == "distance" else []
    with contextlib.closing(run_files.Metrics(tmp_path, 0)) as metrics:
        for step, name, value in lines:
            metrics.write(step, **{name: value})
    assert run_files.best_step(tmp_path, [100, 200, 300, 400]) == best


def test_minutes_leave_out_what_is_not_training():
    lines = [{"step": 10, "images_per_second": 8.0}, {"step": 10, "distance": 1.0},
             {"step": 30, "images_per_second": 16.0}]  # fmt: skip
    assert show.minutes_at(lines, 48) == {10: 1.0, 30: 2.0}


@pytest.mark.nightly
@pytest.mark.slow
def test_the_score_ranks(tmp_path, cache):
    """Real digits < a finished run < one of 500 steps < one of 50 < noise.

    The real ones are of the training images: fewer than 1,000 images have a larger distance, and
    there are only 297 held-out ones, by other people.
    """
    config = configs.named_config("digits")
    config.evaluate.cache_dir = str(cache)
    config.train.update(score_every=50, score_samples=1000)
    train.train(config, tmp_path)
    found = scores_in(tmp_path)
    sources = [data.open_labelled(config.data, field) for field in ("split", "eval_split")]
    small = reference.cached_classifier(config, sources[0], sources)
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (1000, 8, 8, 1)).astype(np.uint8)
    digits = sources[0].read(rng.permutation(sources[0].size)[:1000]).images
    real, noise = (
        distances.frechet_distance(
            small.statistics, distances.statistics([classifier.features(small.layer, x)])
        )
        for x in (digits, noise)
    )
    ranked = [real, found[2200], found[500], found[50], noise]
    assert ranked == sorted(ranked) and all(map(math.isfinite, ranked)), ranked
