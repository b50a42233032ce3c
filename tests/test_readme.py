"""What the README names exists."""

import pathlib
import re

import references

from ddpm_jax import configs

ROOT = pathlib.Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()


def test_paths_exist():
    """Links, pictures, configs, requirements files, and paths in code spans."""
    named = {*re.findall(r"\]\(([^)#:]+)\)", TEXT), *re.findall(r'src="([^":]+)"', TEXT)}
    named |= {*re.findall(r"(?:configs|ddpm_jax|tests|benchmarks)/[\w/.]*\.\w+", TEXT)}
    named |= {*re.findall(r"requirements[\w-]*\.txt", TEXT)}
    assert len(named) > 15
    missing = [path for path in named if not (ROOT / path).exists()]
    assert not missing


def test_functions_and_fields_exist():
    """`module.function` of the package's modules, and `section.field` of a config."""
    fields = configs.flatten(configs.default_config())
    found = 0
    for module, name in re.findall(r"`(\w+)\.(\w+)`", TEXT):
        path = ROOT / "ddpm_jax" / f"{module}.py"
        if path.exists() and name not in ("py", "json") and f"{module}.{name}" not in fields:
            found += 1
            assert re.search(rf"^(def|class) {name}\b|^{name} =", path.read_text(), re.M), name
    assert found > 10


def test_configs_and_rooms_are_listed():
    """Every config and every module is named in the README."""
    for path in [*(ROOT / "configs").glob("*.py"), *(ROOT / "ddpm_jax").glob("[a-z]*.py")]:
        assert path.name in TEXT, path.name


def test_the_table_of_references_is_shown():
    """Each row's quantity, source and reference; what we get may differ in its last digits."""
    shown = [line.split(" | ")[:3] for line in TEXT.splitlines() if line.count(" | ") == 4]
    for row in references.table():
        cells = [f"| {row.quantity}", row.source, references.shown(row.reference)]
        assert cells in shown, row.quantity
