#!/bin/sh
# Make an environment in which the peers run, beside the project's own, which it reads and does not change:
#
#     sh benchmarks/peers/setup.sh DIR [PYTHON]
#     DIR/bin/python benchmarks/peers/aimet_svd.py --help
#
# PYTHON is that of the project's environment (default: .venv/bin/python); its torch, numpy and so on are used as they
# are. AIMET, torchvision and torchao come without their requirements, which would bring another torch; of AIMET's requirements
# only those are installed that its compression imports.
set -eu
there=$1
root=$(cd "$(dirname "$0")/../.." && pwd)
project=${2:-$root/.venv/bin/python}
"$project" -m venv "$there"
packages=$("$project" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
own=$("$there/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
printf '%s\n' "$packages" > "$own/project.pth"
"$there/bin/pip" install --quiet --no-deps aimet-torch==2.42.0 tensorly-torch==0.5.0 torchvision==0.28.0 torchao==0.18.0
"$there/bin/pip" install --quiet --constraint "$root/constraints.txt" \
    bokeh holoviews hvplot cvxpy osqp tensorboard tqdm networkx jsonschema psutil
"$there/bin/python" - <<'PYTHON'
import sys

import torch

print(f"python {sys.version.split()[0]}, torch {torch.__version__} from {torch.__file__}")
PYTHON
