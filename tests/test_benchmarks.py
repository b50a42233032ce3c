"""`python -m benchmarks` runs, beside its peers; no test looks at a time."""

import importlib.util
import subprocess
import sys

import pytest
from programs import ROOT


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
    assert len(rows) == 2 + 4  # a cell of each kind
    for row in rows[2:5]:
        assert all(float(rate.split()[0].replace(",", "")) > 0 for rate in row[1 : len(peers) + 2])
    assert float(rows[5][1].split()[0].replace(",", "")) > 0  # devices are of ours alone
    assert "input pipeline" in done.stdout
