"""The variational bound of held-out images in bits/dim, Eq. (5), and progressive coding."""

import numpy as np
from jax import numpy as jnp
from matplotlib.figure import Figure

from ddpm_jax import configs, parallel
from ddpm_jax.core import diffusion, likelihood, sampling
from ddpm_jax.errors import UserError
from ddpm_jax.files import data, disk, images, row_files
from ddpm_jax.runs import compare, reference, samplers

# Of sampling_provenance: fields that the bound does not depend on (it has every variance).
SAMPLING = """
    variance sampler sampler_order sampler_steps nfe spacing eta dynamic_threshold label guidance
    classifier_sha256
""".split()


def open_images(config, test):
    """The images of `evaluate.split`: a Source; `test`, those of data.eval_split, if it is empty.

    Raises:
      UserError: if there is no such split.
    """
    split, section = config.evaluate.split, config.data.copy_and_resolve_references()
    if split in ("", section.eval_split):
        return test
    section.eval_split = split
    try:
        return data.open_source(section, "eval_split")
    except UserError as error:
        raise UserError(str(error).replace("data.eval_split", "evaluate.split", 1)) from None


def bits_per_dim(config, workdir, provenance, params, source, stop):
    """The mean bound over images, its parts, and progressive lossy compression.

    Writes evaluation.npz (the terms over t, and bits/dim, rate and distortion of each image) and
    evaluation.png. Intermediate results are kept in the run's folder.

    Args:
      config: its evaluate section names the images.
      workdir: the run's folder.
      provenance: what the samples depend on: {field: value}.
      params: of the network.
      source: from open_images.
      stop: from signals.catch.

    Returns:
      {field of evaluation.json: value}.
    """
    split = config.evaluate.split or config.data.eval_split
    count = min(config.evaluate.bits_per_dim_images, source.size)
    description = reference.describe(config.data, split, source)
    known = {name: value for name, value in provenance.items() if name not in SAMPLING}
    folder = reference.provenance_folder(workdir / "evaluation", {**known, **description})
    rows_of, size = make_rows(config, params, source), config.sample.batch_size
    row_files.collect(folder, count, size, rows_of, "evaluate bits/dim", stop)
    results, arrays = summarize(config, unpack(config, row_files.rows(folder, count)))
    disk.write_npz(workdir / "evaluation.npz", **arrays)
    draw(workdir / "evaluation.png", arrays)
    of_images = {"bits_per_dim_split": split, "bits_per_dim_images": count}
    return {**of_images, "bits_per_dim_sha256": description["images_sha256"], **results}


def variances(config):
    """The variances that the bound is computed for: the fixed ones, and the learned one if any."""
    variance, fixed = config.diffusion.variance, diffusion.FIXED_VARIANCES
    return (*fixed, variance) if variance in diffusion.LEARNED_VARIANCES else fixed


def make_rows(config, params, source):
    """Builds (first, last) → [N, 1 + (V + 1) T], for each image L_T, the bound's terms for each of
    V variances, and the MSE of x0. A conditional network gets the labels."""
    schedule, size = configs.make_schedule(config), config.sample.batch_size

    def rows(params, batch, indices):
        x0, keys = images.to_float(batch.images), sampling.image_keys(config.sample.seed, indices)
        vlb = likelihood.vlb(
            schedule,
            samplers.predict_for(config, schedule, params, batch.labels),
            x0,
            lambda t: sampling.noise(keys, t, x0.shape[1:]),
            variances=variances(config),
        )
        terms = [vlb.terms[variance].T for variance in variances(config)]
        return jnp.concatenate([vlb.prior[:, None], *terms, vlb.x0_mse.T], axis=1)

    rows = parallel.pmap(rows, in_axes=(None, 0, 0))

    def rows_of(first, last):
        indices = np.minimum(first + np.arange(size), last - 1)  # padded with the last image
        local = parallel.local_shard(indices)
        out = rows(params, *parallel.shard((source.read(local), local)))
        return parallel.gather(out)[: last - first]

    return rows_of


def unpack(config, rows):
    """The likelihood.Vlb of the images whose rows, [N, 1 + (V + 1) T], make_rows has computed."""
    ends = range(1, rows.shape[1], config.diffusion.num_timesteps)
    prior, *terms, x0_mse = np.split(rows.T, ends)
    return likelihood.Vlb(prior[0], dict(zip(variances(config), terms, strict=True)), x0_mse)


def summarize(config, vlb):
    """Means over the images.

    Args:
      config: its diffusion section is used.
      vlb: a likelihood.Vlb of N images.

    Returns:
      ({field of evaluation.json: value}, {name in evaluation.npz: array}): the fields without the
      name of a variance are those of the run's own.
    """
    own, num_timesteps = config.diffusion.variance, config.diffusion.num_timesteps
    results, arrays = {}, {"prior": vlb.prior.mean(dtype=np.float64)}
    for variance, terms in vlb.terms.items():
        arrays[f"terms_{variance}"] = terms.mean(axis=1, dtype=np.float64)
        rate = vlb.prior + terms[1:].sum(axis=0, dtype=np.float64)
        parts = {"bits_per_dim": rate + terms[0], "rate": rate, "distortion": terms[0]}
        for name, values in parts.items():
            found = {"": float(values.mean()), "_error": standard_error(values)}
            results |= {f"{name}_{variance}{end}": value for end, value in found.items()}
            if variance == own:
                results |= {f"{name}{end}": value for end, value in found.items()}
                arrays[f"{compare.OF_IMAGES}{name}"] = values

    mse = vlb.x0_mse.mean(axis=1, dtype=np.float64)
    rate, rmse = likelihood.progressive_code(arrays[f"terms_{own}"], mse, arrays["prior"])
    tenths = np.unique(np.linspace(0, num_timesteps, 11).round().astype(int))[1:]
    results |= {
        "prior_bits_per_dim": float(arrays["prior"]),
        "rmse": rmse[-1],
        "progressive": [
            {"steps": int(steps), "rate": rate[steps - 1], "rmse": rmse[steps - 1]}
            for steps in tenths
        ],
    }
    return results, {**arrays, "rate": rate, "rmse": rmse}


def standard_error(values):
    """The standard error of a mean; None of a single value."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None


def draw(path, arrays):
    """Plots the bound's terms over t, and distortion over rate, from the arrays of `summarize`."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    over_t, trade = figure.subplots(1, 2)
    for name in sorted(name for name in arrays if name.startswith("terms_")):
        over_t.semilogy(arrays[name], label=name.removeprefix("terms_"))
    over_t.set(xlabel="t", ylabel="bits/dim", title="terms of the VLB")
    over_t.legend()
    trade.plot(arrays["rate"], arrays["rmse"])
    title = "progressive lossy compression"
    trade.set(xlabel="rate (bits/dim)", ylabel="RMSE of x0 (0 to 255)", title=title)
    images.write_figure(path, figure)
