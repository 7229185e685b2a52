"""Where the weights with which trials ended are kept, and how they are written and read."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from autorank.plan import build
from autorank.schedule import Job
from autorank.types import Plan, TrialRecord

MODELS = "models"


def weights_file(directory: Path, trial: Job | TrialRecord) -> Path:
    """Return where the recovered weights of a trial are kept."""
    return directory / MODELS / f"{trial.key}.safetensors"


def carrier_file(directory: Path, trial: Job | TrialRecord) -> Path:
    """Return where the undecomposed weights of a pulled training are kept."""
    return directory / MODELS / f"{trial.key}-undecomposed.safetensors"


def load_weights(dense: nn.Module, plan: Plan, path: Path) -> nn.Module | None:
    """Return the recovered model of a trial on the dense model's device, or None when its weights are not kept."""
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    if not path.is_file():
        return None
    model = build(dense, plan)
    device = next((str(p.device) for p in dense.parameters()), "cpu")
    try:
        load_model(model, str(path), device=device)
    except (SafetensorError, RuntimeError, OSError):
        path.unlink(missing_ok=True)  # damaged: it is made again
        return None
    return model.eval()


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the weights atomically; tied weights are stored once."""
    from safetensors.torch import save_model

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    save_model(model, str(part))
    part.replace(path)
