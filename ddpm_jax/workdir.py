"""The files of a run, except its checkpoints.

runs/cifar10/
  config.json          what the run was made with
  checkpoints/<step>/  see checkpoint.py
  metrics.jsonl        one JSON object a log point; TensorBoard events beside it
  labels.json          what each class is called, if the run knows any
  samples/             grids and arrays of images
  show/, report.html   pictures of it, see show.py
"""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import socket
import tempfile

import ml_collections
import numpy as np
from tensorboardX import SummaryWriter

from ddpm_jax import parallel
from ddpm_jax.errors import UserError


@contextlib.contextmanager
def atomic_write(path):
    """Yields a temporary path beside `path`, and renames it to that when all went well.

    Of several processes, which all come here, only the first one's file stays.
    """
    path = pathlib.Path(path)
    if not parallel.is_first():
        with tempfile.TemporaryDirectory() as folder:
            yield pathlib.Path(folder) / path.name
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def lock(workdir, purpose):
    """Keeps other programs from doing the same in a run's folder, as long as this one lives.

    Args:
      workdir: the run's folder.
      purpose: names the file, .<purpose>.lock.

    Raises:
      UserError: if another program is at it.
    """
    with contextlib.ExitStack() as stack:
        holder = ""
        if parallel.is_first():
            pathlib.Path(workdir).mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((pathlib.Path(workdir) / f".{purpose}.lock").open("a+"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go of it
                file.truncate(0)
                print(os.getpid(), "on", socket.gethostname(), file=file, flush=True)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "unknown"
        if parallel.of_first(holder != ""):
            text = f"workdir={workdir}: another program is at work in it ({purpose})"
            raise UserError(f"{text}; process {holder}" if holder else text)
        yield


def check_free(flag, folder):
    """Raises a UserError unless a folder does not exist yet, or is empty."""
    with named_errors(flag, folder):
        path = pathlib.Path(folder).resolve()
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise UserError(f"{flag}={folder}: exists, and is not an empty folder")


@contextlib.contextmanager
def new_folder(flag, folder):
    """Yields a temporary folder beside `folder`, and renames it to that when all went well.

    Args:
      flag: where the user named it, for errors.
      folder: one that check_free has accepted.

    Raises:
      UserError: if it cannot be written.
    """
    with named_errors(flag, folder):
        path = pathlib.Path(folder).resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        around = tempfile.mkdtemp(prefix=f".{path.name[:100]}.", dir=path.parent)
        try:
            temporary = pathlib.Path(around) / "new"  # mkdtemp's own is for our eyes only
            temporary.mkdir()
            yield temporary
            os.replace(temporary, path)
        finally:
            shutil.rmtree(around, ignore_errors=True)


@contextlib.contextmanager
def named_errors(flag, folder):
    """Turns what the file system says into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{flag}={folder}: cannot be used ({error.strerror})") from None


def load_config(workdir):
    """Reads a run's config.json.

    Returns:
      A locked ConfigDict, or None where there is no run yet.

    Raises:
      UserError: if the file is not a JSON object.
    """
    path = pathlib.Path(workdir) / "config.json"
    if not path.exists():
        return None
    config = ml_collections.ConfigDict(_tuples(read_json(path)))
    return config.lock()


def read_json(path):
    """Reads a JSON object.

    Raises:
      UserError: if the file is something else.
    """
    try:
        fields = json.loads(path.read_text())
    except (RecursionError, ValueError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path}: is not a JSON object")
    return fields


def _tuples(value):
    """JSON has only lists; configs have only tuples."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(value) if isinstance(value, list) else value


def save_config(config, workdir):
    """Writes config.json."""
    with atomic_write(pathlib.Path(workdir) / "config.json") as path:
        path.write_text(json.dumps(config.to_dict(), indent=2) + "\n")


def save_label_names(names, workdir):
    """Writes labels.json: what each label is called."""
    with atomic_write(pathlib.Path(workdir) / "labels.json") as path:
        path.write_text(json.dumps(names) + "\n")


def load_label_names(workdir):
    """The names in labels.json; none where the run knows no classes."""
    path = pathlib.Path(workdir) / "labels.json"
    try:
        return tuple(json.loads(path.read_text())) if path.exists() else ()
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None


def write_npz(path, **arrays):
    """Writes arrays to an .npz file, whole or not at all."""
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)


def read_metrics(workdir):
    """The lines of metrics.jsonl, as dicts; none where there is no such file."""
    path = pathlib.Path(workdir) / "metrics.jsonl"
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if _step_of(line) < float("inf")]


def _step_of(line):
    """The step of a line of metrics.jsonl; infinite if it is not whole."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


class Metrics:
    """Appends to metrics.jsonl and to TensorBoard's event file, in the first of the processes.

    What an interrupted run logged after `step`, the checkpoint it resumes from, is dropped, as is
    a line it did not finish: those steps are about to be done again.
    """

    def __init__(self, workdir, step):
        first = parallel.is_first()
        path = pathlib.Path(workdir) / "metrics.jsonl" if first else pathlib.Path(os.devnull)
        if path.is_file():
            lines = path.read_text(errors="replace").splitlines(keepends=True)
            kept = [line for line in lines if _step_of(line) <= step]
            if len(kept) < len(lines):
                with atomic_write(path) as temporary:
                    temporary.write_text("".join(kept))
        self._file = path.open("a")
        options = {"purge_step": step + 1, "write_to_disk": first}
        self._board = SummaryWriter(str(workdir), **options)

    def write(self, step, **values):
        """Logs named numbers at a step."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self):
        """Flushes both files."""
        self._file.close()
        self._board.close()
