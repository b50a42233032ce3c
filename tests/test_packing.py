"""What makes small networks fast on a CPU: packed parameters, and memory in several arenas."""

import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import configs, cpu, packing, parallel
from ddpm_jax.files import data
from ddpm_jax.runs import objective, states

LIMIT = 100  # elements; the tiny network has arrays below and above it


@pytest.fixture
def state(config, monkeypatch):
    """A TrainState with a history of losses, two EMAs, and a different value everywhere."""
    monkeypatch.setattr(packing, "SMALL", LIMIT)
    config.train.timesteps, config.optim.ema_decay = "importance", (0.9, 0.5)
    optimizer = states.make_optimizer(config.optim, 10)
    state = states.create_state(config, configs.make_model(config), optimizer)
    leaves, treedef = jax.tree.flatten(state)
    rng = np.random.default_rng(0)
    leaves = [jnp.asarray(rng.uniform(1, 2, x.shape).astype(x.dtype)) for x in leaves]
    return jax.tree.unflatten(treedef, leaves)


def test_there_and_back(state):
    """Every array; only large ones are the same objects."""
    packed = packing.packed(state)
    of_params = [x.size for x in jax.tree.leaves(state.params)]
    small = [size for size in of_params if size < LIMIT]
    assert 1 < len(small) < len(of_params)
    assert packed.params.small.shape == (sum(small),)
    fewer = 5 * (len(small) - 1)  # parameters, two EMAs, and Adam's two moments
    assert len(jax.tree.leaves(packed)) == len(jax.tree.leaves(state)) - fewer
    back = packing.unpack(packed)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, back, state)
    pairs = zip(jax.tree.leaves(back.params), jax.tree.leaves(state.params), strict=True)
    assert all((a is b) == (a.size >= LIMIT) for a, b in pairs)
    for a, b in zip(*map(jax.tree.leaves, (packing.unpack(state), state)), strict=True):
        assert a is b  # what is not packed stays as it is


def test_nothing_small():
    """There is nothing to pack."""
    tree = {"kernel": jnp.zeros((3, packing.SMALL))}, {}, 2.0
    found = packing.packed(tree)
    assert found[0] is tree[0] and found[1:] == ({}, 2.0)


def test_only_on_a_cpu(state, monkeypatch):
    assert isinstance(packing.pack(state).params, packing.Packed)
    monkeypatch.setattr(packing.cpu, "is_used", lambda: False)
    assert packing.pack(state) is state


@pytest.mark.parametrize(
    "name, mode, one_arena",
    [
        ("digits", "train", False),
        ("digits", "sample", False),
        ("digits", "evaluate", True),  # by Inception, whose inputs are large
        ("mnist", "train", True),
    ],
)
def test_arenas_of_the_allocator(monkeypatch, name, mode, one_arena):
    """Large blocks need the only arena that keeps them; freed memory is kept in any case."""
    options = {}
    library = types.SimpleNamespace(mallopt=options.__setitem__)
    monkeypatch.setattr(cpu.ctypes, "CDLL", lambda _: library)
    monkeypatch.setattr(cpu, "entry_points", lambda **_: ())
    monkeypatch.setattr(cpu.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setenv("XLA_FLAGS", "")
    cpu.prepare(configs.positions(configs.named_config(name), mode))
    arena_max, mmap_max, trim_threshold = -8, -4, -1
    expected = {mmap_max: 0, trim_threshold: -1} | ({arena_max: 1} if one_arena else {})
    assert options == expected


def test_scores_by_inception_need_one_arena():
    config = configs.named_config("digits")
    assert configs.positions(config, "train") == 64 * 8 * 8
    config.evaluate.inception_weights = "a.pth"
    assert configs.positions(config, "train") == math.inf
    assert configs.positions(config, "sample") == 64 * 8 * 8
    config.train.score_every = 0
    assert configs.positions(config, "train") == 64 * 8 * 8


def test_a_step_of_a_packed_state(config):
    """The same losses, parameters, EMAs and moments, within rounding."""
    optimizer, model = states.make_optimizer(config.optim, 10), configs.make_model(config)
    step = objective.make_train_step(config, model, configs.make_schedule(config), optimizer)
    batch = parallel.shard(data.open_source(config.data).read(np.arange(8)))
    one, other = (states.create_state(config, model, optimizer) for _ in range(2))
    one, other = parallel.replicate(one), packing.packed(parallel.replicate(other))
    for _ in range(3):
        (one, values), (other, of_packed) = step(one, batch), step(other, batch)
        assert float(values["loss"]) == pytest.approx(float(of_packed["loss"]), rel=1e-6)
    assert isinstance(other.params, packing.Packed)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(packing.unpack(other)), strict=True):
        # Adam makes a full step of a gradient's rounding error where the gradient is zero.
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(a) + 1e-4
