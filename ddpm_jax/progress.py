"""The bar that everything shows which takes more than a few seconds."""

import sys

from tqdm.auto import tqdm

from ddpm_jax import parallel


def bar(total, desc, unit, **options):
    """A tqdm bar with the time left; of several processes, the first one shows it.

    Args:
      total: units in the whole.
      desc: what is being done.
      unit: of what.
      **options: more of tqdm's.
    """
    shown = {"leave": False, "dynamic_ncols": True}
    if not parallel.is_first():  # else TQDM_DISABLE may still say so
        shown["disable"] = True
    # A log file need not hold ten lines a second.
    shown["mininterval"] = 0.1 if sys.stderr.isatty() else 10
    return tqdm(total=total, desc=desc, unit=unit, **shown | options)
