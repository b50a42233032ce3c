"""Configs of diffusers' UNet2DModel: its defaults, a tiny one, and random ones that load."""

from hypothesis import strategies as st

# diffusers' own defaults, where torch_reference.make_network has Ho's.
DIFFUSERS = dict(
    norm_eps=1e-5,
    downsample_padding=1,
    freq_shift=0,
    flip_sin_to_cos=True,
    attention_head_dim=8,
)

DOWN = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
UP = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")


def network_json(**fields):
    """A small UNet2DModel's config.json."""
    return {
        "_class_name": "UNet2DModel",
        "sample_size": 8,
        "block_out_channels": [8, 16],
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        **fields,
    }


@st.composite
def configs_of_networks(draw):
    """The content of a config.json, every field that matters said."""
    levels = draw(st.integers(1, 4))
    widths = [4 * draw(st.integers(1, 6)) for _ in range(levels)]
    down, up = (
        draw(st.lists(st.sampled_from(kinds), min_size=levels, max_size=levels))
        for kinds in (DOWN, UP)
    )
    scale_shift = draw(st.booleans())
    channels = draw(st.sampled_from([1, 3, 4]))
    # A last block has no layer to another level, so that its kind says nothing but attention.
    down[-1] = down[-1] if "Attn" in down[-1] else "DownBlock2D"
    up[-1] = up[-1] if "Attn" in up[-1] else "UpBlock2D"
    leads = {"down": "Attn" in "".join(down[:-1]), "up": "Attn" in "".join(up[:-1])}
    return {
        "_class_name": "UNet2DModel",
        "sample_size": [2 ** (levels - 1) * draw(st.integers(1, 2)), 2 ** (levels + 1)],
        "in_channels": channels,
        "out_channels": channels * draw(st.sampled_from([1, 2])),
        "block_out_channels": widths,
        "down_block_types": down,
        "up_block_types": up,
        "layers_per_block": draw(st.integers(1, 2)),
        "norm_num_groups": draw(st.sampled_from([2, 4])),
        "norm_eps": draw(st.sampled_from([1e-5, 1e-6])),
        "freq_shift": draw(st.integers(0, 1)),
        "flip_sin_to_cos": False,
        "downsample_padding": draw(st.integers(0, 1)),
        # A type that no block uses is written as conv.
        "downsample_type": draw(st.sampled_from(["conv", "resnet"])) if leads["down"] else "conv",
        "upsample_type": draw(st.sampled_from(["conv", "resnet"])) if leads["up"] else "conv",
        "attention_head_dim": draw(st.sampled_from([2, 3, 4])),
        "resnet_time_scale_shift": "scale_shift" if scale_shift else "default",
        "add_attention": draw(st.booleans()),
        "num_class_embeds": draw(st.sampled_from([None, 3])),
    }
