"""Runs the command line interface: `python -m mevit_jax COMMAND`."""

from mevit_jax.cli.main import main

if __name__ == '__main__':
  main()
