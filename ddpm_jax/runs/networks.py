"""Import and export of the config.json of diffusers' UNet2DModel.

Its levels are blocks with names; ours are numbered, and each field of the config lists the levels
that have something. Level 0 has the highest resolution, on both paths.
"""

from ddpm_jax import checks, configs
from ddpm_jax.core import diffusion
from ddpm_jax.errors import UserError
from ddpm_jax.runs.schedulers import VERSION, is_size, json_text

# The fields of a UNet2DModel, with diffusers' defaults.
DEFAULTS = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,  # the cosines first
    "down_block_types": ("DownBlock2D", *3 * ["AttnDownBlock2D"]),
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": (*3 * ["AttnUpBlock2D"], "UpBlock2D"),
    "block_out_channels": (224, 448, 672, 896),
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",  # of the blocks with attention
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,  # of an embedding that we do not have
}
# What diffusers' EMAModel adds to the config of a network that it averaged.
OF_EMA = (
    "decay",
    "inv_gamma",
    "min_decay",
    "optimization_step",
    "power",
    "update_after_step",
    "use_ema_warmup",
)
# Those that must have one of these values; act_fn has two names for one function.
ALLOWED = {
    "_class_name": ("UNet2DModel",),
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "flip_sin_to_cos": (False, True),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "downsample_padding": (0, 1),  # 0 is the padding of (0, 1)
    "downsample_type": ("conv", "resnet", None),  # null is conv
    "upsample_type": ("conv", "resnet", None),
    "act_fn": ("silu", "swish"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "add_attention": (False, True),
    "class_embed_type": (None,),
}
# Blocks of each path: whether a residual block leads to the next level. None: the block has
# attention, and downsample_type and upsample_type say it.
BLOCKS = {
    "down": {"DownBlock2D": False, "ResnetDownsampleBlock2D": True, "AttnDownBlock2D": None},
    "up": {"UpBlock2D": False, "ResnetUpsampleBlock2D": True, "AttnUpBlock2D": None},
}
# What diffusers' other blocks are, by what their names contain.
OTHER_BLOCKS = {
    "Skip": "a block with FIR filters and an image pyramid, of score SDE's networks",
    "CrossAttn": "attends to a text or another condition, as in a UNet2DConditionModel",
    "Encoder": "a block of an autoencoder",
    "Decoder": "a block of an autoencoder",
    "KDown": "a block of k-diffusion's upscaler",
    "KUp": "a block of k-diffusion's upscaler",
}


def network_fields(network, origin, image_size=None, null_class=False, num_classes=0):
    """Converts a UNet2DModel's config to fields of our config.

    Args:
      network: the content of its config.json.
      origin: the file, for errors.
      image_size: (H, W), for a file without sample_size.
      null_class: whether the last of its classes, if it has any, is "no class".
      num_classes: of a network whose further input channels are a label's embedding.

    Returns:
      {"section.field": value}.

    Raises:
      UserError: that names the first field that our U-Net does not support.
    """
    fields = {"_class_name": None, **DEFAULTS, **network}
    if fields["sample_size"] is None:
        fields["sample_size"] = image_size
    elif is_size(fields["sample_size"]):
        fields["sample_size"] = 2 * [fields["sample_size"]]
    _check_network(fields, origin, num_classes)

    label_channels = _label_channels(fields)
    found = {
        "data.image_size": tuple(fields["sample_size"]),
        "data.channels": fields["in_channels"] - label_channels,
        "data.num_classes": 0,
        "model.kind": "unet",
        "model.channels": fields["block_out_channels"][0],
        "model.num_res_blocks": fields["layers_per_block"],
        "model.norm_groups": fields["norm_num_groups"],
        "model.norm_eps": float(fields["norm_eps"]),
        "model.freq_shift": fields["freq_shift"],
        "model.symmetric_padding": fields["downsample_padding"] == 1,
        "model.scale_shift": fields["resnet_time_scale_shift"] == "scale_shift",
        **_level_fields(fields),
        **_attention_fields(fields),
    }
    classes = num_classes + null_class if label_channels else fields["num_class_embeds"]
    if classes is not None:
        found |= {"data.num_classes": classes - null_class, "model.null_class": null_class}
        found |= {} if null_class else {"train.label_dropout": 0.0}
        found["model.label_channels"] = label_channels
    if fields["out_channels"] > fields["in_channels"]:
        found |= {"diffusion.variance": "learned_range", "diffusion.loss": "hybrid"}
    if "dropout" in network:  # older files have none; it matters only in training
        found["model.dropout"] = float(network["dropout"])
    return found


def _level_fields(fields):
    """The fields of our config that say what each level has."""
    widths, levels = fields["block_out_channels"], len(fields["block_out_channels"])
    mults = tuple(width // widths[0] for width in widths)
    whole = all(width % widths[0] == 0 for width in widths)
    found = {"model.channel_mults": mults} if whole else {}
    found["model.widths"] = () if whole else tuple(widths)
    for path in ("down", "up"):
        kinds = _block_kinds(fields, path)
        by_attention = fields[f"{path}sample_type"] == "resnet"
        resblocks = [by_attention if kind is None else kind for kind in kinds]
        # A block's layer that leads to the next level belongs to the lower one here.
        below = resblocks[:-1] if path == "down" else resblocks[1:]
        found[f"model.attention_{path}"] = tuple(i for i in range(levels) if kinds[i] is None)
        found[f"model.resblock_{path}"] = tuple(i for i, block in enumerate(below, 1) if block)
    return found


def _attention_fields(fields):
    """The fields of our config that say what each attention is; one head, if it can be one."""
    size, scale_shift = fields["attention_head_dim"], fields["resnet_time_scale_shift"]
    one_head = size is None or _attention_widths(fields) <= {size}
    return {
        "model.attention_middle": fields["add_attention"],
        "model.middle_norm": scale_shift == "default" or fields["attn_norm_num_groups"] is not None,
        "model.num_heads": 1,
        "model.head_channels": 0 if one_head else size,
    }


def _attention_widths(fields):
    """The widths at which a UNet2DModel has attention, a set."""
    widths = fields["block_out_channels"]
    kinds = _block_kinds(fields, "down"), _block_kinds(fields, "up")
    found = {width for width, *of_paths in zip(widths, *kinds, strict=True) if None in of_paths}
    return found | ({widths[-1]} if fields["add_attention"] else set())


def _label_channels(fields):
    """The channels that a network takes besides the image's."""
    return max(fields["in_channels"] - fields["out_channels"], 0)


def _check_network(fields, origin, num_classes):
    """Raises a UserError that names the first field of a UNet2DModel that is not supported."""

    def require(fits, name, allowed):
        if not fits:
            raise UserError(f"{origin}: {name}={json_text(fields[name])}: {allowed}")

    for name, values in ALLOWED.items():
        same_type = isinstance(fields[name], bool) == isinstance(values[0], bool)  # True == 1
        allowed = f"must be {' or '.join(map(json_text, values))}"
        require(same_type and fields[name] in values, name, allowed)
    for name in sorted(fields):
        supported = name in (*DEFAULTS, *OF_EMA) or name.startswith("_") or fields[name] is None
        require(supported, name, "is not supported by our U-Net")
    widths, groups = fields["block_out_channels"], fields["norm_num_groups"]
    for name, ours in (("layers_per_block", "num_res_blocks"), ("norm_num_groups", "widths")):
        most = checks.LARGEST[f"model.{ours}"]
        fits = is_size(fields[name]) and fields[name] <= most
        require(fits, name, f"must be a whole number above 0, at most {most}")
    most, levels = checks.LARGEST["model.widths"], checks.MAX_LEVELS
    fits = _are_sizes(widths) and max(widths) <= most and len(widths) <= levels
    allowed = f"must be a list of whole numbers above 0, at most {levels}, each at most {most}"
    require(fits, "block_out_channels", allowed)
    fits = widths[0] % 2 == 0 and widths[0] >= 4
    require(fits, "block_out_channels", "the first must be even, at least 4")
    fits = all(width % groups == 0 for width in widths)
    require(fits, "norm_num_groups", f"must divide each of block_out_channels, {list(widths)}")
    eps, shift, dropout = fields["norm_eps"], fields["freq_shift"], fields["dropout"]
    require(_is_number(eps) and 0 < eps < 1, "norm_eps", "must lie in (0, 1)")
    fits = type(shift) is int and 0 <= shift < widths[0] // 2
    require(fits, "freq_shift", f"must be a whole number from 0 to {widths[0] // 2 - 1}")
    require(_is_number(dropout) and 0 <= dropout < 1, "dropout", "must lie in [0, 1)")

    _check_images(fields, require, num_classes)
    _check_blocks(fields, require)
    size, most = fields["attention_head_dim"], min(_attention_widths(fields), default=None)
    fits = size is None or (is_size(size) and (most is None or size <= most))
    allowed = "must be null or a whole number above 0"
    allowed += f", at most {most}, the least width with attention" if most else ""
    require(fits, "attention_head_dim", allowed)
    size = 4 * widths[0]
    require(fields["time_embedding_dim"] in (None, size), "time_embedding_dim", f"must be {size}")
    allowed = f"must be null or norm_num_groups={groups}"
    require(fields["attn_norm_num_groups"] in (None, groups), "attn_norm_num_groups", allowed)


def _check_images(fields, require, num_classes):
    """The part of _check_network for images, channels and classes."""
    size, classes = fields["sample_size"], fields["num_class_embeds"]
    factor = 2 ** (len(fields["block_out_channels"]) - 1)
    most = checks.LARGEST["data.image_size"]
    fits = _are_sizes(size) and len(size) == 2
    fits = fits and all(side % factor == 0 and side <= most for side in size)
    allowed = f"must be the images' height and width, multiples of {factor}, at most {most}"
    require(fits, "sample_size", f"{allowed} (or null, and at import --config.data.image_size=H,W)")
    for name in ("in_channels", "out_channels"):
        require(is_size(fields[name]), name, "must be a whole number above 0")
    extra = _label_channels(fields)
    channels, choices = fields["in_channels"] - extra, checks.CHOICES["data.channels"]
    name = "out_channels" if extra else "in_channels"
    require(channels in choices, name, f"choose from {', '.join(map(str, choices))}")
    allowed = f"must be in_channels={channels}, or twice as many, with a learned variance"
    require(fields["out_channels"] in (channels, 2 * channels), "out_channels", allowed)
    fits = not extra or (classes is None and num_classes > 1)
    allowed = f"{extra} more than out_channels can only be a label's: --config.data.num_classes=K"
    require(fits, "in_channels", allowed)
    fits = classes is None or (is_size(classes) and classes > 1)
    require(fits, "num_class_embeds", "must be null or a whole number above 1")


def _check_blocks(fields, require):
    """The part of _check_network for the blocks of the levels."""
    levels = len(fields["block_out_channels"])
    for path in ("down", "up"):
        name = f"{path}_block_types"
        types, known = fields[name], [*BLOCKS[path]]
        fits = isinstance(types, list | tuple) and len(types) == levels
        require(fits, name, f"must be a list of {levels}, as block_out_channels has")
        for kind in map(str, types):
            parts = [text for part, text in OTHER_BLOCKS.items() if part in kind]
            text = f"; {kind} is {parts[0]}" if parts else ""
            fits = kind.removeprefix("UNetRes") in known
            require(fits, name, f"choose from {', '.join(known)}{text}")


def diffusers_network(config):
    """The config.json of the UNet2DModel that equals a config's network."""
    model, size, widths = config.model, config.data.image_size, configs.widths(config.model)
    if widths[0] != model.channels:
        text = f"model.channels={model.channels}: diffusers needs the first level's, {widths[0]}"
        raise UserError(text)
    if not (model.middle_norm or model.scale_shift):
        raise UserError("model.middle_norm=False: diffusers needs model.scale_shift=True for it")
    if model.label_channels:
        text = "diffusers adds the label to the time embedding"
        raise UserError(f"model.label_channels={model.label_channels}: {text}")
    channels, num_classes = config.data.channels, config.data.num_classes
    learned = config.diffusion.variance in diffusion.LEARNED_VARIANCES
    return {
        "_class_name": "UNet2DModel",
        "_diffusers_version": VERSION,
        **DEFAULTS,
        "sample_size": size[0] if size[0] == size[1] else list(size),
        "in_channels": channels,
        "out_channels": 2 * channels if learned else channels,
        "freq_shift": model.freq_shift,
        "flip_sin_to_cos": False,
        "block_out_channels": list(widths),
        **_diffusers_blocks(model),
        "layers_per_block": model.num_res_blocks,
        "downsample_padding": int(model.symmetric_padding),
        "dropout": model.dropout,
        "attention_head_dim": _head_channels(model),
        "norm_num_groups": model.norm_groups,
        "attn_norm_num_groups": (
            model.norm_groups if model.scale_shift and model.middle_norm else None
        ),
        "norm_eps": model.norm_eps,
        "resnet_time_scale_shift": "scale_shift" if model.scale_shift else "default",
        "add_attention": model.attention_middle,
        "num_class_embeds": num_classes + model.null_class if num_classes else None,
    }


def _diffusers_blocks(model):
    """The inverse of _level_fields."""
    fields, levels = {}, range(len(configs.widths(model)))
    for path in ("down", "up"):
        attends, resblocks = model[f"attention_{path}"], model[f"resblock_{path}"]
        # What leads to the next level belongs to the higher level's block on the way down, and to
        # the lower level's on the way up.
        by_block = {level - (path == "down"): level in resblocks for level in levels[1:]}
        of_attention = {by_block[level] for level in attends if level in by_block}
        if len(of_attention) > 1:
            raise UserError(
                f"model.resblock_{path}={resblocks!r}: diffusers needs all or none of the levels "
                f"of model.attention_{path}={attends!r}"
            )
        names = {value: name for name, value in BLOCKS[path].items()}
        blocks = [names[None if i in attends else by_block.get(i, False)] for i in levels]
        fields[f"{path}_block_types"] = blocks if path == "down" else blocks[::-1]
        fields[f"{path}sample_type"] = "resnet" if True in of_attention else "conv"
    return fields


def _head_channels(model):
    """diffusers' attention_head_dim, channels a head; None is one head."""
    if model.head_channels or model.num_heads == 1:
        return model.head_channels or None
    sizes = {width // model.num_heads for width in checks.attention_widths(model)}
    if len(sizes) > 1:
        text = f"diffusers needs the same channels a head; they have {sorted(sizes)}"
        raise UserError(f"model.num_heads={model.num_heads}: {text}")
    return min(sizes, default=None)


def _are_sizes(value):
    return isinstance(value, list | tuple) and value and all(map(is_size, value))


def _is_number(value):
    return isinstance(value, float | int) and not isinstance(value, bool)


def _block_kinds(fields, path):
    """The values of BLOCKS for the levels of a path, a list; level 0 first."""
    types = fields[f"{path}_block_types"]
    kinds = [BLOCKS[path][name.removeprefix("UNetRes")] for name in types]
    return kinds if path == "down" else kinds[::-1]
