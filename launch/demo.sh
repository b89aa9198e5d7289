#!/usr/bin/env bash
# From a fresh machine to a trained video classifier: installs the package, prepares a dataset of real mp4 files, trains,
# evaluates, and draws a picture. About five minutes on two CPU cores.
#   bash launch/demo.sh [FOLDER, default runs/demo]
set -euo pipefail
folder=$(realpath -m "${1:-$(dirname "$0")/../runs/demo}")
cd "$(dirname "$0")/.."
source launch/environment.sh

environment .venv
.venv/bin/mevit prepare moving_shapes --data_dir="$folder/data"
.venv/bin/mevit train --config=demo --workdir="$folder/run" --config.data.data_dir="$folder/data"

results="$folder/run/evaluation/validation-1x1"
echo
echo "$results/report.html      report with learning curves, confusion matrix and mistakes: open it in a browser"
echo "$results/videos.png       predictions for some videos"
echo "$results/results.json     accuracy and other metrics"
echo "TensorBoard: .venv/bin/python -m tensorboard.main --logdir=$folder/run/tensorboard   (pip install tensorboard)"
