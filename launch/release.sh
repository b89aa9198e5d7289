#!/usr/bin/env bash
# Builds dist/mevit_jax-VERSION.tar.gz and .whl, and tests the wheel: installed into an empty environment and used from an
# empty folder, it prepares a dataset, trains some steps, evaluates and predicts. Some minutes.
#   bash launch/release.sh
# The version is that of mevit_jax/__init__.py, and CHANGELOG.md must have a section for it. Then, to release:
#   git tag vVERSION && git push origin vVERSION
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
[[ ${1:-} == --help || ${1:-} == -h ]] && { usage; exit; }

version=$(sed -n "s/^__version__ = '\(.*\)'/\1/p" mevit_jax/__init__.py)
grep -q "^## $version" CHANGELOG.md || { echo "error: CHANGELOG.md has no section ## $version" >&2; exit 1; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

echo "building $version"
"${PYTHON:-python3}" -m venv "$folder/build"
"$folder/build/bin/python" -m pip install --quiet --disable-pip-version-check build
rm -rf "dist/mevit_jax-$version"*
"$folder/build/bin/python" -m build --outdir dist . &> "$folder/build.log" || { cat "$folder/build.log" >&2; exit 1; }
wheel=$(realpath "dist/mevit_jax-$version"-*.whl)  # built from the sdist

echo "installing $wheel"
"${PYTHON:-python3}" -m venv "$folder/environment"
"$folder/environment/bin/python" -m pip install --quiet --disable-pip-version-check "$wheel"
mkdir "$folder/empty"
cd "$folder/empty"
PATH="$folder/environment/bin:$PATH"
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
unset PYTHONPATH

flags=(--config=demo --workdir=run --config.data.data_dir=data)
mevit prepare moving_shapes --data_dir=data --train_videos=128 --validation_videos=32
mevit train "${flags[@]}" --config.training.epochs=2
mevit evaluate "${flags[@]}" --config.evaluation.views=2x1
python - << 'EOF'
from pathlib import Path
import numpy as np
import mevit_jax
from mevit_jax.datasets.builders import moving_shapes
assert Path(mevit_jax.__file__).with_name('py.typed').exists()
frames = moving_shapes.render('grows', moving_shapes.draw('size', np.random.default_rng(0)))
Path('video.mp4').write_bytes(moving_shapes.encode(frames))
EOF
mevit predict video.mp4 --workdir=run
for result in run/evaluation/validation-1x1/report.html run/evaluation/validation-2x1/results.json; do
  [[ -s $result ]] || { echo "error: the installed package wrote no $result" >&2; exit 1; }
done
echo "built and tested: dist/mevit_jax-$version.tar.gz, ${wheel##*/}"
