"""What the peers' scripts share: the import path, and operators that a torchvision beside CPU torch misses."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parents[1]


def prepare() -> Any:
    """Make `harness` and `autorank` importable, and torchvision too; the library returned has to be kept alive.

    A torchvision built for CUDA has its operators in a binary that CPU torch cannot load, and then fails at import
    because two of them have no schema. Nothing here calls them.
    """
    for path in (BENCHMARKS, BENCHMARKS.parent):
        if str(path) not in sys.path:
            sys.path.insert(0, str(path))
    # AIMET asks for one thread nowhere: torch takes what the environment says.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch

    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library
