"""`python -m benchmarks` runs, with the peers; no test checks a time."""

import csv
import importlib.util
import subprocess
import sys

import pytest
from programs import ROOT

from benchmarks import chart


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
