"""The digits with their classes, for classifier-free guidance.

    python main.py --config=configs/digits_conditional.py
    python main.py --mode=sample --workdir=runs/digits_conditional --config.sample.label=7 \
        --config.sample.guidance=2

On 2 CPU cores: 123 s; held-out loss 0.130. A classifier of real digits recognizes the class of
0.964 of 2,000 samples, and of 0.998 with a guidance of 2 (benchmarks/samplers.py).
"""

from ddpm_jax.configs import named_config


def get_config():
    """digits.py, class-conditional; a column of samples for each class."""
    config = named_config("digits")
    config.data.num_classes = 10
    config.sample.num_samples = 60
    return config
