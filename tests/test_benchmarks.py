"""`python -m benchmarks` runs, with the peers; no test checks a time."""

import argparse
import csv
import functools
import importlib.util
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import flagsaver
from programs import ROOT

from benchmarks import __main__ as benchmark
from benchmarks import chart, gpu, memory, objectives, objectives_chart, to_quality
from benchmarks.contestants import OTHER, Cell
from ddpm_jax import checks, configs, cpu
from ddpm_jax.core import unet
from ddpm_jax.files import data
from ddpm_jax.runs import objective, states


def rate_of(text):
    """The median in "1,234 (1,200 to 1,250)"."""
    return float(text.split()[0].replace(",", ""))


@pytest.mark.parity
def test_smoke():
    command = [sys.executable, "-m", "benchmarks", "--smoke"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("|")]
    names = ["ours", "channels_last"]
    if importlib.util.find_spec("denoising_diffusion_pytorch"):
        names.append("denoising-diffusion-pytorch")
    ratios = ["ours / fastest"]
    if cpu.has_bfloat16():
        names += ["ours, bfloat16", "channels_last, bfloat16"]
        ratios += ["in bfloat16"]
    assert rows[0][1 : -len(ratios) - 2] == names
    assert rows[0][-len(ratios) - 2 : -2] == ratios
    assert len(rows) == 2 + 5  # a cell of each kind
    cells = [dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[2:]]
    rates = [{name: rate_of(cell[name]) for name in names if cell[name]} for cell in cells]
    assert all(rate > 0 for row in rates for rate in row.values())
    new = [name for name in names if name != "denoising-diffusion-pytorch"]
    # Devices are of ours alone.
    assert [list(row) for row in rates] == [names, names, names, new, ["ours"]]
    for cell, row in zip(cells, rates, strict=True):
        if len(row) > 1:
            fastest = max(row[name] for name in names[1:] if name in row and "bfl" not in name)
            assert float(cell["ours / fastest"]) == pytest.approx(
                row["ours"] / fastest, rel=0.02, abs=0.01
            )
        if len(row) > 1 and cpu.has_bfloat16():
            ours, other = (row[name] for name in names[-2:])
            assert float(cell["in bfloat16"]) == pytest.approx(ours / other, rel=0.02, abs=0.01)
    assert "input pipeline" in done.stdout


def test_memory_of_a_step(config, capsys):
    """What XLA plans: the state and the batch, and more for what is kept for the gradient."""
    config.train.batch_size = 64
    memory.measure(config, plan_only=True)
    cells = capsys.readouterr().out.strip(" |\n").split(" | ")
    assert cells[:2] == ["1", "False"]
    optimizer = states.make_optimizer(config.optim, 1)
    state = states.create_state(config, configs.make_model(config), optimizer)
    planned, temporary = (float(cell) * 2**20 for cell in cells[2:])
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert planned == pytest.approx(size, abs=2**20) and temporary > planned


def test_saved_rows_are_measured_again_if_they_lack_a_contestant(tmp_path, monkeypatch):
    measured, path = [], tmp_path / "rows.jsonl"
    monkeypatch.setattr(
        benchmark, "measure", lambda cell, names: measured.append(cell.task) or dict.fromkeys(names)
    )
    cells = [Cell("train", "digits", 2), Cell("unipc", "digits", 2), Cell("ddim", "mnist", 2, 5)]
    cells[2] = cells[2]._replace(devices=2)
    names, environment = ["ours", "eager"], {"device": "a CPU"}

    def measured_by(names, environment):
        measured.clear()
        found = dict(benchmark.run_cells(cells, names, path, environment))
        assert list(found) == cells
        return measured[:]

    assert measured_by(names, environment) == ["train", "unipc", "ddim"]
    assert measured_by(names, environment) == []
    # It has no unipc, and devices are of ours alone.
    assert measured_by([*names, OTHER], environment) == ["train"]
    assert measured_by([*names, OTHER], environment) == []
    assert measured_by(names, {"device": "another"}) == ["train", "unipc", "ddim"]


def test_minutes_to_a_quality():
    """Those of the first stop that has it; at the end, those of the last."""
    found = {
        "ours": {10: (1.0, 0.4), 20: (2.0, 0.65), 30: (3.0, 0.6)},
        "other": {10: (3.0, 0.1), 20: (6.0, 0.5)},
    }
    assert to_quality.table(found, [0.5, 0.6])[2:] == [
        "| ours | 2.0 (step 20) | 2.0 (step 20) | 0.60 after 3.0 minutes |",
        "| other | 6.0 (step 20) | never | 0.50 after 6.0 minutes |",
    ]


@pytest.mark.nightly
def test_training_to_a_quality_runs():
    command = [sys.executable, "-m", "benchmarks.to_quality", "--num_steps=20", "--quality=0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("|")][2:]
    assert [row[0][2:] for row in rows] == list(to_quality.CONTESTANTS)
    assert all(row[1].endswith("(step 2)") for row in rows)


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


@flagsaver.as_parsed(data="digits")
@pytest.mark.parametrize("choice", objectives.CHOICES)
def test_each_choice_is_allowed(choice):
    checks.check(objectives.config_of(choice, 0))


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_held_out_mse_of_a_network_that_predicts_zero(config, prediction):
    """1 for ε. With v = 0, the predicted ε is √(1 - ᾱ) x_t: its MSE is ᾱ times that of v."""
    config.diffusion.prediction = prediction
    config.sample.batch_size = 40
    config.train.eval_images = 130  # 6 or 7 for each t
    model = configs.make_model(config)
    optimizer = states.make_optimizer(config.optim, 1)
    params = states.create_state(config, model, optimizer).params
    source = data.open_source(config.data, "eval_split")
    found = objectives.held_out_mse(config, params, source)
    alpha_bars = configs.make_alpha_bars(config).reshape(4, 5)
    x0 = source.read(np.arange(130)).images / 127.5 - 1
    expected = [1.0] * 4
    if prediction == "v":
        v = alpha_bars + (1 - alpha_bars) * np.square(x0).mean()
        expected = (alpha_bars * v).mean(axis=1)
    np.testing.assert_allclose(found, expected, rtol=0.08)


def test_timesteps_of_the_held_out_mse(config):
    """Two images: each has the middle of a half of each quarter. With v = 0, ε is √(1 - ᾱ) x_t."""
    config.diffusion.prediction = "v"
    config.train.eval_images = 2
    params = states.create_state(
        config, configs.make_model(config), states.make_optimizer(config.optim, 1)
    ).params
    source = data.open_source(config.data, "eval_split")
    x0, alpha_bars = source.read(np.arange(2)).images / 127.5 - 1, configs.make_alpha_bars(config)
    expected = []
    for quarter, timesteps in enumerate([(1, 3), (6, 8), (11, 13), (16, 18)]):  # of T = 20
        keys = objective.step_keys(0, quarter, np.arange(2))
        eps = objective.draw(keys, x0.shape[1:], 20)[1]
        signal = alpha_bars[list(timesteps)].reshape(2, 1, 1, 1)
        x_t = np.sqrt(signal) * x0 + np.sqrt(1 - signal) * eps
        expected.append(np.square(np.sqrt(1 - signal) * x_t - eps).mean())
    found = objectives.held_out_mse(config, params, source)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_a_candidate_that_fails_is_tried_again(tmp_path, monkeypatch):
    """And the reason is kept; what was measured is not measured again."""
    started = []

    def run(command, env, **_):
        name = json.loads(command[-1])["name"]
        started.append(name)
        code = int(name == "bad")
        out = json.dumps({"images_per_second": 1.0})
        error = "Traceback\nValueError: no such head size\n"
        return subprocess.CompletedProcess(command, code, out, error)

    monkeypatch.setattr(gpu, "CANDIDATES", {"good": {}, "bad": {"flags": "--x"}})
    monkeypatch.setattr(subprocess, "run", run)
    path = tmp_path / "gpu.jsonl"
    flags = argparse.Namespace(minutes=1, out=path, config="digits", batch=2, only=None)
    flags.device = "a GPU"
    for _ in range(2):
        for line in gpu.profile(flags):
            assert (line.get("failed") == "ValueError: no such head size") == (
                line["name"] == "bad"
            )
            with open(path, "a") as file:
                file.write(json.dumps({"device": "a GPU", "phase": "profile", **line}) + "\n")
    assert started == ["good", "bad", "bad"]


@pytest.mark.parametrize(
    "name",
    ["as it is", "10 steps a dispatch", *(k for k, v in gpu.CANDIDATES.items() if "replaces" in v)],
)
def test_a_candidate_for_a_faster_step(name, monkeypatch):
    """In this process, with a small network."""
    used = []

    def recorded(function):
        return lambda *args, **kwargs: used.append(1) or function(*args, **kwargs)

    by_xla = functools.partial(gpu.cudnn_attention, implementation="xla")
    monkeypatch.setitem(gpu.REPLACED, "attention", (unet, "attend", by_xla))
    for key, (module, attribute, function) in gpu.REPLACED.items():
        monkeypatch.setitem(gpu.REPLACED, key, (module, attribute, recorded(function)))
    monkeypatch.setattr(gpu, "SECONDS", 0.2)
    monkeypatch.setattr(gpu.cpu, "prepare", lambda *_: None)
    monkeypatch.setattr(gpu.cpu, "use_cores", lambda *_: None)
    monkeypatch.setattr(gpu.cpu, "has_bfloat16", lambda: False)  # oneDNN's programs are not kept
    small = {"channels": 8, "norm_groups": 4, "channel_mults": (1,), "dropout": 0.5}
    fields = {f"model.{key}": value for key, value in small.items()}
    case = {"name": name, "config": "digits_improved", "size": 8, "fields": fields}
    case |= {k: v for k, v in gpu.CANDIDATES[name].items() if k != "fields"}
    found = gpu.measure(case)
    assert found["images_per_second"] > 0
    assert bool(found.get("trace")) == (name == "as it is")
    assert bool(used) == ("replaces" in gpu.CANDIDATES[name])


def test_some_candidates(tmp_path, monkeypatch, capsys):
    """In the order that was asked for; a name that there is not is an error with a list."""
    names = []

    def run(command, **_):
        names.append(json.loads(command[-1])["name"])
        return subprocess.CompletedProcess(command, 0, '{"images_per_second": 1.0}', "")

    monkeypatch.setattr(subprocess, "run", run)
    only = gpu.names_of("batch 4,as it is")
    flags = argparse.Namespace(minutes=1, out=tmp_path / "gpu.jsonl", config="digits", batch=2)
    flags.device, flags.only = "a GPU", only
    assert len(list(gpu.profile(flags))) == 2 and names == ["batch 4", "as it is"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", "profile", "--only=batch 3"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "batch 3: choose from as it is, batch 2" in capsys.readouterr().err


def test_replaced_functions_compute_the_same():
    """Attention as one kernel, norms that the backward pass computes again, and flax's."""
    query, key, value = jax.random.normal(jax.random.key(0), (3, 4, 16, 8))
    found = gpu.cudnn_attention(query, key, value, implementation="xla")
    np.testing.assert_allclose(found, unet.attend(query, key, value), rtol=1e-5, atol=1e-6)
    x = jax.random.normal(jax.random.key(1), (2, 4, 4, 8))
    plain = unet.GroupNorm(4)
    params = plain.init(jax.random.key(2), x)

    def gradient(norm):
        return jax.jit(jax.grad(lambda x: jnp.sin(norm.apply(params, x)).sum()))(x)

    for name in ("norms", "flax's norms"):
        other = gpu.REPLACED[name][2](4)
        assert jax.tree.structure(params) == jax.tree.structure(other.init(jax.random.key(2), x))
        np.testing.assert_allclose(gradient(other), gradient(plain), rtol=1e-5, atol=1e-6)


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
