"""`python -m benchmarks` runs, with the peers; no test checks a time."""

import csv
import importlib.util
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import ROOT

from benchmarks import chart, gpu, objectives, objectives_chart
from ddpm_jax import configs
from ddpm_jax.files import data
from ddpm_jax.runs import state as states
from ddpm_jax.runs import train


@pytest.mark.parity
def test_smoke():
    command = [sys.executable, "-m", "benchmarks", "--smoke"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("|")]
    peers = ["eager", "channels_last"]
    if importlib.util.find_spec("denoising_diffusion_pytorch"):
        peers.append("denoising-diffusion-pytorch")
    assert rows[0][1 : len(peers) + 2] == ["ours", *peers]
    assert len(rows) == 2 + 5  # a cell of each kind
    for row in rows[2:5]:
        assert all(float(rate.split()[0].replace(",", "")) > 0 for rate in row[1 : len(peers) + 2])
    assert float(rows[5][1].split()[0].replace(",", "")) > 0  # devices are of ours alone
    assert all(float(rate.split()[0].replace(",", "")) > 0 for rate in rows[6][1:3])
    assert "input pipeline" in done.stdout


def test_chart(tmp_path):
    """It draws docs/speed.csv, in which the ratios are those of the rates."""
    path = ROOT / "docs" / "speed.csv"
    cells = chart.read(path)
    assert len(cells) == 28 and all(cell.keys() == chart.MARKERS.keys() for cell in cells.values())
    with path.open(newline="") as file:
        stated = [row for row in csv.DictReader(file) if row["ours_over_fastest"]]
    assert len(stated) == 28
    for row in stated:
        rates = cells[row["network"], row["task"], int(row["batch"])]
        fastest = max(median for name, (median, *_) in rates.items() if name != chart.OURS)
        ratio = rates[chart.OURS][0] / fastest
        assert ratio == pytest.approx(float(row["ours_over_fastest"]), abs=0.011)
    chart.draw(cells).savefig(tmp_path / "speed.png")


def test_objectives(tmp_path):
    """The page has the tables of docs/objectives.csv, and the picture can be drawn."""
    found = objectives_chart.read(ROOT / "docs" / "objectives.csv")
    page = (ROOT / "docs" / "objectives.md").read_text()
    for choices in found.values():
        for line in objectives_chart.table(choices):
            assert line in page, line
    objectives_chart.draw(found).savefig(tmp_path / "objectives.png")


def test_mean_and_spread_of_seeds():
    assert objectives_chart.cell([0.1, 0.2, 0.3]) == "0.200 ± 0.100"
    assert objectives_chart.cell([4.581]) == "4.58" and objectives_chart.cell(None) == ""


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_held_out_mse_of_a_network_that_predicts_zero(config, prediction):
    """1 for ε. With v = 0, the predicted ε is √(1 - ᾱ) x_t: its MSE is ᾱ times that of v."""
    config.diffusion.prediction = prediction
    config.sample.batch_size = 40
    config.train.eval_images = 100
    model = configs.make_model(config)
    optimizer = states.make_optimizer(config.optim, 1)
    params = train.create_state(config, model, optimizer).params
    source = data.open_source(config.data, "eval_split")
    found = objectives.held_out_mse(config, params, source)
    alpha_bars = configs.make_alpha_bars(config).reshape(4, 5)
    x0 = source.read(np.arange(100)).images / 127.5 - 1
    expected = [1.0] * 4
    if prediction == "v":
        v = alpha_bars + (1 - alpha_bars) * np.square(x0).mean()
        expected = (alpha_bars * v).mean(axis=1)
    np.testing.assert_allclose(found, expected, rtol=0.08)


@pytest.mark.parametrize("name", ["as it is", "10 steps a dispatch", "dropout of 16 bits"])
def test_a_candidate_for_a_faster_step(name, monkeypatch):
    """In this process, with a small network."""
    drawn = []
    monkeypatch.setattr(
        gpu, "sixteen_bits", lambda *a, f=gpu.sixteen_bits: drawn.append(1) or f(*a)
    )
    monkeypatch.setattr(gpu, "SECONDS", 0.2)
    monkeypatch.setattr(gpu.cpu, "prepare", lambda trains: None)
    monkeypatch.setattr(gpu.cpu, "use_cores", lambda *_: None)
    small = {"channels": 8, "norm_groups": 4, "channel_mults": (1,), "dropout": 0.5}
    fields = {f"model.{key}": value for key, value in small.items()}
    case = {"name": name, "config": "digits", "size": 8, **gpu.CANDIDATES[name], "fields": fields}
    found = gpu.measure(case)
    assert found["images_per_second"] > 0
    assert bool(found.get("trace")) == (name == "as it is")
    assert bool(drawn) == (name == "dropout of 16 bits")


def test_dropout_of_16_bits():
    """The rate, the mean, and a mask that depends on the example's key only."""
    keys = jax.random.split(jax.random.key(0), 4)
    x = jnp.ones((4, 100, 100))
    found = gpu.sixteen_bits(x, 0.1, keys, 3)
    dropped = (found == 0).mean()
    assert abs(float(dropped) - 0.1) < 4 * np.sqrt(0.1 * 0.9 / x.size)
    assert abs(float(found.mean()) - 1) < 0.01
    np.testing.assert_array_equal(gpu.sixteen_bits(x[2:3], 0.1, keys[2:3], 3)[0], found[2])
    assert (gpu.sixteen_bits(x, 0.1, keys, 4) != found).any()
