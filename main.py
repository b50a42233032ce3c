"""`python main.py --config=configs/cifar10.py`: the command line, see ddpm_jax/cli.py."""

from ddpm_jax import cli

if __name__ == "__main__":
    cli.main()
