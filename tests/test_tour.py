"""The code in TOUR.md runs."""

import pathlib
import re

import imageio.v3 as imageio
import jax
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
TEXT = (ROOT / "TOUR.md").read_text()
STEPS = "num_steps = 1000"


def run(code):
    """What is defined after the code ran."""
    names = {}
    with jax.numpy_rank_promotion("allow"):
        exec(compile(code, "TOUR.md", "exec"), names)
    return names


def take_the_tour(num_steps):
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S))
    assert code.count(STEPS) == 1
    return run(code.replace(STEPS, f"num_steps = {num_steps}"))


def test_all_its_pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    losses = take_the_tour(20)["losses"]
    assert losses[0] == pytest.approx(1, abs=0.1) and losses[-1] < 0.8
    drawn = {path.name for path in (tmp_path / "tour").iterdir()}
    assert drawn == {pathlib.Path(p).name for p in re.findall(r'src="(.*?)"', TEXT)}
    for name in drawn:
        ours, shown = (
            imageio.imread(p / "tour" / name) for p in (tmp_path, ROOT / "docs" / "assets")
        )
        assert ours.shape == shown.shape


@pytest.mark.slow
def test_it_learns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    losses = take_the_tour(1000)["losses"]
    assert sum(losses[-50:]) / 50 < 0.2  # measured: 0.152
