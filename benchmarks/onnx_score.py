"""Score an exported model.onnx in ONNX Runtime: a process of its own, with neither torch nor autorank imported.

    python benchmarks/onnx_score.py EXPORT_DIR --inputs images.npy --labels labels.npy --limit 1000

Inputs are .npy files, one per input of the model in its order, as the model takes them (normalised, channels first),
or one .npz file with an array ``labels`` and the inputs under the model's input names (or, for one input, any name).
Prints JSON: top-1 accuracy in percent, the number of images, milliseconds per image, versions.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Score an exported model.onnx in ONNX Runtime, without torch.")
    parser.add_argument("export", type=Path, help="exported directory, or a .onnx file")
    parser.add_argument("--inputs", type=Path, nargs="+", required=True, help=".npy per input, or one .npz")
    parser.add_argument("--labels", type=Path, help=".npy of whole numbers; not needed when the .npz holds 'labels'")
    parser.add_argument("--limit", type=int, help="score only the first so many examples")
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save", type=Path, help="write the first output of all examples to this .npy")
    options = parser.parse_args(arguments)
    try:
        result = score(options)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result))
    return 0


def score(options: argparse.Namespace) -> dict[str, Any]:
    """Run the model over the examples and return the figures."""
    file = options.export / "model.onnx" if options.export.is_dir() else options.export
    if not file.is_file():
        raise ValueError(f"{file} does not exist")
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options.threads
    session = onnxruntime.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    inputs, labels = read(options.inputs, options.labels, names)
    count = min(len(labels), options.limit or len(labels))
    # A model exported for a fixed batch size says so in its input's shape.
    fixed = session.get_inputs()[0].shape[0]
    batch = fixed if isinstance(fixed, int) else max(1, options.batch)
    right, seconds, kept = 0, 0.0, []
    for start in range(0, count, batch):
        index = np.arange(start, start + batch).clip(max=count - 1)
        feed = {name: np.ascontiguousarray(array[index]) for name, array in inputs.items()}
        begun = time.perf_counter()
        output = session.run(None, feed)[0]
        seconds += time.perf_counter() - begun
        real = min(batch, count - start)
        right += int((output[:real].argmax(1) == labels[start : start + real]).sum())
        kept.append(output[:real])
    if options.save is not None:
        np.save(options.save, np.concatenate(kept), allow_pickle=False)
    return {
        "file": file.name,
        "bytes": file.stat().st_size,
        "examples": count,
        "accuracy": round(100 * right / count, 4),
        "ms_per_example": round(1e3 * seconds / count, 4),
        "batch": batch,
        "threads": options.threads,
        "onnxruntime": onnxruntime.__version__,
        "torch_imported": "torch" in sys.modules,
        "autorank_imported": "autorank" in sys.modules,
    }


def read(files: Sequence[Path], labels: Path | None, names: Sequence[str]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return the inputs by name and the labels; pickled arrays are refused."""
    arrays: dict[str, np.ndarray]
    if files[0].suffix == ".npz":
        with np.load(files[0], allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    else:
        if len(files) != len(names):
            raise ValueError(
                f"the model has {len(names)} inputs ({', '.join(names)}), and {len(files)} files are given"
            )
        arrays = {
            name: np.load(file, mmap_mode="r", allow_pickle=False) for name, file in zip(names, files, strict=True)
        }
    if labels is not None:
        arrays["labels"] = np.load(labels, allow_pickle=False)
    if "labels" not in arrays:
        raise ValueError("no labels given: --labels labels.npy, or an array 'labels' in the .npz")
    wanted = arrays.pop("labels")
    if len(names) == 1 and len(arrays) == 1:
        arrays = {names[0]: next(iter(arrays.values()))}
    if missing := [name for name in names if name not in arrays]:
        raise ValueError(f"no array for the model's input {missing[0]!r}; there are {', '.join(arrays) or 'none'}")
    sizes = {len(wanted), *(len(arrays[name]) for name in names)}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(f"inputs and labels must have the same number of examples, at least one, not {sorted(sizes)}")
    return {name: arrays[name] for name in names}, wanted


if __name__ == "__main__":
    sys.exit(main())
