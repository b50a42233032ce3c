"""Noise schedules: the β sequence, and the coefficients computed from it.

Time: code t runs over [0, T) and is the paper's t - 1, so `betas[0]` is the paper's β_1 and t = 0
is the last denoising step. ᾱ_{t-1} is 1 there; no code uses `alpha_bars[t - 1]`, which would wrap
around.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np


def linear(num_timesteps, beta_start, beta_end):
    """β linear in t (Ho et al., Sec. 4)."""
    return np.linspace(beta_start, beta_end, num_timesteps)


def linear_rescaled(num_timesteps, beta_start, beta_end):
    """`linear` with both ends multiplied by 1000 / T, so that ᾱ_T hardly depends on T."""
    scale = 1000 / num_timesteps
    return linear(num_timesteps, scale * beta_start, scale * beta_end)


def cosine(num_timesteps, beta_start, beta_end, s=0.008, max_beta=0.999):
    """ᾱ a squared cosine (Nichol & Dhariwal 2021, Eq. 17); ignores beta_start and beta_end."""
    del beta_start, beta_end
    time = np.arange(num_timesteps + 1) / num_timesteps
    alpha_bars = np.cos((time + s) / (1 + s) * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bars[1:] / alpha_bars[:-1], max_beta)


def quadratic(num_timesteps, beta_start, beta_end):
    """√β linear in t (Ho et al.'s code; Song et al. 2020)."""
    return np.linspace(beta_start**0.5, beta_end**0.5, num_timesteps) ** 2


def sigmoid(num_timesteps, beta_start, beta_end):
    """β a logistic curve from -6 to 6 between the two ends (Xu et al. 2022, GeoDiff)."""
    logistic = 1 / (1 + np.exp(-np.linspace(-6, 6, num_timesteps)))
    return beta_start + (beta_end - beta_start) * logistic


SCHEDULES = {f.__name__: f for f in (linear, linear_rescaled, cosine, quadratic, sigmoid)}


@flax.struct.dataclass
class Schedule:
    """Coefficients of q and p, each [T] float32, rounded once from float64.

    The names are the paper's: α = 1 - β, ᾱ_t = ∏ α_s. `posterior_*` belong to
    q(x_{t-1} | x_t, x_0), Eqs. (6)-(7).
    """

    betas: jax.Array
    alpha_bars: jax.Array
    sqrt_alpha_bars: jax.Array
    sqrt_one_minus_alpha_bars: jax.Array
    sqrt_recip_alpha_bars: jax.Array  # √(1 / ᾱ)
    sqrt_recip_alpha_bars_minus_one: jax.Array  # √(1 / ᾱ - 1)
    posterior_variance: jax.Array  # β̃, 0 at t = 0
    posterior_mean_coef_x0: jax.Array
    posterior_mean_coef_x_t: jax.Array
    fixed_small_log_variance: jax.Array  # log β̃, at t = 0 the value of t = 1
    fixed_large_log_variance: jax.Array  # log β, at t = 0 that of β̃ at t = 1

    @property
    def num_timesteps(self):
        """T."""
        return self.betas.shape[0]


def make_alpha_bars(name, num_timesteps, beta_start=1e-4, beta_end=0.02, zero_terminal_snr=False):
    """ᾱ of the schedule `name`.

    Args:
      name: a key of SCHEDULES.
      num_timesteps: T, at least 1.
      beta_start: β at code t = 0, in (0, 1).
      beta_end: β at code t = T - 1, in (0, 1).
      zero_terminal_snr: whether to rescale it to ᾱ = 0 at t = T - 1.

    Returns:
      [T] float64, descending, in (0, 1); with zero_terminal_snr the last one is 0.

    Raises:
      ValueError: for an unknown name, T < 1, or a β outside (0, 1).
    """
    if name not in SCHEDULES:
        raise ValueError(f"diffusion.schedule={name!r}: choose from {', '.join(SCHEDULES)}")
    if num_timesteps < 1:
        raise ValueError(f"diffusion.num_timesteps={num_timesteps}: must be at least 1")
    for field, beta in (("beta_start", beta_start), ("beta_end", beta_end)):
        if not 0 < beta < 1:
            raise ValueError(f"diffusion.{field}={beta}: must lie in (0, 1)")
    betas = SCHEDULES[name](num_timesteps, beta_start, beta_end)
    if not np.all((betas > 0) & (betas < 1)):
        raise ValueError(
            f"diffusion.schedule={name!r} with num_timesteps={num_timesteps}: its largest β is "
            f"{betas.max():.4g} and must lie in (0, 1); use more timesteps or a smaller beta_end"
        )
    alpha_bars = np.cumprod(1 - betas)
    if alpha_bars[-1] < np.finfo(np.float32).tiny:
        raise ValueError(
            f"diffusion.num_timesteps={num_timesteps} with beta_end={beta_end}: float32 cannot "
            "hold 1 / ᾱ_T; use a smaller beta_end or schedule=linear_rescaled"
        )
    if not zero_terminal_snr:
        return alpha_bars
    if num_timesteps < 2:
        raise ValueError("diffusion.num_timesteps=1: zero_terminal_snr needs at least 2")
    return rescale_to_zero_terminal_snr(alpha_bars)


def rescale_to_zero_terminal_snr(alpha_bars):
    """Rescales ᾱ so that x_T is pure noise (Lin et al. 2023, Algorithm 1).

      √ᾱ_t ← (√ᾱ_t - √ᾱ_T) · √ᾱ_1 / (√ᾱ_1 - √ᾱ_T)

    ᾱ of the first step is kept, ᾱ of the last one becomes 0.

    Args:
      alpha_bars: [T] float64, descending.

    Returns:
      [T] float64.
    """
    root = np.sqrt(alpha_bars)
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def make_schedule(*args, **kwargs):
    """The Schedule of make_alpha_bars's arguments."""
    return from_alpha_bars(make_alpha_bars(*args, **kwargs))


def from_alpha_bars(alpha_bars):
    """The Schedule of ᾱ: its `coefficients`, rounded to float32."""
    return Schedule(**{k: jnp.asarray(v, jnp.float32) for k, v in coefficients(alpha_bars).items()})


def coefficients(alpha_bars):
    """Every coefficient of a Schedule in float64: {name: [T]}.

    Args:
      alpha_bars: [T] float64, descending, in (0, 1); the last one may be 0, where 1 / √ᾱ is
        infinite.
    """
    alpha_bars_prev = np.append(1.0, alpha_bars[:-1])
    alphas = alpha_bars / alpha_bars_prev
    betas = 1 - alphas
    with np.errstate(divide="ignore"):
        recip_alpha_bars = 1 / alpha_bars
    posterior_variance = betas * (1 - alpha_bars_prev) / (1 - alpha_bars)  # Eq. (7)
    # β̃ is 0 at t = 0, where no noise is added; its logarithm is replaced by that of t = 1.
    first = posterior_variance[1] if len(betas) > 1 else betas[0]
    return dict(
        betas=betas,
        alpha_bars=alpha_bars,
        sqrt_alpha_bars=np.sqrt(alpha_bars),
        sqrt_one_minus_alpha_bars=np.sqrt(1 - alpha_bars),
        sqrt_recip_alpha_bars=np.sqrt(recip_alpha_bars),
        sqrt_recip_alpha_bars_minus_one=np.sqrt(recip_alpha_bars - 1),
        posterior_variance=posterior_variance,
        posterior_mean_coef_x0=np.sqrt(alpha_bars_prev) * betas / (1 - alpha_bars),
        posterior_mean_coef_x_t=np.sqrt(alphas) * (1 - alpha_bars_prev) / (1 - alpha_bars),
        fixed_small_log_variance=np.log(np.append(first, posterior_variance[1:])),
        fixed_large_log_variance=np.log(np.append(first, betas[1:])),
    )
