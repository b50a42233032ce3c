"""Every config builds its network without computing anything, and rejects a typo."""

import ast
import contextlib
import inspect
import json
import pathlib
import re
import runpy
import shlex
import types

import jax
import pytest

import ddpm_jax
from ddpm_jax import checks, cli, configs, cpu
from ddpm_jax.core import likelihood, solvers, unet
from ddpm_jax.errors import UserError
from ddpm_jax.files import checkpoint, run_files
from ddpm_jax.runs import samplers

FILES = sorted((pathlib.Path(__file__).parent.parent / "configs").rglob("*.py"))
PARAMETERS = {
    "cifar10": 35_746_307,
    "default": 35_746_307,
    "celebahq256": 113_673_219,
    "lsun256": 113_673_219,
}


def load(path):
    return runpy.run_path(str(path))["get_config"]()


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_builds(path):
    config = load(path)
    checks.check(config)
    configs.make_schedule(config)
    model = configs.make_model(config)
    params = unet.param_shapes(model, configs.image_shape(config))
    count = sum(p.size for p in jax.tree.leaves(params))
    assert count == PARAMETERS.get(path.stem, count)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_scores_take_little_of_a_training(path):
    """At most 6 % of its passes through the network; those of a gradient count three."""
    config = load(path)
    train = config.train
    if not train.score_every:
        return
    chain = samplers.make_chain(configs.for_show(config))
    scoring = train.num_steps / train.score_every * train.score_samples * len(chain.timesteps)
    assert 0 < scoring < 0.06 * 3 * train.num_steps * train.batch_size


TUTORIALS = ("cifar10_t1000", "flowers_t1000", "mnist28_t1000", "mnist28_t200", "mnist32_t200")


@pytest.mark.parametrize("name", TUTORIALS)
def test_chains_of_tutorials(name):
    """C and D do not end in noise; rescaled, they do (prior KL)."""
    config = load(FILES[0].parent / "tutorials" / f"{name}.py")
    diffusion = config.diffusion
    kl = likelihood.prior_kl(configs.make_alpha_bars(config)[-1], 1 / 3)
    expected = {200: 0.0387, 1000: 9.7e-6}[diffusion.num_timesteps]
    assert float(kl) == pytest.approx(expected, rel=0.01)
    assert (kl > likelihood.MAX_PRIOR_KL) == name.endswith("t200")
    diffusion.schedule = "linear_rescaled"
    assert likelihood.prior_kl(configs.make_alpha_bars(config)[-1], 1 / 3) < likelihood.MAX_PRIOR_KL


def overrides_in_docstrings():
    """(path, flags) of the overrides in a docstring; adjacent flags belong together."""
    for name in TUTORIALS:
        path = FILES[0].parent / "tutorials" / f"{name}.py"
        text = ast.get_docstring(ast.parse(path.read_text())).replace("\\\n", "\n")
        flag = r"--(?:no)?config\."
        for group in re.findall(rf'(?:(?:"{flag}[^"]*"|{flag}[\w.=]*\w)\s*)+', text):
            yield pytest.param(path, shlex.split(group), id=f"{name} {group.strip()}")


@pytest.mark.parametrize("path, flags", [*overrides_in_docstrings()])
def test_overrides_of_tutorials(path, flags):
    config = load(path)
    for flag in flags:
        field, _, value = flag.removeprefix("--").partition("=")
        if field.startswith("no"):
            field, value = field.removeprefix("no"), "False"
        with contextlib.suppress(ValueError):  # a string is meant as it is
            value = ast.literal_eval(value)
        config.update_from_flattened_dict({field.removeprefix("config."): value})
    checks.check(config)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_rejects_a_typo(path):
    config = load(path).lock()
    with pytest.raises(AttributeError):
        config.model.chanels = 3
    with pytest.raises(AttributeError):
        config.trian = 3
    with pytest.raises(TypeError):
        config.train.batch_size = "many"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_is_the_same_after_being_saved(path, tmp_path):
    config = load(path)
    run_files.save_config(config, tmp_path)
    assert run_files.load_config(tmp_path).to_dict() == config.to_dict()


OLD_VALUES = ["--config.diffusion.loss=bound", "--config.sample.spacing=uniform"]


def test_old_values_in_commands_and_config_files(tmp_path):
    """Names of earlier versions still work."""
    path = tmp_path / "mine.py"
    path.write_text(
        "from ddpm_jax.configs import named_config\n\ndef get_config():\n"
        "    config = named_config('digits')\n    config.diffusion.loss = 'bound'\n"
        "    config.sample.spacing = 'uniform'\n    return config\n"
    )
    from_flags = cli.parse(["main.py", "--config=digits", *OLD_VALUES]).config
    for config in (from_flags, configs.named_config(path)):
        assert (config.diffusion.loss, config.sample.spacing) == ("vlb", "leading")


@pytest.mark.slow
def test_a_run_that_was_saved_with_old_values(config, tmp_path):
    """It can be sampled and resumed; file names are those of the new values."""
    config.diffusion.loss = "vlb"
    ddpm_jax.train(config, tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    fields["diffusion"]["loss"], fields["sample"]["spacing"] = "bound", "uniform"
    path.write_text(json.dumps(fields))
    sample = ["main.py", "--mode=sample", f"--workdir={tmp_path}", "--config.sample.num_steps=5"]
    cli.run(sample)
    (first,) = (tmp_path / "samples").glob("sample_*.npz")
    assert first.name == "sample_000004_n4_seed0_ancestral5.npz"
    cli.run([*sample, OLD_VALUES[1]])
    assert [*(tmp_path / "samples").glob("sample_*.npz")] == [first]
    assert ddpm_jax.load(tmp_path).config.diffusion.loss == "vlb"
    ddpm_jax.sample(tmp_path, 1, num_steps=5, spacing="uniform", batch_size=4)
    config.train.num_steps = 5
    ddpm_jax.train(config, tmp_path)
    assert checkpoint.latest_step(tmp_path) == 5


V = {"diffusion.prediction": "v", "diffusion.zero_terminal_snr": True}


@pytest.mark.parametrize(
    "changes, mode, message",
    [
        ({"sample.order": 3}, "sample", "sample.order=3: with sample.sampler='ancestral'"),
        ({"sample.sampler": "heun", "sample.order": 1}, "sample", "sample.order=1: with"),
        ({"sample.sampler": "dpmpp", "sample.order": 4}, "sample", "choose from 1, 2, 3"),
        ({"sample.sampler": "unipc", "sample.order": 1}, "sample", "choose from 2, 3"),
        ({"sample.sampler": "euler"}, "sample", "sample.sampler='euler': choose from ancestral"),
        ({"sample.spacing": "cosine"}, "sample", "sample.spacing='cosine': choose from leading"),
        ({"sample.num_steps": 21}, "sample", "sample.num_steps=21: must be from 1 to"),
        ({"sample.num_steps": -1}, "sample", "sample.num_steps=-1: must be 0 or more"),
        ({"sample.dynamic_threshold": 1.5}, "sample", "sample.dynamic_threshold=1.5: must lie in"),
        ({"diffusion.zero_terminal_snr": True}, "train", "needs diffusion.prediction='x0' or 'v'"),
        ({**V, "sample.num_steps": 5}, "sample", "sample.spacing='leading': with zero_terminal"),
        (V, "train", "show.spacing='leading': with zero_terminal_snr, choose from linspace, tra"),
        ({**V, "diffusion.num_timesteps": 1}, "sample", "zero_terminal_snr needs at least 2"),
        ({"sample.sampler": "dpmpp"}, "inpaint", "inpaint takes ancestral or ddim"),
        ({"sample.sampler": "heun"}, "invert", "invert takes ancestral or ddim"),
        ({"show.sampler": "euler"}, "show", "show.sampler='euler': choose from ancestral"),
    ],
    ids=str,
)
def test_a_sampler_that_cannot_be(config, changes, mode, message):
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError) as error:
        checks.check(config, mode)
    assert message in str(error.value)


def test_samplers_that_can_be(config):
    """Every sampler in every mode that takes it; zero terminal SNR with all steps."""
    for sampler in solvers.SOLVERS:
        config.sample.sampler = sampler
        for mode in ("sample", "train", "img2img", "interpolate", "evaluate", "show"):
            checks.check(config, mode)
    config.update_from_flattened_dict(V)
    config.show.spacing = "trailing"
    checks.check(config, "train")


def test_every_field_has_a_comment_and_a_reader():
    """One comment a field; and its name occurs in the package."""
    package = "\n".join(p.read_text() for p in pathlib.Path(configs.__file__).parent.rglob("*.py"))
    source = inspect.getsource(configs)
    default = source[source.index("def default_config") : source.index("def named_config")]
    package, default = package.replace(default, ""), default.splitlines()
    # Read under another spelling: data[field], and the whole section as UNet's attributes.
    package += "".join(
        f".{name}\n" for name in ("split", "eval_split", *unet.Network.__annotations__)
    )
    for name in configs.flatten(configs.default_config()):
        (line,) = [x for x in default if f"    {name if '.' in name else f'config.{name}'} = " in x]
        assert "  # " in line, line
        assert f".{name.split('.')[-1]}" in package, name


def test_papers_settings():
    """Ho et al. 2020, App. B."""
    cifar10 = load(FILES[0].parent / "cifar10.py")
    assert cifar10.train.batch_size == 128 and cifar10.train.num_steps == 800_000
    assert cifar10.optim.learning_rate == 2e-4 and cifar10.optim.warmup_steps == 5000
    assert cifar10.optim.ema_decay == 0.9999 and cifar10.optim.grad_clip == 1.0
    assert cifar10.model.dropout == 0.1 and cifar10.data.random_flip
    assert cifar10.diffusion.variance == "fixed_large" and cifar10.diffusion.clip_x0
    for name in ("celebahq256", "lsun256"):
        large = load(FILES[0].parent / f"{name}.py")
        assert large.train.batch_size == 64 and large.optim.learning_rate == 2e-5
        assert large.model.dropout == 0 and large.diffusion.variance == "fixed_small"


def test_a_learned_variance_is_of_all_steps(config):
    config.diffusion.update(loss="vlb", variance="learned")
    for num_steps in (0, 20):
        config.sample.num_steps = num_steps
        checks.check(config, "sample")
    config.sample.num_steps = 10
    with pytest.raises(UserError, match=r"sample\.num_steps=10: a learned variance needs all 20"):
        checks.check(config, "sample")
    config.sample.sampler = "ddim"
    checks.check(config, "sample")


@pytest.mark.parametrize(
    "name, value",
    [
        ("data.image_size", (16, 16)),
        ("data.channels", 3),
        ("data.num_classes", 10),
        ("diffusion.schedule", "linear"),
        ("diffusion.num_timesteps", 10),
        ("diffusion.beta_end", 0.01),
        ("diffusion.prediction", "v"),
        ("model.norm_groups", 2),
        ("optim.ema_decay", (0.98, 0.995)),  # the first would be read as the second
        ("train.label_dropout", 0.0),  # whether there is a null class
    ],
)
def test_a_run_is_not_used_with_another_network_or_chain(config, name, value):
    config.optim.ema_decay, config.data.num_classes = (0.995, 0.98), 5
    saved = config.copy_and_resolve_references()
    config.update_from_flattened_dict({name: value})
    with pytest.raises(UserError, match=rf"workdir=runs/x: .*{name} "):
        checks.check_same_run(saved, config, "runs/x", "use")


def test_imported_weights_are_trained_with_any_average(config):
    saved = config.copy_and_resolve_references()
    config.optim.ema_decay, config.train.label_dropout = 0.5, 0.5
    checks.check_same_run(saved, config, "runs/x", "imported")
    config.model.norm_groups = 2
    with pytest.raises(UserError, match=r"model\.norm_groups"):
        checks.check_same_run(saved, config, "runs/x", "imported")


@pytest.mark.parametrize("decay", [[0.9, 0.5], [], (), ([0.9],), {0.9}, (0.9, 0.9), 1.0, "0.9"])
def test_decays_that_are_none(config, decay):
    config.optim.ema_decay = decay
    with pytest.raises(UserError, match=r"optim\.ema_decay=.*in round brackets"):
        checks.check(config)


@pytest.mark.parametrize(
    "batch_size, accumulate, devices", [(32, 1, 2), (32, 32, 1), (48, 16, 1), (128, 8, 4)]
)
def test_cores_become_devices_that_fit(config, monkeypatch, batch_size, accumulate, devices):
    """At least 16 images for each; of 32 parts of one image, two devices could compute none."""
    config.train.batch_size, config.sample.batch_size = batch_size, 64
    config.optim.accumulate = accumulate
    set_to = {}
    monkeypatch.setattr(cpu.os, "sched_getaffinity", lambda _: range(4), raising=False)
    jax = types.SimpleNamespace(
        config=types.SimpleNamespace(jax_num_cpu_devices=0, update=set_to.__setitem__)
    )
    monkeypatch.setattr(cpu, "jax", jax)
    monkeypatch.setenv("XLA_FLAGS", "")
    sizes = configs.batch_sizes(config, "train").values()
    cpu.use_cores(*sizes, parts=configs.parts(config, "train"))
    assert set_to == {"jax_num_cpu_devices": devices}


def test_a_run_is_used_with_another_dropout_seed_or_sampler(config):
    saved = config.copy_and_resolve_references()
    config.update_from_flattened_dict(
        {
            "seed": 3,
            "data.split": "train[:7]",
            "diffusion.clip_x0": False,
            "model.dropout": 0.3,
            "model.dtype": "bfloat16",
            "sample.sampler": "ddim",
            "train.batch_size": 4,
        }
    )
    checks.check_same_run(saved, config, "runs/x", "use")
