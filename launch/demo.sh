#!/usr/bin/env bash
# From a fresh machine to a trained video classifier: installs, makes a dataset of real mp4 files, trains, evaluates,
# and leaves a picture. About five minutes on two CPU cores.
#   bash launch/demo.sh [FOLDER, default runs/demo]
set -euo pipefail
folder=$(realpath -m "${1:-$(dirname "$0")/../runs/demo}")
cd "$(dirname "$0")/.."
source launch/environment.sh

environment .venv requirements.txt
.venv/bin/mevit prepare moving_shapes --data_dir="$folder/data"
.venv/bin/python main.py --config=configs/demo.py --workdir="$folder/run" --config.data.data_dir="$folder/data"

echo
echo "Look at  $folder/run/evaluation/validation-1x1/report.html      curves, classes, mistakes: open it in a browser"
echo "         $folder/run/evaluation/validation-1x1/videos.png       what it says of some videos"
echo "         $folder/run/evaluation/validation-1x1/results.json     and of all"
echo "         .venv/bin/python -m tensorboard.main --logdir=$folder/run/tensorboard   (pip install tensorboard)"
