#!/usr/bin/env bash
# Creates a TPU slice on Google Cloud, trains on it, and deletes it. NAME is any name for the slice.
#   bash launch/tpu_pod.sh create  NAME --zone=ZONE --type=v6e-64 [--spot]    requests it, and waits until it is ready
#   bash launch/tpu_pod.sh install NAME --zone=ZONE [--bucket=BUCKET]         copies this repository, mounts ~/BUCKET
#   bash launch/tpu_pod.sh run     NAME --zone=ZONE -- --config=configs/k400.py --workdir=~/BUCKET/k400 [main.py flags]
#   bash launch/tpu_pod.sh follow  NAME --zone=ZONE [--worker=0]              shows a host's log; Ctrl-C leaves the run going
#   bash launch/tpu_pod.sh stop    NAME --zone=ZONE                           saves a checkpoint and ends the run
#   bash launch/tpu_pod.sh delete  NAME --zone=ZONE                           deletes the slice, which ends billing
# All take --project=PROJECT, and --dry_run, which prints the commands. After a preemption: delete, create, install and
# run as before; the run resumes. See docs/launch/tpu_pod.md.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh

fail() {
  echo "error: $1" >&2
  exit 1
}

project='' zone='' type='' bucket='' worker=0 spot=''
command=${1:---help}
[[ $command == --help || $command == -h ]] && { usage; exit; }
name=${2:-}
[[ $name && $name != -* ]] || fail "give a NAME: bash launch/tpu_pod.sh $command NAME --zone=ZONE"
shift 2
while (($#)); do
  case $1 in
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --bucket=*) bucket=${1#*=} ;;
    --worker=*) worker=${1#*=} ;;
    --spot) spot=1 ;;
    --dry_run) dry_run=1 ;;
    --) shift; break ;;
    *) fail "unknown option $1: see bash launch/tpu_pod.sh --help" ;;
  esac
  shift
done
[[ $zone ]] || fail 'give --zone=ZONE, a zone with this TPU type'
common=(--zone="$zone" ${project:+--project="$project"})

on() {  # on WORKER COMMAND: runs a command by ssh; WORKER is an index or all
  run gcloud compute tpus tpu-vm ssh "$name" "${common[@]}" --worker="$1" --command="$2"
}

create() {
  local version
  case $type in
    v6e-*) version=v2-alpha-tpuv6e ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v4-*) version=tpu-ubuntu2204-base ;;
    *) fail "give --type=: v4-N, v5p-N, v5litepod-N or v6e-N, not '$type'" ;;
  esac
  run gcloud compute tpus queued-resources create "$name" "${common[@]}" --node-id="$name" \
    --accelerator-type="$type" --runtime-version="$version" ${spot:+--spot}
  local state
  until [[ ${dry_run:-} ]]; do
    state=$(gcloud compute tpus queued-resources describe "$name" "${common[@]}" --format='value(state.state)')
    echo "$(date +%T) $state"
    case $state in
      ACTIVE) break ;;
      FAILED | SUSPENDED) fail "$name is $state: delete and create it again" ;;
    esac
    sleep 20
  done
}

install() {
  local archive=/tmp/mevit_jax.tar.gz
  run git archive --format=tar.gz --output="$archive" HEAD
  run gcloud compute tpus tpu-vm scp "$archive" "$name:$archive" "${common[@]}" --worker=all
  on all "set -e
    command -v python3.12 > /dev/null || {
      sudo add-apt-repository --yes ppa:deadsnakes/ppa
      sudo apt-get update --quiet && sudo apt-get install --yes --quiet python3.12-venv
    }
    mkdir -p mevit_jax && tar -xzf $archive -C mevit_jax && cd mevit_jax
    source launch/environment.sh
    PYTHON=python3.12 environment .venv tpu"
  [[ ! $bucket ]] || on all "set -e
    command -v gcsfuse > /dev/null || {
      key=/usr/share/keyrings/cloud.google.asc packages=https://packages.cloud.google.com/apt
      curl -fsS \$packages/doc/apt-key.gpg | sudo tee \$key > /dev/null
      echo \"deb [signed-by=\$key] \$packages gcsfuse-jammy main\" | sudo tee /etc/apt/sources.list.d/gcsfuse.list
      sudo apt-get update --quiet && sudo apt-get install --yes --quiet gcsfuse
    }
    mkdir -p ~/$bucket && { mountpoint -q ~/$bucket || gcsfuse --implicit-dirs $bucket ~/$bucket; }"
}

start() {
  (($#)) || fail 'give the flags of main.py after --'
  local flags
  printf -v flags '%q ' "$@"
  on all "cd mevit_jax || exit
    ! kill -0 \$(cat run.pid 2> /dev/null) 2> /dev/null || { echo 'error: a run is in progress: use follow or stop' >&2; exit 1; }
    nohup setsid .venv/bin/python -u main.py $flags > run.log 2>&1 < /dev/null & echo \$! > run.pid"
}

case $command in
  create) create ;;
  install) install ;;
  run) start "$@" ;;
  follow) on "$worker" 'tail -n +1 -F mevit_jax/run.log' ;;
  stop) on all "kill -TERM \$(cat mevit_jax/run.pid)" ;;
  delete) run gcloud compute tpus queued-resources delete "$name" "${common[@]}" --force --quiet ;;
  *) fail "unknown command $command: see bash launch/tpu_pod.sh --help" ;;
esac
