"""Import and export of weights of diffusers' UNet2DModel.

networks.py has the network's config, schedulers.py the schedulers.

A folder in diffusers' format is flat, or a pipeline with a subfolder for each component:

  config.json                            unet/config.json
  diffusion_pytorch_model.safetensors    unet/diffusion_pytorch_model.safetensors
  scheduler_config.json                  scheduler/scheduler_config.json

Large weights are several files with an index, diffusion_pytorch_model.safetensors.index.json.
Tensors have PyTorch's layout: convolutions [out, in, height, width], linear layers [out, in].
"""

import contextlib
import logging
import os
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from ddpm_jax import checks, configs
from ddpm_jax.core import diffusion, unet
from ddpm_jax.errors import UserError, listed, one_line
from ddpm_jax.files import checkpoint, disk, run_files
from ddpm_jax.runs import networks, schedulers

log = logging.getLogger(__name__)

TENSORS = "diffusion_pytorch_model.safetensors"
SCHEDULER = "scheduler", "scheduler_config.json"

# diffusers' names of our modules and parameters.
MODULES = {
    "conv_in": "conv_in",
    "conv_out": "conv_out",
    "norm_out": "conv_norm_out",
    "temb1": "time_embedding.linear_1",
    "temb2": "time_embedding.linear_2",
    "middle_block0": "mid_block.resnets.0",
    "middle_attention": "mid_block.attentions.0",
    "middle_block1": "mid_block.resnets.1",
    "labels": "class_embedding",
    # in a residual block
    "norm1": "norm1",
    "conv1": "conv1",
    "temb": "time_emb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "shortcut": "conv_shortcut",
    # in an attention block
    "norm": "group_norm",
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj": "to_out.0",
    # in a layer
    "embedding": "weight",
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
}
# Names of attention layers before diffusers 0.15, which the published weights use.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def import_run(config, weights, workdir, overrides=()):
    """Imports a folder in diffusers' format as a run, for sampling or further training.

    The weights are both its parameters and their EMA; its step is 0.

    Args:
      config: for the fields that the folder does not define.
      weights: the folder, or a .safetensors file with a config.json beside it.
      workdir: the run's folder; must not exist, or be empty.
      overrides: names of the fields that the user set; see read_run.

    Raises:
      UserError: for a network that our U-Net does not support, an incomplete folder, or a workdir
        that is not empty; nothing is written then.
    """
    disk.check_free("workdir", workdir)
    checkpoint.check_path(workdir)
    config, params = read_run(config, weights, overrides)
    with disk.new_folder("workdir", workdir) as folder:
        checkpoint.save_imported(folder, params)
        run_files.save_config(config, folder)
    log.info("wrote %s", workdir)


def is_diffusers(weights):
    """Whether a folder or a file has the config of a diffusers network."""
    path = _find(_folder_of(weights), "unet", "config.json")
    return path is not None and "_class_name" in disk.read_json(path)


def read_run(config, weights, overrides=()):
    """Reads weights in diffusers' format.

    Args:
      config: for the fields that the folder does not define.
      weights: the folder, or a .safetensors file with a config.json beside it.
      overrides: names of the fields that the user set. A value that contradicts the folder is an
        error, unless it does not change the function of the weights (as dropout).

    Returns:
      (config, params): checked, and a tree of arrays.

    Raises:
      UserError: for a network that our U-Net does not support, or an incomplete folder.
    """
    folder = _folder_of(weights)
    if not os.path.isdir(folder) or not os.path.exists(weights):
        raise UserError(f"weights={weights}: no such folder, nor a .safetensors file")
    _check_pipeline(folder)
    path = _find(folder, "unet", "config.json")
    if path is None:
        raise UserError(f"weights={weights}: has no config.json (nor unet/config.json)")
    network, schedule = disk.read_json(path), _find(folder, *SCHEDULER)
    fields = read_fields(config, network, path, overrides)
    if schedule is not None:
        fields = with_scheduler(fields, disk.read_json(schedule), schedule)

    user_fields, learned = configs.flatten(config), diffusion.LEARNED_VARIANCES
    if config.diffusion.variance in learned:  # the network may have none
        fields.setdefault("diffusion.variance", "fixed_large")
        if fields["diffusion.variance"] not in learned:
            fields["diffusion.loss"] = "simple"
    for name in fields.keys() & set(overrides):
        of_network = fields[name] in learned or user_fields[name] in learned
        if name in checks.FREE["use"] and not of_network:
            fields[name] = user_fields[name]
        elif fields[name] != user_fields[name]:
            text = f"{weights} has {fields[name]!r}"
            raise UserError(f"--config.{name}={user_fields[name]!r}: {text}")
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(fields)
    checks.check(config, "import")
    flip = network.get("flip_sin_to_cos", networks.DEFAULTS["flip_sin_to_cos"])
    tensors = _tensors_beside(path) if folder == pathlib.Path(weights) else pathlib.Path(weights)
    params = read_params(tensors, config, flip_sin_to_cos=flip)
    log.info("read %s: %s", weights, ", ".join(f"{k}={v}" for k, v in fields.items()))
    if config.data.num_classes and "model.null_class" not in overrides:
        text = "%s: none of its %d classes is a null class (or else: --config.model.null_class)"
        log.info(text, weights, config.data.num_classes)
    if schedule is None:
        chain = ", ".join(f"{name}={value}" for name, value in config.diffusion.items())
        text = "no scheduler_config.json in %s: the diffusion process is the config's, %s"
        log.warning(text, weights, chain)
    return config, params


def with_scheduler(fields, scheduler, path):
    """Adds the fields of a scheduler to those of the network; they must agree on the variance."""
    found = schedulers.read_scheduler(scheduler, path)
    learned, said = "diffusion.variance" in fields, scheduler.get("variance_type")
    if learned and said is None:
        found.pop("diffusion.variance", None)
    elif learned != (said == "learned_range"):
        text = "the network has learned a variance" if learned else "the network has no variance"
        allowed = "must be" if learned else "cannot be"
        text = f'{allowed} "learned_range": {text} (out_channels)'
        raise UserError(f"{path}: variance_type={schedulers.json_text(said)}: {text}")
    return fields | found


def read_fields(config, network, path, overrides):
    """networks.network_fields, with what the user says and the file does not."""
    size = config.data.image_size if "data.image_size" in overrides else None
    null_class = config.model.null_class and "model.null_class" in overrides
    classes = config.data.num_classes if "data.num_classes" in overrides else 0
    return networks.network_fields(network, path, size, null_class, classes)


def export_run(config, workdir, weights):
    """Writes a run's checkpoint as a folder for diffusers' DDPMPipeline.

    Args:
      config: the run's config; `sample.checkpoint` and `sample.use_ema` choose the parameters.
      workdir: the run's folder.
      weights: the folder to write; must not exist, or be empty.

    Raises:
      UserError: for a network that diffusers does not support, a missing checkpoint, or a folder
        that is not empty; nothing is written then.
    """
    disk.check_free("weights", weights)
    scheduler = schedulers.write_scheduler(config)
    files = {
        "model_index.json": {
            "_class_name": "DDPMPipeline",
            "_diffusers_version": schedulers.VERSION,
            "scheduler": ["diffusers", scheduler["_class_name"]],
            "unet": ["diffusers", "UNet2DModel"],
        },
        "unet/config.json": networks.diffusers_network(config),
        "scheduler/scheduler_config.json": scheduler,
    }
    step, params = checkpoint.restore_params(config, workdir)
    tensors = diffusers_tensors(params, len(configs.widths(config.model)))
    with disk.new_folder("weights", weights) as folder:
        for name, content in files.items():
            disk.write_json(folder / name, content)
        try:  # PyTorch's readers require this metadata
            safetensors.numpy.save_file(tensors, folder / "unet" / TENSORS, {"format": "pt"})
        except safetensors.SafetensorError as error:  # the disk is full
            raise UserError(f"weights={weights}: cannot be used ({one_line(error)})") from None
    which = "EMA" if config.sample.use_ema else "raw"
    log.info("wrote %s: the %s parameters of step %d", weights, which, step)
    total, kind = config.diffusion.num_timesteps, scheduler["_class_name"]
    few = configs.sampling_steps(config)
    steps = {"DDPMScheduler": total, "DPMSolverMultistepScheduler": few}  # those that it runs
    if kind not in steps:
        text = "DDPMPipeline may not run a %s: load the network and the scheduler by themselves"
        log.info(text, kind)
    elif config.data.num_classes:
        text = (
            "DDPMPipeline gives the network no labels: call it yourself, the classes are 0 to %d%s"
        )
        null = ", and the last embedding is the null class" if config.model.null_class else ""
        log.info(text, config.data.num_classes - 1, null)
    elif steps[kind] != 1000:
        text = "call the DDPMPipeline with num_inference_steps=%d; its default is 1000"
        log.info(text, steps[kind])


def diffusers_tensors(params, levels):
    """Our parameters (or their gradients) with diffusers' names and layout.

    Args:
      params: the network's tree.
      levels: of the U-Net.

    Returns:
      {name: numpy array}.
    """
    named = (
        (tensor_name(path, levels), np.asarray(array))
        for path, array in traverse_util.flatten_dict(params).items()
    )
    return {name: np.ascontiguousarray(to_diffusers(name, array)) for name, array in named}


def tensor_name(path, levels):
    """diffusers' name of one of our parameters.

    Args:
      path: its path in the tree, as ("up0_block1", "conv1", "kernel").
      levels: of the U-Net; diffusers counts the levels of the up path from the lowest resolution.

    Returns:
      As "up_blocks.3.resnets.1.conv1.weight".
    """
    return ".".join(MODULES.get(module) or _block_name(module, levels) for module in path)


def _block_name(module, levels):
    side, level, layer, attention = re.fullmatch(
        r"(down|up)(\d+)_(conv|resblock|block\d+)(_attention)?", module
    ).groups()
    level = int(level)
    # What leads down belongs to the level after it here, before it in diffusers.
    if layer in ("conv", "resblock"):
        down = f"down_blocks.{level - 1}.downsamplers.0"
        up = f"up_blocks.{levels - 1 - level}.upsamplers.0"
        return (down if side == "down" else up) + (".conv" if layer == "conv" else "")
    index = level if side == "down" else levels - 1 - level
    kind = "attentions" if attention else "resnets"
    return f"{side}_blocks.{index}.{kind}.{layer.removeprefix('block')}"


def to_diffusers(name, array):
    """Converts one of our parameters to PyTorch's layout."""
    if array.ndim == 4:
        return array.transpose(3, 2, 0, 1)
    if "conv_shortcut" in name and array.ndim == 2:
        return array.T[:, :, None, None]
    return array if name == "class_embedding.weight" else array.T


def from_diffusers(name, array):
    """The inverse of to_diffusers."""
    if "conv_shortcut" in name and array.ndim == 4:
        return array[:, :, 0, 0].T
    if name == "class_embedding.weight":
        return array
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def read_params(path, config, flip_sin_to_cos=False):
    """Reads a network's parameters, tensor by tensor, to save memory.

    Args:
      path: a .safetensors file, or the index of several.
      config: its data and model sections define the expected tensors.
      flip_sin_to_cos: whether the time embedding has the cosines first.

    Returns:
      A tree of float32 arrays.

    Raises:
      UserError: if the file is missing or damaged, or has missing or unexpected tensors.
    """
    levels = len(configs.widths(config.model))
    with contextlib.ExitStack() as stack:
        files = _open_tensors(path, stack)
        stored = {_new_name(name): name for name in files}
        if len(stored) < len(files):
            duplicates = listed(sorted(set(files) - set(stored.values())))
            raise UserError(f"{path}: has tensors under an old and a new name: {duplicates}")
        # A network that is far from the file could take minutes to trace.
        last = f"up_blocks.{levels - 1}.resnets.{config.model.num_res_blocks}.conv1.weight"
        if last not in stored:
            raise UserError(f"{path}: lacks {last}; it has {listed(sorted(files))}")
        shapes = unet.param_shapes(configs.make_model(config), configs.image_shape(config))
        shapes = traverse_util.flatten_dict(shapes)
        names = {param: tensor_name(param, levels) for param in shapes}
        expected = {
            name: jax.eval_shape(lambda p, name=name: to_diffusers(name, p), shapes[param]).shape
            for param, name in names.items()
        }
        slices = {name: files[old].get_slice(old) for name, old in stored.items()}
        _check_tensors(path, slices, expected)
        params = {}
        for param, name in names.items():
            array = from_diffusers(name, files[stored[name]].get_tensor(stored[name]))
            params[param] = jnp.asarray(array, jnp.float32)
    if flip_sin_to_cos:
        kernel = params["temb1", "kernel"]  # [embedding, out]
        params["temb1", "kernel"] = jnp.roll(kernel, len(kernel) // 2, axis=0)
    return traverse_util.unflatten_dict(params)


def _check_tensors(path, slices, expected):
    """Raises a UserError that names missing, unexpected and mismatched tensors of a file."""
    problems = {
        "lacks": expected.keys() - slices.keys(),
        "has, and should not,": slices.keys() - expected.keys(),
        "has of another shape or type": set(),
    }
    for name in expected.keys() & slices.keys():
        shape, kind = tuple(slices[name].get_shape()), slices[name].get_dtype()
        if shape != expected[name] or kind not in ("F32", "F16", "BF16"):
            text = f"{name} {kind} {list(shape)}, not F32 {list(expected[name])}"
            problems["has of another shape or type"].add(text)
    texts = [f"{what} {listed(sorted(names))}" for what, names in problems.items() if names]
    if texts:
        raise UserError(f"{path}: {'; '.join(texts)}")


def _new_name(name):
    """A tensor's name in today's diffusers, also if the network is the `model` of another module.

    As in the class-conditional U-Net of diffusers' course, whose label embedding is class_emb.
    """
    modules = name.removeprefix("model.").split(".")
    if modules[0] == "class_emb":
        modules[0] = "class_embedding"
    if "attentions" in modules[:-2] and modules[-2] in OLD_NAMES:
        modules[-2] = OLD_NAMES[modules[-2]]
    return ".".join(modules)


def _tensors_beside(config_json):
    """The path of a network's tensors: their index, if there is one, as in diffusers."""
    path = config_json.with_name(TENSORS)
    index = path.with_name(f"{TENSORS}.index.json")
    return index if index.is_file() else path


def _open_tensors(path, stack):
    """Opens one .safetensors file, or those of an index: {name of a tensor: its file}."""
    if path.suffix != ".json":
        file = stack.enter_context(_open(path))
        return dict.fromkeys(file.keys(), file)
    weight_map = disk.read_json(path).get("weight_map")
    fits = isinstance(weight_map, dict) and all(map(_is_file_name, weight_map.values()))
    if not fits:
        raise UserError(f"{path}: weight_map: must give each tensor the name of a file beside it")
    parts = {name: path.with_name(name) for name in sorted(set(weight_map.values()))}
    files = {name: stack.enter_context(_open(part)) for name, part in parts.items()}
    for name, file in files.items():
        keys, indexed = set(file.keys()), {t for t, part in weight_map.items() if part == name}
        if keys != indexed:
            text = "its tensors are not those that the index has there"
            raise UserError(f"{parts[name]}: {text}: {listed(sorted(keys ^ indexed))}")
    return {tensor: files[name] for tensor, name in weight_map.items()}


def _is_file_name(name):
    """Whether a value of a JSON file is the name of a file, not a path to another folder."""
    return isinstance(name, str) and name not in ("", "..") and pathlib.Path(name).name == name


def _open(path):
    """Opens a .safetensors file; a pickle is never read."""
    if not path.is_file():
        folder, pickle = str(path.parent), path.with_suffix(".bin")
        if pickle.exists():
            raise UserError(
                f"{pickle}: is a pickle, which is not read; convert it to safetensors with "
                f"diffusers: UNet2DModel.from_pretrained({folder!r}).save_pretrained({folder!r})"
            )
        others = sorted(path.parent.glob("*.safetensors"))
        others = [file for file in others if "-of-" not in file.name]  # a part of several
        hint = f"; to read another one, --weights={others[0]}" if others else ""
        raise UserError(f"{path}: no such file{hint}")
    try:
        return safetensors.safe_open(path, framework="np")
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: is not a complete safetensors file ({one_line(error)})") from None


def _folder_of(weights):
    """The folder of `weights`, a folder or a .safetensors file."""
    weights = pathlib.Path(weights)
    return (
        weights.parent if weights.suffix == ".safetensors" and os.path.isfile(weights) else weights
    )


def _pipeline_of(folder):
    """The pipeline that a network's folder is a part of, or the folder itself."""
    folder = folder.absolute()
    return folder.parent if folder.name in ("unet", "unet_ema") else folder


def _check_pipeline(folder):
    """Raises a UserError for a pipeline with other components than a network and a scheduler.

    Warns if the EMA of the network is beside it.
    """
    index = _pipeline_of(folder) / "model_index.json"
    if os.path.isfile(index):
        stored = disk.read_json(index).items()
        components = {name for name, kind in stored if kind != [None, None]}
        components = {name for name in components if not name.startswith("_")}
        if others := components - {"unet", "scheduler"}:
            names = ", ".join(sorted(others))
            raise UserError(f"{index}: has {names}; only unet and scheduler are supported")
    if os.path.isdir(folder / "unet") and os.path.isdir(average := folder / "unet_ema"):
        log.warning("reading the raw parameters in unet; for their EMA, --weights=%s", average)


def _find(folder, component, name):
    """The path of the file `name` of a pipeline's component, in either layout, or None."""
    folders = [folder / component, folder]
    if component != "unet":
        folders.append(_pipeline_of(folder) / component)
    paths = (folder / name for folder in folders)
    return next((path for path in paths if os.path.isfile(path)), None)  # no error for a long name
