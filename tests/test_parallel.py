"""What several processes divide and say, seen from one; tests/test_hosts.py starts several."""

import types

import jax
import numpy as np
import pytest

from ddpm_jax import parallel


@pytest.mark.parametrize("count", [1, 2, 3])
def test_each_process_has_its_part_of_a_batch(monkeypatch, count):
    """Equally many, in order, of every array of a tree; labels may be missing."""
    batch = {"images": np.arange(24).reshape(12, 2), "keys": np.arange(12), "labels": None}
    parts = []
    for index in range(count):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        monkeypatch.setattr(jax, "process_count", lambda: count)
        parts.append(parallel.local_shard(batch))
    for name in ("images", "keys"):
        assert {len(part[name]) for part in parts} == {12 // count}
        np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), batch[name])


@pytest.mark.parametrize("first, order", [(True, ["work", "meet"]), (False, ["meet", "work"])])
def test_the_first_process_works_before_the_others(monkeypatch, first, order):
    seen = []
    monkeypatch.setattr(parallel, "is_first", lambda: first)
    monkeypatch.setattr(parallel, "barrier", lambda: seen.append("meet"))
    with parallel.first_process_first():
        seen.append("work")
    assert seen == order


def test_what_an_error_of_jax_means(monkeypatch):
    """Too little memory; or a lost process, where there is more than one."""
    memory, lost, other = map(
        RuntimeError, ("RESOURCE_EXHAUSTED: Out of memory", "UNAVAILABLE: x", "INTERNAL: x")
    )
    for several in (False, True):
        monkeypatch.setattr(jax.distributed, "is_initialized", lambda s=several: s)
        assert "use a smaller batch_size" in parallel.explain(memory)
        assert ("a process was lost" in parallel.explain(lost)) == several
        assert not parallel.explain(other)


@pytest.mark.parametrize("platforms, plugins, warns", [
    (None, ["xla_cuda12"], True), ("cpu", ["xla_cuda12"], False), (None, [], False),
])  # fmt: skip
def test_a_gpu_that_is_not_found_is_no_secret(monkeypatch, caplog, platforms, plugins, warns):
    config = types.SimpleNamespace(jax_platforms=platforms)
    fake = types.SimpleNamespace(devices=lambda: [0], default_backend=lambda: "cpu", config=config)
    monkeypatch.setattr(parallel, "jax", fake)
    found = [types.SimpleNamespace(name=name) for name in plugins]
    monkeypatch.setattr(parallel, "entry_points", lambda group: found)
    parallel.check_devices()
    assert ("plugin xla_cuda12 but finds no such device" in caplog.text) == warns
