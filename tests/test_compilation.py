"""Compiled programs are kept for the next command."""

import logging
import os
import pathlib

import jax
import pytest
from programs import DIGITS, TINY, finish

from ddpm_jax import compilation, cpu


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A new home, and JAX as a user without a cache of his own finds it."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)


def folder_of_jax():
    return jax.config.jax_compilation_cache_dir


def test_a_folder_in_the_home_for_each_processor(home, monkeypatch):
    folders = set()
    for model in ("A", "B", "A"):
        monkeypatch.setattr(cpu, "cpuinfo", lambda model=model: f"model name : {model}\nflags : f")
        jax.config.update("jax_compilation_cache_dir", None)
        compilation.keep_programs()
        folders.add(pathlib.Path(folder_of_jax()))
    assert len(folders) == 2
    assert all(f.is_dir() and f.parent == home / ".cache/ddpm_jax/programs" for f in folders)


def test_the_mhz_of_the_moment_does_not_change_the_folder(home, monkeypatch):
    found = []
    for mhz in (2400, 3100):
        text = f"processor : 0\nmodel name : A\ncpu MHz : {mhz}\nflags : avx2\n"
        monkeypatch.setattr(cpu, "cpuinfo", lambda text=text: text)
        jax.config.update("jax_compilation_cache_dir", None)
        compilation.keep_programs()
        found.append(folder_of_jax())
    assert found[0] == found[1]


@pytest.mark.parametrize("value", ["", "elsewhere"])
def test_the_environment_variable_decides(home, monkeypatch, value):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", value)
    compilation.keep_programs()
    assert folder_of_jax() is None and not list(home.iterdir())


def test_a_folder_that_the_caller_chose_stays(home):
    jax.config.update("jax_compilation_cache_dir", "of the caller")
    compilation.keep_programs()
    assert folder_of_jax() == "of the caller"


def test_nothing_is_kept_for_several_processes(home, monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    compilation.keep_programs()
    assert folder_of_jax() is None and not list(home.iterdir())


@pytest.mark.parametrize("reason", ["a file in its place", "no home"])
def test_a_home_that_cannot_be_written(home, caplog, monkeypatch, reason):
    if reason == "no home":
        monkeypatch.setattr(compilation, "FOLDER", "~nobody_of_this_name/programs")
    else:
        (home / ".cache").write_text("a file")
    with caplog.at_level(logging.WARNING):
        compilation.keep_programs()
    assert folder_of_jax() is None
    (record,) = caplog.records
    assert "JAX_COMPILATION_CACHE_DIR" in record.message


def test_the_programs_that_were_not_used_for_longest_are_deleted(tmp_path):
    # name: (bytes, written, read); of "read", the time of writing is older.
    files = {"old": (40, 1, 1), "read": (30, 2, 9), "new": (30, 5, 5), "newest": (20, 7, 7)}
    for name, (size, written, read) in files.items():
        path = tmp_path / name[0] / "autotuning" / name  # XLA's folder for GPUs
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(bytes(size))
        os.utime(path, (read, written))
    for most, left in (
        (120, set(files)),
        (119, {"read", "new", "newest"}),
        (60, {"read", "newest"}),
    ):
        compilation.delete_oldest(tmp_path, most)
        assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == left


@pytest.mark.slow
def test_a_second_command_compiles_nothing_again(home):
    """What the first compiled is read; a damaged file does no harm."""

    def train(name):
        code, output = finish(*arguments, f"--workdir={home / name}", cwd=home)
        assert code == 0, output
        return output

    def kept():
        return {path: path.stat().st_mtime_ns for path in home.glob(".cache/ddpm_jax/programs/*/*")}

    # Large enough for oneDNN's convolutions, whose program cannot be kept.
    arguments = (DIGITS, *TINY, "--config.train.num_steps=2", "--config.train.batch_size=256")
    assert "warning" not in train("first").lower()
    first = kept()
    assert len(first) > 3
    assert "warning" not in train("second").lower()
    assert first.items() <= kept().items()
    largest = max(first, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:1000])
    assert "Error reading persistent compilation cache entry" in train("third")
