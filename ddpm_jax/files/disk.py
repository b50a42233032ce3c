"""Files that are written as a whole or not at all; locks; JSON."""

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

import numpy as np

from ddpm_jax import parallel
from ddpm_jax.errors import UserError, one_line

log = logging.getLogger(__name__)

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


def write_npz(path, **arrays):
    """Writes arrays to an .npz file, whole or not at all."""
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)
