"""Draws what `python -m benchmarks.samplers` measured: quality against network evaluations.

python -m benchmarks.sampler_chart docs/samplers.csv docs/assets/samplers.png
"""

import csv

import numpy as np
from matplotlib.figure import Figure

from benchmarks import chart

FULL_CHAIN = ("ancestral", "2", "leading")
MARKERS = dict(ancestral="o", ddim="s", dpmpp="^", dpmpp_sde="v", unipc="D", heun="x", plms="+")
LINES = dict(leading="-", linspace="--", trailing=":")


def read(path):
    """{data: {(sampler, order, spacing): {nfe: [distance of each seed]}}}, of measured chains."""
    found = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            method = tuple(row[name] for name in ("sampler", "order", "spacing"))
            curve = found.setdefault(row["data"], {}).setdefault(method, {})
            curve.setdefault(int(row["nfe"]), []).append(float(row["distance"]))
    # Without its full chain, a run has nothing to compare with.
    return {name: m for name, m in found.items() if max(m.get(FULL_CHAIN, {0: []})) > 50}


def draw(found):
    """A Figure with a panel for each run: means over the seeds, and their range."""
    figure = Figure(figsize=(6.5, 4.6 * len(found)), layout="constrained")
    panels = np.ravel(figure.subplots(len(found)))
    for axes, (name, methods) in zip(panels, found.items(), strict=True):
        for (sampler, order, spacing), curve in methods.items():
            nfe = sorted(curve)
            nfe = [n for n in nfe if n <= 50] if (sampler, order, spacing) == FULL_CHAIN else nfe
            values = np.array([(np.mean(curve[n]), min(curve[n]), max(curve[n])) for n in nfe])
            if not nfe:
                continue
            label = f"{sampler}{order if sampler in ('dpmpp', 'unipc') else ''}, {spacing}"
            (line,) = axes.plot(
                nfe, values[:, 0], marker=MARKERS[sampler], linestyle=LINES[spacing], label=label
            )
            axes.fill_between(nfe, *values[:, 1:].T, alpha=0.2, color=line.get_color())
        full = max(methods[FULL_CHAIN])
        distance = np.mean(methods[FULL_CHAIN][full])
        axes.axhline(distance, color="black", linewidth=0.8)
        axes.axhspan(distance, 1.1 * distance, color="black", alpha=0.1, linewidth=0)
        axes.set(
            title=f"{name}; black: all {full} steps, and 10 % above", xlabel="NFE", xscale="log",
            ylabel="Fréchet distance", yscale="log",
        )  # fmt: skip
        ticks = sorted({n for curve in methods.values() for n in curve if n <= 50} - {4, 7, 9, 19})
        axes.set_xticks(ticks, ticks)
        axes.minorticks_off()
        axes.legend(fontsize=7, ncols=2)
    return figure


if __name__ == "__main__":
    chart.command(__doc__, read, draw)
