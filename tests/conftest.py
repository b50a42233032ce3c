"""Four virtual CPU devices, strict JAX, tiny networks."""

import getpass
import importlib
import os
import pathlib
import re
import signal
import sys
import tempfile
import types

import jax
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for configs/ and main.py

os.environ.pop("TQDM_DISABLE", None)  # tests read the bars

# Compilations are shared by the tests, by the programs they start, and by the next run.
CACHE = os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(pathlib.Path(tempfile.gettempdir()) / f"ddpm_jax_tests_{getpass.getuser()}"),
)

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def pytest_configure(config):
    """Tests need fast compilation more than fast code, except measurements."""
    if config.option.markexpr in config.getini("addopts"):  # the default run
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_backend_optimization_level=0"


@pytest.fixture(scope="module", autouse=True)
def bounded_memory_maps():
    """Compiled programs hold memory maps; with more than Linux's 65,530, a process crashes."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 25_000:
        jax.clear_caches()


@pytest.fixture(scope="module")
def reference():
    """torch_reference.py, imported late, so that only the parity tests need PyTorch.

    With one thread: pytest has a process for each core, and more are slower for small networks.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield importlib.import_module("torch_reference")
    torch.set_num_threads(threads)


# What the programs of a config depend on.
OF_ALL = "seed", "model.", "diffusion.", "data.image_size", "data.channels", "data.num_classes"
SECTIONS = {
    "create_state": (*OF_ALL, "optim.", "train.timesteps"),
    "make_train_step": (*OF_ALL, "optim.", "train."),
    "make_eval_loss": (*OF_ALL, "data.", "optim.accumulate", "train."),
    "make_sampler": (*OF_ALL, "sample."),
}
NO_DEPENDENCE = re.compile(r"train\.((num|keep|score)_.*|.*_every)")
MADE = {}


def functions():
    """Those that a program may call; a test that replaces one of them gets programs of its own."""
    runs = (
        "ddpm_jax.configs",
        "ddpm_jax.runs.samplers",
        "ddpm_jax.runs.objective",
        "ddpm_jax.runs.states",
    )
    names = "ddpm_jax.core.", *runs
    modules = [module for name, module in sorted(sys.modules.items()) if name.startswith(names)]
    items = (item for module in modules for item in sorted(vars(module).items()))
    return tuple(v for k, v in items if isinstance(v, types.FunctionType) and k not in SECTIONS)


def once(make, sections, rest):
    """`make` of a config; equal configs get the same result, if `rest` tells what else counts."""
    from ddpm_jax import configs

    def made(config, *args, **options):
        more = rest(config, *args, **options)
        if more is None:
            return make(config, *args, **options)
        fields = [x for x in configs.flatten(config).items() if not NO_DEPENDENCE.fullmatch(x[0])]
        fields = [x for x in fields if x[0].startswith(sections)]
        key = make, repr(fields), repr(more), functions()
        if key not in MADE:
            own = config.copy_and_resolve_references()  # the test may change its config
            MADE[key] = make(own, *args, **options)
        return MADE[key]

    return made


@pytest.fixture(autouse=True)
def each_program_once(monkeypatch):
    """Runs of equal configs share their programs: tracing them is most of a short run's time."""
    from ddpm_jax.core import unet
    from ddpm_jax.runs import objective, samplers, states

    def is_network(model):
        return type(model).__module__ == unet.__name__

    def step(config, model, schedule, optimizer, devices=None):
        shared = is_network(model) and config.optim.decay == "constant"
        return len(devices or jax.devices()) if shared else None

    def eval_loss(config, model, schedule, source):
        return () if config.data.name == "digits" else None

    def sampler(config, label=None, frames_at=(), x0_at=(), task=samplers.from_noise, **more):
        other = task is not samplers.from_noise or any(more.values())
        return None if other else (label, frames_at, x0_at)

    def state(config, model, optimizer):
        return () if is_network(model) else None

    for module, name, rest in (
        (objective, "make_train_step", step),
        (objective, "make_eval_loss", eval_loss),
        (samplers, "make_sampler", sampler),
        (states, "create_state", state),
    ):
        monkeypatch.setattr(module, name, once(getattr(module, name), SECTIONS[name], rest))
    shared = states.create_state

    def create_state(config, model, optimizer):
        return jax.tree.map(jax.numpy.copy, shared(config, model, optimizer))  # steps donate theirs

    monkeypatch.setattr(states, "create_state", create_state)


@pytest.fixture
def no_report(monkeypatch):
    """Training does not draw its report, which test_show.py tests."""
    from ddpm_jax import cli

    monkeypatch.setattr(cli.show, "show", lambda *_: None)


@pytest.fixture
def signal_at(monkeypatch):
    """signal_at(step, number): the next training gets this signal after so many steps."""
    from ddpm_jax.runs import train

    updates = train.updates

    def at(step, number):
        def with_signal(*args):
            monkeypatch.setattr(train, "updates", updates)
            for trained, update in enumerate(updates(*args)):
                if trained == step:
                    signal.raise_signal(number)
                yield update

        monkeypatch.setattr(train, "updates", with_signal)

    return at


@pytest.fixture
def config():
    """The digits with a network of a few thousand parameters and a short chain."""
    from ddpm_jax import configs

    config = configs.named_config("digits")
    config.model.update(
        channels=8,
        channel_mults=(1,),
        num_res_blocks=1,
        attention_down=(),
        attention_up=(),
        dropout=0.1,
    )
    config.model.norm_groups = 4
    config.diffusion.num_timesteps = 20
    config.optim.update(learning_rate=1e-3, warmup_steps=2, decay="constant")
    config.train.update(
        batch_size=8,
        num_steps=4,
        log_every=1,
        eval_every=2,
        eval_images=10,
        sample_every=100,
        score_every=0,
        checkpoint_every=100,
    )
    config.sample.update(num_samples=4, batch_size=4)
    return config.lock()
