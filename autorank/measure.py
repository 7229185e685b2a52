"""What a model costs: MACs counted on a trace, parameters, bytes, measured time; the model itself is never changed."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from autorank import formats
from autorank.copying import model_copy
from autorank.errors import ModelError, describe
from autorank.opcounts import handles
from autorank.pytrees import tensors
from autorank.quant.size import stored_bytes
from autorank.seeding import seeded
from autorank.types import DENSE, CallSize, Choice, Cost, LayerSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

_CONVOLUTIONS: dict[str, type[nn.Module]] = {
    "conv1d": nn.Conv1d,
    "conv2d": nn.Conv2d,
    "conv3d": nn.Conv3d,
    "conv_transpose1d": nn.ConvTranspose1d,
    "conv_transpose2d": nn.ConvTranspose2d,
    "conv_transpose3d": nn.ConvTranspose3d,
}

SECONDS = 0.2
"""How long the time of a model is measured, at least."""
LAYER_SECONDS = 0.05
"""How long the time of a layer is measured, at least: hundreds of candidates must not take minutes."""
WARM_UP_RUNS = 3
MIN_BLOCKS = 5
"""A median of fewer timed blocks than this says little about the spread."""


@dataclass(frozen=True)
class Count:
    """Cost of a model for one example.

    Attributes
    ----------
    cost : Cost
    unsupported : tuple of (operation, how often)
        Operations whose MACs are not counted.
    by_module : mapping
        Module name → MACs of the module with everything inside it; a shared module has its first name.
    """

    cost: Cost
    unsupported: tuple[tuple[str, int], ...]
    by_module: Mapping[str, int]


@dataclass(frozen=True)
class Timing:
    """Median time of one run in milliseconds, interquartile range of the timed blocks, and the number of runs."""

    median_ms: float
    spread_ms: float
    runs: int


def sizes(inputs: tuple[Tensor, ...]) -> str:
    """Return the shapes and types of the inputs in words, such as ``1×3×32×32 float32``."""
    return ", ".join(f"{'×'.join(map(str, x.shape)) or 'scalar'} {str(x.dtype).removeprefix('torch.')}" for x in inputs)


def batch_one(inputs: tuple[Tensor, ...], batch: int = 1) -> tuple[Tensor, ...]:
    """Cut the first dimension of every input to one example, and repeat that example.

    Parameters
    ----------
    inputs : tuple of Tensor
        Example inputs; one without dimensions stays as it is.
    batch : int
        How many examples to return.

    Raises
    ------
    ModelError
        There is no input, an input is not a tensor, or one holds no example.
    """
    if not isinstance(inputs, tuple) or not inputs:
        raise ModelError("example inputs must be a tuple of tensors with at least one tensor")
    for number, x in enumerate(inputs):
        if not isinstance(x, Tensor):
            raise ModelError(f"example input {number} must be a tensor, not {type(x).__name__}")
        if x.ndim and not len(x):
            raise ModelError(f"example input {number} has shape {tuple(x.shape)}: it holds no example")
    return tuple(x[:1].detach().repeat_interleave(batch, 0) if x.ndim else x.detach() for x in inputs)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Work without gradients, and leave PyTorch's random state as it was."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        yield


def count(
    model: nn.Module, inputs: tuple[Tensor, ...], device: str | torch.device = "cpu"
) -> tuple[Cost, tuple[tuple[str, int], ...]]:
    """Count MACs, parameters and bytes of a model for one example.

    Parameters
    ----------
    model : nn.Module
        Any device and mode; it is not changed.
    inputs : tuple of Tensor
        Inputs of the forward pass, the batch as first dimension; only the first example is used.
    device : str or torch.device
        Where a copy of the model is run, for models with operators that not every device has.

    Returns
    -------
    cost : Cost
        MACs of convolutions, linear maps, matrix products and attention; normalisation is not counted.
    unsupported : tuple of (str, int)
        Operations that are not counted and how often each occurs.

    Raises
    ------
    ModelError
        The model cannot be copied or does not run on one example.
    """
    result = analyse(model, inputs, device)
    return result.cost, result.unsupported


def analyse(model: nn.Module, inputs: tuple[Tensor, ...], device: str | torch.device = "cpu") -> Count:
    """Count like `count`, with the MACs of every module."""
    from fvcore.nn import FlopCountAnalysis

    uncounted: Counter[str] = Counter()
    cut = tuple(x.to(device) for x in batch_one(inputs))
    wrapped = _TensorsOut(model_copy(model).to(device).eval())
    analysis = FlopCountAnalysis(wrapped, cut).set_op_handle(**handles(uncounted))
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    fused = torch.backends.mha.get_fastpath_enabled()
    # The fused attention of eval mode hides its products from the trace.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with undisturbed():
            counted = analysis.by_module()
    except Exception as error:  # the user's forward may raise anything
        raise ModelError(
            f"the model does not run on a batch of one example (inputs: {sizes(cut)}): {describe(error)}"
        ) from None
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    uncounted.update(analysis.unsupported_ops())
    params = sum(p.numel() for p in wrapped.parameters() if not nn.parameter.is_lazy(p))
    prefix = "model."
    return Count(
        Cost(round(counted[""]), params, stored_bytes(wrapped)),
        tuple(sorted(uncounted.items())),
        {"": round(counted[""])}
        | {k.removeprefix(prefix): round(v) for k, v in counted.items() if k.startswith(prefix)},
    )


class _TensorsOut(nn.Module):
    """A model whose output, whatever it is made of, is handed to the tracer as a tuple of tensors.

    The outputs of all leaf modules are handed over as well: the tracer drops operations that lead to no output, but a
    layer whose result goes unused costs what it costs.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._kept: list[Tensor] = []
        for module in model.modules():
            if not any(True for _ in module.children()):
                module.register_forward_hook(lambda _m, _args, output: self._kept.extend(tensors(output)))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the model and flatten what it returns."""
        self._kept.clear()
        found = (*tensors(self.model(*inputs)), *self._kept)
        return found or (torch.zeros(1),)


def time_module(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    threads: int = 1,
    min_run_time: float | None = None,
    device: str | torch.device = "cpu",
) -> Timing:
    """Measure how long one forward pass takes.

    Parameters
    ----------
    module : nn.Module
        Timed as a copy in eval mode, under ``inference_mode``.
    inputs : tuple of Tensor
    threads : int
        PyTorch threads during the measurement.
    min_run_time : float
        Seconds to measure for, at least; `SECONDS` when not given.
    device : str or torch.device
        Where to run; work on a GPU is waited for.

    Raises
    ------
    ModelError
        The module cannot be copied or does not run on these inputs.
    """
    from torch.utils.benchmark import Timer

    copied = model_copy(module).to(device).eval()
    moved = tuple(x.detach().to(device) for x in inputs)
    timer = Timer("module(*inputs)", globals={"module": copied, "inputs": moved}, num_threads=threads)
    with undisturbed(), torch.inference_mode():
        try:
            timer.timeit(WARM_UP_RUNS)
        except Exception as error:  # the user's forward may raise anything
            raise ModelError(f"the model does not run on inputs {sizes(moved)}: {describe(error)}") from None
        measured = timer.blocked_autorange(min_run_time=SECONDS if min_run_time is None else min_run_time)
        number = measured.number_per_run
        times = list(measured.times)
        while len(times) < MIN_BLOCKS:
            times.extend(timer.timeit(number).times)
    quarter = statistics.quantiles(times, n=4, method="inclusive")
    return Timing(1e3 * statistics.median(times), 1e3 * (quarter[2] - quarter[0]), number * len(times))


def time_layers(
    pairs: Iterable[tuple[LayerSpec, Choice | None]],
    threads: int = 1,
    device: str | torch.device = "cpu",
    batch: int = 1,
    min_run_time: float | None = None,
) -> dict[tuple[str, Choice | None], float]:
    """Measure layers alone, dense or decomposed, on random inputs of their real size.

    Parameters
    ----------
    pairs : iterable of (LayerSpec, Choice or None)
        None times the dense layer. Equal shapes with equal choices are measured once within one call, so hand over all
        pairs together; a generator is read as the measurements go on.
    threads : int
    device : str or torch.device
    batch : int
        Number of examples; a layer that sees several rows per example gets as many times more.
    min_run_time : float
        Seconds per measurement; `LAYER_SECONDS` when not given.

    Returns
    -------
    dict
        (layer name, choice) → milliseconds for all calls of the layer in one forward pass.

    Raises
    ------
    ModelError
        A spec has no calls: it was read off a module without a forward run.
    """
    known: dict[tuple[LayerSpec, Choice | None], float] = {}
    table: dict[tuple[str, Choice | None], float] = {}
    seconds = LAYER_SECONDS if min_run_time is None else min_run_time
    for spec, choice in pairs:
        if not spec.calls:
            raise ModelError(f"layer {spec.name!r} cannot be timed: its input size is not known without a forward run")
        total = 0.0
        for call, times in Counter(spec.calls).items():
            key = (replace(spec, name="", calls=(call,)), choice)
            if key not in known:
                known[key] = _time_layer(spec, call, choice, threads, device, batch, seconds)
            total += times * known[key]
        table[spec.name, choice] = total
    return table


def _time_layer(
    spec: LayerSpec,
    call: CallSize,
    choice: Choice | None,
    threads: int,
    device: str | torch.device,
    batch: int,
    min_run_time: float,
) -> float:
    rows = batch * call.batch
    size = (rows, *call.input, spec.in_channels) if spec.kind == "linear" else (rows, spec.in_channels, *call.input)
    with undisturbed(), seeded(0):
        if choice is None or choice.format == DENSE:
            layer = dense_layer(spec)
        else:
            layer = formats.get(choice.format).layer(spec, choice.rank, choice.options)
        layer = layer.to(getattr(torch, spec.dtype))
        x = torch.randn(size).to(getattr(torch, spec.dtype))
    return time_module(layer, (x,), threads, min_run_time, device).median_ms


def dense_layer(spec: LayerSpec) -> nn.Module:
    """Build the dense layer that `spec` describes, freshly initialised."""
    dtype = getattr(torch, spec.dtype)
    if spec.kind == "linear":
        return nn.Linear(spec.in_channels, spec.out_channels, spec.bias).to(dtype)
    settings: dict[str, Any] = {
        "stride": spec.stride,
        "padding": spec.padding,
        "padding_mode": spec.padding_mode,
        "dilation": spec.dilation,
        "groups": spec.groups,
        "bias": spec.bias,
    }
    if spec.transposed:
        settings["output_padding"] = spec.output_padding or (0,) * len(spec.kernel)
    layer = _CONVOLUTIONS[spec.kind](spec.in_channels, spec.out_channels, spec.kernel, **settings)
    return layer.to(dtype)  # drawn in float32, as a model that is cast afterwards is
