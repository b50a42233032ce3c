"""MNIST, 28×28 gray, with the paper's schedule and a network small enough for a CPU.

    python main.py --config=configs/mnist.py

On 2 CPU cores: 120 to 128 images/s when nothing else runs (70 minutes beside other work); held-out
loss 0.0235 after 5.3 epochs.
"""

from ddpm_jax.configs import default_config


def get_config():
    """Ho et al.'s schedule, but 32 channels instead of 128."""
    config = default_config()
    config.data.update(name="mnist", image_size=(28, 28), channels=1)
    config.model.update(
        channels=32,
        channel_mults=(1, 2, 2),
        num_res_blocks=1,
        attention_down=(2,),
        attention_up=(2,),
        norm_groups=8,
        dropout=0.0,
    )
    config.optim.update(learning_rate=1e-3, warmup_steps=200, decay="cosine", ema_decay=0.995)
    config.train.update(
        num_steps=2500,
        eval_every=250,
        sample_every=1250,
        score_every=500,
        checkpoint_every=250,
        keep_every=0,
    )
    return config
