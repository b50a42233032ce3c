"""Draws the table of `python -m benchmarks --full`: rates relative to the fastest peer.

    python -m benchmarks.chart docs/speed.csv docs/assets/speed.png

Each row of the CSV file is one contestant in one cell: median, lowest and highest images/s. The
suffix of the picture decides its format.
"""

import argparse
import csv

from matplotlib.figure import Figure

OURS = "ours"
MARKERS = {
    OURS: dict(marker="o", color="tab:blue", s=36, zorder=3),
    "compiled": dict(marker="D", color="tab:red", s=16),
    "eager": dict(marker="^", color="tab:orange", s=16),
    "channels_last": dict(marker="v", color="tab:green", s=16),
    "denoising-diffusion-pytorch": dict(marker="x", color="gray", s=16, linewidths=1),
}
NETWORKS = {"digits": "digits, 8×8", "mnist": "MNIST, 28×28", "cifar10": "CIFAR-10, 32×32"}
TASKS = ("train", "forward", "ancestral", "ddim")


def read(path):
    """{(network, task, batch): {contestant: (median, lowest, highest)}}, cells with peers only."""
    cells = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            if not row["devices"]:
                cell = cells.setdefault((row["network"], row["task"], int(row["batch"])), {})
                rates = (row["images_per_second"], row["lowest"], row["highest"])
                cell[row["contestant"]] = tuple(map(float, rates))
    return cells


def draw(cells):
    """A Figure with a panel for each network and a line for each cell."""
    chosen = {name: sorted((c for c in cells if c[0] == name), key=order) for name in NETWORKS}
    heights = [len(panel) for panel in chosen.values()]
    figure = Figure(figsize=(6, 8.4), layout="constrained")
    panels = figure.subplots(len(NETWORKS), 1, sharex=True, height_ratios=heights)
    for axes, (network, panel) in zip(panels, chosen.items(), strict=True):
        draw_network(axes, [cells[cell] for cell in panel])
        labels = [f"{task}, batch {batch}" for _, task, batch in panel]
        axes.set_yticks(range(len(panel)), labels, fontsize=9)
        axes.set_title(NETWORKS[network], fontsize=10, loc="left")
        axes.invert_yaxis()
    panels[-1].set_xlabel("images/s, divided by the fastest peer's median")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=3, fontsize=9, frameon=False)
    return figure


def order(cell):
    """Training first, then by batch size."""
    _, task, batch = cell
    return TASKS.index(task), batch


def draw_network(axes, panel):
    """The contestants of each cell, divided by the median of the fastest peer."""
    axes.axvline(1, color="black", linewidth=0.8)
    for name, style in MARKERS.items():
        points = []
        for y, rates in enumerate(panel):
            fastest = max(median for peer, (median, *_) in rates.items() if peer != OURS)
            median, lowest, highest = (rate / fastest for rate in rates[name])
            points.append((median, y))
            if name == OURS:
                axes.plot((lowest, highest), (y, y), color="tab:blue", linewidth=1.5, alpha=0.5)
        axes.scatter(*zip(*points, strict=True), label=name, **style)
    axes.grid(axis="x", linewidth=0.4)
    axes.set_axisbelow(True)


def command(text, read, draw):
    """The command line of a chart: draws a CSV file to a picture.

    Args:
      text: the program's docstring; its first line is the help's.
      read: a path to what draw takes.
      draw: what was read to a Figure.
    """
    parser = argparse.ArgumentParser(description=text.split("\n")[0])
    parser.add_argument("csv", help="the measurements, as in docs/")
    parser.add_argument("picture", help="the file to write")
    arguments = parser.parse_args()
    draw(read(arguments.csv)).savefig(arguments.picture, dpi=150)


if __name__ == "__main__":
    command(__doc__, read, draw)
