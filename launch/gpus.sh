#!/usr/bin/env bash
# Trains on all NVIDIA GPUs of this machine, as one process; installs what that needs into .venv-gpu, once.
#   bash launch/gpus.sh --config=configs/k400.py --workdir=runs/k400 [main.py's other flags]
#   bash launch/gpus.sh --dry_run ...    prints the commands
# CUDA_VISIBLE_DEVICES=0,1 takes two of them. Stopped, it goes on with the same command. See docs/launch/gpus.md.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh

case ${1:-} in
  '' | --help | -h) usage; exit ;;
  --dry_run) dry_run=1; shift ;;
esac
run environment .venv-gpu requirements.txt requirements-gpu.txt
run .venv-gpu/bin/python -c 'import jax; assert jax.default_backend() == "gpu", "jax sees no GPU: is the driver there?"'
run .venv-gpu/bin/python main.py "$@"
