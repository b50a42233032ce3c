"""The frames of the reverse process that a run's pictures show.

The grids that training draws keep the same frames as the report, though they only show its end: so
one compiled program draws both.
"""

from typing import NamedTuple

import numpy as np

from ddpm_jax.core import solvers
from ddpm_jax.runs import samplers


class Frames(NamedTuple):
    """The steps whose frames are shown, as indices of the chain's timesteps; noisiest first."""

    timesteps: np.ndarray  # [S], of the chain
    strip: list  # columns of the strips: after the step, and x0_pred
    animation: list  # frames of the animation, after the step
    options: dict  # frames_at and x0_at, for samplers.make_sampler

    def numbers(self, steps):
        """Where the frames of these steps are among those that the sampler returns."""
        kept = sorted({*self.strip, *self.animation}, reverse=True)
        return [kept.index(i) for i in steps]


def timesteps(config):
    """The t of the strips, noisiest first."""
    total = config.diffusion.num_timesteps
    tenths = np.linspace(total - 1, 0, min(10, total)).round().astype(int).tolist()
    return sorted(set(config.show.timesteps or tenths), reverse=True)


def of_reverse(config):
    """The Frames of a config; its sampler is that of the show section (configs.for_show)."""
    chain = samplers.make_chain(config)
    taus, rows = chain.timesteps, solvers.rows_of_steps(samplers.make_solver(config, chain))
    # With fewer steps than T, the nearest ones.
    strip = {int(np.abs(taus - t).argmin()) for t in timesteps(config)}
    last, count = len(taus) - 1, min(config.show.num_frames, len(taus))
    animation = set(np.linspace(0, last, count).round().astype(int).tolist())
    options = {
        "frames_at": {rows[i][1] for i in strip | animation},
        "x0_at": {rows[i][0] for i in strip},
    }
    strip, animation = (sorted(steps, reverse=True) for steps in (strip, animation))
    return Frames(taus, strip, animation, options)
