"""Malformed input of every kind for the command line.

Each example calls cli.main() as a user would, up to where the computing would begin. It is
answered in one line with exit code 2, and then no file has changed; or it works. Never a traceback,
and nothing takes long or much memory.
"""

import contextlib
import faulthandler
import functools
import io
import json
import logging
import os
import pathlib
import pickle
import re
import resource
import shutil
import signal
import stat
import sys
import tempfile
import unittest.mock
import zipfile
from typing import NamedTuple

import jax
import numpy as np
import psutil
import pytest
import safetensors.numpy
from family import network_json
from flax import traverse_util
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from programs import DIGITS, ROOT, TINY
from references import FIXTURES

from ddpm_jax import cli, configs, cpu, parallel, progress
from ddpm_jax.core import unet
from ddpm_jax.files import checkpoint, data, image_files, run_files
from ddpm_jax.metrics import features, inception
from ddpm_jax.runs import bound, interop, networks, samplers, show, train

SECONDS = 20  # for an example; most take a hundredth
MEMORY = 4 * 2**30  # bytes that it may ask for
FIELDS = configs.flatten(configs.default_config())
EXAMPLES = {
    "overrides of a config": 120,
    "overrides of a run": 80,
    "config files": 80,
    "runs' configs": 80,
    "folders of images": 80,
    "images": 60,
    "safetensors": 40,
    "configs of diffusers": 60,
    "a family of networks": 500,
    "arrays": 80,
    "flags": 60,
}
# What PIL and others warn of, they also read, or fail with an error.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


class Enough(BaseException):
    """The input was accepted, and the computing would begin."""


class Hang(BaseException):
    """An example took too long."""


def thrown(name):
    """The number of examples, with a fixed seed."""
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    return settings(
        max_examples=EXAMPLES[name],
        derandomize=True,
        database=None,
        deadline=None,  # of our own, which ends what hangs
        suppress_health_check=slow,
    )


def enough(*_, **__):
    raise Enough


@pytest.fixture(scope="module", autouse=True)
def no_computing(tmp_path_factory):
    """Stops each example where the computation would begin; restores logging after this module."""

    def small_state(*_, **__):
        params = {"kernel": np.zeros(2, np.float32)}
        return train.states.TrainState(jax.numpy.zeros((), int), params, (params,), {})

    def restore_params(config, workdir):
        return (0, None) if checkpoint.latest_step(workdir) == 0 else restore(config, workdir)

    def make_sampler(*arguments, **options):
        sampler(*arguments, **options)
        return enough

    restore, sampler = checkpoint.restore_params, samplers.make_sampler
    root, names = logging.getLogger(), ("absl", "asyncio", "ddpm_jax")
    handlers, levels = root.handlers[:], [logging.getLogger(name).level for name in names]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.states, "create_state", small_state)
        patch.setattr(train, "describe_memory", lambda *_: None)
        patch.setattr(train, "run_loop", enough)
        patch.setattr(train.scores, "make_score", enough)
        patch.setattr(show, "show", enough)
        patch.setattr(checkpoint, "restore_params", restore_params)
        patch.setattr(samplers, "make_sampler", make_sampler)
        patch.setattr(bound, "make_rows", enough)
        patch.setattr(inception, "load", lambda path: inception.Weights({}, None, "0"))
        patch.setattr(features, "make_extractor", lambda *_: enough)
        patch.setattr(interop, "diffusers_tensors", enough)
        patch.setattr(parallel, "connected", enough)
        patch.setattr(data, "_prepare", enough)  # downloads
        patch.setattr(progress, "bar", functools.partial(progress.bar, disable=True))
        for module in (cpu, parallel):  # a search of all installed packages
            patch.setattr(module, "entry_points", functools.cache(module.entry_points))
        # Traced once, however often its weights are read.
        patch.setattr(unet, "param_shapes", functools.cache(unet.param_shapes))
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))  # of caches
        yield
    root.handlers[:] = handlers
    for name, level in zip(names, levels, strict=True):
        logging.getLogger(name).setLevel(level)


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    """The folder of a run that samples 8×8 gray images."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = cli.parse(["main.py", DIGITS, *TINY]).config
    with config.unlocked():
        config.sample.update(num_samples=4, batch_size=4)
        config.evaluate.update(num_samples=4)
    checkpoint.save_imported(folder, {"kernel": np.zeros(2, np.float32)})
    run_files.save_config(config, folder)
    return folder


@contextlib.contextmanager
def place(*copied):
    """Yields a new folder, two below one of its own, with copies of these; and goes there."""
    with tempfile.TemporaryDirectory() as top:
        folder = pathlib.Path(top) / "in" / "here"
        folder.mkdir(parents=True)
        with contextlib.chdir(folder):
            for source in copied:
                shutil.copytree(source, source.name)
            yield folder


def snapshot(folder):
    """{path: what it is} of all that is below a folder."""
    found = {}
    for parent, folders, files in os.walk(folder):
        for path in (pathlib.Path(parent, name) for name in folders + files):
            mode = path.lstat().st_mode
            content = path.read_bytes() if stat.S_ISREG(mode) else None
            found[path] = mode, os.readlink(path) if stat.S_ISLNK(mode) else content
    return found


@contextlib.contextmanager
def limits():
    """An example may not take long, nor much memory."""

    def stop(*_):
        raise Hang(f"still busy after {SECONDS} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + MEMORY, hard))
    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    faulthandler.dump_traceback_later(2 * SECONDS, exit=True)  # what an exception does not end
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def attempt(*arguments):
    """Runs main.py with these arguments, in a `place`: its error, or nothing where it works."""
    before, out, err = snapshot("../.."), io.StringIO(), io.StringIO()
    argv = unittest.mock.patch.object(sys, "argv", ["main.py", *map(str, arguments)])
    with limits(), argv, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        except Enough:
            code = 0
    assert code in (0, 2), err.getvalue()
    if code == 0:
        return ""
    # Remarks about files, or that they are skipped, may come before.
    said = re.sub(r"^(data\.path|--images|--mask)=.*\n", "", err.getvalue(), flags=re.MULTILINE)
    assert len(said.splitlines()) == 1 and said.startswith("error: "), said
    assert not out.getvalue() and snapshot("../..") == before
    return said


# Strategies.

WORDS = [
    *("", " ", "0", "-1", "1", "2", "3", "7", "8", "1e300", "-1e300", "1e-320", "1e39", "0.5"),
    *("nan", "inf", "-inf", "9" * 30, "-" + "9" * 30, "9" * 5000, "2147483648", "4294967296"),
    *("1000000", "100000000", "4096", "true", "None", "null", "()", "(1,)", "(0,)", "(-8,8)"),
    *("(1,2", "(" * 300, "(" * 300 + ")" * 300, "(100000,100000)", "(8,8)", "(8,8,8)", "(1e9,1)"),
    *("(nan,)", "('a',)", "(None,)", "((1,),)", "(True,)", "{1:2}", "[1]", str((1,) * 5000)),
    *("'a'", '"', "a\nb", "\r", "\x1b[2J", "é", "日本", "\u2028", "\udcff", "%s %d", "{}", "{0}"),
    *("../../x", "/", "/dev/zero", "~", "~nosuchuser/x", "x" * 300, "x" * 5000, "-", "--", "="),
    *("train[:", "train[5%:3%]", "train[:101%]", "train[99:]", "train[:1]", "train+train", "all"),
    *("train[:" + "9" * 30 + "]", "train[:²%]", "a/b", "a:b", "a/b/c:1.2.3", "huggingface:x"),
    *(
        "digits",
        "folder",
        "1_000",
        "0x10",
        "1,2",
        "ddim",
        "learned",
        "vlb",
        "bound",
        "cosine",
        "run",
    ),
]
ANY_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
INTS = st.integers() | st.sampled_from([-1, 0, 1, 7, 4096, 10**6, 10**9, 2**31, 2**32, 10**30])
FLOATS = st.floats() | st.sampled_from([-1.0, 0.0, 0.5, 1.0, 1e-320, 1e-12, 1e39, 1e300])
OF_KIND = {
    int: INTS.map(str),
    float: FLOATS.map(str),
    bool: st.sampled_from(["true", "false"]),
    tuple: st.lists(INTS | st.sampled_from([1, 2, 4, 8]), max_size=4).map(lambda v: str(tuple(v))),
    str: ANY_TEXT,
}
JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY_TEXT, inner, max_size=4),
    max_leaves=6,
)
HUGE = st.sampled_from([2**31, 2**64, 10**9, 10**30, 10**400, -(2**63), 1e39, 1e300, [10**9] * 2])


@st.composite
def overrides(draw):
    """One or two arguments that set fields to something."""
    arguments = []
    for field in draw(st.lists(st.sampled_from(sorted(FIELDS)), min_size=1, max_size=2)):
        form = draw(st.sampled_from(["--config.{}={}"] * 9 + ["--config.{}", "--noconfig.{}"]))
        value = draw(OF_KIND[type(FIELDS[field])] | st.sampled_from(WORDS))
        arguments.append(form.format(field, value))
    return arguments


@st.composite
def mutated(draw, whole):
    """Bytes with a few of them changed, taken out, doubled or cut off."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        some = draw(st.binary(min_size=1, max_size=8))
        change = draw(st.sampled_from(["flip", "set", "insert", "remove", "cut"]))
        if change == "flip" and content:
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif change == "set":
            content[at : at + len(some)] = some
        elif change == "insert":
            content[at:at] = some
        elif change == "remove":
            del content[at : at + len(some)]
        elif change == "cut":
            del content[at:]
    return bytes(content)


@st.composite
def altered(draw, fields):
    """A nested dict with a few fields that are missing, too many, or something else."""
    fields = json.loads(json.dumps(fields))
    for _ in range(draw(st.integers(1, 3))):
        sections = [fields, *(value for value in fields.values() if isinstance(value, dict))]
        section = draw(st.sampled_from(sections))
        name = draw(st.sampled_from([*section, "more"]))
        if draw(st.integers(0, 4)) == 0:
            section.pop(name, None)
        else:
            old = section.get(name)
            same_kind = {
                bool: st.booleans(),
                int: st.integers(-1, 40),
                float: st.floats(),
                str: st.sampled_from(WORDS),
                list: st.lists(st.integers(-1, 9) | st.sampled_from(WORDS), max_size=40),
            }
            section[name] = draw(same_kind.get(type(old), JSONS) | HUGE | JSONS)
    return fields


# Configs.


def train_arguments():
    """A training on two images in a folder of the current one."""
    pictures = pathlib.Path.cwd() / "pictures"
    pictures.mkdir()
    for name in "ab":
        Image.new("L", (8, 8)).save(pictures / f"{name}.png")
    folder = ("name=folder", f"path={pictures}", "split=train", "eval_split=train")
    return [DIGITS, *TINY, *(f"--config.data.{field}" for field in folder)]


def test_numbers_beyond_all_bounds():
    """In every field that holds numbers; the error names it."""
    whole = (2**32, 10**30, -(10**30))
    kinds = {int: whole, float: ("nan", "inf", "-inf", "1e39", "1e300")}
    kinds[tuple] = [f"({n},{n})" for n in whole]
    absurd = [(name, n) for name, value in FIELDS.items() for n in kinds.get(type(value), ())]
    absurd += [
        ("data.image_size", "(100000,100000)"),
        ("diffusion.num_timesteps", 10**9),
        ("model.channels", 10**9),
        ("model.channel_mults", (1,) * 5000),
        ("model.channel_mults", "(1,1000000)"),
        ("model.num_res_blocks", 10**6),
        ("train.batch_size", 10**9),
        ("sample.batch_size", 10**9),
    ]
    with place():
        arguments = train_arguments()
        for name, value in absurd:
            assert f"error: {name}=" in attempt(*arguments, f"--config.{name}={value}"), value


@thrown("overrides of a config")
@given(overrides())
def test_overrides_of_a_config(arguments):
    with place():
        attempt(*train_arguments(), *arguments)


@pytest.mark.slow
@thrown("overrides of a run")
@given(mode=st.sampled_from(["sample", "show", "evaluate", "export", *cli.EDITS]), given=st.data())
def test_overrides_of_a_run(a_run, mode, given):
    more = {"export": ["--weights=out"], "inpaint": ["--mask=a.png", "--images=a.png"]}
    more |= {mode: ["--images=a.png,a.png"] for mode in cli.EDITS if mode != "inpaint"}
    with place(a_run):
        Image.new("L", (8, 8)).save("a.png")
        run = [f"--mode={mode}", "--workdir=run", *more.get(mode, [])]
        attempt(*run, *given.draw(overrides()))


BODIES = [
    *("raise ValueError('no\\nlines')", "raise SystemExit(0)", "1 / 0", "x", "[][0]"),
    *("open('nowhere')", "assert False", "open('/')", "next(iter(()))", "raise RuntimeError()"),
    *("f = lambda: f(); f()", "return", "return None", "return 5", "return {}", "return default"),
    *("return ConfigDict()", "return ConfigDict({'seed': 1})", "return default.get_config"),
    *("c = ConfigDict(); c.c = c; return c", "import nothing", "'\\d'.encode('ascii'); return 1"),
    *("return type('Odd', (), {'lock': lambda s: s, 'items': lambda s: [(1, 2)]})()",),
    "c = configs.default_config(); c.unlock(); c.data = placeholder(ConfigDict); return c",
    "c = configs.default_config(); c.unlock(); c.seed = placeholder(int); return c",
    "c = configs.default_config(); c.unlock(); c.train = default; return c",
    "return configs.default_config()",
]
HEAD = "from ml_collections import ConfigDict\nfrom ml_collections.config_dict import placeholder\n"
HEAD += "from configs import default\n\n\ndef get_config():\n    "
CODE = st.one_of(
    st.sampled_from(BODIES).map(lambda body: f"{HEAD}{body}\n".encode()),
    altered(configs.default_config().to_dict()).map(
        lambda fields: f"inf, nan = 1e999, 1e999 - 1e999\n{HEAD}return ConfigDict({fields!r})\n"
    ).map(lambda text: text.encode(errors="surrogateescape")),
    st.binary(max_size=40),
    st.sampled_from([b"", b"\0", b"\xff", b"get_config = 1", b"(" * 1000, b"def get_config(): ("]),
    mutated((ROOT / "configs/digits.py").read_bytes()),
)  # fmt: skip


@thrown("config files")
@given(CODE, st.sampled_from([(), ("--config.seed=1",), ("--mode=show",)]))
def test_config_files(content, arguments):
    with place() as folder:
        (folder / "mine.py").write_bytes(content)
        attempt("--config=mine.py", *arguments)


@thrown("runs' configs")
@given(given=st.data())
def test_configs_of_runs(a_run, given):
    saved = (a_run / "config.json").read_bytes()
    deep = st.integers(1, 3000).map(lambda n: b'{"data": ' + b"[" * n + b"]" * n + b"}")
    fields = altered(json.loads(saved)).map(lambda fields: json.dumps(fields).encode())
    content = given.draw(fields | mutated(saved) | deep | st.binary(max_size=20))
    arguments = given.draw(st.sampled_from([(), ("--config.sample.seed=1",)]))
    mode = given.draw(st.sampled_from(["sample", "show", "evaluate", "train"]))
    with place(a_run) as folder:
        (folder / "run/config.json").write_bytes(content)
        attempt(f"--mode={mode}", "--workdir=run", *arguments)


# Images.


def encoded(kind, mode, size=(9, 8), **options):
    """An image file of this kind as bytes."""
    rng, stream = np.random.default_rng(0), io.BytesIO()
    image = Image.fromarray(rng.integers(0, 256, (*size[::-1], 4), np.uint8))
    if mode in ("I;16", "I", "F"):
        image = Image.new(mode, size, 300)
    elif mode == "LAB":
        image = Image.frombytes("LAB", size, rng.bytes(3 * size[0] * size[1]))
    else:
        image = image.convert("RGB").convert(mode) if mode not in ("RGBA", "LA") else image
        image = image.convert(mode)
    image.save(stream, kind, **options)
    return stream.getvalue()


def png_of_size(width, height):
    """A PNG whose header claims this size."""
    small = bytearray(encoded("PNG", "L"))
    small[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    small[29:33] = zlib_crc(small[12:29])
    return bytes(small)


def zlib_crc(chunk):
    import zlib

    return zlib.crc32(bytes(chunk)).to_bytes(4, "big")


EXIF = Image.Exif()
EXIF[0x0112] = 6  # turned
SOUND = [
    *(encoded("PNG", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
    encoded("PNG", "P", transparency=bytes(range(256))),
    *(encoded("JPEG", mode, exif=EXIF) for mode in ("L", "RGB", "CMYK")),
    *(encoded("GIF", mode) for mode in ("L", "P")),
    *(encoded("BMP", mode) for mode in ("1", "L", "P", "RGB")),
    *(encoded("TIFF", mode) for mode in ("L", "RGBA", "CMYK", "LAB", "I;16", "I", "F")),
    encoded("TIFF", "RGB", compression="tiff_lzw"),
    encoded("TIFF", "1", compression="group4"),
    *(encoded("WEBP", mode, lossless=True, exif=EXIF) for mode in ("RGB", "RGBA")),
    *(encoded(kind, "L", (8, 8)) for kind in ("PNG", "BMP")),
    png_of_size(60_000, 60_000),
    png_of_size(9_600, 9_600),
    png_of_size(2**31 - 1, 2**31 - 1),
    png_of_size(0, 8),
]
CONTENTS = st.one_of(
    st.sampled_from(SOUND),
    st.sampled_from(SOUND).flatmap(mutated),
    st.binary(max_size=30),
    st.sampled_from(["folder", "loop", "dangling", "fifo", "above"]),
)
NAMES = st.builds(
    str.__add__,
    st.one_of(
        st.sampled_from(["a", "b", "sub/a", "more/b", " ", "\n", "\x1b", "\udcff", "-", "x" * 200]),
        st.text(st.characters(codec="utf-8", exclude_characters="\0/."), min_size=1, max_size=9),
    ),
    st.sampled_from([*sorted(image_files.extensions()), ".PNG", ".txt", ".npz", ""]),
)


def put(path, content):
    """Makes a file, or what else may be in its place."""
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "folder":
        path.mkdir()
    elif content == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to({"loop": path.name, "dangling": "nothing", "above": ".."}[content])


@pytest.mark.slow
@thrown("folders of images")
@given(
    files=st.dictionaries(NAMES, CONTENTS, max_size=4),
    channels=st.sampled_from([1, 3, 4]),
    skip=st.booleans(),
    more=st.sampled_from([(), ("--config.data.num_classes=2",), ("--config.data.max_ram_gib=0",)]),
)
def test_folders_of_images(files, channels, skip, more):
    with place() as folder:
        arguments = train_arguments()
        for name, content in files.items():
            put(folder / "pictures" / name, content)
        fields = (f"channels={channels}", f"skip_unreadable={skip}")
        attempt(*arguments, *(f"--config.data.{field}" for field in fields), *more)


@thrown("images")
@given(
    name=NAMES,
    content=CONTENTS,
    mode=st.sampled_from(sorted(cli.EDITS)),
    whole=st.booleans(),
)
def test_images(a_run, name, content, mode, whole):
    """As an image, in a folder of images, or as a mask."""
    with place(a_run) as folder:
        (folder / "pictures").mkdir()
        put(folder / "pictures" / name, content)
        path = "pictures" if whole else f"pictures/{name}"
        mask = [f"--mask={path}"] if mode == "inpaint" else []
        attempt(f"--mode={mode}", "--workdir=run", f"--images={path}", *mask)


# Weights.


@pytest.mark.slow
@thrown("safetensors")
@given(given=st.data())
def test_safetensors(given):
    path = f"unet/{interop.TENSORS}"
    whole = (FIXTURES / path).read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    header = mutated(whole[:length]).map(lambda part: part + whole[length:])
    fields = altered(json.loads(whole[8:length])).map(lambda fields: json.dumps(fields).encode())
    sized = fields.map(lambda text: len(text).to_bytes(8, "little") + text + whole[length:])
    content = given.draw(header | sized | mutated(whole) | st.binary(max_size=40))
    with place(FIXTURES) as folder:
        (folder / FIXTURES.name / path).write_bytes(content)
        attempt("--mode=import", f"--weights={FIXTURES.name}", "--workdir=run")


@pytest.mark.slow
@thrown("configs of diffusers")
@given(given=st.data())
def test_configs_of_diffusers(given):
    names = ["unet/config.json", "scheduler/scheduler_config.json", "model_index.json"]
    path = given.draw(st.sampled_from(names))
    whole = (FIXTURES / path).read_bytes()
    fields = altered(json.loads(whole)).map(lambda fields: json.dumps(fields).encode())
    content = given.draw(fields | mutated(whole) | st.binary(max_size=20))
    more = given.draw(st.just([]) | overrides())
    with place(FIXTURES) as folder:
        (folder / FIXTURES.name / path).write_bytes(content)
        attempt("--mode=import", f"--weights={FIXTURES.name}", "--workdir=run", *more)


FAMILY = [
    network_json(),
    network_json(block_out_channels=[8, 12], sample_size=[8, 4], norm_eps=1e-6),
    network_json(num_class_embeds=3, attention_head_dim=4, add_attention=False),
    network_json(
        down_block_types=["ResnetDownsampleBlock2D", "AttnDownBlock2D"],
        up_block_types=["AttnUpBlock2D", "ResnetUpsampleBlock2D"],
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        out_channels=6,
    ),
]
BLOCKS = sorted({kind for of_path in networks.BLOCKS.values() for kind in of_path})
BLOCKS += ["UNetResDownBlock2D", "SkipUpBlock2D", "KDownBlock2D", "CrossAttnDownBlock2D", "", 3]
KNOWN = sorted(networks.DEFAULTS)


@functools.cache
def tensors_of(text):
    """The tensors that a network's config.json needs, zeros."""
    config = configs.default_config()
    config.update_from_flattened_dict(networks.network_fields(json.loads(text), "config.json"))
    params = unet.param_shapes(configs.make_model(config), configs.image_shape(config))
    levels, tensors = len(configs.widths(config.model)), {}
    for path, leaf in traverse_util.flatten_dict(params).items():
        name = interop.tensor_name(path, levels)
        zeros = interop.to_diffusers(name, np.zeros(leaf.shape, np.float16))
        tensors[name] = np.ascontiguousarray(zeros)
    return tensors


class Example(NamedTuple):
    """A network; hypothesis prints no tensors."""

    fields: dict
    tensors: dict

    def __repr__(self):
        shapes = {name: (tensor.dtype, tensor.shape) for name, tensor in self.tensors.items()}
        return f"{self.fields} {shapes}"[:5000]


@st.composite
def networks_nearby(draw):
    """A config.json and tensors that fit it; then some of one of them is changed."""
    whole = draw(st.sampled_from(FAMILY))
    fields, tensors = whole, dict(tensors_of(json.dumps(whole)))
    if draw(st.booleans()):
        fields = draw(altered(whole))
    for name in draw(st.lists(st.sampled_from(KNOWN), max_size=2)):
        of_blocks = st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=3)
        likely = of_blocks if name.endswith("block_types") else INTS | JSONS | HUGE
        fields = {**fields, name: draw(likely)}
    for name in draw(st.lists(st.sampled_from(sorted(tensors)), max_size=2)):
        shape = draw(st.lists(st.integers(0, 9), max_size=5))
        dtype = draw(st.sampled_from(["float32", "float64", "int8", "bool", "uint16"]))
        change = draw(st.sampled_from(["missing", "misshapen", "renamed", "another type"]))
        tensor = tensors.pop(name, np.zeros(2, np.float32))
        changed = {
            "misshapen": {name: np.zeros(shape, np.float32)},
            "renamed": {draw(ANY_TEXT): tensor},
            "another type": {name: tensor.astype(dtype)},
        }
        tensors |= changed.get(change, {})
    return Example(fields, tensors)


@thrown("a family of networks")
@given(given=st.data())
def test_a_family_of_networks(given):
    """Of all that a UNet2DModel can be; an error names a field or a tensor."""
    fields, tensors = given.draw(networks_nearby())
    with place() as folder:
        (folder / "config.json").write_text(json.dumps(fields))
        (folder / interop.TENSORS).write_bytes(safetensors.numpy.save(tensors))
        said = attempt("--mode=import", "--weights=.", "--workdir=run")
        names = ["_class_name", "lacks", *KNOWN, *fields, *tensors]
        assert not said or any(str(name) in said for name in names), said


# Arrays.


class Evil:
    """Unpickling it makes a file."""

    def __reduce__(self):
        return open, ("unpickled", "w")


def npz(**arrays):
    """An .npz file as bytes."""
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def zipped(content, name="images.npy", compression=zipfile.ZIP_DEFLATED):
    """A zip of one file as bytes."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as file:
        file.writestr(name, content)
    return stream.getvalue()


def npy(array, shape=None, descr=None, version=(1, 0)):
    """An .npy file as bytes; its header may claim another shape or type."""
    stream = io.BytesIO()
    fields = np.lib.format.header_data_from_array_1_0(array)
    fields |= {"shape": shape or array.shape, "descr": descr or fields["descr"]}
    writers = np.lib.format
    write = writers.write_array_header_1_0 if version == (1, 0) else writers.write_array_header_2_0
    write(stream, fields)
    return stream.getvalue() + array.tobytes()


GOOD = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 1), np.uint8)
PICKLED = np.array([[[[Evil()]]]], dtype=object)
ARRAYS = [
    npz(images=GOOD),
    npz(images=GOOD[0]),
    npz(images=GOOD[:0]),
    npz(images=GOOD[:, :, :4]),
    npz(images=GOOD.astype(float)),
    npz(images=np.float32(3)),
    npz(images=np.array("text")),
    npz(pictures=GOOD),
    npz(images=PICKLED),
    npz(images=GOOD, other=PICKLED),
    npy(GOOD),
    pickle.dumps(Evil()),
    zipped(pickle.dumps(Evil())),
    zipped(pickle.dumps(Evil()), "images"),
    zipped(npy(GOOD), "../../images.npy"),
    zipped(npy(GOOD), "/images.npy"),
    zipped(npy(GOOD), "images"),
    zipped(npy(GOOD, version=(2, 0))),
    zipped(npy(GOOD, (10**9, 8, 8, 1))),
    zipped(npy(GOOD, (10**15, 8, 8, 1))),
    zipped(npy(GOOD, (2, 8, 8, 10**20))),
    zipped(npy(GOOD, (-1, 8, 8, 1))),
    zipped(npy(GOOD, ("a", 8, 8, 1))),
    zipped(npy(GOOD, (True, 8, 8, 1))),
    zipped(npy(GOOD, descr="|O")),
    zipped(npy(GOOD, descr=[("a", "u1")])),
    zipped(npy(GOOD, descr="x" * 20_000)),
    zipped(b"\x93NUMPY\x01\x00v\x00" + b"(" * 118),
    *(zipped(npy(GOOD), compression=kind) for kind in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)),
    zipped(npy(np.zeros((10**6, 8, 8, 1), np.uint8))[: 10**7]),
    b"PK\x05\x06" + bytes(18),
]


@thrown("arrays")
@given(
    content=st.sampled_from(ARRAYS) | st.sampled_from(ARRAYS).flatmap(mutated),
    mode=st.sampled_from(sorted(cli.EDITS)),
    as_mask=st.booleans(),
)
def test_arrays(a_run, content, mode, as_mask):
    """Nothing is unpickled, and nothing leaves an archive."""
    with place(a_run) as folder:
        (folder / "a.npz").write_bytes(content)
        Image.new("L", (8, 8)).save("mask.png")
        mask = ["--mask=" + ("a.npz" if as_mask else "mask.png")] if mode == "inpaint" else []
        attempt(f"--mode={mode}", "--workdir=run", "--images=a.npz", *mask)
        assert not (folder / "unpickled").exists()
        assert os.listdir("../..") == ["in"] and os.listdir("..") == ["here"]


# Flags.

COMMANDS = [
    (DIGITS, *TINY),
    ("--mode=show", DIGITS),
    ("--mode=sample", "--workdir=run"),
    ("--mode=img2img", "--workdir=run", "--images=a.png"),
    ("--mode=inpaint", "--workdir=run", "--images=a.png", "--mask=a.png"),
    ("--mode=import", "--workdir=new", f"--weights={FIXTURES.name}"),
    ("--mode=export", "--workdir=run", "--weights=new"),
    ("--mode=compare", "--workdirs=run,new"),
    (),
]
PLACES = [
    "run",
    "file",
    "file/run",
    "loop",
    "pipe",
    "a.png",
    "new",
    "new/new",
    "a.npz",
    ".",
    "/proc/x",
]
FLAGS = st.one_of(
    st.builds(
        "--{}={}".format,
        st.sampled_from(sorted({*cli.define_flags()})),
        st.sampled_from([*WORDS, *cli.MODES]) | st.sampled_from(PLACES),
    ),
    st.sampled_from(sorted({*cli.define_flags()})).map("--{}".format),
    ANY_TEXT,
    st.sampled_from(["--flagfile=a.png", "--flagfile=.", "--undefok=x", "--?", "--no", "-", "--"]),
)


@thrown("flags")
@given(st.sampled_from(COMMANDS), st.lists(FLAGS, min_size=1, max_size=2))
def test_flags(a_run, command, more):
    """A command that works, and a flag or two behind it."""
    with place(a_run, FIXTURES) as folder:
        (folder / "a.png").write_bytes(encoded("PNG", "L", (8, 8)))
        (folder / "file").write_bytes(b"")
        (folder / "loop").symlink_to("loop")
        os.mkfifo(folder / "pipe")
        attempt(*command, *more)


def test_there_are_enough():
    assert sum(EXAMPLES.values()) >= 500
