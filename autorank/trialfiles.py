"""Where the weights with which trials ended are kept, and how they are written and read."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from torch import Tensor, nn

from autorank.errors import SweepError
from autorank.job import Job
from autorank.plan import build
from autorank.solvers.kept import digest_all
from autorank.trouble import tell
from autorank.types import Plan, TrialRecord

MODELS = "models"
_DIGEST = "autorank.digest"


def weights_file(directory: Path, trial: Job | TrialRecord) -> Path:
    """Return where the recovered weights of a trial are kept."""
    return directory / MODELS / f"{trial.key}.safetensors"


def carrier_file(directory: Path, trial: Job | TrialRecord) -> Path:
    """Return where the undecomposed weights of a pulled training are kept."""
    return directory / MODELS / f"{trial.key}-undecomposed.safetensors"


def load_weights(dense: nn.Module, plan: Plan, path: Path) -> nn.Module | None:
    """Return the recovered model of a trial on the dense model's device, or None when its weights are not kept."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_model

    if not path.is_file():
        return None
    model = build(dense, plan)
    device = next((str(p.device) for p in dense.parameters()), "cpu")
    try:
        with safe_open(str(path), framework="pt") as file:
            written = (file.metadata() or {}).get(_DIGEST)  # none in files of earlier versions
        load_model(model, str(path), device=device)
        # Safetensors notices a missing end, not a changed byte.
        if written is not None and written != digest_all(_state(model)):
            raise ValueError("its content is not what was written")
    except (SafetensorError, ValueError, RuntimeError, OSError):
        tell(f"{path}: damaged, so its trial's weights are made again")
        path.unlink(missing_ok=True)
        return None
    return model.eval()


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the weights atomically; tied weights are stored once.

    Raises
    ------
    SweepError
        The disk is full, or may not be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_model

    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_model(model, str(part), {_DIGEST: digest_all(_state(model))})
        part.replace(path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise SweepError(
            f"cannot write {path}: {getattr(error, 'strerror', None) or error}; what finished is saved: "
            f"once that is mended, `autorank resume {path.parents[1]}`"
        ) from None


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
