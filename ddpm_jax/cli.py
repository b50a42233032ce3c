"""Trains, samples and evaluates diffusion models, and exchanges weights with diffusers.

  python main.py --config=configs/digits.py
  python main.py --config=configs/cifar10.py --config.train.batch_size=64
  python main.py --mode=sample --workdir=runs/cifar10 --config.sample.num_samples=256
  python main.py --mode=img2img --workdir=runs/cifar10 --images=FOLDER
  python main.py --mode=show --config=configs/cifar10.py
  python main.py --mode=evaluate --workdir=runs/cifar10
  python main.py --mode=compare --workdirs=runs/a,runs/b
  python main.py --mode=import --weights=FOLDER --workdir=runs/x
  python main.py --mode=export --workdir=runs/x --weights=FOLDER
  srun python main.py --config=configs/cifar10.py --distributed

--config.section.field=value overrides any field of the config; ddpm_jax/configs.py lists them all.
"""

import difflib
import functools
import logging
import os
import pathlib
import re
import shlex
import signal
import sys
import warnings
from contextlib import nullcontext
from typing import NamedTuple

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags
from tqdm.contrib.logging import logging_redirect_tqdm

from ddpm_jax import checks, compilation, configs, cpu, parallel, signals
from ddpm_jax.errors import UserError, is_disk_full, one_line, printable
from ddpm_jax.files import checkpoint, disk, run_files
from ddpm_jax.runs import compare, edit, evaluate, generate, interop, show, train

EDITS = {
    "img2img": edit.img2img,
    "interpolate": edit.interpolate,
    "inpaint": edit.inpaint,
    "invert": edit.invert,
}
MODES = ("train", "sample", *EDITS, "show", "evaluate", "compare", "import", "export")
# Flags that these modes require, and the others do not accept.
REQUIRED = {
    "weights": ("import", "export"),
    "images": tuple(EDITS),
    "mask": ("inpaint",),
    "workdirs": ("compare",),
}
PATHS = ("config", "workdir", "weights", "images", "mask")  # flags that name files and folders
INTERRUPTIBLE = {"sample": generate.sample, "evaluate": evaluate.evaluate}
# The folders in workdir that a mode writes to.
WRITES = {
    "train": ("",),
    "sample": ("samples",),
    "evaluate": ("", "evaluation"),
    "show": ("", "show"),
    **dict.fromkeys(EDITS, ("samples",)),
}
DISTRIBUTED = ("train", "sample", "evaluate")  # modes for several processes
log = logging.getLogger(__name__)


class Command(NamedTuple):
    """A parsed command line."""

    mode: str
    config: ConfigDict  # with the overrides applied
    overrides: tuple  # names of the overridden fields
    workdir: pathlib.Path | None
    weights: str | None
    workdirs: tuple = ()
    images: tuple = ()
    mask: str | None = None
    processes: tuple | None = None  # the arguments of parallel.connected, if there are several


def define_flags():
    """All flags except the overrides of the config."""
    values = flags.FlagValues()
    text = "what to do; show visualizes a run in a report, invert is DDIM inversion"
    flags.DEFINE_enum("mode", "train", MODES, text, flag_values=values)
    text = "a config file, or the name of one in configs/; by default the run's own config"
    flags.DEFINE_string("config", None, text, flag_values=values)
    text = "the run's folder; runs/<config name> by default"
    flags.DEFINE_string("workdir", None, text, flag_values=values)
    text = "the runs' folders for --mode=compare"
    flags.DEFINE_list("workdirs", [], text, flag_values=values)
    text = "a folder in diffusers' format, which import reads and export writes"
    flags.DEFINE_string("weights", None, text, flag_values=values)
    text = "inputs of img2img, interpolate, inpaint and invert: files, folders, .npz of sample"
    flags.DEFINE_list("images", [], text, flag_values=values)
    text = "an image file of the images' size; inpaint generates the white pixels"
    flags.DEFINE_string("mask", None, text, flag_values=values)
    text = "run in several processes, started by Slurm, Kubernetes or Open MPI"
    flags.DEFINE_boolean("distributed", False, text, flag_values=values)
    text = "for processes started otherwise: host:port of process 0"
    flags.DEFINE_string("coordinator", None, text, flag_values=values)
    text = "for processes started otherwise: the number of processes"
    flags.DEFINE_integer("num_processes", None, text, lower_bound=1, flag_values=values)
    text = "for processes started otherwise: the number of this process, from 0"
    flags.DEFINE_integer("process_id", None, text, lower_bound=0, flag_values=values)
    flags.DEFINE_boolean("helpshort", False, "explain the flags", flag_values=values)
    flags.DEFINE_alias("help", "helpshort", flag_values=values)
    return values


def parse(argv):
    """Reads the command line.

    Returns:
      A Command, or None after printing the help.

    Raises:
      UserError: for invalid arguments.
    """
    values = define_flags()
    try:
        _, *rest = values(argv, known_only=True)
    except (flags.Error, UnicodeDecodeError) as error:  # a --flagfile may not be UTF-8
        raise UserError(one_line(error)) from None
    if values.helpshort:
        print(__doc__, values.get_help(include_special_flags=False), sep="\n")
        return None
    for flag in ("images", "workdirs"):
        if "" in values[flag].value:
            raise UserError(f"--{flag}={','.join(values[flag].value)}: has an empty name")
    for flag, modes in REQUIRED.items():
        if (values.mode in modes) != bool(values[flag].value):
            text = "is missing; needed by" if values.mode in modes else "is only for"
            raise UserError(f"--{flag}: {text} --mode={', '.join(modes)}")
    processes = check_processes(values)
    if values.mode == "compare":
        return Command("compare", None, (), None, None, check_workdirs(values, rest))
    if not (values.config or values.workdir):
        raise UserError("--config: is missing, as in --config=configs/digits.py")
    for flag in PATHS:
        value, home = values[flag].value, functools.partial(configs.at_home, f"--{flag}")
        values[flag].value = [*map(home, value)] if flag == "images" else home(value or "")
    workdir = pathlib.Path(values.workdir or f"runs/{pathlib.Path(values.config).stem}")
    if os.path.exists(workdir) and not os.path.isdir(workdir):  # no error for a long name
        raise UserError(f"workdir={workdir}: is not a folder")
    if values.config:
        config = configs.named_config(values.config)
    elif values.mode == "import":
        config = configs.without_data()
    else:
        config = run_files.saved_config(workdir)
    overrides = tuple(re.sub(r"--(no)?config\.|=.*", "", argument) for argument in rest)
    return Command(
        values.mode,
        configs.normalize(override(config, rest)),
        overrides,
        workdir,
        values.weights,
        images=tuple(values.images),
        mask=values.mask or None,
        processes=processes,
    )


def check_workdirs(values, rest):
    """The folders that compare compares, from the flags; it takes no others."""
    others = [f"--{name}" for name in ("config", "workdir") if values[name].value] + rest
    if others:
        raise UserError(f"{others[0]}: compare takes only --workdirs")
    if len(set(values.workdirs)) < 2:
        raise UserError("--workdirs: compare needs two or more, as in --workdirs=runs/a,runs/b")
    return [configs.at_home("--workdirs", path) for path in values.workdirs]


def check_processes(values):
    """The arguments of parallel.connected from the flags, or None for a single process."""
    processes = (values.coordinator, values.num_processes, values.process_id)
    if processes == (None, None, None):
        processes = processes if values.distributed else None
    else:
        for name in ("coordinator", "num_processes", "process_id"):
            if values[name].value is None:
                text = "is missing; --coordinator, --num_processes and --process_id go together"
                raise UserError(f"--{name}: {text}")
        if not re.fullmatch(r".+:\d+", values.coordinator):
            raise UserError(f"--coordinator={values.coordinator}: must be host:port")
        if values.process_id >= values.num_processes:
            allowed = f"must be below --num_processes={values.num_processes}"
            raise UserError(f"--process_id={values.process_id}: {allowed}")
    if processes and values.mode not in DISTRIBUTED:
        raise UserError(f"--distributed: is only for --mode={', '.join(DISTRIBUTED)}")
    return processes


def override(config, arguments):
    """Applies --config.section.field=value arguments to a config."""
    values = flags.FlagValues()
    argv = [sys.argv[0], *arguments]
    fields = configs.flatten(config)
    for argument in arguments:
        match = re.match(r"--(?:no)?config\.([^=]+)", argument)
        if not match:
            raise UserError(f"{argument}: unknown argument; see --helpshort")
        if match[1] not in fields:
            close = difflib.get_close_matches(match[1], fields, n=1)
            hint = f"did you mean {close[0]}?" if close else "see ddpm_jax/configs.py"
            raise UserError(f"--config.{match[1]}: no such field; {hint}")
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
        values(argv)
    except (flags.Error, TypeError, ValueError) as error:
        raise UserError(one_line(error)) from None
    except (MemoryError, RecursionError):  # of Python's own parser
        raise UserError("--config: a value is nested too deeply") from None
    return values.config


def run(argv):
    """Runs a command line.

    Returns:
      The exit code: 0, or 128 + the number of the signal that stopped the training.
    """
    command = parse(argv)
    if command is None:
        return 0
    if command.mode == "compare":
        compare.compare(command.workdirs)
        return 0
    cpu.prepare(configs.positions(command.config, command.mode))
    if command.processes is None:
        compilation.keep_programs()  # for one process only, see there
        sizes = configs.batch_sizes(command.config, command.mode).values()
        cpu.use_cores(*sizes, parts=configs.parts(command.config, command.mode))
        processes = nullcontext()
    else:
        processes = parallel.connected(*command.processes)
    with processes:
        parallel.check_devices()
        if not parallel.is_first():
            logging.getLogger("ddpm_jax").setLevel(logging.ERROR)
        return execute(command, argv)


def execute(command, argv):
    """Executes a parsed command; returns the exit code."""
    mode, config, workdir, weights = command.mode, command.config, command.workdir, command.weights
    if mode == "import":  # checks the config itself, with the fields from the weights
        interop.import_run(config, weights, workdir, command.overrides)
        return 0
    checks.check(config, mode)
    for name in WRITES.get(mode, ()):
        disk.check_writable(workdir / name)
    if mode == "train":
        caught = train.train(config, workdir)
        if caught:
            log.info("stopped; to resume, run: %s", shell_command(argv))
            return 128 + caught
        # All processes draw it, or none, also where a file is seen later by some.
        if not parallel.broadcast_from_first((workdir / "report.html").exists()):
            train.attempt("the report", lambda: show.show(config, workdir))
        log.info("done: %s", workdir)
    else:
        if mode != "show" or run_files.load_config(workdir) is not None:
            purpose = "imported" if checkpoint.latest_step(workdir) == 0 else "use"
            checks.check_same_run(run_files.saved_config(workdir), config, workdir, purpose)
        if mode in INTERRUPTIBLE:
            with signals.catch() if command.processes else nullcontext(signals.never) as stop:
                INTERRUPTIBLE[mode](config, workdir, stop)
        elif mode == "show":
            show.show(config, workdir)
        elif mode in EDITS:
            masks = () if command.mask is None else (command.mask,)
            EDITS[mode](config, workdir, command.images, *masks)
        else:
            interop.export_run(config, workdir, weights)
    return 0


def shell_command(argv):
    """The shell command of these arguments."""
    start = ["python"] if argv[0].endswith(".py") else []
    return shlex.join([*start, *argv])


def main():
    """Runs the command line; a user's mistake is one line and exit code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    # Pillow warns of unreadable metadata, which is not needed, and of large images.
    warnings.filterwarnings("ignore", module="PIL")
    # Orbax and TFDS's downloads log long versions of the errors that they raise.
    for name in ("absl", "asyncio", "urllib3"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    logging.getLogger("ddpm_jax").setLevel(logging.INFO)
    try:
        with logging_redirect_tqdm():
            code = run(sys.argv)
            sys.stdout.flush()
    except UserError as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        code = 2
    except signals.Stopped as error:
        print(f"{error}; finished parts are kept; the same command resumes", file=sys.stderr)
        code = 128 + error.number
    except BrokenPipeError:  # the reader is closed, as in `| head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except OSError as error:
        if not (is_disk_full(error) or error.filename):  # a path from the user
            raise
        print(f"error: {printable(error)}", file=sys.stderr)
        code = 2
    except jax.errors.JaxRuntimeError as error:
        if not (text := parallel.explain(error)):
            raise
        print(f"error: {text} ({one_line(error)[:200]})", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print("interrupted; nothing was lost, run the same command again", file=sys.stderr)
        code = 130
    else:
        sys.exit(code)
    parallel.exit_process(code)
