"""What a run writes besides its checkpoints, as others read it."""

import json
import math
import sys
import types

import pytest

from ddpm_jax.errors import UserError
from ddpm_jax.files import disk, run_files
from ddpm_jax.runs import train


@pytest.fixture
def scalars(monkeypatch):
    """What TensorBoard shows of a folder: {name: [(step, value), ...]}."""
    # Else its reader imports TensorFlow.
    monkeypatch.setitem(sys.modules, "tensorboard.compat.notf", types.ModuleType("notf"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def read(folder):
        events = EventAccumulator(str(folder)).Reload()
        names = events.Tags()["scalars"]
        return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in names}

    return read


def test_tensorboard_shows_what_was_logged(tmp_path, scalars):
    """At once, without what an interrupted run logged after the step that another resumes from."""
    first = run_files.Metrics(tmp_path, 0)
    for step in range(1, 6):
        first.write(step, loss=2.0**-step, skipped=step)
    first.write(5, eval_loss=0.5)
    assert scalars(tmp_path)["loss"] == [(step, 2.0**-step) for step in range(1, 6)]
    second = run_files.Metrics(tmp_path, 3)  # the first was killed: it is not closed
    assert scalars(tmp_path)["loss"] == [(step, 2.0**-step) for step in range(1, 4)]
    second.write(4, loss=7.0, skipped=0)
    found = scalars(tmp_path)
    assert found["loss"] == [(1, 0.5), (2, 0.25), (3, 0.125), (4, 7.0)]
    assert found["skipped"] == [(1, 1), (2, 2), (3, 3), (4, 0)]
    assert not found.get("eval_loss")
    assert [line["step"] for line in run_files.read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 2
    for metrics in (first, second):
        metrics.close()


def strict(text):
    """JSON, by those who know no NaN."""

    def refuse(name):
        raise ValueError(name)

    return json.loads(text, parse_constant=refuse)


def test_what_is_not_finite_is_null_in_a_file_and_nan_again_when_read(tmp_path):
    metrics = run_files.Metrics(tmp_path, 0)
    metrics.write(1, loss=math.nan, grad_norm=math.inf, skipped=0)
    metrics.write(2, loss=0.5, skipped=0)
    metrics.close()
    path = tmp_path / "metrics.jsonl"
    lines = [strict(line) for line in path.read_text().splitlines()]
    assert lines[0] == {"step": 1, "loss": None, "grad_norm": None, "skipped": 0}
    with path.open("a") as file:  # as older runs did
        file.write('{"step": 3, "loss": NaN, "skipped": 0}\n{"step": null, "loss": 1.0}\n')
    run_files.Metrics(tmp_path, 3).close()
    read = run_files.read_metrics(tmp_path)
    assert [line["step"] for line in read] == [1, 2, 3]
    assert [math.isnan(line["loss"]) for line in read] == [True, False, True]
    assert train.mean_loss(read, 1, 2) == 0.5 and math.isnan(train.mean_loss(read, 0, 2))


def test_json_of_anything():
    value = {"a": [1.5, -math.inf, {"b": (math.nan, "nan", None, True)}], "c": 2}
    expected = {"a": [1.5, None, {"b": [None, "nan", None, True]}], "c": 2}
    assert strict(disk.to_json(value, indent=2)) == expected


def test_files_of_another_process_may_come_late(tmp_path, monkeypatch):
    answers = [True, False, False]
    disk.wait_for_files(answers.pop, tmp_path)
    assert not answers
    monkeypatch.setattr(disk, "SECONDS_FOR_FILES", 0.3)
    with pytest.raises(UserError, match="does not see its files there; all must share workdir"):
        disk.wait_for_files(lambda: False, tmp_path)


def test_a_file_of_results_is_json_whatever_they_are(tmp_path):
    """null for what is not finite, at every depth; the folder is made."""
    path = tmp_path / "run" / "evaluation.json"
    disk.write_json(path, {"fid": math.nan, "per_seed": [{"kid": -math.inf}, {"kid": 0.5}]})
    assert strict(path.read_text()) == {"fid": None, "per_seed": [{"kid": None}, {"kid": 0.5}]}
