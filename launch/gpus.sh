#!/usr/bin/env bash
# Trains on all NVIDIA GPUs of this machine in one process; installs into .venv-gpu, once.
#   bash launch/gpus.sh --config=configs/k400.py --workdir=runs/k400 [other flags of main.py]
#   bash launch/gpus.sh --dry_run ...    prints the commands
# CUDA_VISIBLE_DEVICES=0,1 uses two of them. The same command resumes a stopped run. See docs/launch/gpus.md.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh

case ${1:-} in
  '' | --help | -h) usage; exit ;;
  --dry_run) dry_run=1; shift ;;
esac
run environment .venv-gpu gpu
run .venv-gpu/bin/python -c 'import jax; assert jax.default_backend() == "gpu", "jax finds no GPU: check nvidia-smi"'
run .venv-gpu/bin/python main.py "$@"
