"""Import and export of diffusers' scheduler files (scheduler_config.json).

A scheduler's class names the sampler; its fields are the diffusion process and the sampler's
settings. Our DDPM is its DDPMScheduler; a DDIMScheduler is read as the same diffusion process.
"""

import json
import logging

import numpy as np

from ddpm_jax import errors
from ddpm_jax.core import schedules, solvers
from ddpm_jax.core.diffusion import FIXED_VARIANCES
from ddpm_jax.errors import UserError

log = logging.getLogger(__name__)

VERSION = "0.42.1"  # of diffusers, whose format the export writes
PLAIN = ("DDPMScheduler", "DDIMScheduler")  # read as a diffusion process only
SAMPLERS = {
    "DPMSolverMultistepScheduler": "dpmpp",
    "UniPCMultistepScheduler": "unipc",
    "PNDMScheduler": "plms",
    "HeunDiscreteScheduler": "heun",
}
SCHEDULES = {
    "linear": "linear",
    "scaled_linear": "quadratic",
    "squaredcos_cap_v2": "cosine",
    "sigmoid": "sigmoid",
}
PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
# fixed_small_log is the same variance, computed from its logarithm.
VARIANCES = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "learned_range": "learned_range",  # its "learned" is σ², ours its logarithm
}
ALGORITHMS = {"dpmsolver++": "dpmpp", "sde-dpmsolver++": "dpmpp_sde"}
EVEN = ("leading", "linspace", "trailing")  # timestep_spacing
UNBOUNDED = 1e6  # a sample_max_value that no threshold reaches; our threshold has no maximum

# Fields of all schedulers, with diffusers' defaults.
DEFAULTS = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "steps_offset": 0,
    "tensor_format": "pt",  # of old files; the type of arrays
}
THRESHOLD = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
CLIP = {"clip_sample_range": 1.0}
# Further fields of each class, with diffusers' defaults.
FIELDS = {
    "DDPMScheduler": {
        **THRESHOLD,
        **CLIP,
        "clip_sample": True,
        "variance_type": "fixed_small",
        "predict_epsilon": True,  # an older name of prediction_type
        "timestep_spacing": "leading",
        "rescale_betas_zero_snr": False,
    },
    "DPMSolverMultistepScheduler": {
        **THRESHOLD,
        "solver_order": 2,
        "algorithm_type": "dpmsolver++",
        "variance_type": None,  # it reads only whether the network has learned one
        "timestep_spacing": "linspace",
        "use_karras_sigmas": False,
        "use_lu_lambdas": False,
        "rescale_betas_zero_snr": False,
        "flow_shift": 1.0,
        "time_shift_type": "exponential",
    },
    "UniPCMultistepScheduler": {
        **THRESHOLD,
        "solver_order": 2,
        "timestep_spacing": "linspace",
        "use_karras_sigmas": False,
        "rescale_betas_zero_snr": False,
        "flow_shift": 1.0,
        "time_shift_type": "exponential",
    },
    "PNDMScheduler": {"timestep_spacing": "leading"},
    "HeunDiscreteScheduler": {
        **CLIP,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "clip_sample": False,
        "timestep_spacing": "linspace",
        "use_karras_sigmas": False,
    },
}
FIELDS["DDIMScheduler"] = FIELDS["DDPMScheduler"]
NO_OTHER_SIGMAS = {
    name: (False, False)
    for name in ("use_exponential_sigmas", "use_beta_sigmas", "use_flow_sigmas")
}
# Fields of each class for which we have one value: (diffusers' default, our value).
FIXED = {
    "DDIMScheduler": {"set_alpha_to_one": (True, True)},
    "DPMSolverMultistepScheduler": {
        **NO_OTHER_SIGMAS,
        "solver_type": ("midpoint", "midpoint"),
        "lower_order_final": (True, True),
        "euler_at_final": (False, False),
        "final_sigmas_type": ("zero", "zero"),
        "lambda_min_clipped": (-np.inf, -np.inf),
        "use_dynamic_shifting": (False, False),
    },
    "UniPCMultistepScheduler": {
        **NO_OTHER_SIGMAS,
        "predict_x0": (True, True),
        "solver_type": ("bh2", "bh2"),
        "lower_order_final": (True, True),
        "disable_corrector": ([], []),
        "final_sigmas_type": ("zero", "zero"),
        "use_dynamic_shifting": (False, False),
    },
    "PNDMScheduler": {"skip_prk_steps": (False, True), "set_alpha_to_one": (False, True)},
    "HeunDiscreteScheduler": {
        name: (False, False) for name in ("use_exponential_sigmas", "use_beta_sigmas")
    },
}
# A scheduler that was made from another one's file keeps that one's fields, and ignores them.
ANY_CLASS = {name for fields in (*FIELDS.values(), *FIXED.values()) for name in fields}
THIRD_ORDER = (
    "order 3 of diffusers' DPMSolverMultistepScheduler halves its last term, and so is of second "
    "order; ours is of third order"
)
KARRAS = "with Karras' spacing, diffusers keeps σ between steps; ours are those of whole steps"
# What diffusers does otherwise with a spacing: {(class, spacing): text}.
JUMPS = "goes from t to t - T // S, whatever the next of its steps is; ours goes to the next step"
WHOLE = "does not round the steps of linspace; ours are whole"
OTHERWISE = {
    ("DDIMScheduler", "linspace"): f"diffusers' DDIMScheduler {JUMPS}",
    ("DDIMScheduler", "trailing"): f"unless S divides T, diffusers' DDIMScheduler {JUMPS}",
    ("PNDMScheduler", "trailing"): f"unless S divides T, diffusers' PNDMScheduler {JUMPS}",
    ("HeunDiscreteScheduler", "linspace"): f"diffusers' HeunDiscreteScheduler {WHOLE}",
}


def read_scheduler(scheduler, origin):
    """Converts a scheduler's config to fields of our config.

    Args:
      scheduler: the content of its scheduler_config.json.
      origin: the file, for errors.

    Returns:
      {"section.field": value}.

    Raises:
      UserError: that names the first field that we do not support.
    """
    kind = scheduler.get("_class_name")
    fixed = FIXED.get(kind, {}) if isinstance(kind, str) else {}
    fields = {**DEFAULTS, **{name: default for name, (default, _) in fixed.items()}}
    if isinstance(kind, str):
        fields |= FIELDS.get(kind, {})
    supported = {"_class_name", *fields}
    ignored = sorted(name for name in scheduler if name in ANY_CLASS - supported)
    fields |= {name: value for name, value in scheduler.items() if name not in ignored}

    def require(fits, name, allowed):
        if not fits:
            raise UserError(f"{origin}: {name}={json_text(fields.get(name))}: {allowed}")

    classes = ", ".join(sorted(FIELDS))
    allowed = f"choose from {classes} (without this file, --config defines the diffusion)"
    require(isinstance(kind, str) and kind in FIELDS, "_class_name", allowed)
    for name in sorted(fields):
        allowed = f"is not supported for {kind}"
        known = name in supported or name.startswith("_")
        require(known or fields[name] is None, name, allowed)
    for name, (_, ours) in fixed.items():
        require(fields[name] == ours, name, f"must be {json_text(ours)}")
    found = _diffusion(fields, require) | _clipping(fields, require) | _sampler(fields, require)
    if ignored:  # after the checks: an error is one line
        values = ", ".join(f"{name}={json_text(scheduler[name])}" for name in ignored)
        log.warning("%s: ignored, as %s does: %s", origin, kind, values)
    return found


def _take(fields, require, name, choices):
    """The value of a field in our words."""
    fits = isinstance(fields[name], str) and fields[name] in choices
    require(fits, name, f"choose from {', '.join(choices)}")
    return choices[fields[name]]


def _diffusion(fields, require):
    """The fields of our diffusion section."""
    require(fields.get("predict_epsilon", True) is True, "predict_epsilon", "must be true")
    prediction = _take(fields, require, "prediction_type", PREDICTIONS)
    steps, start, end = (fields[n] for n in ("num_train_timesteps", "beta_start", "beta_end"))
    require(is_size(steps), "num_train_timesteps", "must be a whole number above 0")
    for name in ("beta_start", "beta_end"):
        fits = isinstance(fields[name], float | int) and 0 < fields[name] < 1
        require(fits, name, "must lie in (0, 1)")
    name = _take(fields, require, "beta_schedule", SCHEDULES)
    if fields["trained_betas"] is not None:
        name = _schedule_of(fields["trained_betas"], steps, start, end)
        allowed = f"must be those of one of {', '.join(SCHEDULES)}"
        require(name, "trained_betas", allowed)
    rescales = fields.get("rescale_betas_zero_snr", False)
    require(isinstance(rescales, bool), "rescale_betas_zero_snr", "must be true or false")
    found = {
        "diffusion.schedule": name,
        "diffusion.num_timesteps": steps,
        "diffusion.beta_start": float(start),
        "diffusion.beta_end": float(end),
        "diffusion.zero_terminal_snr": rescales,
        "diffusion.prediction": prediction,
    }
    if fields["_class_name"] in PLAIN or fields.get("variance_type") is not None:
        found["diffusion.variance"] = _take(fields, require, "variance_type", VARIANCES)
    return found


def _clipping(fields, require):
    """Whether x0 is clipped, and the quantile of dynamic thresholding."""
    for name in ("thresholding", "clip_sample"):
        allowed = "must be true or false"
        require(isinstance(fields.get(name, False), bool), name, allowed)
    clips, quantile = fields.get("clip_sample", False), 0.0
    if clips:
        require(fields["clip_sample_range"] == 1, "clip_sample_range", "must be 1.0")
    if fields.get("thresholding"):
        # A threshold between 1 and 1 is plain clipping.
        most = fields["sample_max_value"]
        fits = isinstance(most, float | int) and (most == 1 or most >= UNBOUNDED)
        allowed = f"must be 1.0 (clipping), or {UNBOUNDED:g} or more (no maximum)"
        require(fits, "sample_max_value", allowed)
        clips, quantile = True, fields["dynamic_thresholding_ratio"]
        fits = isinstance(quantile, float | int) and 0 < quantile <= 1
        require(fits, "dynamic_thresholding_ratio", "must lie in (0, 1]")
        quantile = 0.0 if most == 1 else float(quantile)
    found = {"diffusion.clip_x0": clips}
    return found | ({"sample.dynamic_threshold": quantile} if quantile else {})


def _sampler(fields, require):
    """The fields of our sample section; only the spacing for DDPMScheduler and DDIMScheduler."""
    kind = fields["_class_name"]
    if kind in PLAIN:
        return {"sample.spacing": _spacing(fields, require)}
    sampler, order = SAMPLERS[kind], fields.get("solver_order", 2)
    if kind == "DPMSolverMultistepScheduler":
        sampler = _take(fields, require, "algorithm_type", ALGORITHMS)
    orders = solvers.ORDERS.get(sampler, (2,))
    allowed = f"choose from {', '.join(map(str, orders))}"
    require(is_size(order) and order in orders, "solver_order", allowed)
    if kind == "PNDMScheduler":
        # It extrapolates v where we extrapolate ε.
        require(fields["prediction_type"] == "epsilon", "prediction_type", 'must be "epsilon"')
    if (sampler, order) == ("dpmpp", 3):
        log.warning("%s", THIRD_ORDER)
    spacing = _spacing(fields, require)
    return {"sample.sampler": sampler, "sample.order": order, "sample.spacing": spacing}


def _spacing(fields, require):
    """Our name of a scheduler's spacing."""
    spacing, choices = fields["timestep_spacing"], _even_spacings(fields["_class_name"])
    require(spacing in choices, "timestep_spacing", f"choose from {', '.join(choices)}")
    # Of both, diffusers takes Karras'.
    for name, other in (("use_lu_lambdas", "logsnr"), ("use_karras_sigmas", "karras")):
        allowed = "must be true or false"
        require(fields.get(name, False) in (True, False, None), name, allowed)
        spacing = other if fields.get(name) else spacing
    if spacing == "leading":
        require(fields["steps_offset"] == 0, "steps_offset", "must be 0")
    _warn_of_spacing(fields["_class_name"], spacing)
    return spacing


def _warn_of_spacing(kind, spacing):
    """Warns if a scheduler of diffusers takes other steps than ours."""
    of_all = KARRAS if spacing in ("karras", "logsnr") else ""
    if text := OTHERWISE.get((kind, spacing), of_all):
        log.warning("%s", text)


def _even_spacings(kind):
    """The evenly spaced steps that a scheduler takes as we do."""
    # From every t, PNDMScheduler goes to t - T // S, whatever the next t of linspace is.
    return tuple(name for name in EVEN if (kind, name) != ("PNDMScheduler", "linspace"))


def _schedule_of(betas, steps, start, end):
    """The name of the schedule with these β's, or None."""
    try:
        betas = np.asarray(betas, np.float64)
    except (OverflowError, TypeError, ValueError):
        return None
    for name in SCHEDULES.values():
        ours = schedules.SCHEDULES[name](steps, start, end)
        if betas.shape == ours.shape and np.allclose(betas, ours, rtol=1e-5, atol=0):
            return name
    return None


def write_scheduler(config):
    """The scheduler_config.json for a config's diffusion and sample sections.

    The class is that of the sampler; a DDPMScheduler for ancestral sampling and for DDIM, whose
    pipeline reads it.

    Raises:
      UserError: that names the first field that diffusers does not have.
    """
    diffusion, sampler = config.diffusion, config.sample.sampler
    kinds = {ours: kind for kind, ours in SAMPLERS.items()} | {
        "dpmpp_sde": "DPMSolverMultistepScheduler"
    }
    kind = kinds.get(sampler, "DDPMScheduler")
    scale, name = 1.0, diffusion.schedule
    if name == "linear_rescaled":
        scale, name = 1000 / diffusion.num_timesteps, "linear"
    beta_schedule = {ours: theirs for theirs, ours in SCHEDULES.items()}[name]
    predictions = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    if kind == "PNDMScheduler":
        predictions = {"eps": "epsilon"}  # it extrapolates v where we extrapolate ε
    # A DPMSolverMultistepScheduler takes the first three channels for ε, whatever there is.
    cuts_right = config.data.channels == 3 and diffusion.prediction == "eps"
    has_learned = kind in PLAIN or ("variance_type" in FIELDS[kind] and cuts_right)
    variances = (*FIXED_VARIANCES, "learned_range") if has_learned else FIXED_VARIANCES
    for field, supported in (("prediction", predictions), ("variance", variances)):
        text = f"{kind} has only {', '.join(supported)}"
        errors.require(diffusion[field] in supported, f"diffusion.{field}", diffusion[field], text)
    betas = schedules.SCHEDULES[diffusion.schedule](
        diffusion.num_timesteps, diffusion.beta_start, diffusion.beta_end
    )
    return {
        "_class_name": kind,
        "_diffusers_version": VERSION,
        "num_train_timesteps": diffusion.num_timesteps,
        "beta_schedule": beta_schedule,
        "beta_start": scale * diffusion.beta_start,
        "beta_end": scale * diffusion.beta_end,
        # DDIMScheduler has no sigmoid, but accepts β's.
        "trained_betas": betas.tolist() if name == "sigmoid" else None,
        "prediction_type": predictions[diffusion.prediction],
        **_written_sampler(config, kind),
    }


def _written_sampler(config, kind):
    """The fields of a scheduler that are not of its diffusion process."""
    diffusion, section = config.diffusion, config.sample
    has, quantile = FIELDS[kind], section.dynamic_threshold
    fields = {name: ours for name, (_, ours) in FIXED.get(kind, {}).items()}
    fields.pop("lambda_min_clipped", None)  # JSON has no -∞; it is the default
    zero_snr, name = diffusion.zero_terminal_snr, "diffusion.zero_terminal_snr"
    errors.require(
        not zero_snr or "rescale_betas_zero_snr" in has, name, zero_snr, f"{kind} has none"
    )
    if "rescale_betas_zero_snr" in has:
        fields["rescale_betas_zero_snr"] = zero_snr
    name = "sample.dynamic_threshold"
    errors.require(not quantile or "thresholding" in has, name, quantile, f"{kind} has none")
    if quantile or (diffusion.clip_x0 and "thresholding" in has and "clip_sample" not in has):
        fields["thresholding"] = True
        fields["sample_max_value"] = UNBOUNDED if quantile else 1.0
        fields["dynamic_thresholding_ratio"] = quantile or 0.995
    elif "clip_sample" in has:
        fields["clip_sample"] = diffusion.clip_x0
    else:
        clips, name = diffusion.clip_x0, "diffusion.clip_x0"
        errors.require(not clips or "thresholding" in has, name, clips, f"{kind} does not clip")
    fields |= _written_spacing(section.spacing, section.sampler, kind)
    if kind in PLAIN:
        return fields | {"variance_type": diffusion.variance}
    if "solver_order" in has:
        fields["solver_order"] = section.order
    if diffusion.variance == "learned_range":
        fields["variance_type"] = "learned_range"
    if kind == "DPMSolverMultistepScheduler":
        algorithms = {ours: theirs for theirs, ours in ALGORITHMS.items()}
        fields["algorithm_type"] = algorithms[section.sampler]
        if section.order == 3:
            log.warning("%s", THIRD_ORDER)
    return fields


def _written_spacing(spacing, sampler, kind):
    """The fields of a scheduler for a spacing."""
    flags = {"karras": "use_karras_sigmas", "logsnr": "use_lu_lambdas"}
    supported = [
        *_even_spacings(kind),
        *(name for name, flag in flags.items() if flag in FIELDS[kind]),
    ]
    text = f"{kind} has only {', '.join(supported)}"
    errors.require(spacing in supported, "sample.spacing", spacing, text)
    # Which scheduler reads a DDPMScheduler's file, the pipeline decides; for ddim it is this one.
    _warn_of_spacing("DDIMScheduler" if sampler == "ddim" else kind, spacing)
    if spacing in EVEN:
        return {"timestep_spacing": spacing, "steps_offset": 0}
    return {flags[spacing]: True}


def json_text(value):
    """A value as in a JSON file."""
    return json.dumps(value, ensure_ascii=False)


def is_size(value):
    """Whether a value of a JSON file is a whole number above 0, and not absurdly large."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**20
