"""The step on one and four devices, resuming bit for bit, and what stops a run."""

import fractions
import itertools
import json
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ddpm_jax import checks, configs, packing, parallel, signals
from ddpm_jax.core import timesteps, unet
from ddpm_jax.errors import UserError
from ddpm_jax.files import checkpoint, data, run_files
from ddpm_jax.runs import generate, objective, samplers, states, train

pytestmark = pytest.mark.usefixtures("no_report")


def setup(config, num_devices, count_traces=None):
    """A train step on the first devices, and a fresh state there, packed as in training."""
    devices = jax.devices()[:num_devices]
    optimizer = states.make_optimizer(config.optim, config.train.num_steps)
    model = configs.make_model(config)
    state = states.create_state(config, model, optimizer)
    if count_traces is not None:
        model = Counting(model, count_traces)
    schedule = configs.make_schedule(config)
    step = objective.make_train_step(config, model, schedule, optimizer, devices)
    return step, packing.pack(parallel.replicate(state, devices))


class Counting:
    """A model that notes each time it is traced."""

    def __init__(self, model, traces):
        self.model, self.traces = model, traces

    def apply(self, *args, **kwargs):
        self.traces.append(args[1].shape)
        return self.model.apply(*args, **kwargs)


def run(config, num_devices, num_steps, name="loss"):
    """The state after some steps, and the losses (or another metric) of all."""
    step, state = setup(config, num_devices)
    source = data.open_source(config.data)
    size = config.train.batch_size
    batches = data.batches(source, batch_size=size, seed=0, first_step=0, random_flip=False)
    found = []
    for _ in range(num_steps):
        assert_importance_has_begun(state)
        state, values = step(state, parallel.shard(next(batches), num_devices))
        found.append(float(values[name]))
    return jax.tree.map(np.array, packing.unpack(state)), found


def assert_importance_has_begun(state):
    """Before each step but the first, if there is a history of losses."""
    if state.step > 0 and state.loss_history is not None:
        assert state.loss_history.counts.min() >= timesteps.HISTORY


IMPROVED = {
    "diffusion.loss": "hybrid",
    "diffusion.variance": "learned_range",
    "diffusion.loss_weight": "min_snr",
    "train.timesteps": "low_discrepancy",
}
IMPORTANCE = {
    "diffusion.loss": "hybrid",
    "diffusion.variance": "learned_range",
    "train.timesteps": "importance",
    "train.batch_size": 40,
    "diffusion.num_timesteps": 2,  # with 40 images: the history is full after the first step
    "optim.ema_decay": (0.5, 0.9),
}
OBJECTIVES = pytest.mark.parametrize(
    "objective", [{}, IMPROVED, IMPORTANCE], ids=["Ho's", "improved", "importance"]
)


@OBJECTIVES
def test_one_and_four_devices_agree(config, objective):
    """Same losses and parameters within rounding, dropout included."""
    config.update_from_flattened_dict(objective)
    assert config.model.dropout > 0
    one, four = run(config, 1, 4), run(config, 4, 4)
    np.testing.assert_allclose(one[1], four[1], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(one[0].params), jax.tree.leaves(four[0].params), strict=True):
        # Adam makes a full step of a gradient's rounding error where the gradient is zero.
        assert np.linalg.norm(a - b) <= 1e-3 * np.linalg.norm(a) + 1e-3


@pytest.mark.slow
def test_dropout_matters(config):
    config.optim.update(warmup_steps=0, learning_rate=0.01)
    config.model.dropout = 0.5
    _, losses = run(config, 4, 3)
    config.model.dropout = 0.0
    _, without = run(config, 4, 3)
    assert losses[0] == pytest.approx(without[0], rel=1e-3)  # the last layer starts near zero
    assert losses[2] != pytest.approx(without[2], rel=1e-3)


def test_first_loss_and_zero_first_update(config):
    """ε is predicted as 0 at first, so the loss is near E[ε²] = 1; the first rate is 0."""
    step, state = setup(config, 4)
    before = jax.tree.map(np.array, state.params)
    batch = data.open_source(config.data).read(np.arange(8))
    state, values = step(state, parallel.shard(batch))
    assert float(values["loss"]) == pytest.approx(1.0, abs=0.15)
    jax.tree.map(np.testing.assert_array_equal, before, state.params)


def test_noise_is_a_function_of_seed_step_and_example():
    keys = objective.step_keys(0, 3, jnp.arange(6))
    t, eps, *_ = objective.draw(keys, (4, 4, 1), 1000)
    part = objective.draw(objective.step_keys(0, 3, jnp.arange(4, 6)), (4, 4, 1), 1000)
    np.testing.assert_array_equal(eps[4:], part[1])
    np.testing.assert_array_equal(t[4:], part[0])
    for other in (
        objective.step_keys(0, 4, jnp.arange(6)),
        objective.step_keys(1, 3, jnp.arange(6)),
    ):
        assert (objective.draw(other, (4, 4, 1), 1000)[1] != eps).all()


def test_t_is_uniform():
    t, eps, *_ = objective.draw(objective.step_keys(0, 0, jnp.arange(20_000)), (1, 1, 1), 10)
    counts = np.bincount(t, minlength=10)
    assert len(counts) == 10 and np.abs(counts - 2000).max() < 200  # 4.7 standard deviations
    assert float(eps.var()) == pytest.approx(1, abs=0.05)


def checkpointed(config, workdir):
    """All arrays of a run's newest checkpoint."""
    _, like = setup(config, 4)
    with checkpoint.open_manager(workdir, config.train) as manager:
        state = checkpoint.restore(manager, packing.unpack(like))
    return jax.tree.map(np.array, vars(state))


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@OBJECTIVES
def test_resuming_changes_no_bit(config, tmp_path, objective):
    """4 steps equal 2, a new start, and 2 more; flips and dropout included."""
    config.update_from_flattened_dict(objective)
    config.data.random_flip = True
    assert train.train(config, tmp_path / "whole") == 0
    config.train.num_steps = 2
    assert train.train(config, tmp_path / "parts") == 0
    config.train.num_steps = 4
    assert train.train(config, tmp_path / "parts") == 0

    whole, parts = (checkpointed(config, tmp_path / name) for name in ("whole", "parts"))
    assert whole["step"] == parts["step"] == 4
    if whole["loss_history"] is not None:
        assert whole["loss_history"].counts.sum() == 4 * 40
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    losses = [
        {line["step"]: line["loss"] for line in lines(tmp_path / name) if "loss" in line}
        for name in ("whole", "parts")
    ]
    assert losses[0] == losses[1] and sorted(losses[0]) == [1, 2, 3, 4]
    held_out = [line for line in lines(tmp_path / "parts") if "eval_loss" in line]
    assert [line["step"] for line in held_out] == [2, 4]
    assert (tmp_path / "whole" / "samples" / "step_000004.png").exists()
    assert list((tmp_path / "whole").glob("events.out.tfevents.*"))


def test_epochs(config, tmp_path, capfd):
    """20 images in batches of 8: an epoch ends after 2.5 steps, the second one after 5."""
    config.data.split = "train[:20]"
    config.train.update(num_steps=0, num_epochs=2)
    train.train(config, tmp_path / "whole")
    of_steps = {x["step"]: x["loss"] for x in lines(tmp_path / "whole") if "loss" in x}
    means = [np.mean([of_steps[s] for s in epoch]) for epoch in ((1, 2, 3), (4, 5))]
    assert sorted(of_steps) == [1, 2, 3, 4, 5]
    passed = [x["epoch"] for x in lines(tmp_path / "whole") if "epoch" in x]
    assert passed == [0.4, 0.8, 1.2, 1.6, 2.0]
    assert f"epoch 2.00, loss {of_steps[5]:.4f} (epoch: {means[1]:.4f})" in capfd.readouterr().err

    config.train.log_every = 2  # nor does it matter where the run was interrupted
    config.train.num_epochs = 1
    train.train(config, tmp_path / "parts")
    config.train.update(num_steps=4, num_epochs=0)
    train.train(config, tmp_path / "parts")
    config.train.update(num_steps=0, num_epochs=2)
    train.train(config, tmp_path / "parts")
    for name in ("whole", "parts"):
        found = {x["step"]: x["epoch_loss"] for x in lines(tmp_path / name) if "epoch_loss" in x}
        assert found == {3: pytest.approx(means[0]), 5: pytest.approx(means[1])}


def test_a_signal_at_the_end_of_an_epoch_loses_no_line(config, tmp_path, signal_at):
    """Actions due at the step of the signal run once, when the run is resumed."""
    config.data.split = "train[:24]"  # three steps
    config.train.update(num_steps=0, num_epochs=2, eval_every=3, sample_every=3)
    signal_at(3, signal.SIGTERM)
    assert train.train(config, tmp_path) == signal.SIGTERM
    assert not [x for x in lines(tmp_path) if "epoch_loss" in x]
    for _ in range(2):
        assert train.train(config, tmp_path) == 0
        for name in ("epoch_loss", "eval_loss"):
            assert [x["step"] for x in lines(tmp_path) if name in x] == [3, 6]
    assert (tmp_path / "samples" / "step_000003.png").exists()


def test_few_steps_wait_to_be_computed(config):
    """With 32, XLA's CPU runtime deadlocks when other programs use the cores."""
    started = done = most = 0

    class Loss:
        def block_until_ready(self):
            nonlocal done
            done += 1
            return self

    def step_fn(state, batch):
        nonlocal started, most
        started += 1
        most = max(most, started - done)
        return state, {"loss": Loss()}

    state = types.SimpleNamespace(step=0)
    steps = train.updates(config, state, step_fn, data.open_source(config.data))
    for _ in itertools.islice(steps, 50):
        pass
    assert started == 49 and most == train.AHEAD + 1 < 16


def test_an_epoch_shorter_than_a_step(config, tmp_path):
    config.data.split = "train[:3]"
    config.train.update(num_steps=0, num_epochs=4)
    train.train(config, tmp_path)
    of_steps = [x["loss"] for x in lines(tmp_path) if "loss" in x]
    assert [x["epoch_loss"] for x in lines(tmp_path) if "epoch_loss" in x] == of_steps
    assert len(of_steps) == 2


@pytest.mark.slow
def test_asynchronous_saving_does_not_see_later_steps(config, tmp_path):
    """A checkpoint written in the background is the state at its own step."""
    config.train.checkpoint_every = 1
    config.train.keep_checkpoints = 10
    train.train(config, tmp_path / "run")
    _, like = setup(config, 4)
    state, _ = run(config, 4, 3)
    with checkpoint.open_manager(tmp_path / "run", config.train) as manager:
        assert manager.all_steps() == [1, 2, 3, 4]
        manager.delete(4)
        saved = checkpoint.restore(manager, packing.unpack(like))
    jax.tree.map(np.testing.assert_array_equal, saved.params, state.params)


def test_held_out_loss_is_fixed(config):
    """Again the same; the same whatever the seed and the batch size; near 1 at first."""
    _, state = setup(config, 4)
    model, schedule = configs.make_model(config), configs.make_schedule(config)
    source = data.open_source(config.data, "eval_split")
    losses, read = [], []
    config.data.name = "counted"  # not the digits', whose programs are shared with other tests
    counted = source._replace(read=lambda i: read.append(len(i)) or source.read(i))
    for seed, batch_size, parts in ((0, 8, 1), (0, 8, 1), (1, 4, 1), (0, 8, 2)):
        config.seed, config.train.batch_size, config.optim.accumulate = seed, batch_size, parts
        losses.append(objective.make_eval_loss(config, model, schedule, counted)(state.params))
    assert read == [8, 8, 8, 8, 4, 4, 4, 4, 4, 4]  # 10 images; not more at once than in training
    assert losses[0] == losses[1] and losses[2] == losses[3]
    assert losses[0] == pytest.approx(losses[2], rel=1e-5)
    assert losses[0] == pytest.approx(1, abs=0.1)


def test_a_loss_that_is_not_finite_stops_the_run(config, tmp_path):
    config.optim.learning_rate = 1e30
    config.train.num_steps = 20
    config.train.checkpoint_every = 1
    with pytest.raises(UserError, match=r"not finite at step \d+"):
        train.train(config, tmp_path / "run")
    last = checkpointed(config, tmp_path / "run")
    assert last["step"] >= 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(last["params"]))


@pytest.mark.slow
def test_old_checkpoints_go_and_every_nth_stays(config, tmp_path):
    config.train.update(num_steps=7, checkpoint_every=1, keep_checkpoints=2, keep_every=3)
    train.train(config, tmp_path / "run")
    kept = {int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit()}
    assert kept == {3, 6, 7}


def test_an_interrupted_checkpoint_is_ignored(config, tmp_path):
    """What a killed process leaves of a checkpoint has a temporary name."""
    config.train.num_steps = 2
    train.train(config, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    (folder / "2").rename(folder / "3.orbax-checkpoint-tmp-1")
    with pytest.raises(UserError, match="no checkpoint"):
        generate.sample(config, tmp_path / "run")
    assert train.train(config, tmp_path / "run") == 0
    assert (folder / "2").exists()


def test_sampling_reads_the_averaged_or_the_raw_parameters(config, tmp_path):
    shapes = unet.param_shapes(configs.make_model(config), configs.image_shape(config))
    raw, averaged = (
        jax.tree.map(lambda s, v=v: np.full(s.shape, v, s.dtype), shapes) for v in (1, 2)
    )
    with checkpoint.open_manager(tmp_path, config.train) as manager:
        averages = averaged, jax.tree.map(lambda array: 3 * array, raw)
        state = states.TrainState(np.int32(3), raw, averages, {"count": np.int32(3)})
        checkpoint.save(manager, 3, state)
    config.optim.ema_decay = (0.99, 0.9)
    for use_ema, decay, expected in (
        (True, 0.0, averages[0]),
        (True, 0.99, averages[0]),
        (True, 0.9, averages[1]),
        (False, 0.9, raw),
    ):
        config.sample.update(use_ema=use_ema, ema_decay=decay)
        step, params = checkpoint.restore_params(config, tmp_path)
        assert step == 3
        jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_a_run_goes_on_with_other_timesteps(config, tmp_path, caplog):
    """A history of losses begins when it is first needed, and is dropped when it is not."""
    caplog.set_level("INFO")
    for num_steps, name in ((2, "uniform"), (4, "importance"), (5, "uniform")):
        config.train.update(num_steps=num_steps, timesteps=name)
        assert train.train(config, tmp_path) == 0
        folder = tmp_path / "checkpoints" / str(num_steps)
        assert (folder / "loss_history").exists() == (name == "importance")
        if name == "importance":
            assert checkpointed(config, tmp_path)["loss_history"].counts.sum() == 16
    assert "from step 2 on: train.timesteps 'uniform' -> 'importance'" in caplog.text


def test_a_finished_run_is_not_said_to_be_another(config, tmp_path):
    """Its config.json names what it was trained with; what only shows it may change."""
    train.train(config, tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    config.optim.learning_rate *= 2
    with pytest.raises(UserError, match=r"finished.* optim.learning_rate 0.001 -> 0.002; "):
        train.train(config, tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before
    config.optim.learning_rate /= 2
    config.show.num_steps = 5
    assert train.train(config, tmp_path) == 0
    config.optim.learning_rate *= 2
    config.train.num_steps += 1
    assert train.train(config, tmp_path) == 0
    assert run_files.saved_config(tmp_path).optim.learning_rate == 0.002
    config.train.num_steps -= 1
    with pytest.raises(UserError, match=r"train\.num_steps=4: .* has 5 steps already"):
        train.train(config, tmp_path)
    assert run_files.saved_config(tmp_path).train.num_steps == 5


@pytest.mark.parametrize("name, value", [("train.score_samples", 7), ("show.num_steps", 3)])
def test_scores_that_cannot_be_compared_are_named(
    config, tmp_path, caplog, monkeypatch, name, value
):
    monkeypatch.setattr(checkpoint, "latest_step", lambda workdir: 2)
    for before, after in itertools.product((0, 1), repeat=2):  # there are none to compare, or are
        config.train.score_every = before
        run_files.save_config(config, tmp_path)
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict({name: value, "train.score_every": after})
        caplog.clear()
        train.check_changes(changed, tmp_path, last=4)
        warned = f"before and after step 2 do not compare: {name} " in caplog.text
        assert warned == (before > 0 and after > 0)


def test_a_grid_has_no_more_images_than_it_shows(config, tmp_path):
    drawn = []

    def sample(params, indices, stop):
        drawn.append(len(indices))
        shape = len(indices), *configs.image_shape(config)
        return samplers.Generated(np.zeros(shape, np.uint8), None, None)

    config.sample.update(num_samples=10_000, use_ema=False)
    state = states.TrainState(0, {}, ({},), None)
    train.write_grid(tmp_path / "grid.png", sample, config, state, lambda: 0)
    assert drawn == [generate.GRID_IMAGES]


def test_a_skipped_update_leaves_the_history(config):
    """A loss that is not finite must not decide which timesteps are drawn from then on."""
    config.update_from_flattened_dict(IMPORTANCE)
    step, state = setup(config, 4)
    batch = data.open_source(config.data).read(np.arange(8))
    state, values = step(state, parallel.shard(batch))
    assert values["applied"] and int(state.loss_history.counts.sum()) == 8
    broken = jax.tree.map(lambda p: p * np.nan, state.params)
    state, values = step(state.replace(params=broken), parallel.shard(batch))
    assert not values["applied"] and int(state.loss_history.counts.sum()) == 8
    assert np.isfinite(state.loss_history.losses).all()


def test_the_emas_of_a_run_do_not_change(config, tmp_path):
    config.optim.ema_decay = (0.9, 0.5)
    train.train(config, tmp_path)
    config.train.num_steps = 5
    for other in (0.9, (0.5, 0.9), (0.9, 0.5, 0.1)):
        config.optim.ema_decay = other
        with pytest.raises(UserError, match=r"optim.ema_decay \(0.9, 0.5\) -> "):
            train.train(config, tmp_path)
    assert run_files.saved_config(tmp_path).optim.ema_decay == (0.9, 0.5)


def test_metrics_of_lost_steps_are_dropped(config, tmp_path):
    config.train.num_steps = 2
    train.train(config, tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 9.0}\n{"step": 3, "lo')
    config.train.num_steps = 3
    train.train(config, tmp_path)
    assert [line["loss"] for line in lines(tmp_path) if line["step"] == 3 and "loss" in line] != [9]


@pytest.mark.parametrize(
    "field, value",
    [
        ("model.channels", 16),
        ("diffusion.num_timesteps", 30),
        ("data.split", "train[:700]"),
        ("seed", 3),
        ("train.batch_size", 16),
    ],
)
def test_another_config_is_refused(config, tmp_path, field, value):
    saved = config.to_dict()
    config.update_from_flattened_dict({field: value})
    from ml_collections import ConfigDict

    with pytest.raises(UserError, match=f"workdir=.*{field} ") as error:
        checks.check_same_run(ConfigDict(saved), config, "runs/x", "train")
    assert str(error.value).count("->") == 1


def test_training_longer_is_not_another_config(config):
    from ml_collections import ConfigDict

    saved = ConfigDict(config.to_dict())
    config.train.num_steps = 1000
    config.optim.learning_rate = 1e-5
    config.diffusion.variance = "fixed_large"
    checks.check_same_run(saved, config, "runs/x", "train")


def test_a_chain_that_does_not_end_in_noise_is_reported(config, caplog):
    source = data.open_source(config.data, "eval_split")
    caplog.set_level("INFO")
    for name in ("linear", "linear_rescaled"):
        caplog.clear()
        config.diffusion.update(schedule=name, num_timesteps=200)
        state = states.TrainState(0, {}, ({},), None)
        train.describe(config, state, configs.make_schedule(config), source, source)
        named = "does not end in noise (prior KL 0.0" in caplog.text
        assert named == ("linear_rescaled" in caplog.text) == (name == "linear")
        assert ("0.132" in caplog.text) == (name == "linear")


@pytest.mark.parametrize(
    "section, field, value",
    [
        ("optim", "accumulate", 2),
        pytest.param("model", "remat", True, marks=pytest.mark.slow),
    ],
)
def test_what_saves_memory_changes_no_gradient(config, section, field, value):
    """Except for rounding; dropout is that of the whole batch."""
    plain, norms = run(config, 4, 4, name="grad_norm")
    config[section][field] = value
    saving, same_norms = run(config, 4, 4, name="grad_norm")
    np.testing.assert_allclose(same_norms, norms, rtol=1e-4)
    for a, b in zip(jax.tree.leaves(plain.params), jax.tree.leaves(saving.params), strict=True):
        assert np.linalg.norm(a - b) <= 1e-3 * np.linalg.norm(a) + 1e-3


def test_the_batch_must_divide_into_parts(config):
    config.optim.accumulate = 3
    with pytest.raises(UserError, match=r"train\.batch_size=8: .* 4 devices times optim\.accum"):
        checks.check(config)


def test_one_copy_of_the_state_a_device(config):
    """And the buffers of the state before the step are deleted."""
    step, before = setup(config, 4)
    batch = data.open_source(config.data).read(np.arange(8))
    after, _ = step(before, parallel.shard(batch))
    for leaf in jax.tree.leaves(after):
        shards = leaf.addressable_shards
        assert len(shards) == len({shard.device for shard in shards}) == 4
        assert all(shard.data.shape == leaf.shape for shard in shards)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))


def test_the_step_is_traced_and_compiled_once(config, caplog):
    """For the estimate of its memory, and for all steps."""
    traces = []
    step, state = setup(config, 4, traces)
    source = data.open_source(config.data)
    batch = parallel.shard(source.read(np.arange(8)))
    caplog.set_level("INFO", logger="ddpm_jax")
    with jax.log_compiles():
        train.describe_memory(step, state, source, 8)
        compiled = [record for record in caplog.records if "Compiling" in record.getMessage()]
        for _ in range(3):
            state, _ = step(state, batch)
    again = [record for record in caplog.records if "Compiling" in record.getMessage()]
    assert len(compiled) == 1 == len(again) and traces == [(2, 8, 8, 1)]
    assert "memory per device: " in caplog.text


def test_memory_that_is_not_there_is_warned_of(config, caplog, monkeypatch):
    step, state = setup(config, 4)
    monkeypatch.setattr(parallel, "device_memory", lambda: 1000)
    train.describe_memory(step, state, data.open_source(config.data), 8)
    for cure in ("train.batch_size", "optim.accumulate", "model.remat", "more devices"):
        assert cure in caplog.text


# What fails while training goes on costs a warning, or is named when what was trained is saved.


def test_what_only_shows_how_training_goes_does_not_end_it(config, tmp_path, monkeypatch, caplog):
    """A failing grid and held-out loss: each step was saved before."""
    saved_before = []

    def fail(*_, **__):
        saved_before.append(list(saved))
        raise RuntimeError("no\nluck")

    saved, save = [], checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda m, s, x: (saved.append(s), save(m, s, x)))
    monkeypatch.setattr(generate, "write_grid", fail)
    monkeypatch.setattr(objective, "make_eval_loss", lambda *_: fail)
    config.train.update(num_steps=4, sample_every=2, eval_every=2, checkpoint_every=2)
    assert train.train(config, tmp_path) == 0
    assert checkpoint.latest_step(tmp_path) == 4
    assert saved_before == [[2], [2], [2, 4], [2, 4]]
    for name in ("the held-out loss", "the sample grid"):
        assert caplog.text.count(rf"{name} failed, and was skipped: RuntimeError('no\nluck')") == 2


def folder_of_images(path, names, size=(8, 8)):
    rng = np.random.default_rng(0)
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, size, np.uint8)).save(path / name)
    return path


@pytest.mark.parametrize("damage", ["delete", "truncate", "replace"])
def test_data_that_cannot_be_read_any_more(config, tmp_path, monkeypatch, damage):
    """For files that are read during training: the state is saved, and the error names the file."""
    folder = folder_of_images(tmp_path / "images", [f"{i}.png" for i in range(16)])
    fields = dict(split="train[:12]", eval_split="train[12:]", max_ram_gib=0.0)
    config.data.update(name="folder", path=str(folder), **fields)
    config.train.update(num_steps=1000, log_every=3)
    progress_text = train.progress_text

    def vandal(config, workdir, span, step, *rest):
        if step == 3:
            for path in folder.iterdir():
                if damage == "truncate":
                    path.write_bytes(path.read_bytes()[:60])
                else:
                    path.unlink()
                    _ = damage == "replace" and path.write_text("a page that says 404")
        return progress_text(config, workdir, span, step, *rest)

    monkeypatch.setattr(train, "progress_text", vandal)
    why = {"delete": "No such file", "truncate": "truncated", "replace": "not an image"}[damage]
    expected = rf"^data\.path='{folder}': {folder}/\d+\.png cannot be read \(.*{why}.*\)$"
    with pytest.raises(UserError, match=expected):
        train.train(config, tmp_path / "run")
    saved = checkpoint.latest_step(tmp_path / "run")
    assert saved >= 3
    assert lines(tmp_path / "run")[-1]["step"] == saved


def test_a_closed_terminal_saves(config, tmp_path, signal_at):
    """SIGHUP is like SIGTERM; under nohup, which ignores it, training continues."""
    signal_at(3, signal.SIGHUP)
    assert train.train(config, tmp_path) == signal.SIGHUP
    assert checkpoint.latest_step(tmp_path) == 3
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.catch() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop()
    finally:
        signal.signal(signal.SIGHUP, before)


# A run knows what it was trained on.


def on_folder(config, folder, **fields):
    config.data.update(name="folder", path=str(folder), split="train[:60%]", **fields)
    config.data.update(eval_split="train[60%:]")
    config.train.batch_size = 4
    return config


NAMES = [f"{kind}/{i}.png" for kind in ("cat", "dog") for i in range(5)]


@pytest.mark.parametrize(
    "change, message",
    [
        ("rename a class", "other classes: cat, dog -> aardvark, cat; use the same data"),
        ("add an image", "other data: 6 images -> 7; use"),
        ("rename an image", r"other data: the same number of images \(6\), but other files"),
        ("replace an image", r"other data: the same number of images \(6\), but other files"),
    ],
)
def test_other_data_are_refused(config, tmp_path, change, message):
    folder = folder_of_images(tmp_path / "data", NAMES)
    run_files.save_config(on_folder(config, folder, num_classes=2), tmp_path / "run")
    run_files.save_data(data.open_source(config.data), tmp_path / "run")
    if change == "rename a class":
        (folder / "dog").rename(folder / "aardvark")
    elif change == "add an image":
        folder_of_images(folder, ["cat/5.png", "dog/5.png"])
    else:
        for path in folder.rglob("*.png"):  # whichever of them are trained on
            if change == "rename an image":
                path.rename(path.with_stem(f"new{path.stem}"))
            else:
                Image.new("L", (8, 8)).save(path)
    before = (tmp_path / "run" / "data.json").read_text()
    config.train.num_steps = 6
    with pytest.raises(UserError, match=rf"^workdir={tmp_path}/run: was trained on {message}"):
        train.train(config, tmp_path / "run")
    assert (tmp_path / "run" / "data.json").read_text() == before
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.json", "data.json"}


@pytest.mark.slow
def test_the_same_files_elsewhere_are_the_same_data(config, tmp_path):
    """Except for a run older than data.json, whose files are unknown."""
    folder = folder_of_images(tmp_path / "data", NAMES)
    train.train(on_folder(config, folder, num_classes=2), tmp_path / "run")
    folder.rename(tmp_path / "moved")
    config.data.path = str(tmp_path / "moved")
    config.train.num_steps = 5
    assert train.train(config, tmp_path / "run") == 0
    (tmp_path / "run" / "data.json").rename(tmp_path / "run" / "labels.json")
    (tmp_path / "run" / "labels.json").write_text('["cat", "dog"]')
    config.train.num_steps = 6
    assert train.train(config, tmp_path / "run") == 0
    (tmp_path / "run" / "data.json").unlink()
    (tmp_path / "moved").rename(folder)
    config.data.path = str(folder)
    with pytest.raises(UserError, match="was trained on other data"):
        train.train(config, tmp_path / "run")


def test_held_out_images_may_be_others(config, tmp_path):
    """They do not affect training."""
    run_files.save_config(on_folder(config, folder_of_images(tmp_path / "data", NAMES)), tmp_path)
    run_files.save_data(data.open_source(config.data), tmp_path)
    config.data.eval_split = "train[80%:]"
    source, eval_source = train.open_data(config, tmp_path, None)
    assert (source.size, eval_source.size) == (6, 2)


def test_held_out_losses_of_the_raw_and_of_the_chosen_average(config, tmp_path):
    config.optim.ema_decay, config.sample.ema_decay = (0.9, 0.5), 0.5
    written = {}
    metrics = types.SimpleNamespace(write=lambda step, **values: written.update(values))
    span = train.Span(0, 4, fractions.Fraction(2))
    state = states.TrainState(3, "raw", ("of 0.9", "of 0.5"), None)
    actions = train.make_actions(
        config, tmp_path, span, metrics, lambda params, stop: params, None, None, lambda: 0
    )
    actions["the held-out loss"].run(3, state)
    assert written == {"eval_loss": "raw", "eval_loss_ema": "of 0.5"}
