"""What the benchmarks share: flags, the machine in words, where the real data lie, figures as JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def arguments(description: str) -> argparse.ArgumentParser:
    """Return a parser with the flags that every benchmark takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a minute at most, for a first look")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument(
        "--shared",
        type=Path,
        default=Path(os.environ.get("AUTORANK_SHARED", ROOT.parent / "shared")),
        help="folder with data/cifar10-jpeg and models/resnet20-cifar10jpeg.safetensors",
    )
    return parser


def cifar(shared: Path) -> dict[str, Any]:
    """Return the settings that name the CIFAR-10 data and the trained ResNet-20; exit in one line without them."""
    data = shared / "data" / "cifar10-jpeg"
    weights = shared / "models" / "resnet20-cifar10jpeg.safetensors"
    for path in (data, weights):
        if not path.exists():
            sys.exit(f"{path} is not there; give the folder with data/ and models/ by --shared")
    sys.path.insert(0, str(ROOT))
    return {
        "model": "python:benchmarks.models:resnet20",
        "weights": str(weights),
        "data": f"parquet:{data}",
        "data_args": {
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
            "augment": "flip+crop",
        },
    }


def machine() -> dict[str, str]:
    """Return the machine in words: processor, cores, system, torch and its device."""
    import torch

    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        name = platform.machine()
    return {
        "processor": name,
        "cores": str(os.cpu_count()),
        "system": platform.system(),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def finish(args: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Print the machine and write the figures where --json says."""
    result = {
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "figures": figures,
    }
    print("machine:", ", ".join(f"{key} {value}" for key, value in result["machine"].items()))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
