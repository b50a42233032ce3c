"""Names in README, CONTRIBUTING and docs exist, and their commands are valid."""

import itertools
import pathlib
import re
import shlex

import pytest
import references

from ddpm_jax import checks, cli, configs
from ddpm_jax.files import run_files

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOK = ROOT / "notebooks" / "tour.ipynb"
TEXT = "\n".join(page.read_text() for page in PAGES)
FILES = ("json", "py")  # endings that follow a dot as fields do
MODULES = {path.stem: path for path in (ROOT / "ddpm_jax").rglob("[a-z]*.py")}
FIELDS = configs.flatten(configs.default_config())


def test_readme_is_short():
    content = (ROOT / "README.md").read_bytes()
    assert content.count(b"\n") <= 200 and len(content) <= 12_000


def test_the_core_is_as_short_as_it_says():
    core = (ROOT / "ddpm_jax" / "core").glob("*.py")
    lines = sum(len(path.read_text().splitlines()) for path in core)
    said = [int(x.replace(",", "")) for x in re.findall(r"are under ([\d,]+) lines", TEXT)]
    assert len(said) == 2 and all(number - 200 < lines < number for number in said)


@pytest.mark.parametrize("page", [*PAGES, NOTEBOOK], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """Links and pictures, which are relative to the page; and the headings that links name."""
    text = page.read_text()
    named = {*re.findall(r"\]\(([^):]+)\)", text), *re.findall(r'src="([^":]+)"', text)}
    for target in named:
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text()), target


def anchors(text):
    """The ids that GitHub and mkdocs give to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_paths_exist():
    """Paths of the repository in text and code, relative to its root."""
    folders = r"(?<![\w/])(?:configs|ddpm_jax|tests|benchmarks|docs|notebooks)/[\w/.-]*\.\w+"
    named = {*re.findall(folders, TEXT), *re.findall(r"requirements[\w-]*\.txt", TEXT)}
    assert len(named) > 40
    assert not [path for path in named if not (ROOT / path).exists()]


def test_functions_and_fields_exist():
    """`module.function` of the package's modules, and `section.field` of a config."""
    functions = fields = 0
    sections = {name.partition(".")[0] for name in FIELDS if "." in name}
    for module, name in re.findall(r"`(\w+)\.(\w+)[=`]", TEXT):
        path = MODULES.get(module)
        if f"{module}.{name}" in FIELDS:
            fields += 1
        elif path and name not in FILES:
            functions += 1
            assert re.search(rf"^(def|class) {name}\b|^{name} =", path.read_text(), re.M), name
        else:
            assert module not in sections or name in FILES, f"{module}.{name}"
    assert functions > 20 and fields > 20
    overrides = {*re.findall(r"--(?:no)?config\.(\w+\.\w+)", TEXT)} - {"section.field"}
    assert len(overrides) > 20 and not overrides - FIELDS.keys()


def test_tables_of_fields():
    """The first column of a table of a section's fields."""
    tables = re.findall(r"^\| field of `--config\.(\w+)` \|.*\n((?:\|.*\n)+)", TEXT, re.M)
    assert {section for section, _ in tables} == {"sample", "show", "evaluate"}
    for section, rows in tables:
        names = {*re.findall(r"`(\w+)`", " ".join(row.split("|")[1] for row in rows.splitlines()))}
        assert len(names) > 5 and not {f"{section}.{name}" for name in names} - FIELDS.keys()


def test_names_in_the_source_exist():
    """CONTRIBUTING's `name` in `path`: where something has to be added."""
    text = (ROOT / "CONTRIBUTING.md").read_text().replace("\n", " ")
    pairs = re.findall(r"`(\w+)` (?:in|of) +`([\w/]+\.py)`", text)
    assert len(pairs) > 5
    for name, path in pairs:
        assert re.search(rf"^(def|class) {name}\b|^{name} =", (ROOT / path).read_text(), re.M), name


def test_configs_and_modules_are_listed():
    """Every config and every module is on the page about the code; and in the API reference."""
    code, api = ((ROOT / "docs" / name).read_text() for name in ("code.md", "api.md"))
    for path in [*(ROOT / "configs").glob("*.py"), *MODULES.values()]:
        assert path.name in code or path.parent.name == "metrics", path.name
    for path in MODULES.values():
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        assert f"::: {name}\n" in api, name


def test_pages_are_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    readme = (ROOT / "README.md").read_text()
    for page in PAGES[2:]:
        assert f"{page.name}\n" in navigation, page.name
        assert f"docs/{page.name}" in readme or page.name == "index.md", page.name


def test_the_table_of_references_is_shown():
    """Each row's quantity, source and reference; what we get may differ in its last digits."""
    text = (ROOT / "docs" / "fidelity.md").read_text()
    shown = [line.split(" | ")[:3] for line in text.splitlines() if line.count(" | ") == 4]
    for row in references.table():
        cells = [f"| {row.quantity}", row.source, references.shown(row.reference)]
        assert cells in shown, row.quantity
    assert f"[{len(references.table())} rows](docs/fidelity.md)" in TEXT


def commands():
    """Every command of the pages as a list of words, each once; those with … are abbreviated."""
    text = TEXT.replace("\\\n", " ")
    lines = re.findall(r"^    (?:srun )?((?:python|pip|ddpm_jax) .*)$", text, re.M)
    lines += re.findall(r"`((?:python|pip) [^`\n]+)`", text)
    parts = [part for line in lines for part in line.split(" && ") if "…" not in part]
    split = (shlex.split(part, comments=True) for part in parts if not part.startswith("mkdocs"))
    return [*map(list, dict.fromkeys(map(tuple, split)))]


COMMANDS = commands()


def test_there_are_commands_of_every_mode():
    modes = {word[7:] for command in COMMANDS for word in command if word.startswith("--mode=")}
    assert modes == {*cli.MODES} - {"train"}
    assert len(COMMANDS) > 50


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_command(command, tmp_path, monkeypatch):
    """main.py's flags are read and checked; of other programs, the files and flags exist."""
    program, *words = command
    if program == "pip":
        files = [file for flag, file in itertools.pairwise(words) if flag == "-r"]
        here = words[-1] == "." or words[-1].startswith(".[")
        assert (files or here) and all((ROOT / file).is_file() for file in files)
    elif program == "ddpm_jax":
        parse(command, tmp_path, monkeypatch)
    elif words[0] == "main.py":
        parse(words, tmp_path, monkeypatch)
    else:
        flag, module, *rest = words
        assert flag == "-m"
        if module == "pytest":
            files = [word for word in rest if word.startswith("tests")]
            markers = {*re.findall(r"\w+", " ".join(set(rest) - {*files, "-m"}))}
            assert all((ROOT / file).exists() for file in files)
            assert markers <= {"parity", "slow", "nightly", "and", "or", "not"}
        else:
            path = ROOT / module.replace(".", "/")
            path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
            for name in re.findall(r"--(\w+)", " ".join(rest)):
                assert re.search(rf'"(--)?{name}"', path.read_text()), name


def parse(words, tmp_path, monkeypatch):
    """Reads and checks a command as main.py would, beside runs of the names that it mentions."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    given = dict(word.removeprefix("--").split("=", 1) for word in words[1:] if "=" in word)
    if "config" not in given and "workdir" in given:
        name = pathlib.Path(given["workdir"]).name
        paths = [*(ROOT / "configs").rglob(f"{name}.py"), ROOT / "configs" / "cifar10.py"]
        run_files.save_config(configs.named_config(paths[0]), given["workdir"])
    command = cli.parse(words)
    if command.config is not None:
        checks.check(command.config, command.mode)
