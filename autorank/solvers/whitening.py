"""Statistics of layers: input covariances, collected by a forward run, reduced to the axes a format needs, as roots.

With Σ = E[x xᵀ] over the input patches of a layer, the mean squared error of its output is tr(Δ Σ Δᵀ) for a weight
error Δ (T × S·K). Decomposing W·L with L Lᵀ = Σ instead of W, and undoing L on the factor that carries the input,
therefore minimises the error of the output; for a matrix factorisation that is the closed-form optimum.

With G, the covariance of the loss's gradients at the layer's output (`autorank.solvers.gradients`), decomposing Mᵀ·W·L
with M Mᵀ = G minimises tr(G Δ Σ Δᵀ), twice the rise of the loss in second order.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from autorank.copying import model_copy
from autorank.errors import DataError, ModelError
from autorank.solvers.kept import digest_all
from autorank.solvers.moments import Accumulator
from autorank.types import LayerSpec

DEFAULT_SHRINK = 1e-3
"""Share of the mean variance that is mixed into a covariance before its root is taken."""

MIN_SHRINK = 1e-6
"""What is mixed in even when no shrinkage is asked for, so that the root can be inverted."""


@dataclass(frozen=True)
class LayerStats:
    """Second moments of a layer's inputs, and of the loss's gradients at its outputs.

    With y_p = W a_p at output position p and g_p the gradient of one example's loss there, a weight error Δ changes the
    loss, in second order and with the Fisher information for the Hessian, by ½ E[(Σ_p g_pᵀ Δ a_p)²]. Inputs taken as
    independent of gradients, and gradients of different positions as uncorrelated (the K-FAC assumptions; Grosse and
    Martens 2016, arXiv 1602.01407), that is ½ Σ_p tr(E[g_p g_pᵀ] Δ Σ Δᵀ) = ½ tr(G Δ Σ Δᵀ), with Σ the *mean* of a aᵀ
    over examples and positions (`covariance`) and G the mean over examples of the *sum* of g gᵀ over positions
    (`gradient`). Each call of a layer adds its positions to both. Groups are taken as uncorrelated.

    Attributes
    ----------
    covariance : Tensor, shape (groups, n, n) or (groups, n), float32
        E[x xᵀ] of the input patches, n = S/groups · K, in the order (S, K1, ..., Kd) of ``weight.reshape(T, -1)``.
        When `factorised`, n = S/groups: the average over the kernel positions. When `diagonal`, the variances alone.
    count : int
        Number of patches that were averaged.
    factorised : bool
        The patch covariance was too large to keep and is approximated by covariance ⊗ identity over the kernel.
    gradient : Tensor or None, shape (groups, T/groups, T/groups) or (groups, T/groups), float32
        G as above; with too many output channels its diagonal alone. None when gradients were not collected; zero when
        the loss does not depend on the layer.
    """

    covariance: Tensor
    count: int
    factorised: bool = False
    gradient: Tensor | None = None

    @property
    def diagonal(self) -> bool:
        """Whether only the variances are known, because there are too many channels for their covariance."""
        return self.covariance.ndim == 2

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
        Tensor, shape (groups, m, m), or (groups, m) when `diagonal`
            m = S/groups times the sizes of the kept axes, in the order (S, axes).
        """
        kept = math.prod(kernel[a] for a in axes)
        if self.diagonal:
            if self.factorised:
                return self.covariance.repeat_interleave(kept, dim=1)
            each = self.covariance.reshape(self.covariance.shape[0], -1, *kernel)
            others = [2 + a for a in range(len(kernel)) if a not in axes]
            return (each.mean(others) if others else each).flatten(1)
        if self.factorised:
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
        return full.reshape(groups, channels * kept, channels * kept)

    def root(self, kernel: Sequence[int], axes: Sequence[int], shrink: float, device: torch.device) -> Tensor:
        """Return what `whiten` takes for the mode of the channels and `axes`.

        Parameters
        ----------
        kernel, axes : sequence of int
            As for `reduced`.
        shrink : float
            As for `square_root`.
        device : torch.device
            Where it is computed and kept.

        Returns
        -------
        Tensor, shape (groups, m, m), or (groups, m) when `diagonal`; float64
            The lower triangular root, or the standard deviations.
        """
        covariance = self.reduced(kernel, axes).to(device)
        return deviations(covariance, shrink) if self.diagonal else square_root(covariance, shrink)


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


def deviations(variances: Tensor, shrink: float = DEFAULT_SHRINK) -> Tensor:
    """Return the diagonal of `square_root` for a diagonal covariance, without forming the matrix.

    Parameters
    ----------
    variances : Tensor, shape (..., n)
    shrink : float

    Returns
    -------
    Tensor, shape (..., n), float64
    """
    rho = max(shrink, MIN_SHRINK)
    variances = variances.to(torch.float64)
    mean = variances.mean(-1, keepdim=True)
    root = ((1 - rho) * variances + rho * mean).sqrt()
    return torch.where(mean > 0, root, torch.ones_like(root))


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
        return ((rows * cov[:, None] if stats.diagonal else rows @ cov) * rows).sum()

    # A weight that its inputs never excite has no output to compare with: compare with a trace of white input instead.
    variances = cov if stats.diagonal else cov.diagonal(dim1=-2, dim2=-1)
    floor = 1e-12 * dense.square().sum() * variances.mean()
    reference = torch.maximum(power(dense), floor)
    error = power(delta).clamp_min(0)
    return float((error / reference).sqrt()) if reference > 0 else 0.0


def collect(
    model: nn.Module,
    specs: Sequence[LayerSpec],
    batches: Iterable[tuple[Tensor, ...]],
    device: str | torch.device = "cpu",
    max_patch: int = 4608,
    examples: int | None = None,
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
        Longest side of a covariance. Convolutions with more weights per output (S/groups · K) get `factorised`
        statistics; layers with more channels than that (S/groups), linear ones included, get `diagonal` ones: the fit
        then weighs their inputs by their size and takes them for uncorrelated.
    examples : int, optional
        How many examples the batches hold together; by default taken from the first batch and the number of batches,
        if that is known. Layers with many output positions take every k-th one only, so that about 50 patches (20,000
        at least) stand behind each column of a covariance; without this number they take all.

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
    accumulators: dict[str, Accumulator] = {}
    handles = []
    known = float(len(batches)) if examples is None and isinstance(batches, Sized) else None
    try:
        for spec in specs:
            try:
                module = runner.get_submodule(spec.name)
            except AttributeError:
                raise ModelError(f"layer {spec.name!r} is not in the model, so it has no input statistics") from None
            accumulator = accumulators[spec.name] = Accumulator(spec, max_patch, known)

            def hook(
                _module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], to: Accumulator = accumulator
            ) -> None:
                to.add(args[0] if args else kwargs["input"])

            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        seen = 0
        with torch.no_grad():
            for inputs in batches:
                if not seen and examples is not None:
                    size = max((len(x) for x in inputs if x.ndim), default=1)
                    for accumulator in accumulators.values():
                        accumulator.batches = examples / max(size, 1)
                runner(*(x.to(device) for x in inputs))
                seen += 1
        if not seen:
            raise DataError("there is no calibration batch to collect input statistics from")
    finally:
        for handle in handles:
            handle.remove()
    return {name: _statistics(accumulator) for name, accumulator in accumulators.items() if accumulator.count}


def _statistics(accumulator: Accumulator) -> LayerStats:
    covariance = accumulator.moment().to(torch.float32).cpu()
    if not bool(torch.isfinite(covariance).all()):
        raise ModelError(f"layer {accumulator.spec.name!r}: its inputs on the calibration data are not finite")
    return LayerStats(covariance, accumulator.count, accumulator.factorised)


def save(stats: Mapping[str, LayerStats], path: str | Path) -> None:
    """Write statistics as one safetensors file."""
    from safetensors.torch import save_file

    meta = {name: [s.count, s.factorised, s.gradient is not None] for name, s in stats.items()}
    tensors = {f"covariance {name}": s.covariance.contiguous() for name, s in stats.items()}
    tensors |= {f"gradient {name}": s.gradient.contiguous() for name, s in stats.items() if s.gradient is not None}
    text = json.dumps(meta, sort_keys=True)
    # One entry: safetensors writes several in an order that differs from one process to the next.
    header = {"layers": meta, "digest": digest_all(tensors, text)}
    save_file(tensors, str(path), metadata={"statistics": json.dumps(header, sort_keys=True)})


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
            header = json.loads((file.metadata() or {})["statistics"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        # Safetensors notices a missing end, not a changed byte.
        if header["digest"] != digest_all(tensors, json.dumps(header["layers"], sort_keys=True)):
            raise ValueError("its content is not what was written")
        return {
            name: LayerStats(
                tensors[f"covariance {name}"],
                int(count),
                bool(factorised),
                tensors[f"gradient {name}"] if gradient else None,
            )
            for name, (count, factorised, gradient) in header["layers"].items()
        }
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path}: not a file of layer statistics ({type(error).__name__}: {error})") from None


def whiten(tensor: Tensor, root: Tensor, axes: Sequence[int]) -> Tensor:
    """Multiply the input mode of a weight by a root: W → W·L.

    Parameters
    ----------
    tensor : Tensor, shape (groups, out, S, K1, ..., Kd)
        A weight or a factor in the layout of a convolution's weight.
    root : Tensor, shape (groups, m, m), or (groups, m) for a diagonal one
        m = S times the sizes of `axes`.
    axes : sequence of int
        Kernel axes that are merged with S into the input mode.
    """
    return _on_input(tensor, axes, lambda rows: rows * root[:, None] if root.ndim == 2 else rows @ root)


def unwhiten(tensor: Tensor, root: Tensor, axes: Sequence[int]) -> Tensor:
    """Undo `whiten` with a lower triangular or a diagonal root: F → F·L⁻¹."""
    if root.ndim == 2:
        return _on_input(tensor, axes, lambda rows: rows / root[:, None])
    return _on_input(tensor, axes, lambda rows: torch.linalg.solve_triangular(root, rows, upper=False, left=False))


def whiten_output(tensor: Tensor, root: Tensor) -> Tensor:
    """Multiply the output mode of a weight (groups, T, S, K1, ..., Kd) by a root, (g, T, T) or diagonal: W → Lᵀ·W."""
    rows = tensor.flatten(2)
    changed = rows * root[..., None] if root.ndim == 2 else root.mT @ rows
    return changed.reshape(tensor.shape)


def unwhiten_output(tensor: Tensor, root: Tensor) -> Tensor:
    """Undo `whiten_output` with a lower triangular or a diagonal root: F → L⁻ᵀ·F."""
    rows = tensor.flatten(2)
    changed = rows / root[..., None] if root.ndim == 2 else torch.linalg.solve_triangular(root.mT, rows, upper=True)
    return changed.reshape(tensor.shape)


def _on_input(tensor: Tensor, axes: Sequence[int], change: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply `change` to rows (groups, rows, S · axes) of `tensor` and put the axes back."""
    others = [a for a in range(tensor.ndim - 3) if a not in axes]
    order = [0, 1, *(3 + a for a in others), 2, *(3 + a for a in axes)]
    moved = tensor.permute(order)
    length = math.prod(moved.shape[2 + len(others) :])
    rows = change(moved.reshape(tensor.shape[0], -1, length))
    return rows.reshape(moved.shape).permute([order.index(i) for i in range(tensor.ndim)])
