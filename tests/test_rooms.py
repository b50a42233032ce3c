"""Allowed imports between the parts of the package; and the length of its functions."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "ddpm_jax"
# What the modules of a folder, or a module, may import from the rest of the package. Within a
# folder, all imports are allowed; Python itself refuses cycles.
MACHINERY = {"compilation", "configs", "cpu", "errors", "packing", "parallel"}
MACHINERY |= {"progress", "signals"}
MAY_IMPORT = {
    "core": set(),
    "errors": set(),
    "onednn": set(),
    "cpu": {"onednn", "winograd"},
    "winograd": set(),
    "compilation": {"cpu"},
    "packing": {"cpu"},
    "parallel": {"errors"},
    "progress": {"parallel"},
    "signals": {"parallel"},
    "configs": {"core", "cpu", "errors"},
    "checks": {"configs", "core", "errors", "parallel"},
    "files": {"core", *MACHINERY},
    "metrics": {"files", *MACHINERY},
    "runs": {"checks", "core", "files", "metrics", *MACHINERY},
    "cli": {"checks", "core", "files", "metrics", "runs", *MACHINERY},
    "interface": {"checks", "core", "files", "runs", *MACHINERY},
    "__init__": {"errors", "interface"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def part_of(path):
    """The folder of a module, or its own name if it is in none."""
    inside = path.relative_to(PACKAGE)
    return inside.parts[0] if len(inside.parts) > 1 else inside.stem


def imported(path):
    """The parts that a file of the package imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "ddpm_jax":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module.startswith("ddpm_jax."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("ddpm_jax."))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows_point_one_way(path):
    part = part_of(path)
    assert set(imported(path)) - {part} <= MAY_IMPORT[part]


def test_training_does_not_draw_its_report():
    """The command line does it after training."""
    names = ast.walk(ast.parse((PACKAGE / "runs" / "train.py").read_text()))
    assert not [n for n in names if isinstance(n, ast.alias) and n.name in ("show", "evaluate")]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_function_fits_on_a_screen(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name
