"""Import and export of weights of diffusers' UNet2DModel; schedulers.py has its schedulers.

A folder in diffusers' format is flat, or a pipeline with a subfolder for each component:

  config.json                            unet/config.json
  diffusion_pytorch_model.safetensors    unet/diffusion_pytorch_model.safetensors
  scheduler_config.json                  scheduler/scheduler_config.json

Tensors have PyTorch's layout: convolutions [out, in, height, width], linear layers [out, in].
"""

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

from ddpm_jax import configs
from ddpm_jax.core import unet
from ddpm_jax.errors import UserError, one_line
from ddpm_jax.files import checkpoint
from ddpm_jax.files import workdir as run_files
from ddpm_jax.runs import schedulers
from ddpm_jax.runs.schedulers import is_size, json_text

log = logging.getLogger(__name__)

TENSORS = "diffusion_pytorch_model.safetensors"

# Fields of a UNet2DModel for which our U-Net has one value: (diffusers' default, our value).
FIXED = {
    "center_input_sample": (False, False),
    "time_embedding_type": ("positional", "positional"),
    "freq_shift": (0, 1),
    "mid_block_type": ("UNetMidBlock2D", "UNetMidBlock2D"),
    "mid_block_scale_factor": (1, 1),
    "downsample_padding": (1, 0),  # 0 is the padding of (0, 1)
    "downsample_type": ("conv", "conv"),
    "upsample_type": ("conv", "conv"),
    "act_fn": ("silu", "silu"),
    "norm_eps": (1e-5, 1e-6),
    "resnet_time_scale_shift": ("default", "default"),
    "add_attention": (True, True),
    "class_embed_type": (None, None),
    "num_class_embeds": (None, None),
}
# The other fields, with diffusers' defaults.
DEFAULTS = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (224, 448, 672, 896),
    "down_block_types": ("DownBlock2D", *3 * ["AttnDownBlock2D"]),
    "up_block_types": (*3 * ["AttnUpBlock2D"], "UpBlock2D"),
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "attention_head_dim": 8,
    "attn_norm_num_groups": None,
    "time_embedding_dim": None,
    "flip_sin_to_cos": True,  # the cosines first
    "dropout": 0.0,
    "num_train_timesteps": None,  # of an embedding that we do not have
}
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
      weights: the folder.
      workdir: the run's folder; must not exist, or be empty.
      overrides: names of the fields that the user set; see read_run.

    Raises:
      UserError: for a network that our U-Net does not support, an incomplete folder, or a workdir
        that is not empty; nothing is written then.
    """
    run_files.check_free("workdir", workdir)
    checkpoint.check_path(workdir)
    config, params = read_run(config, weights, overrides)
    with run_files.new_folder("workdir", workdir) as folder:
        checkpoint.save_imported(folder, params)
        run_files.save_config(config, folder)
    log.info("wrote %s", workdir)


def is_diffusers(folder):
    """Whether a folder has the config of a diffusers network."""
    path = _find(pathlib.Path(folder), "unet", "config.json")
    return path is not None and "_class_name" in run_files.read_json(path)


def read_run(config, weights, overrides=()):
    """Reads a folder in diffusers' format.

    Args:
      config: for the fields that the folder does not define.
      weights: the folder.
      overrides: names of the fields that the user set. A value that contradicts the folder is an
        error, unless it does not change the function of the weights (as dropout).

    Returns:
      (config, params): checked, and a tree of arrays.

    Raises:
      UserError: for a network that our U-Net does not support, or an incomplete folder.
    """
    weights = pathlib.Path(weights)
    if not os.path.isdir(weights):
        raise UserError(f"weights={weights}: no such folder")
    _check_pipeline(weights)
    path = _find(weights, "unet", "config.json")
    if path is None:
        raise UserError(f"weights={weights}: has no config.json (nor unet/config.json)")
    network = run_files.read_json(path)
    size = config.data.image_size if "data.image_size" in overrides else None
    fields = network_fields(network, path, size)
    schedule = _find(weights, "scheduler", "scheduler_config.json")
    if schedule is not None:
        fields |= schedulers.read_scheduler(run_files.read_json(schedule), schedule)

    user_fields = configs.flatten(config)
    for name in fields.keys() & set(overrides):
        if name in configs.FREE["use"]:
            fields[name] = user_fields[name]
        elif fields[name] != user_fields[name]:
            text = f"{weights} has {fields[name]!r}"
            raise UserError(f"--config.{name}={user_fields[name]!r}: {text}")
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(fields)
    configs.check(config, "import")
    flip = network.get("flip_sin_to_cos", DEFAULTS["flip_sin_to_cos"])
    params = read_params(path.with_name(TENSORS), config, flip_sin_to_cos=flip)
    log.info("read %s: %s", weights, ", ".join(f"{k}={v}" for k, v in fields.items()))
    if schedule is None:
        chain = ", ".join(f"{name}={value}" for name, value in config.diffusion.items())
        text = "no scheduler_config.json in %s: the diffusion process is the config's, %s"
        log.warning(text, weights, chain)
    return config, params


def export_run(config, workdir, weights):
    """Writes a run's newest checkpoint as a folder for diffusers' DDPMPipeline.

    Args:
      config: the run's config; `sample.use_ema` chooses the parameters.
      workdir: the run's folder.
      weights: the folder to write; must not exist, or be empty.

    Raises:
      UserError: for a network that diffusers does not support, a missing checkpoint, or a folder
        that is not empty; nothing is written then.
    """
    run_files.check_free("weights", weights)
    scheduler = schedulers.write_scheduler(config)
    files = {
        "model_index.json": {
            "_class_name": "DDPMPipeline",
            "_diffusers_version": schedulers.VERSION,
            "scheduler": ["diffusers", scheduler["_class_name"]],
            "unet": ["diffusers", "UNet2DModel"],
        },
        "unet/config.json": diffusers_network(config),
        "scheduler/scheduler_config.json": scheduler,
    }
    step, params = checkpoint.restore_params(config, workdir)
    tensors = diffusers_tensors(params, len(config.model.channel_mults))
    with run_files.new_folder("weights", weights) as folder:
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(run_files.to_json(content, indent=2) + "\n")
        # PyTorch's readers require this metadata.
        safetensors.numpy.save_file(tensors, folder / "unet" / TENSORS, metadata={"format": "pt"})
    which = "EMA" if config.sample.use_ema else "raw"
    log.info("wrote %s: the %s parameters of step %d", weights, which, step)
    steps, kind = config.diffusion.num_timesteps, scheduler["_class_name"]
    if kind != "DDPMScheduler":
        text = "DDPMPipeline may not run a %s: load the network and the scheduler by themselves"
        log.info(text, kind)
    elif steps != 1000:
        log.info("call the DDPMPipeline with num_inference_steps=%d; its default is 1000", steps)


def network_fields(network, origin, image_size=None):
    """Converts a UNet2DModel's config to fields of our config.

    Args:
      network: the content of its config.json.
      origin: the file, for errors.
      image_size: (H, W), for a file without sample_size.

    Returns:
      {"section.field": value}.

    Raises:
      UserError: that names the first field that our U-Net does not support.
    """
    defaults = {name: default for name, (default, _) in FIXED.items()}
    fields = {"_class_name": None, **defaults, **DEFAULTS, **network}
    if fields["sample_size"] is None:
        fields["sample_size"] = image_size
    elif is_size(fields["sample_size"]):
        fields["sample_size"] = 2 * [fields["sample_size"]]
    _check_network(fields, origin)

    widths, size = fields["block_out_channels"], fields["sample_size"]
    attends = _attends(fields["down_block_types"], "DownBlock2D")
    # Older files have no dropout; it matters only in training.
    dropout = {"model.dropout": float(network["dropout"])} if "dropout" in network else {}
    return dropout | {
        "data.image_size": tuple(size),
        "data.channels": fields["in_channels"],
        "data.num_classes": 0,
        "model.kind": "unet",
        "model.channels": widths[0],
        "model.channel_mults": tuple(width // widths[0] for width in widths),
        "model.num_res_blocks": fields["layers_per_block"],
        "model.attention_resolutions": tuple(
            size[0] // 2**level for level, attend in enumerate(attends) if attend
        ),
        "model.norm_groups": fields["norm_num_groups"],
    }


def _check_network(fields, origin):
    """Raises a UserError that names the first field of a UNet2DModel that is not supported."""

    def require(fits, name, allowed):
        if not fits:
            raise UserError(f"{origin}: {name}={json_text(fields[name])}: {allowed}")

    require(fields["_class_name"] == "UNet2DModel", "_class_name", 'must be "UNet2DModel"')
    widths, size, groups, channels = (
        fields[name]
        for name in ("block_out_channels", "sample_size", "norm_num_groups", "in_channels")
    )
    for name in ("layers_per_block", "norm_num_groups"):
        require(is_size(fields[name]), name, "must be a whole number above 0")
    fits = _are_sizes(widths) and all(width % widths[0] == 0 for width in widths)
    require(fits, "block_out_channels", "must be a list of multiples of its first number")
    fits = widths[0] % 2 == 0 and widths[0] >= 4
    require(fits, "block_out_channels", "the first must be even, at least 4")
    fits = widths[0] % groups == 0
    require(fits, "norm_num_groups", f"must divide the first of block_out_channels, {widths[0]}")

    for name, (_, ours) in FIXED.items():
        same = fields[name] == ours or (name, fields[name]) == ("act_fn", "swish")
        unused = name.startswith("downsample") and len(widths) == 1
        require(same or unused, name, f"our U-Net has {json_text(ours)}")
    for name in sorted(fields):
        supported = name in FIXED or name in DEFAULTS or name.startswith("_")
        require(supported or fields[name] is None, name, "is not supported by our U-Net")

    factor = 2 ** (len(widths) - 1)
    fits = _are_sizes(size) and len(size) == 2 and all(side % factor == 0 for side in size)
    allowed = f"must be the images' height and width, multiples of {factor}"
    require(fits, "sample_size", f"{allowed} (or null, and --config.data.image_size=H,W)")
    choices = configs.CHOICES["data.channels"]
    require(channels in choices, "in_channels", f"choose from {', '.join(map(str, choices))}")
    require(fields["out_channels"] == channels, "out_channels", f"must be in_channels={channels}")
    flips = isinstance(fields["flip_sin_to_cos"], bool)
    require(flips, "flip_sin_to_cos", "must be true or false")
    dropout = fields["dropout"]
    fits = isinstance(dropout, float | int) and 0 <= dropout < 1
    require(fits, "dropout", "must lie in [0, 1)")

    attends = _attends(fields["down_block_types"], "DownBlock2D")
    fits = attends is not None and len(attends) == len(widths)
    allowed = f"must be {len(widths)} of DownBlock2D and AttnDownBlock2D"
    require(fits, "down_block_types", allowed)
    fits = _attends(fields["up_block_types"], "UpBlock2D") == attends[::-1]
    allowed = "must be UpBlock2D and AttnUpBlock2D, with attention where down_block_types has it"
    require(fits, "up_block_types", allowed)
    heads = {width for width, attend in zip(widths, attends, strict=True) if attend} | {widths[-1]}
    size = fields["attention_head_dim"]
    fits = size is None or all(width == size for width in heads)
    allowed = f"our attention has one head: must be null, or the width, {sorted(heads)}"
    require(fits, "attention_head_dim", allowed)
    for name, ours in (("attn_norm_num_groups", groups), ("time_embedding_dim", 4 * widths[0])):
        require(fields[name] in (None, ours), name, f"our U-Net has {ours}")


def diffusers_network(config):
    """The config.json of the UNet2DModel that equals a config's network."""
    model, size = config.model, config.data.image_size
    mults = model.channel_mults
    if mults[0] != 1:
        raise UserError(f"model.channel_mults={mults!r}: diffusers needs 1 as the first")
    if config.data.num_classes:  # diffusers' pipelines have no labels
        raise UserError(f"data.num_classes={config.data.num_classes}: diffusers' pipelines need 0")
    attends = [size[0] // 2**level in model.attention_resolutions for level in range(len(mults))]
    return {
        "_class_name": "UNet2DModel",
        "_diffusers_version": schedulers.VERSION,
        **{name: ours for name, (_, ours) in FIXED.items()},
        **DEFAULTS,
        "sample_size": size[0] if size[0] == size[1] else list(size),
        "in_channels": config.data.channels,
        "out_channels": config.data.channels,
        "block_out_channels": [mult * model.channels for mult in mults],
        "down_block_types": ["AttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "up_block_types": ["AttnUpBlock2D" if a else "UpBlock2D" for a in attends[::-1]],
        "layers_per_block": model.num_res_blocks,
        "norm_num_groups": model.norm_groups,
        "attention_head_dim": None,
        "flip_sin_to_cos": False,
        "dropout": model.dropout,
    }


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
        r"(down|up)(\d+)_(conv|block\d+)(_attention)?", module
    ).groups()
    level = int(level)
    # A downsampling convolution belongs to the level after it here, before it in diffusers.
    if layer == "conv":
        down = f"down_blocks.{level - 1}.downsamplers.0.conv"
        return down if side == "down" else f"up_blocks.{levels - 1 - level}.upsamplers.0.conv"
    index = level if side == "down" else levels - 1 - level
    kind = "attentions" if attention else "resnets"
    return f"{side}_blocks.{index}.{kind}.{layer.removeprefix('block')}"


def to_diffusers(name, array):
    """Converts one of our parameters to PyTorch's layout."""
    if array.ndim == 4:
        return array.transpose(3, 2, 0, 1)
    if "conv_shortcut" in name and array.ndim == 2:
        return array.T[:, :, None, None]
    return array.T


def from_diffusers(name, array):
    """The inverse of to_diffusers."""
    if "conv_shortcut" in name and array.ndim == 4:
        return array[:, :, 0, 0].T
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def read_params(path, config, flip_sin_to_cos=False):
    """Reads a network's parameters, tensor by tensor, to save memory.

    Args:
      path: a .safetensors file.
      config: its data and model sections define the expected tensors.
      flip_sin_to_cos: whether the time embedding has the cosines first.

    Returns:
      A tree of float32 arrays.

    Raises:
      UserError: if the file is missing or damaged, or has missing or unexpected tensors.
    """
    shapes = unet.param_shapes(configs.make_model(config), configs.image_shape(config))
    shapes, levels = traverse_util.flatten_dict(shapes), len(config.model.channel_mults)
    names = {param: tensor_name(param, levels) for param in shapes}
    expected = {
        name: jax.eval_shape(lambda p, name=name: to_diffusers(name, p), shapes[param]).shape
        for param, name in names.items()
    }
    with _open(path) as file:
        keys = file.keys()
        stored = {_new_name(name): name for name in keys}
        if len(stored) < len(keys):
            duplicates = _listed(set(keys) - set(stored.values()))
            raise UserError(f"{path}: has tensors under an old and a new name: {duplicates}")
        _check_tensors(path, file, stored, expected)
        params = {}
        for param, name in names.items():
            array = from_diffusers(name, file.get_tensor(stored[name]))
            params[param] = jnp.asarray(array, jnp.float32)
    if flip_sin_to_cos:
        kernel = params["temb1", "kernel"]  # [embedding, out]
        params["temb1", "kernel"] = jnp.roll(kernel, len(kernel) // 2, axis=0)
    return traverse_util.unflatten_dict(params)


def _check_tensors(path, file, stored, expected):
    """Raises a UserError that names missing, unexpected and mismatched tensors of a file."""
    problems = {
        "lacks": expected.keys() - stored.keys(),
        "has, and should not,": stored.keys() - expected.keys(),
        "has of another shape or type": set(),
    }
    for name in expected.keys() & stored.keys():
        tensor = file.get_slice(stored[name])
        shape, kind = tuple(tensor.get_shape()), tensor.get_dtype()
        if shape != expected[name] or kind not in ("F32", "F16", "BF16"):
            text = f"{name} {kind} {list(shape)}, not F32 {list(expected[name])}"
            problems["has of another shape or type"].add(text)
    texts = [f"{what} {_listed(names)}" for what, names in problems.items() if names]
    if texts:
        raise UserError(f"{path}: {'; '.join(texts)}")


def _listed(names, most=4):
    """The first few names, and the number of the others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(sorted(names)[:most]) + more


def _new_name(name):
    """A tensor's name in today's diffusers."""
    modules = name.split(".")
    if "attentions" in modules and modules[-2] in OLD_NAMES:
        modules[-2] = OLD_NAMES[modules[-2]]
    return ".".join(modules)


def _open(path):
    """Opens a .safetensors file; a pickle is never read."""
    if not path.is_file():
        pickle = path.with_suffix(".bin")
        if pickle.exists():
            folder = str(path.parent)
            raise UserError(
                f"{pickle}: is a pickle, which is not read; convert it to safetensors with "
                f"diffusers: UNet2DModel.from_pretrained({folder!r}).save_pretrained({folder!r})"
            )
        raise UserError(f"{path}: no such file")
    try:
        return safetensors.safe_open(path, framework="np")
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: is not a complete safetensors file ({one_line(error)})") from None


def _check_pipeline(folder):
    """Raises a UserError for a pipeline with other components than a network and a scheduler."""
    index = folder / "model_index.json"
    if os.path.isfile(index):
        components = {name for name in run_files.read_json(index) if not name.startswith("_")}
        if others := components - {"unet", "scheduler"}:
            names = ", ".join(sorted(others))
            raise UserError(f"{index}: has {names}; only unet and scheduler are supported")


def _find(folder, component, name):
    """The path of the file `name` of a pipeline's component, in either layout, or None."""
    folders = [folder / component, folder]
    if folder.absolute().name == "unet":
        folders.append(folder.absolute().parent / component)
    paths = (folder / name for folder in folders)
    return next((path for path in paths if os.path.isfile(path)), None)  # no error for a long name


def _are_sizes(value):
    return isinstance(value, list | tuple) and value and all(map(is_size, value))


def _attends(types, plain):
    """Whether each block has attention, a list; None if a block has another type."""
    if not isinstance(types, list | tuple):
        return None
    kinds = {plain: False, f"Attn{plain}": True}
    attends = [kinds.get(str(name).removeprefix("UNetRes")) for name in types]
    return None if None in attends else attends
