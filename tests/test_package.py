"""What is installed: the ranges, the tested versions, and a wheel that works on its own."""

import pathlib
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS = ("3.11", "3.12", "3.13")
# Which of the project's ranges each requirements file has the tested versions of.
FILES = {
    "requirements.txt": ("", "cuda12", "prepare"),
    "requirements-cpu.txt": ("", "prepare"),
    "requirements-test.txt": ("", "prepare", "test"),
    "requirements-parity.txt": ("", "prepare", "test", "parity"),
    "requirements-eval.txt": ("eval",),
}


def pinned(name, python):
    """{package: Requirement} of a requirements file, and of those that it includes."""
    found = {}
    for line in (ROOT / name).read_text().splitlines():
        line = line.split("#")[0].strip()
        if line.startswith("-r "):
            found |= pinned(line.removeprefix("-r ").strip(), python)
        elif line and applies(requirement := Requirement(line), python):
            found[requirement.name.lower()] = requirement
    return found


def applies(requirement, python):
    environment = {"python_version": python, "sys_platform": "linux", "platform_machine": "x86_64"}
    return requirement.marker is None or requirement.marker.evaluate(environment)


def ranges(extras, python):
    """{package: Requirement} of the project with these extras; "" is what it always needs."""
    texts = [*(PROJECT["dependencies"] if "" in extras else [])]
    texts += [text for extra in extras if extra for text in PROJECT["optional-dependencies"][extra]]
    wanted = map(Requirement, texts)
    return {r.name.lower(): r for r in wanted if r.name != "ddpm_jax" and applies(r, python)}


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("name", FILES)
def test_the_tested_versions_are_in_the_ranges(name, python):
    """Each file pins just what its extras ask for, to a version that they allow."""
    pins, wanted = pinned(name, python), ranges(FILES[name], python)
    assert pins.keys() == wanted.keys()
    for package, requirement in pins.items():
        (version,) = [s.version for s in requirement.specifier if s.operator == "=="]
        assert wanted[package].specifier.contains(version), package


def test_the_package_alone_needs_no_tensorflow():
    names = ranges(("",), "3.11")
    assert not {"tensorflow", "tensorflow-cpu", "torch"} & names.keys()
    assert not names["orbax-checkpoint"].specifier.contains("1.0.0")


PROGRAM = """
import importlib.util
import numpy as np
import ddpm_jax
assert importlib.util.find_spec("tensorflow") is None
run = ddpm_jax.load("runs/digits")
images = run.sample(4, sampler="ddim", num_steps=5)
assert run.step == 20 and images.shape == (4, 8, 8, 1) and images.dtype == np.uint8
config = ddpm_jax.config("digits")
config.train.num_steps = 2
assert ddpm_jax.train(config, "runs/mine").step == 2
"""


@pytest.mark.slow
def test_a_wheel_in_a_fresh_environment(tmp_path):
    """From another folder: digits are trained for 20 steps, sampled, and imported in Python."""

    def call(*command):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    call(sys.executable, "-m", "venv", "fresh")
    bin_ = tmp_path / "fresh" / "bin"
    call(bin_ / "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir=.", ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    call(bin_ / "pip", "install", "--quiet", wheel)
    short = ["--config.train.num_steps=20", "--config.sample.num_samples=4"]
    call(bin_ / "ddpm_jax", "--config=digits", *short)
    assert (tmp_path / "runs" / "digits" / "report.html").exists()
    call(bin_ / "ddpm_jax", "--mode=sample", "--workdir=runs/digits", *short[1:])
    call(bin_ / "python", "-c", PROGRAM)
