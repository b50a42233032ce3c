"""The progress bar of everything that takes more than a few seconds."""

import sys

from tqdm.auto import tqdm

from ddpm_jax import parallel


def bar(total, desc, unit, **options):
    """A tqdm bar with the time left; only the first process shows it.

    Args:
      total: number of units.
      desc: the text beside the bar.
      unit: name of the unit.
      **options: other options of tqdm.
    """
    defaults = {"leave": False, "dynamic_ncols": True}
    if sys.stderr is None or not parallel.is_first():  # otherwise TQDM_DISABLE decides
        defaults["disable"] = True
    # Ten lines a second are too many for a log file.
    defaults["mininterval"] = 0.1 if sys.stderr and sys.stderr.isatty() else 10
    return tqdm(total=total, desc=desc, unit=unit, **defaults | options)
