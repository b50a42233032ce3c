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

import contextlib
import fcntl
import json
import logging
import lzma
import math
import os
import pathlib
import shutil
import socket
import struct
import tempfile
import time
import tokenize
import uuid
import zipfile
import zlib

import ml_collections
import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from ddpm_jax import configs, parallel
from ddpm_jax.errors import UserError, one_line

log = logging.getLogger(__name__)

SCORES = ("fid", "distance")  # of metrics.jsonl, each from a measure of its own; lower is better
SECONDS_FOR_FILES = 90
# Errors when reading an array from a damaged archive, or from another kind of file.
ARCHIVE_ERRORS = (
    ArithmeticError,
    EOFError,
    KeyError,
    OSError,
    RuntimeError,
    TypeError,
    UserWarning,
    ValueError,
    lzma.LZMAError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)
START_ANEW = "use the same data, or start a new run with another --workdir"


@contextlib.contextmanager
def atomic_write(path):
    """Yields a temporary path beside `path`, and renames it to `path` if there was no error.

    All processes call this; only the first process's file is kept.
    """
    path = pathlib.Path(path)
    if not parallel.is_first():
        with tempfile.TemporaryDirectory() as folder:
            yield pathlib.Path(folder) / path.name
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # Threads, and containers that share a folder, may have the same process number.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def lock(folder, purpose, waits=False):
    """Locks a folder for one purpose: no other program can hold the same lock at the same time.

    Args:
      folder: the folder.
      purpose: the lock file is .<purpose>.lock.
      waits: whether to wait for another program, or to raise an error.

    Raises:
      UserError: if another program holds the lock, or the folder cannot be written.
    """
    path, holder = pathlib.Path(folder) / f".{purpose}.lock", ""
    with contextlib.ExitStack() as stack:
        if parallel.is_first():
            with named_errors("workdir", folder):
                path.parent.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(path.open("a+"))
            holder = _hold(file, waits)
        if parallel.broadcast_from_first(holder != ""):
            raise UserError(f"{folder}: is in use by another program ({purpose}){holder}")
        yield


def _hold(file, waits):
    """Locks a file for as long as it is open; returns the other process if it is locked."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = f"; process {file.read().strip() or 'unknown'}"
        if not waits:
            return holder
        log.info("waiting for another program in %s%s", pathlib.Path(file.name).parent, holder)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:  # some network file systems have no locks
        log.warning("%s cannot be locked (%s)", file.name, error.strerror)
    file.truncate(0)
    print(os.getpid(), "on", socket.gethostname(), file=file, flush=True)
    return ""


def check_free(flag, folder):
    """Raises a UserError unless a folder is empty, or does not exist and can be created."""
    with named_errors(flag, folder):
        path = pathlib.Path(folder).resolve()
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise UserError(f"{flag}={folder}: exists, and is not an empty folder")
    check_writable(path.parent, flag)  # new_folder renames within the parent


def check_writable(folder, flag="workdir"):
    """Raises a UserError unless files can be created in a folder, or the folder can be created.

    Call it before slow computations, so that their results are not lost.
    """
    if not parallel.is_first():
        return
    path = pathlib.Path(folder).absolute()
    while not os.path.exists(path):  # no error for a long name
        path = path.parent
    with named_errors(flag, folder), tempfile.TemporaryFile(dir=path):
        pass


@contextlib.contextmanager
def new_folder(flag, folder):
    """Yields a temporary folder beside `folder`, and renames it to `folder` if there was no error.

    Args:
      flag: the user's name of the folder, for errors.
      folder: a folder that check_free has accepted.

    Raises:
      UserError: if it cannot be written.
    """
    with named_errors(flag, folder):
        path = pathlib.Path(folder).resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        outer = tempfile.mkdtemp(prefix=f".{path.name[:100]}.", dir=path.parent)
        try:
            temporary = pathlib.Path(outer) / "new"  # only its owner can read mkdtemp's folder
            temporary.mkdir()
            yield temporary
            os.replace(temporary, path)
        finally:
            shutil.rmtree(outer, ignore_errors=True)


@contextlib.contextmanager
def named_errors(flag, folder):
    """Turns errors of the file system into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{flag}={folder}: cannot be used ({error.strerror})") from None


def wait_for_files(are_there, folder):
    """Waits until this process sees what the first process wrote; a network's file system may need
    a minute.

    Args:
      are_there: () to whether it does.
      folder: for the error.

    Raises:
      UserError: if it does not see the files in time.
    """
    deadline = time.monotonic() + SECONDS_FOR_FILES
    while not are_there():
        if time.monotonic() > deadline:
            text = f"{folder}: another process than the first does not see its files there"
            raise UserError(f"{text}; all must share workdir and evaluate.cache_dir")
        time.sleep(0.2)


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
    fields = read_json(path)
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


def nan_for_null(fields):
    """The inverse of to_json for a JSON object's values; infinities come back as NaN, too."""
    return {key: math.nan if value is None else value for key, value in fields.items()}


def read_json(path, object_hook=None):
    """Reads a JSON object.

    Args:
      path: the file.
      object_hook: of json.loads; nan_for_null for what holds results.

    Raises:
      UserError: if the file is something else.
    """
    fields = _parsed(path, object_hook)
    if not isinstance(fields, dict):
        raise UserError(f"{path}: is not a JSON object")
    return fields


def _parsed(path, object_hook=None):
    if not path.is_file():  # opening a pipe would block
        raise UserError(f"{path}: is not a file")
    try:
        return json.loads(path.read_text(), object_hook=object_hook)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (RecursionError, ValueError) as error:
        raise UserError(f"{path}: not valid JSON ({one_line(error)})") from None


def to_json(value, **options):
    """JSON of nested dicts and lists; non-finite numbers become null, since JSON has none.

    Args:
      value: the dict or list.
      **options: of json.dumps.
    """

    def finite(value):
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(value), allow_nan=False, **options)


def write_json(path, value):
    """Writes nested dicts and lists, whole or not at all; see to_json."""
    with atomic_write(path) as temporary:
        temporary.write_text(to_json(value, indent=2) + "\n")


def save_config(config, workdir):
    """Writes config.json."""
    write_json(pathlib.Path(workdir) / "config.json", config.to_dict())


def save_data(source, workdir):
    """Writes data.json, which identifies the training images.

    Args:
      source: the training images.
      workdir: the run's folder.
    """
    fields = {"images": source.size, "sha256": source.sha256, "label_names": source.label_names}
    write_json(pathlib.Path(workdir) / "data.json", fields)


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
    saved = read_json(path) if path.exists() else {"sha256": "" if moved else source.sha256}
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
    names = read_json(path).get("label_names") if path.exists() else None
    if names is None:
        path = path.with_name("labels.json")
        names = _parsed(path) if path.exists() else []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: is not a list of names")
    return tuple(names)


def write_npz(path, **arrays):
    """Writes arrays to an .npz file, whole or not at all."""
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)


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
        values = json.loads(line, object_hook=nan_for_null)
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
                with atomic_write(path) as temporary:
                    temporary.write_text("".join(until_step))
        self._file = path.open("a")
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"
        self._events = RecordWriter(open(workdir / name if first else os.devnull, "wb"))  # noqa: SIM115
        self._write_event(0, file_version="brain.Event:2")
        # TensorBoard ignores events of other files from this step on.
        self._write_event(step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step, **values):
        """Logs named numbers at a step."""
        self._file.write(to_json({"step": step, **values}) + "\n")
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
