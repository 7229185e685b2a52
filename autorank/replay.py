"""Running a network again with one layer changed, without what comes before that layer.

In a recorded forward pass every module keeps what it returned. In a replay, a module whose whole call lies before the
first call of the changed layer returns that instead of computing, at the highest level that does; what the network does
between its modules is done again. Whether a network can be replayed is not guessed: each layer's replay is held, bit by
bit, against the recorded outputs, and where they differ the whole network is run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from autorank.copying import model_copy
from autorank.pytrees import map_tensors, tensors
from autorank.seeding import seeded


@dataclass
class _Call:
    """One call of a module in the recorded pass."""

    module: nn.Module
    began: int  # positions in the order of all begins and ends
    ended: int = -1
    following: int = -1  # number of the first call that began after this one ended
    output: Any = None
    versions: list[int] = field(default_factory=list)
    seconds: float = 0.0  # since the pass began, at the begin of this call


class _DivergedError(Exception):
    """The replay called another module than the recorded pass did."""


class Replay:
    """A network that can be run again from one of its layers on.

    Parameters
    ----------
    model : nn.Module
        Left as it is: a copy in eval mode is run, on the model's device.
    seed : int
        PyTorch's random numbers start from it in every run.

    Raises
    ------
    ModelError
        The model cannot be copied.
    """

    def __init__(self, model: nn.Module, seed: int = 0) -> None:
        self._model = model_copy(model).eval()
        self._seed = seed
        self._device = next((p.device for p in self._model.parameters()), torch.device("cpu"))
        self._modules = dict(self._model.named_modules())
        self._inputs: tuple[Tensor, ...] = ()
        self._outputs: Any = None
        self._calls: list[_Call] = []
        self._first: dict[nn.Module, _Call] = {}
        self._total = 0.0
        self._changed: set[int] = set()  # numbers of the calls whose output is changed in place afterwards
        self._whole: set[str] = set()  # layers with which the whole network has to be run
        self._checked: set[str] = set()
        self._mode: _Recording | _Playing | None = None
        for module in self._model.modules():
            _intercept(module, self._called)

    def record(self, inputs: tuple[Tensor, ...]) -> Any:
        """Run the unchanged network, keep what its modules return, and return its outputs.

        Parameters
        ----------
        inputs : tuple of Tensor
            The positional inputs, on the device of the model.
        """
        self._inputs = inputs
        outputs = self._recorded()
        late = self._late()
        if late - self._changed:
            self._changed |= late
            outputs = self._recorded()
        self._outputs = map_tensors(outputs, torch.clone)
        return outputs

    def run(self, layer: str, replacement: nn.Module) -> Any:
        """Return the outputs of the network, on the recorded inputs, with another module in the place of a layer.

        Parameters
        ----------
        layer : str
            Qualified name.
        replacement : nn.Module
            Called like the layer; put in eval mode.
        """
        replacement.eval()
        if layer not in self._checked:
            self._checked.add(layer)
            if not self._replays(layer):
                self._whole.add(layer)
        return self._played(layer, replacement)

    @property
    def whole(self) -> frozenset[str]:
        """The layers that were found to need the whole network to be run."""
        return frozenset(self._whole)

    @property
    def seconds(self) -> float:
        """Seconds of the last recorded pass."""
        return self._total

    def share(self, layer: str) -> float:
        """Return the share of the recorded pass that was left when the layer was first called; 0 when it never was."""
        call = self._first.get(self._modules[layer])
        if layer in self._whole:
            return 1.0
        return 0.0 if call is None else 1 - call.seconds / max(self._total, 1e-9)

    def _recorded(self) -> Any:
        self._calls, self._first = [], {}  # what the last pass kept may be large
        recording = self._mode = _Recording(self._changed)
        try:
            outputs = self._forward()
        finally:
            self._mode = None
        self._total = time.perf_counter() - recording.begun
        self._calls = recording.calls
        for call in self._calls:
            self._first.setdefault(call.module, call)
        return outputs

    def _late(self) -> set[int]:
        """Return the numbers of the calls whose outputs are not any more what the modules returned."""
        return {
            number
            for number, call in enumerate(self._calls)
            if number not in self._changed and [x._version for x in tensors(call.output)] != call.versions
        }

    def _played(self, layer: str, instead: Callable[..., Any]) -> Any:
        """Run from the layer on; record again when that changed what is recorded."""
        target = self._modules[layer]
        while True:
            first = None if layer in self._whole else self._first.get(target)
            playing = self._mode = _Playing(self._calls, self._changed, first, target, instead)
            try:
                outputs = self._forward()
            except _DivergedError:
                self._whole.add(layer)
                continue
            finally:
                self._mode = None
            late = self._late() if playing.replays else set()
            if not late:
                return outputs
            self._changed |= late
            self._recorded()

    def _replays(self, layer: str) -> bool:
        """Say whether running from the layer on, with nothing changed, gives what the whole network gives."""
        target = self._modules[layer]
        original = target.forward.__wrapped__
        try:
            return _equal(self._played(layer, original), self._outputs)
        except Exception:  # of the user's forward pass, which goes another way in a replay
            return False

    def _forward(self) -> Any:
        with torch.no_grad(), seeded(self._seed, self._device):
            return self._model(*self._inputs)

    def _called(self, module: nn.Module, compute: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self._mode is None:
            return compute(*args, **kwargs)
        return self._mode.called(module, compute, args, kwargs)


class _Recording:
    """Keeps what modules return."""

    def __init__(self, changed: set[int]) -> None:
        self.calls: list[_Call] = []
        self.begun = time.perf_counter()
        self._changed = changed
        self._position = 0

    def called(self, module: nn.Module, compute: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        number = len(self.calls)
        call = _Call(module, self._tick(), seconds=time.perf_counter() - self.begun)
        self.calls.append(call)
        output = compute(*args, **kwargs)
        call.ended, call.following = self._tick(), len(self.calls)
        call.output = map_tensors(output, torch.clone if number in self._changed else _same)
        call.versions = [x._version for x in tensors(call.output)]
        return output

    def _tick(self) -> int:
        self._position += 1
        return self._position


class _Playing:
    """Returns what was recorded until the changed layer is called, and computes from then on."""

    def __init__(
        self,
        calls: Sequence[_Call],
        changed: set[int],
        first: _Call | None,
        target: nn.Module,
        instead: Callable[..., Any],
    ) -> None:
        self._calls, self._changed = calls, changed
        self._first, self._target, self._instead = first, target, instead
        self._next = 0
        self.replays = first is not None

    def called(self, module: nn.Module, compute: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if module is self._target:
            self._first = None
            return self._instead(*args, **kwargs)
        if self._first is None:
            return compute(*args, **kwargs)
        number = self._next
        call = self._calls[number] if number < len(self._calls) else None
        if call is None or call.module is not module:
            raise _DivergedError
        if call.ended < self._first.began:
            self._next = call.following
            return map_tensors(call.output, torch.clone if number in self._changed else _same)
        self._next = number + 1
        return compute(*args, **kwargs)


def _intercept(module: nn.Module, called: Callable[[nn.Module, Callable[..., Any], Any, Any], Any]) -> None:
    """Put `called` in the place of a module's forward, which hooks cannot keep from computing."""
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return called(module, original, args, kwargs)

    forward.__wrapped__ = original  # type: ignore[attr-defined]
    module.forward = forward


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _equal(a: Any, b: Any) -> bool:
    first, second = list(tensors(a)), list(tensors(b))
    return len(first) == len(second) and all(
        x.shape == y.shape and x.dtype == y.dtype and bool(((x == y) | ((x != x) & (y != y))).all())
        for x, y in zip(first, second, strict=True)
    )
