#!/usr/bin/env bash
# Trains on several nodes under SLURM, with one process per node that uses all its GPUs. From the repository's root:
#   sbatch --nodes=4 [sbatch options] launch/slurm.sh --config=configs/k400.py --workdir=/shared/k400 [main.py flags]
#   bash launch/slurm.sh --dry_run ...    prints the commands
# Three minutes before the time limit, and on preemption, it saves a checkpoint and requeues the job; scancel ends it.
# The repository, the workdir and the data must be on a file system that all nodes share. See docs/launch/slurm.md.
#SBATCH --job-name=mevit
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@180
#SBATCH --open-mode=append
#SBATCH --output=mevit-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"  # sbatch runs a copy of $0 in another folder
[[ -f launch/environment.sh ]] || { echo 'error: run sbatch in the root of the repository' >&2; exit 1; }
source launch/environment.sh

case ${1:-} in
  --help | -h) usage; exit ;;
  --dry_run) dry_run=1; shift ;;
  *) [[ ${SLURM_JOB_ID:-} ]] || { usage; exit 1; } ;;
esac
run environment .venv-gpu gpu

requeue=
# shellcheck disable=SC2329 # the trap calls it
stop() {  # main.py saves a checkpoint on SIGTERM
  requeue=1
  scancel --signal=TERM "$SLURM_JOB_ID"
}
trap stop USR1
run srun --kill-on-bad-exit=1 --label .venv-gpu/bin/python main.py "$@" &
status=0
wait $! || status=$?
if [[ $requeue ]]; then
  status=0
  wait $! || status=$?  # the signal interrupted the first wait
  ((status == 0)) || scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
