"""Input covariances of layers: collected by a forward run, reduced to the axes a format needs, and turned into roots.

With Σ = E[x xᵀ] over the input patches of a layer, the mean squared error of its output is tr(Δ Σ Δᵀ) for a weight
error Δ (T × S·K). Decomposing W·L with L Lᵀ = Σ instead of W, and undoing L on the factor that carries the input,
therefore minimises the error of the output; for a matrix factorisation that is the closed-form optimum.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from autorank.copying import model_copy
from autorank.errors import DataError, ModelError
from autorank.types import LayerSpec

DEFAULT_SHRINK = 1e-3
"""Share of the mean variance that is mixed into a covariance before its root is taken."""

MIN_SHRINK = 1e-6
"""What is mixed in even when no shrinkage is asked for, so that the root can be inverted."""

_CHUNK = 1 << 23  # elements of one im2col buffer: 32 MiB of float32


@dataclass(frozen=True)
class LayerStats:
    """Second moments of a layer's inputs.

    Attributes
    ----------
    covariance : Tensor, shape (groups, n, n), float32
        E[x xᵀ] of the input patches, n = S/groups · K, in the order (S, K1, ..., Kd) of ``weight.reshape(T, -1)``.
        When `factorised`, n = S/groups: the average over the kernel positions.
    count : int
        Number of patches that were averaged.
    factorised : bool
        The patch covariance was too large to keep and is approximated by covariance ⊗ identity over the kernel.
    """

    covariance: Tensor
    count: int
    factorised: bool = False

    def reduced(self, kernel: Sequence[int], axes: Sequence[int]) -> Tensor:
        """Return the covariance over the channels and some kernel axes, averaged over the other kernel axes.

        Parameters
        ----------
        kernel : sequence of int
            (K1, ..., Kd).
        axes : sequence of int
            The kernel axes to keep, ascending.

        Returns
        -------
        Tensor, shape (groups, m, m)
            m = S/groups times the sizes of the kept axes, in the order (S, axes).
        """
        if self.factorised:
            kept = math.prod(kernel[a] for a in axes)
            eye = torch.eye(kept, dtype=self.covariance.dtype, device=self.covariance.device)
            return torch.stack([torch.kron(block, eye) for block in self.covariance])
        groups, n, _ = self.covariance.shape
        channels = n // math.prod(kernel)
        full = self.covariance.reshape(groups, channels, *kernel, channels, *kernel)
        d = len(kernel)
        # From the last axis on, so that the earlier ones keep their places; `diagonal` appends the common axis.
        for axis in reversed(range(d)):
            if axis not in axes:
                rows = 2 + axis
                columns = rows + 1 + (full.ndim - 3) // 2
                full = full.diagonal(dim1=rows, dim2=columns).mean(-1)
        m = channels * math.prod(kernel[a] for a in axes)
        return full.reshape(groups, m, m)


def square_root(cov: Tensor, shrink: float = DEFAULT_SHRINK) -> Tensor:
    """Return the lower triangular L with L Lᵀ = (1 − ρ) C + ρ·tr(C)/n·I.

    Parameters
    ----------
    cov : Tensor, shape (..., n, n)
        Symmetric and positive semi-definite up to rounding.
    shrink : float
        ρ between 0 and 1; at least `MIN_SHRINK` is used, so that L can be inverted. A zero covariance gives the
        identity.

    Returns
    -------
    Tensor, shape (..., n, n), float64
    """
    rho = max(shrink, MIN_SHRINK)
    cov = cov.to(torch.float64)
    cov = (cov + cov.mT) / 2
    mean = cov.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    eye = torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device)
    dead = cov.abs().amax(dim=(-2, -1), keepdim=True) == 0
    shrunk = torch.where(dead, eye, (1 - rho) * cov / mean + rho * eye)
    root, info = torch.linalg.cholesky_ex(shrunk)
    if bool(info.any()):
        # Rounding of the float32 sums made it indefinite by more than ρ: lift the eigenvalues, keep a triangular root.
        values, vectors = torch.linalg.eigh(shrunk)
        _, upper = torch.linalg.qr((vectors * values.clamp_min(rho).sqrt()[..., None, :]).mT)
        sign = torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(upper.dtype)
        root = upper.mT * sign[..., None, :]
    return root * mean.sqrt()


def output_error(weight: Tensor, approx: Tensor, stats: LayerStats) -> float:
    """Return the relative root-mean-square error of a layer's output when `approx` replaces `weight`.

    Parameters
    ----------
    weight, approx : Tensor, shape (T, S/groups, K1, ..., Kd)
    stats : LayerStats

    Returns
    -------
    float
        sqrt(tr(Δ Σ Δᵀ) / tr(W Σ Wᵀ)); 0 when both outputs are zero.
    """
    cov = stats.covariance.to(device=weight.device, dtype=torch.float64)
    groups = cov.shape[0]
    dense = weight.detach().to(torch.float64).reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    delta = dense - approx.detach().to(torch.float64).reshape(dense.shape)

    def power(matrix: Tensor) -> Tensor:
        if stats.factorised:
            rows = matrix.transpose(2, 3).reshape(groups, -1, matrix.shape[2])
        else:
            rows = matrix.reshape(groups, matrix.shape[1], -1)
        return ((rows @ cov) * rows).sum()

    # A weight that its inputs never excite has no output to compare with: compare with a trace of white input instead.
    floor = 1e-12 * dense.square().sum() * cov.diagonal(dim1=-2, dim2=-1).mean()
    reference = torch.maximum(power(dense), floor)
    error = power(delta).clamp_min(0)
    return float((error / reference).sqrt()) if reference > 0 else 0.0


def _padding(spec: LayerSpec) -> list[int]:
    """Return the padding as `functional.pad` takes it: last axis first, before and after."""
    pads: list[int] = []
    for axis in reversed(range(len(spec.kernel))):
        if spec.padding == "same":
            total = spec.dilation[axis] * (spec.kernel[axis] - 1)
            pads += [total // 2, total - total // 2]
        elif spec.padding == "valid":
            pads += [0, 0]
        else:
            pads += [int(spec.padding[axis])] * 2
    return pads


def patches(x: Tensor, spec: LayerSpec) -> Tensor:
    """Return the input patches of a convolution (im2col) as a view where possible.

    Parameters
    ----------
    x : Tensor, shape (N, S, I1, ..., Id)
    spec : LayerSpec
        Stride, padding and its mode, dilation and kernel are honoured.

    Returns
    -------
    Tensor, shape (N, S, O1, ..., Od, K1, ..., Kd)
    """
    pads = _padding(spec)
    if any(pads):
        mode = "constant" if spec.padding_mode == "zeros" else spec.padding_mode
        x = functional.pad(x, pads, mode=mode)
    d = len(spec.kernel)
    for axis, (size, stride, dilation) in enumerate(zip(spec.kernel, spec.stride, spec.dilation, strict=True)):
        x = x.unfold(2 + axis, dilation * (size - 1) + 1, stride)
        x = x[..., ::dilation]
    assert x.ndim == 2 + 2 * d
    return x


class _Accumulator:
    """Sums x xᵀ of one layer in float64, a bounded block of patches at a time."""

    def __init__(self, spec: LayerSpec, factorised: bool) -> None:
        self.spec, self.factorised = spec, factorised
        self.total: Tensor | None = None
        self.count = 0

    def add(self, x: Tensor) -> None:
        x = x.detach().to(torch.float32)
        for block in self._blocks(x):
            # (rows, groups, channels, K) → (groups, rows, n), one more row per kernel position when factorised
            rows = block.permute(1, 0, 3, 2) if self.factorised else block.transpose(0, 1)
            rows = rows.reshape(rows.shape[0], -1, rows.shape[-1] if self.factorised else math.prod(rows.shape[2:]))
            product = (rows.mT @ rows).to(torch.float64)
            self.total = product if self.total is None else self.total.add_(product)
            self.count += block.shape[0]

    def _blocks(self, x: Tensor) -> Iterator[Tensor]:
        spec = self.spec
        groups, channels, d = spec.groups, spec.weight_shape[1], len(spec.kernel)
        if d == 0:
            for part in x.reshape(-1, 1, channels, 1).split(max(1, _CHUNK // channels)):
                yield part
            return
        if x.ndim == d + 1:
            x = x[None]
        windows = patches(x, spec)
        windows = windows.permute(0, *range(2, 2 + d), 1, *range(2 + d, 2 + 2 * d))
        per_line = max(1, math.prod(windows.shape[2:]))
        lines = max(1, _CHUNK // per_line)
        examples = max(1, lines // windows.shape[1])
        for part in windows.split(examples):
            for line in part.split(lines, dim=1):
                yield line.reshape(math.prod(line.shape[: d + 1]), groups, channels, -1)

    def result(self) -> LayerStats:
        assert self.total is not None
        per_patch = math.prod(self.spec.kernel) if self.factorised else 1
        covariance = (self.total / (self.count * per_patch)).to(torch.float32).cpu()
        if not bool(torch.isfinite(covariance).all()):
            raise ModelError(f"layer {self.spec.name!r}: its inputs on the calibration data are not finite")
        return LayerStats(covariance, self.count, self.factorised)


def collect(
    model: nn.Module,
    specs: Sequence[LayerSpec],
    batches: Iterable[tuple[Tensor, ...]],
    device: str | torch.device = "cpu",
    max_patch: int = 4608,
) -> dict[str, LayerStats]:
    """Run a model and return the input statistics of its layers.

    Parameters
    ----------
    model : nn.Module
        Left as it is: a copy in eval mode is run.
    specs : sequence of LayerSpec
        The layers to watch, by name; each is a convolution or a linear layer.
    batches : iterable of tuples of Tensor
        The positional inputs of the model, batch by batch.
    device : str or torch.device
        Where to run.
    max_patch : int
        Layers with more than this many weights per output (S/groups · K) get `factorised` statistics.

    Returns
    -------
    dict from layer name to LayerStats
        On the CPU. A layer that no batch reached is missing.

    Raises
    ------
    DataError
        There was no batch.
    ModelError
        A layer does not exist or its inputs are not finite.
    """
    runner = model_copy(model).eval().to(device)
    accumulators: dict[str, _Accumulator] = {}
    handles = []
    try:
        for spec in specs:
            try:
                module = runner.get_submodule(spec.name)
            except AttributeError:
                raise ModelError(f"layer {spec.name!r} is not in the model, so it has no input statistics") from None
            factorised = bool(spec.kernel) and math.prod(spec.weight_shape[1:]) > max_patch
            accumulator = accumulators[spec.name] = _Accumulator(spec, factorised)

            def hook(
                _module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], to: _Accumulator = accumulator
            ) -> None:
                to.add(args[0] if args else kwargs["input"])

            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        seen = 0
        with torch.no_grad():
            for inputs in batches:
                runner(*(x.to(device) for x in inputs))
                seen += 1
        if not seen:
            raise DataError("there is no calibration batch to collect input statistics from")
    finally:
        for handle in handles:
            handle.remove()
    return {name: accumulator.result() for name, accumulator in accumulators.items() if accumulator.count}


def save(stats: Mapping[str, LayerStats], path: str | Path) -> None:
    """Write statistics as one safetensors file."""
    from safetensors.torch import save_file

    meta = {name: [s.count, s.factorised] for name, s in stats.items()}
    tensors = {name: s.covariance.contiguous() for name, s in stats.items()}
    save_file(tensors, str(path), metadata={"layers": json.dumps(meta, sort_keys=True)})


def load(path: str | Path) -> dict[str, LayerStats]:
    """Read what `save` wrote.

    Raises
    ------
    DataError
        The file is missing, damaged, or holds something else.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            meta = json.loads((file.metadata() or {})["layers"])
            return {
                name: LayerStats(file.get_tensor(name), int(count), bool(factorised))
                for name, (count, factorised) in meta.items()
            }
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path}: not a file of input statistics ({type(error).__name__}: {error})") from None


def whiten(tensor: Tensor, root: Tensor, axes: Sequence[int]) -> Tensor:
    """Multiply the input mode of a weight by a root: W → W·L.

    Parameters
    ----------
    tensor : Tensor, shape (groups, out, S, K1, ..., Kd)
        A weight or a factor in the layout of a convolution's weight.
    root : Tensor, shape (groups, m, m)
        m = S times the sizes of `axes`.
    axes : sequence of int
        Kernel axes that are merged with S into the input mode.
    """
    return _on_input(tensor, axes, lambda rows: rows @ root)


def unwhiten(tensor: Tensor, root: Tensor, axes: Sequence[int]) -> Tensor:
    """Undo `whiten` with a lower triangular root: F → F·L⁻¹."""
    return _on_input(tensor, axes, lambda rows: torch.linalg.solve_triangular(root, rows, upper=False, left=False))


def _on_input(tensor: Tensor, axes: Sequence[int], change: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply `change` to rows (groups, rows, S · axes) of `tensor` and put the axes back."""
    others = [a for a in range(tensor.ndim - 3) if a not in axes]
    order = [0, 1, *(3 + a for a in others), 2, *(3 + a for a in axes)]
    moved = tensor.permute(order)
    length = math.prod(moved.shape[2 + len(others) :])
    rows = change(moved.reshape(tensor.shape[0], -1, length))
    return rows.reshape(moved.shape).permute([order.index(i) for i in range(tensor.ndim)])
