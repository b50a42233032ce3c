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
    who = [row[1].split(" (")[0] for row in rows[2:]]
    peers = ["ours", "eager", "channels_last"]
    if importlib.util.find_spec("denoising_diffusion_pytorch"):
        peers.append("denoising-diffusion-pytorch")
    assert who == peers * 3 + ["ours"]
    assert all(float(row[2]) > 0 for row in rows[2:])
    assert "input pipeline" in done.stdout
