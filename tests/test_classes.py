"""Class labels: from the dataset through training into the picture of a 7."""

import json
import pathlib
import types

import imageio.v3 as imageio
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from ddpm_jax import checks, cli, configs, parallel
from ddpm_jax.core import diffusion, likelihood, sampling, solvers, unet
from ddpm_jax.errors import UserError
from ddpm_jax.files import checkpoint, data, run_files
from ddpm_jax.runs import edit, generate, objective, samplers, states, train

pytestmark = pytest.mark.usefixtures("no_report")
ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture
def conditional(config):
    config.data.num_classes = 10
    return config


def some_params(config, seed=0):
    """Parameters that make the network's output depend on all of its input."""
    shapes = unet.param_shapes(configs.make_model(config), configs.image_shape(config))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: 0.2 * rng.standard_normal(s.shape, np.float32), shapes)


def test_the_network_is_told_the_class(conditional):
    """The output depends on the label; no label is the same as the last label."""
    model, params = configs.make_model(conditional), some_params(conditional)
    net_fn = jax.jit(unet.net_fn(model, params))
    x, t = jnp.ones((11, 8, 8, 1)), jnp.full(11, 3)
    out = np.asarray(net_fn(x, t, jnp.arange(11)))
    assert len(np.unique(out.reshape(11, -1), axis=0)) == 11
    np.testing.assert_allclose(net_fn(x, t)[:1], out[10:], rtol=1e-5, atol=1e-6)


def test_labels_are_dropped_at_the_rate_that_is_asked_for(conditional):
    """Over 4,096 examples; labels that are not dropped do not change."""
    conditional.train.label_dropout = 0.25
    optimizer = states.make_optimizer(conditional.optim, 10)
    labels = np.arange(4096) % 10
    seen = []

    def loss_fn(params, x0, labels, t, eps, dropout_keys):
        jax.debug.callback(lambda a: seen.append(np.asarray(a)), labels)
        return jnp.zeros(len(x0)) * params["w"]

    def step(state, batch):
        return objective.train_step(conditional, loss_fn, optimizer, state, batch)

    params = {"w": jnp.zeros(())}
    state = states.TrainState(jnp.zeros((), int), params, (params,), optimizer.init(params))
    batch = data.Batch(np.zeros((4096, 8, 8, 1), np.uint8), labels)
    one = jax.devices()[:1]
    run = parallel.pmap(step, in_axes=(None, 0), out_axes=(None, None), devices=one)
    jax.block_until_ready(run(parallel.replicate(state, one), parallel.shard(batch, 1)))
    jax.effects_barrier()
    found = seen[0].reshape(-1)
    dropped = found == 10
    assert dropped.mean() == pytest.approx(0.25, abs=0.03)  # 4.4 standard deviations
    np.testing.assert_array_equal(found[~dropped], labels[~dropped])
    assert abs(dropped[::2].mean() - dropped[1::2].mean()) < 0.06


def test_a_classifier_is_told_every_label(conditional):
    """Whatever the rate for classifier-free guidance is: it has no label for "no class"."""
    conditional.model.kind, conditional.train.label_dropout = "classifier", 1.0
    batch, step = data.Batch(np.zeros((8, 8, 8, 1), np.uint8), np.arange(8)), np.int32(0)

    def labels_of(step, batch):
        state = types.SimpleNamespace(step=step)
        return objective.draw_examples(conditional, state, batch).labels

    run = parallel.pmap(labels_of, in_axes=(None, 0))
    np.testing.assert_array_equal(parallel.gather(run(step, parallel.shard(batch))), np.arange(8))


def test_train_and_sample_a_class(conditional, tmp_path, monkeypatch):
    """By number and by name; the grid of all classes has a column for each."""
    config = conditional
    config.sample.update(num_samples=20, batch_size=20)
    assert train.train(config, tmp_path) == 0
    saved = json.loads((tmp_path / "data.json").read_text())
    assert saved["label_names"] == list("0123456789") and saved["images"] == 1500
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for line in (line for line in lines if "loss" in line):
        quarters = [line[f"loss_q{i}"] for i in range(1, 5) if f"loss_q{i}" in line]
        assert quarters and min(quarters) <= line["loss"] * 1.0001
        assert max(quarters) >= line["loss"] * 0.9999
    grid = imageio.imread(tmp_path / "samples" / "step_000004.png")
    assert grid.shape == (2 * 72 + 8, 10 * 72 + 8)
    run_files.save_data(data.Source(1500, None, tuple("abcdefghij")), tmp_path)
    command = ["main.py", "--mode=sample", f"--workdir={tmp_path}", "--config.sample.num_samples=4"]
    command += ["--config.sample.batch_size=4"]
    for label in ("7", "h"):
        cli.run([*command, f"--config.sample.label={label}", "--config.sample.guidance=2"])
    a, b = (
        np.load(tmp_path / "samples" / f"sample_000004_n4_seed0_label{label}_guidance2.npz")[
            "images"
        ]
        for label in ("7", "h")
    )
    np.testing.assert_array_equal(a, b)
    with pytest.raises(
        UserError, match=r"sample\.label='k': choose from a, b, c, d, e, f, g, h, i"
    ):
        cli.run([*command, "--config.sample.label=k"])
    with pytest.raises(UserError, match=r"sample\.label='10': choose from a"):
        cli.run([*command, "--config.sample.label=10"])


def test_bad_labels_and_weights_are_known_before_anything_is_written(conditional, tmp_path):
    conditional.sample.label = "eleven"
    with pytest.raises(UserError, match=r"sample\.label='eleven': choose from 0, 1, 2, 3, 4, 5"):
        train.train(conditional, tmp_path / "run")
    assert not list(tmp_path.iterdir())
    conditional.train.label_dropout = 0.0
    conditional.sample.guidance = 2.0
    with pytest.raises(UserError, match=r"sample\.guidance=2\.0: must be 1: .* label dropout"):
        checks.check(conditional)


def test_numbers_do_where_names_are_lost(conditional, tmp_path):
    run_files.save_config(conditional, tmp_path)
    checkpoint.save_imported(tmp_path, some_params(conditional))
    conditional.sample.update(label="9", num_samples=4)
    generate.sample(conditional, tmp_path)
    assert (tmp_path / "samples" / "sample_000000_n4_seed0_label9.npz").exists()
    for text, message in (("[", "not valid JSON"), ("[1, 2]", "is not a list of names")):
        (tmp_path / "labels.json").write_text(text)
        with pytest.raises(UserError, match=rf"labels\.json: {message}"):
            generate.sample(conditional, tmp_path)


@pytest.mark.parametrize(
    "label, names, number",
    [
        ("3", "abcdef", 3),
        ("c", "abcdef", 2),
        ("2", ("0", "1", "10", "11", "2"), 4),
        ("11", ("0", "1", "10", "11", "2"), 3),
        ("3", ("0", "1", "10", "11", "2"), None),
        ("1", ("7", "cat"), None),
        ("6", "abcdef", None),
        (5000 * "9", "abcdef", None),
    ],
)
def test_a_number_is_a_name_where_there_are_such_names(label, names, number):
    """Folders 0, 1, 10, 11, 2: class 3 does not exist; it is not the fourth folder, 11."""
    if number is None:
        with pytest.raises(UserError, match=rf"sample\.label='{label}': choose from {names[0]}, "):
            generate.label_number(label, tuple(names))
    else:
        assert generate.label_number(label, tuple(names)) == number


def test_guidance_in_the_sampler(conditional):
    """Scale 0 ignores the class, 1 does not; with all classes, image i has class i mod K."""
    config = conditional
    config.sample.update(num_samples=4, batch_size=4)
    params = parallel.replicate(some_params(config))

    def sample(guidance, label, indices=(0, 1, 2, 3)):
        config.sample.guidance = guidance
        return samplers.make_sampler(config, label)(params, np.array(indices)).x.astype(int)

    np.testing.assert_array_equal(sample(0.0, 3), sample(0.0, 8))
    assert (sample(1.0, 3) != sample(1.0, 8)).any()
    assert np.abs(sample(1.0001, 3) - sample(1.0, 3)).max() <= 1
    in_turn = sample(1.0, None, (13, 3, 8, 0))
    np.testing.assert_allclose(in_turn[:2], sample(1.0, 3, (13, 3, 3, 3))[:2], atol=1)
    np.testing.assert_allclose(in_turn[2], sample(1.0, 8, (8, 8, 8, 8))[0], atol=1)


def of_label(model, params):
    """In place of a network: ε = (1 + label) / 10; a classifier's log p is label · Σ x_t."""

    def eps(x_t, t, labels=None):
        labels = jnp.full(len(x_t), 10) if labels is None else labels  # 10 is none
        return jnp.broadcast_to((1 + labels.reshape(-1, 1, 1, 1)) / 10, x_t.shape)

    def log_p(x_t, t):
        return jnp.outer(x_t.sum((1, 2, 3)), jnp.arange(10))

    return log_p if params == "p" else eps


@pytest.mark.parametrize("kind", ["free", "classifier"])
def test_guidance_by_hand(conditional, monkeypatch, kind):
    """On a chain of 5 of 20 steps; ᾱ is that of the network's step τ_3 = 12.

    Classifier-free: ε_u + g (ε_c - ε_u). By a classifier: ε_c - √(1 - ᾱ) · g · ∇ log p.
    """
    monkeypatch.setattr(unet, "net_fn", of_label)
    conditional.diffusion.update(schedule="linear", beta_end=0.4, clip_x0=False)
    conditional.sample.update(num_steps=5, guidance=3.0)
    classifier = ("model", "p") if kind == "classifier" else None
    a = np.cumprod(1 - np.linspace(1e-4, 0.4, 20))[12]
    labels, x_t = jnp.array([2, 0, 9]), jax.random.normal(jax.random.key(0), (3, 8, 8, 1))
    chain = samplers.make_chain(conditional)
    predict_fn = samplers.guided_predict(conditional, chain, {}, labels, classifier)
    given = (1 + np.array([2, 0, 9])) / 10
    eps = 1.1 + 3 * (given - 1.1)
    if classifier:
        eps = given - np.sqrt(1 - a) * 3 * np.array([2, 0, 9])
    expected = (x_t - np.sqrt(1 - a) * eps.reshape(3, 1, 1, 1)) / np.sqrt(a)
    np.testing.assert_allclose(predict_fn(x_t, jnp.full(3, 3)).x0, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("task", [samplers.from_noise, edit.img2img_task])
@pytest.mark.parametrize("sampler", solvers.SOLVERS)
def test_every_sampler_is_guided(conditional, monkeypatch, sampler, task):
    """The network knows one image of class c, (c - 5) / 10: guided, x0_u + 2 (x0_c - x0_u).

    All samplers find exactly that image, from noise and from another image; the network sees both
    labels in one batch, and is called as often as the sampler says.
    """
    calls = []

    def net_fn(model, params):
        schedule = configs.make_schedule(conditional)

        def eps(x_t, t, labels):
            jax.debug.callback(lambda a: calls.append(len(a)), labels)
            x0 = jnp.broadcast_to((labels.reshape(-1, 1, 1, 1) - 5) / 10, x_t.shape)
            return diffusion.predict_eps(schedule, x_t, t, x0)

        return eps

    monkeypatch.setattr(unet, "net_fn", net_fn)
    conditional.sample.update(sampler=sampler, num_steps=4, guidance=2.0, batch_size=4, t=15)
    sample = samplers.make_sampler(conditional, label=3, task=task)
    inputs = {"image": np.full((4, 8, 8, 1), 200, np.uint8)}
    # jax.pmap takes in_axes for those of the leaves where there are as many; a network has more.
    params = parallel.replicate({str(i): np.zeros(1) for i in range(20)})
    images = sample(params, np.arange(4), inputs if task is edit.img2img_task else None).x
    expected = 0.5 + 2 * (-0.2 - 0.5)  # no class is label 10
    assert np.abs(images - (expected + 1) * 127.5).max() <= 1
    chain = samplers.make_chain(conditional)
    nfe = solvers.num_calls(task(conditional, chain).solver)
    jax.effects_barrier()
    assert calls == nfe * 4 * [2]  # on 4 devices


@pytest.mark.parametrize(
    "label, task, expected",
    [
        ("", samplers.from_noise, None),
        ("", edit.img2img_task, 10),
        ("3", samplers.from_noise, 3),
        ("3", edit.img2img_task, 3),
    ],
)
def test_images_to_edit_are_of_no_class_unless_one_is_given(
    conditional, tmp_path, monkeypatch, label, task, expected
):
    asked = []
    monkeypatch.setattr(checkpoint, "restore_params", lambda *_: (5, {}))
    monkeypatch.setattr(
        samplers, "make_sampler", lambda config, **options: asked.append(options) or max
    )
    conditional.sample.label = label
    generate.restore_sampler(conditional, tmp_path, task)
    assert asked == [{"task": task, "label": expected, "classifier": None}]


@pytest.mark.parametrize(
    "name, value",
    [
        ("diffusion.num_timesteps", 10),
        ("diffusion.schedule", "linear"),
        ("diffusion.beta_end", 0.1),
        ("diffusion.zero_terminal_snr", True),
        ("data.image_size", (16, 16)),
        ("data.channels", 3),
        ("model.kind", "unet"),
    ],
)
def test_a_classifier_of_other_images_or_another_chain(config, tmp_path, name, value):
    config.sample.classifier = str(tmp_path)
    saved = config.copy_and_resolve_references()
    saved.update_from_flattened_dict({"model.kind": "classifier", "data.num_classes": 10})
    saved.update_from_flattened_dict({name: value})
    run_files.save_config(saved, tmp_path)
    message = "holds no classifier" if name == "model.kind" else f"its {name} is .*, this run's"
    with pytest.raises(UserError, match=rf"sample\.classifier=.*: {message}"):
        generate.load_classifier(config)


def test_a_classifier_has_to_know_the_run_s_classes(conditional, monkeypatch):
    conditional.sample.label = "dog"
    monkeypatch.setattr(generate, "load_classifier", lambda _: ("model", "p", ("cat", "dog")))
    for names in ((), ("cat", "dog")):
        found = generate.guidance_for(conditional, names)
        assert found == {"label": 1, "classifier": ("model", "p")}
    with pytest.raises(UserError, match=r"sample\.classifier=.*: has other classes: cat, dog"):
        generate.guidance_for(conditional, ("dog", "cat"))


@pytest.mark.slow
def test_a_classifier_learns_and_guides(config, tmp_path):
    """Trained on x_t by the same loop: its loss falls; its gradient changes what is sampled."""
    unconditional = tmp_path / "unet"
    train.train(config, unconditional)
    config.data.num_classes = 10
    config.model.kind = "classifier"
    config.model.channels = 16
    config.optim.update(learning_rate=3e-3, warmup_steps=5)
    config.train.update(num_steps=120, batch_size=64, eval_every=120, log_every=10)
    train.train(config, tmp_path / "classifier")
    assert not (tmp_path / "classifier" / "samples").exists()
    text = (tmp_path / "classifier" / "metrics.jsonl").read_text()
    losses = [line["loss"] for line in map(json.loads, text.splitlines()) if "loss" in line]
    assert losses[0] > 2 and losses[-1] < 0.9 * losses[0]  # log 10 = 2.3 knows nothing

    command = ["main.py", "--mode=sample", f"--workdir={unconditional}"]
    guided = [*command, f"--config.sample.classifier={tmp_path / 'classifier'}"]
    cli.run([*guided, "--config.sample.label=3", "--config.sample.guidance=0"])
    cli.run([*guided, "--config.sample.label=3"])
    cli.run(command)
    folder = unconditional / "samples"
    plain, none, three = (
        np.load(*folder.glob(f"sample_000004_n4_seed0{rest}.npz"))["images"].astype(int)
        for rest in ("", "_label3_guidance0_classifier-*", "_label3_classifier-*")
    )
    assert np.abs(plain - none).max() <= 1 and np.abs(plain - three).max() > 1
    with pytest.raises(UserError, match=r"sample\.classifier=.*holds no classifier"):
        cli.run([*command, f"--config.sample.classifier={unconditional}"])
    with pytest.raises(UserError, match=r"model\.kind='classifier': a classifier cannot do this"):
        cli.run(["main.py", "--mode=sample", f"--workdir={tmp_path / 'classifier'}"])
    with pytest.raises(UserError, match=r"its diffusion\.num_timesteps is 20, this run's 10"):
        config.update(model={"kind": "unet"}, diffusion={"num_timesteps": 10})
        config.sample.classifier = str(tmp_path / "classifier")
        generate.load_classifier(config)


@pytest.mark.slow
@pytest.mark.parametrize(
    "prediction, loss, variance",
    [("v", "simple", "fixed_small"), ("x0", "vlb", "fixed_large"), ("mean", "vlb", "learned")],
)
def test_ablations_train_sample_and_are_measured(config, tmp_path, prediction, loss, variance):
    """Each of Table 2's choices through training, sampling and bits/dim."""
    config.diffusion.update(prediction=prediction, loss=loss, variance=variance)
    config.evaluate.update(num_samples=0, bits_per_dim_images=4)
    assert train.train(config, tmp_path) == 0
    settings = ["--config.evaluate.num_samples=0", "--config.evaluate.bits_per_dim_images=4"]
    settings += ["--config.evaluate.nearest_images=0"]
    cli.run(["main.py", "--mode=evaluate", f"--workdir={tmp_path}", *settings])
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found["variance"] == variance
    assert found["bits_per_dim"] == found[f"bits_per_dim_{variance}"] > 0
    assert ("bits_per_dim_learned" in found) == (variance == "learned")
    assert (tmp_path / "samples" / "step_000004.png").exists()


@pytest.mark.slow
def test_asking_for_a_seven(tmp_path):
    """A short training on the digits; a classifier of real ones recognises what was asked for."""
    run = f"--workdir={tmp_path / 'run'}"
    cli.run(["main.py", f"--config={ROOT}/configs/digits_conditional.py", run,
              "--config.train.num_steps=200", "--config.train.score_every=0"])  # fmt: skip
    cli.run(["main.py", "--mode=sample", run, "--config.sample.guidance=2",
              "--config.sample.sampler=dpmpp_sde", "--config.sample.num_steps=20",
              "--config.sample.num_samples=80", "--noconfig.sample.use_ema"])  # fmt: skip
    (path,) = (tmp_path / "run" / "samples").glob("sample_000200_n80_*guidance2*.npz")
    images = np.load(path)["images"].reshape(80, 64)
    digits = load_digits()
    classifier = SVC(C=10).fit(np.round(digits.data * (255 / 16)), digits.target)
    recognised = (classifier.predict(images) == np.arange(80) % 10).mean()
    assert recognised > 0.8


def test_the_bound_as_a_loss_is_the_bound(config):
    """The loss at t is the term of likelihood.vlb at t, in bits/dim."""
    config.diffusion.update(prediction="mean", loss="vlb", variance="learned")
    model, schedule = configs.make_model(config), configs.make_schedule(config)
    params = some_params(config)
    x0 = np.float32(data.open_source(config.data).read(np.arange(3)).images / 127.5 - 1)
    keys = sampling.image_keys(0, jnp.arange(3))
    predict_fn = configs.make_predictor(config, schedule, unet.net_fn(model, params))

    def noise(t):
        return sampling.noise(keys, t, (8, 8, 1))

    bound = likelihood.vlb(schedule, predict_fn, x0, noise, variances=("learned",))
    loss_fn = jax.jit(objective.make_loss(config, model, schedule))
    for t in (0, 1, 19):
        loss = loss_fn(params, x0, None, jnp.full(3, t), noise(t))
        np.testing.assert_allclose(loss, bound.terms["learned"][t], rtol=1e-4)


def test_loss_by_quarter_of_t():
    """Over the steps since the last log point, each weighted with its number of examples."""
    pending = [
        {"loss": 1.0, "share": [0.5, 0.5, 0, 0], "loss_share": [1, 0.5, 0, 0], "applied": True},
        {"loss": 2.0, "share": [0.25, 0.75, 0, 0], "loss_share": [0.5, 3, 0, 0], "applied": True},
        {"loss": np.nan, "share": [0, 0, 0, 1], "loss_share": 4 * [np.nan], "applied": False},
    ]
    means = train.summarize(pending)
    assert (means["loss_q1"], means["loss_q2"], means["loss"]) == (2.0, 2.8, 1.5)
    assert means["skipped"] == 1
    assert "loss_q3" not in means


def test_a_variance_that_was_learned_is_part_of_the_network(config, tmp_path):
    saved = config.copy_and_resolve_references()
    config.diffusion.update(loss="vlb", variance="learned")
    for purpose in ("train", "use"):
        with pytest.raises(UserError, match=r"diffusion\.variance"):
            checks.check_same_run(saved, config, tmp_path, purpose)
    saved.diffusion.update(loss="vlb", variance="fixed_small")
    config.diffusion.variance = "fixed_large"
    checks.check_same_run(saved, config, tmp_path, "use")
    with pytest.raises(UserError, match=r"diffusion\.variance"):  # it is in the loss
        checks.check_same_run(saved, config, tmp_path, "train")
