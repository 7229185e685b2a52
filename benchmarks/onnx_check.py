"""Export a point of a sweep and score it on test images twice: in this process, and by ONNX Runtime in another one.

python benchmarks/onnx_check.py SWEEP [--point NUMBER] [--images 1000] [--quick] [--json FILE]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from harness import ROOT, arguments, finish

import autorank
from autorank.sweep import task_of


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--point", help="default: the recommended point")
    parser.add_argument("--images", type=int, default=1000)
    args = parser.parse_args()
    images = min(args.images, 200) if args.quick else args.images
    sys.path.insert(0, str(ROOT))

    result = autorank.open_sweep(args.sweep)
    task = task_of(result.config)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        exported = result.export(folder / "export", point=args.point, say=print)
        batches = list(task.batches("test", limit=images))
        inputs = torch.cat([batch.inputs[0] for batch in batches])
        labels = torch.cat([batch.targets for batch in batches])
        np.save(folder / "inputs.npy", inputs.numpy())
        np.save(folder / "labels.npy", labels.numpy())
        model = autorank.load(exported.directory, task.model)
        with torch.inference_mode():
            here = 100 * (model(inputs).argmax(1) == labels).float().mean().item()
        command = [sys.executable, str(Path(__file__).with_name("onnx_score.py")), str(exported.directory)]
        command += ["--inputs", str(folder / "inputs.npy"), "--labels", str(folder / "labels.npy")]
        there = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        report = json.loads((exported.directory / "plan.json").read_text())
    print(f"{len(labels)} test images, plan of {len(report['layers'])} decomposed layers")
    print(f"PyTorch, this process:       {here:.2f} %")
    print(f"ONNX Runtime, another one:   {there['accuracy']:.2f} %   ({there})")
    print(f"difference:                  {abs(here - there['accuracy']):.2f} points")
    finish(args, {"torch": here, "onnxruntime": there, "images": len(labels)})


if __name__ == "__main__":
    main()
