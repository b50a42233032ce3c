"""The defaults of ddpm_jax/configs.py, for config files that import this module."""

from ddpm_jax.configs import default_config as get_config

__all__ = ["get_config"]
