"""A content-addressed cache of fits: the same weight, format and rank is fitted once per sweep, whoever asks.

The key is a hash of everything that a fit depends on, the code that computes it included. Files are written beside
their place and renamed, so several processes can use one directory; a file that is damaged is fitted again.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autorank.formats import Factors, Format
from autorank.solvers import whitening
from autorank.solvers.curvature import predicted_loss_increase
from autorank.solvers.kept import DIGESTS, digest, digest_all
from autorank.solvers.whitening import LayerStats
from autorank.trouble import tell
from autorank.types import Choice, Errors, LayerSpec, canonical_json

LAYOUT = 4
"""Raised when what a cache file holds changes."""


class FitCache:
    """Fits that were made before.

    Parameters
    ----------
    directory : Path or None
        Where the files are; created when the first fit is written. None keeps the fits in memory.
    fetch : callable, optional
        Brings a file from where the fits were made ahead, if it is there, to its place in `directory`.
    """

    def __init__(self, directory: Path | None = None, fetch: Callable[[Path], object] | None = None) -> None:
        self.directory = directory
        self._fetch = fetch or (lambda path: None)
        self._memory: dict[str, tuple[Factors, dict[str, Any]]] = {}

    def get_or_fit(
        self, fmt: Format, weight: Tensor, spec: LayerSpec, choice: Choice, stats: LayerStats | None, seed: int
    ) -> tuple[Factors, dict[str, Any]]:
        """Return the factors of a weight, fitted now or earlier, bit-equal either way.

        Parameters
        ----------
        fmt : Format
        weight : Tensor, shape (T, S/groups, K1, ..., Kd)
        spec : LayerSpec
        choice : Choice
        stats : LayerStats or None
        seed : int

        Returns
        -------
        factors : dict of Tensor
            float32, on the device of `weight`, the caller's own.
        info : dict
            ``weight_error`` (‖W − Ŵ‖ / ‖W‖), ``output_error`` (relative, None without `stats`), ``loss_increase``
            (½·tr(GΔΣΔᵀ), None without gradients), ``sensitivity`` (of the weight to noise on the factors) and ``hit``.

        Raises
        ------
        FormatError
            The fit is not possible.
        """
        key = self._key(fmt, weight, spec, choice, stats, seed)
        found = self._read(key)
        if found is not None:
            factors, info = found
            return {k: v.to(weight.device, copy=True) for k, v in factors.items()}, {**info, "hit": True}
        factors = fmt.fit(weight, spec, choice.rank, choice.options, stats, seed)
        info = _errors(fmt, weight, spec, choice, factors, stats)
        self._write(key, {k: v.detach().cpu().contiguous().clone() for k, v in factors.items()}, info)
        return factors, {**info, "hit": False}

    def holds(
        self, fmt: Format, weight: Tensor, spec: LayerSpec, choice: Choice, stats: LayerStats | None, seed: int
    ) -> bool:
        """Say whether `get_or_fit` will find a fit, unless its file is damaged; arguments as there."""
        key = self._key(fmt, weight, spec, choice, stats, seed)
        return key in self._memory or (self.directory is not None and self._path(self.directory, key).is_file())

    def _key(
        self, fmt: Format, weight: Tensor, spec: LayerSpec, choice: Choice, stats: LayerStats | None, seed: int
    ) -> str:
        what = {
            "layout": LAYOUT,
            "code": _code(type(fmt).__module__),
            "torch": torch.__version__,
            "device": weight.device.type,  # a GPU rounds otherwise, and an outcome must not depend on who was first
            "weight": digest(weight),
            "stats": None if stats is None else _used(stats),
            "spec": asdict(replace(spec, name="", calls=(), bias=False)),
            "format": choice.format,
            "rank": choice.rank,
            "options": choice.options,
            "seed": seed,
        }
        return hashlib.sha256(canonical_json(what).encode()).hexdigest()

    def _read(self, key: str) -> tuple[Factors, dict[str, Any]] | None:
        if key in self._memory or self.directory is None:
            return self._memory.get(key)
        from safetensors import SafetensorError, safe_open

        path = self._path(self.directory, key)
        self._fetch(path)
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                factors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            # Safetensors notices a missing end, not a changed byte.
            if metadata["key"] != key or metadata["digest"] != digest_all(factors, metadata["info"], metadata["order"]):
                raise ValueError("its content is not what was written")
            info, order = json.loads(metadata["info"]), json.loads(metadata["order"])
            known = {"weight_error", "output_error", "loss_increase", "sensitivity"} == set(info)
            if not known:
                raise ValueError("it says something else about a fit")
            return {name: factors[name] for name in order}, info
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError):
            tell(f"a damaged fit in {self.directory} is made again")
            return None

    def _write(self, key: str, factors: Factors, info: dict[str, Any]) -> None:
        if self.directory is None:
            self._memory[key] = factors, info
            return
        from safetensors.torch import save

        metadata = {"key": key, "info": json.dumps(info), "order": json.dumps(list(factors))}
        metadata["digest"] = digest_all(factors, metadata["info"], metadata["order"])
        part = ""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            handle, part = tempfile.mkstemp(dir=self.directory, prefix=f"{key[:16]}.", suffix=".part")
            with os.fdopen(handle, "wb") as file:
                file.write(save(factors, metadata))
            os.replace(part, self._path(self.directory, key))
        except OSError as error:
            # The fit itself is fine; a cache that cannot be written only costs time.
            if part:
                Path(part).unlink(missing_ok=True)
            tell(f"a fit could not be cached in {self.directory}: {error.strerror or error}")

    @staticmethod
    def _path(directory: Path, key: str) -> Path:
        return directory / f"{key}.safetensors"


def _used(stats: LayerStats) -> list[object]:
    """Return what identifies the statistics; the errors depend on all of them, whatever the fit looks at."""
    return [DIGESTS(stats.covariance), stats.factorised, None if stats.gradient is None else DIGESTS(stats.gradient)]


@lru_cache
def _code(module: str) -> str:
    """Return a hash of the source of all formats and solvers, and of the module that defines the format."""
    package = Path(__file__).parent
    files = {*package.glob("formats/*.py"), *package.glob("solvers/*.py")}
    own = getattr(sys.modules.get(module), "__file__", None)
    if own:
        files.add(Path(own))
    # Sorted by content, so that it does not matter where the package lies.
    return hashlib.sha256(
        "".join(sorted(hashlib.sha256(f.read_bytes()).hexdigest() for f in files)).encode()
    ).hexdigest()


def _errors(
    fmt: Format, weight: Tensor, spec: LayerSpec, choice: Choice, factors: Factors, stats: LayerStats | None
) -> dict[str, Any]:
    found = kernel_errors(weight, fmt.reconstruct(factors, spec, choice.rank, choice.options), stats)
    return {
        "weight_error": found.weight,
        "output_error": found.output,
        "loss_increase": found.loss,
        "sensitivity": fmt.sensitivity(factors, spec, choice.rank, choice.options),
    }


def kernel_errors(weight: Tensor, approx: Tensor, stats: LayerStats | None) -> Errors:
    """Return what a layer loses whose kernel `weight` becomes `approx`, both (T, S/groups, K1, ..., Kd)."""
    weight = weight.detach() if weight.device.type != "mps" else weight.detach().cpu()
    dense = weight.to(torch.float64)
    approx = approx.detach().to(dense)
    norm = torch.linalg.vector_norm(dense)
    error = torch.linalg.vector_norm(dense - approx)
    return Errors(
        float(error / norm) if norm > 0 else float(error),
        None if stats is None else whitening.output_error(dense, approx, stats),
        None if stats is None else predicted_loss_increase(dense, approx, stats),
    )
