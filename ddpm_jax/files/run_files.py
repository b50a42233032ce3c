"""The files of a run, except its checkpoints.

runs/cifar10/
  config.json          the run's config
  checkpoints/<step>/  see checkpoint.py
  metrics.jsonl        one JSON object per log line; TensorBoard events beside it
  data.json            digest of the training images, and the names of the classes
  samples/             grids and arrays of images
  show/, report.html   visualizations, see show.py
  evaluation.json      and others, see evaluate.py; evaluation/ and scores/ have their parts
"""

import json
import logging
import math
import os
import pathlib
import socket
import time

import ml_collections
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from ddpm_jax import configs, parallel
from ddpm_jax.errors import UserError, one_line
from ddpm_jax.files import disk

log = logging.getLogger(__name__)

SCORES = ("fid", "distance")  # of metrics.jsonl, each from a measure of its own; lower is better
START_ANEW = "use the same data, or start a new run with another --workdir"


def load_config(workdir):
    """Reads a run's config.json; fields that are newer than the run are added.

    Returns:
      A complete, locked ConfigDict, or None if there is no run yet.

    Raises:
      UserError: if the file is not a JSON object, or not a config.
    """
    path = pathlib.Path(workdir) / "config.json"
    if not os.path.exists(path):  # no error for a long name
        return None
    fields = disk.read_json(path)
    try:
        config = ml_collections.ConfigDict(configs.with_tuples(fields)).lock()
        config = configs.with_added(configs.with_levels(configs.rename_old_values(config)))
    except (AttributeError, RecursionError, ValueError) as error:
        raise UserError(f"{path}: is not a config ({one_line(error)})") from None
    return configs.complete(config, path)


def saved_config(workdir):
    """load_config of a folder that must hold a run.

    Raises:
      UserError: if there is no run, or its config.json is not a config.
    """
    config = load_config(workdir)
    if config is None:
        raise UserError(f"workdir={workdir}: holds no run (no config.json)")
    return config


def save_config(config, workdir):
    """Writes config.json."""
    disk.write_json(pathlib.Path(workdir) / "config.json", config.to_dict())


def save_data(source, workdir):
    """Writes data.json, which identifies the training images.

    Args:
      source: the training images.
      workdir: the run's folder.
    """
    fields = {"images": source.size, "sha256": source.sha256, "label_names": source.label_names}
    disk.write_json(pathlib.Path(workdir) / "data.json", fields)


def check_same_data(source, workdir, moved):
    """Raises a UserError unless a run was trained on exactly these images, in this order.

    Args:
      source: the training images.
      workdir: the run's folder.
      moved: whether data.path has changed; for runs of old versions, which have no data.json, this
        is the only check.
    """
    check_same_classes(source, workdir)
    path = pathlib.Path(workdir) / "data.json"
    saved = disk.read_json(path) if path.exists() else {"sha256": "" if moved else source.sha256}
    if saved.get("sha256") == source.sha256:
        return
    count = saved.get("images", "unknown")
    change = f"{count} images -> {source.size}"
    if count == source.size:
        change = f"the same number of images ({count}), but other files or another order"
    raise UserError(f"workdir={workdir}: was trained on other data: {change}; {START_ANEW}")


def check_same_classes(source, workdir):
    """Raises a UserError if a run and these images have different classes."""
    names = load_label_names(workdir)
    if names and source.label_names and names != source.label_names:
        change = f"{', '.join(names)} -> {', '.join(source.label_names)}"
        text = f"workdir={workdir}: was trained on other classes: {change[:1000]}; {START_ANEW}"
        raise UserError(text)


def load_label_names(workdir):
    """The classes' names from data.json, or labels.json of old versions; () without classes."""
    path = pathlib.Path(workdir) / "data.json"
    names = disk.read_json(path).get("label_names") if path.exists() else None
    if names is None:
        path = path.with_name("labels.json")
        names = disk._parsed(path) if path.exists() else []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: is not a list of names")
    return tuple(names)


def read_metrics(workdir):
    """The lines of metrics.jsonl as dicts of numbers; an empty list if there is no file."""
    path = pathlib.Path(workdir) / "metrics.jsonl"
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return [values for values in map(_values, lines) if values is not None]


def best_step(workdir, steps):
    """The step with the lowest score of some steps; None if none of them has a score.

    The score is that of SCORES which was measured last: one cannot be compared with another.
    """
    scores, last = {name: {} for name in SCORES}, SCORES[0]
    for line in read_metrics(workdir):
        for name in line.keys() & scores.keys():
            scores[name][line["step"]], last = line[name], name
    scores = scores[last]
    scored = [step for step in steps if math.isfinite(scores.get(step, math.nan))]
    return min(scored, key=scores.get, default=None)


def _values(line):
    """{name: number} of a line of metrics.jsonl, with null as NaN; None if it is not valid."""
    try:
        values = json.loads(line, object_hook=disk.nan_for_null)
    except (RecursionError, ValueError):
        return None
    if not isinstance(values, dict) or not isinstance(values.get("step"), int):
        return None
    return values if all(isinstance(v, int | float) for v in values.values()) else None


class Metrics:
    """Appends to metrics.jsonl and to TensorBoard's event file, in the first process.

    A resumed run repeats the steps after its checkpoint. So lines after `step`, the checkpoint's
    step, are removed, and so is an incomplete line.
    """

    def __init__(self, workdir, step):
        first, workdir = parallel.is_first(), pathlib.Path(workdir)
        path = workdir / "metrics.jsonl" if first else pathlib.Path(os.devnull)
        if path.is_file():
            lines = path.read_text(errors="replace").splitlines(keepends=True)
            complete = ((line, _values(line)) for line in lines if line.endswith("\n"))
            until_step = [line for line, values in complete if values and values["step"] <= step]
            if len(until_step) < len(lines):
                with disk.atomic_write(path) as temporary:
                    temporary.write_text("".join(until_step))
        self._file = path.open("a")
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"
        self._events = RecordWriter(open(workdir / name if first else os.devnull, "wb"))  # noqa: SIM115
        self._write_event(0, file_version="brain.Event:2")
        # TensorBoard ignores events of other files from this step on.
        self._write_event(step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step, **values):
        """Logs named numbers at a step."""
        self._file.write(disk.to_json({"step": step, **values}) + "\n")
        self._file.flush()
        numbers = (Summary.Value(tag=tag, simple_value=value) for tag, value in values.items())
        self._write_event(step, summary=Summary(value=numbers))

    def _write_event(self, step, **content):
        event = Event(wall_time=time.time(), step=step, **content)
        self._events.write(event.SerializeToString())
        self._events.flush()

    def close(self):
        """Closes both files."""
        self._file.close()
        self._events.close()
