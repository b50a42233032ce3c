"""The tour in notebooks/: what is committed was executed, runs again, and shows what it says."""

import ast
import base64
import importlib
import io
import pathlib
import re
import resource

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.svm import SVC

import ddpm_jax

ROOT = pathlib.Path(__file__).resolve().parent.parent
PATH = ROOT / "notebooks" / "tour.ipynb"
CPU_SECONDS = 480  # four minutes of two cores; measured: 250
SCALE, LINE = 5, 3  # pixels of the grids: of a digit's pixel, and between digits


@pytest.fixture
def notebook():
    return nbformat.read(PATH, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def printed(notebook):
    return "".join(output.text for output in outputs(notebook) if output.output_type == "stream")


def pictures(notebook):
    """PIL images; those that a cell leaves behind, in the order of the cells."""
    data = [output.data for output in outputs(notebook) if "data" in output]
    pngs = [base64.b64decode(d["image/png"]) for d in data if "image/png" in d]
    return [Image.open(io.BytesIO(png)) for png in pngs]


def digits(picture):
    """The images of a grid, [rows, columns, 8, 8] in [0, 255]."""
    pixels = np.asarray(picture.convert("L"))
    step = 8 * SCALE + LINE
    rows, columns = ((size - LINE) // step for size in pixels.shape)
    cells = pixels[LINE : LINE + rows * step, LINE : LINE + columns * step]
    cells = cells.reshape(rows, step, columns, step).swapaxes(1, 2)
    middle = SCALE // 2
    return cells[:, :, middle : 8 * SCALE : SCALE, middle : 8 * SCALE : SCALE]


def recognised(images, labels):
    """The fraction of images [N, 8, 8] that a classifier of real digits assigns to their labels."""
    real = load_digits()
    classifier = SVC(gamma=0.001).fit(real.data, real.target)
    return np.mean(classifier.predict(images.reshape(len(images), 64) * (16 / 255)) == labels)


def check_claims(notebook):
    """What the text says is what the outputs show."""
    text = printed(notebook)
    before, after = (
        float(re.search(rf"{name} ([\d.]+)\n", text)[1])
        for name in ("parameters, loss", "held-out loss")
    )
    assert before == pytest.approx(1, abs=0.02)
    assert after < 0.15  # measured: 0.125
    seconds = [float(s) for s in re.findall(r"\d steps: ([\d.]+) s", text)]
    assert len(seconds) == 3 and seconds[0] > 3 * seconds[1] > 3 * seconds[2]
    data, _, forward, _, samples, faster, sevens, classes, animation, inpainted = pictures(notebook)
    assert digits(data).shape == digits(samples).shape == (2, 16, 8, 8)
    assert forward.size == (440, 314)
    _, twenty, ten = digits(faster).astype(int)
    across = np.abs(twenty - ten).mean(), np.abs(twenty - np.roll(ten, 1, axis=0)).mean()
    assert across[0] < across[1] / 2  # the same digits
    assert recognised(digits(sevens)[0], np.full(16, 7)) > 0.9
    in_turn = digits(classes)
    assert recognised(in_turn.reshape(-1, 8, 8), np.tile(np.arange(10), 4)) > 0.9
    assert animation.format == "GIF" and animation.n_frames == 50
    image, _, *results = digits(inpainted).astype(int)
    for result in results:
        np.testing.assert_array_equal(result[:, :4], image[:, :4])
        assert np.abs(result[:, 4:] - image[:, 4:]).mean() > 5  # it was not known


def test_it_is_complete_and_clean(notebook):
    """Executed from start to end; nothing of the machine, and no warning, is in it."""
    nbformat.validate(notebook)
    assert PATH.stat().st_size < 1_500_000
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {(output.output_type, output.get("name")) for output in outputs(notebook)}
    assert kinds == {("stream", "stdout"), ("display_data", None), ("execute_result", None)}
    for output in outputs(notebook):
        assert {*output.get("data", {})} <= {"image/png", "text/plain"}
        output.get("data", {}).pop("image/png", None)
    rest = nbformat.writes(notebook)
    assert not re.search(r"/(home|root|tmp|usr|opt|work|Users)/|site-packages|Warning", rest)


def test_what_it_shows(notebook):
    check_claims(notebook)


def test_its_code_fits_the_package(notebook):
    """Every cell compiles, and every name of the package that it uses exists."""
    names, used = {"ddpm_jax": ddpm_jax}, 0
    for cell in code_cells(notebook):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("ddpm_jax"):
                for alias in node.names:
                    names[alias.name] = importlib.import_module(f"{node.module}.{alias.name}")
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                module = names.get(node.value.id)
                used += module is not None
                assert module is None or hasattr(module, node.attr), node.attr
    assert used > 10


def execute(notebook, tmp_path, monkeypatch):
    """From another folder, in which nothing is left."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("TQDM_DISABLE", "1")
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=1800, kernel_name="python3", resources=where).execute()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_short_training_runs(notebook, tmp_path, monkeypatch):
    (training,) = (cell for cell in code_cells(notebook) if "ddpm_jax.train(" in cell.source)
    training.source = "config.train.num_steps = 50\n" + training.source
    execute(notebook, tmp_path, monkeypatch)
    assert "50 steps in" in printed(notebook) and len(pictures(notebook)) == 10


@pytest.mark.nightly
def test_it_runs(notebook, tmp_path, monkeypatch):
    """In the time that it says."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    execute(notebook, tmp_path, monkeypatch)
    check_claims(notebook)
    seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    assert 10 < seconds < CPU_SECONDS
