"""Draws what `python -m benchmarks.objectives` measured, and prints it as a table.

python -m benchmarks.objectives_chart docs/objectives.csv docs/assets/objectives.png
"""

import csv

import numpy as np
from matplotlib.figure import Figure

from benchmarks import chart

BASELINE = "simple"
# {score: (title, whether larger is better)}
SCORES = {
    "mse_q1": ("ε-MSE, 1st quarter of t", False),
    "mse_q2": ("2nd quarter", False),
    "mse_q3": ("3rd quarter", False),
    "mse_q4": ("4th quarter", False),
    "bits/dim": ("bits/dim", False),
    "full": ("Fréchet, all T steps", False),
    "fast": ("Fréchet, 10 steps", False),
    "confident": ("confident", True),
}


def read(path):
    """{data: {choice: {score: [value of each seed]}}}, in the order of the file."""
    found = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            scores = found.setdefault(row["data"], {}).setdefault(row["choice"], {})
            scores.setdefault(row["score"], []).append(float(row["value"]))
    return found


def table(choices):
    """Yields the lines of a Markdown table: mean ± standard deviation over the seeds."""
    shown = [name for name in SCORES if any(name in scores for scores in choices.values())]
    yield f"| | {' | '.join(SCORES[name][0] for name in shown)} |"
    yield "|---" * (len(shown) + 1) + "|"
    for choice, scores in choices.items():
        yield f"| {choice} | {' | '.join(cell(scores.get(name)) for name in shown)} |"


def cell(values):
    """Mean ± standard deviation; of one seed, its value; empty if it was not measured."""
    if not values:
        return ""
    digits = max(0, 2 - int(np.floor(np.log10(abs(np.mean(values))))))
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"


def draw(found):
    """A Figure with eight panels for each dataset: every seed a dot, a line at the baseline."""
    names = list(SCORES)
    heights = [1.4 + 0.38 * len(choices) for choices in found.values()]
    figure = Figure(figsize=(9, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(found), squeeze=False, height_ratios=heights)[:, 0]
    for part, (data, choices) in zip(parts, found.items(), strict=True):
        part.suptitle(data)
        for panels, four in zip(part.subplots(2, 4), (names[:4], names[4:]), strict=True):
            for axes, name in zip(panels, four, strict=True):
                draw_score(axes, name, choices)
                axes.set_yticks(range(len(choices)), [] if axes is not panels[0] else choices)
    return figure


def draw_score(axes, name, choices):
    """One panel; green is better than every seed of the baseline, red is worse than every one.

    One seed tells no difference: it is gray.
    """
    title, larger = SCORES[name]
    sign = 1 if larger else -1
    baseline = sign * np.array(choices[BASELINE].get(name, [np.nan]))
    for y, scores in enumerate(choices.values()):
        values = np.array(scores.get(name, []))
        if len(values):
            better, worse = min(sign * values) > max(baseline), max(sign * values) < min(baseline)
            color = "tab:green" if better else "tab:red" if worse else "tab:gray"
            if min(len(values), len(baseline)) == 1:
                color = "tab:gray"
            axes.plot([min(values), max(values)], [y, y], color=color, linewidth=1.5, alpha=0.5)
            axes.scatter(values, [y] * len(values), color=color, s=12, zorder=3)
    axes.axvline(sign * np.mean(baseline), color="black", linewidth=0.8)
    axes.set_title(title, fontsize=9)
    measured = [value for scores in choices.values() for value in scores.get(name, [])]
    if not measured:
        axes.set_axis_off()
    elif name == "fast" and max(measured) > 10 * min(measured):
        axes.set_xscale("log")
    else:
        axes.locator_params(axis="x", nbins=3)
    axes.tick_params(labelsize=8)
    axes.set_ylim(len(choices) - 0.5, -0.5)
    axes.grid(axis="x", linewidth=0.4)
    axes.set_axisbelow(True)


def draw_and_print(found):
    """A Figure; prints the tables."""
    for choices in found.values():
        print("\n".join(table(choices)), end="\n\n")
    return draw(found)


if __name__ == "__main__":
    chart.command(__doc__, read, draw_and_print)
