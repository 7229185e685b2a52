"""Distillation inside the network: outputs of blocks, and not only of the whole, held at those of the dense model.

A decomposed network has the dense one's blocks, shapes and all, so each can be taught what it should put out (FitNets,
Romero et al., ICLR 2015, arXiv 1412.6550, without the regressors that other shapes need). In a short fine-tune, where
the gradient of the outputs alone says little to the first layers, that helps most.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from autorank.errors import ConfigError


def changed_layers(model: nn.Module, dense: nn.Module) -> tuple[str, ...]:
    """Return the names of the modules of `dense` that are of another class in `model`, in its order."""
    now = dict(model.named_modules())
    return tuple(name for name, module in dense.named_modules() if name in now and type(now[name]) is not type(module))


def blocks(dense: nn.Module, layers: Sequence[str]) -> tuple[str, ...]:
    """Return the modules whose outputs are compared: for every layer the innermost block that it belongs to.

    A block is an entry of a `Sequential` or `ModuleList`: a residual block, or in a plain chain the layer itself. A
    layer outside of them stands for itself.
    """
    found: dict[str, None] = {}
    for layer in layers:
        place = layer
        while place and not isinstance(dense.get_submodule(place.rpartition(".")[0]), nn.Sequential | nn.ModuleList):
            place = place.rpartition(".")[0]
        found.setdefault(place or layer)
    return tuple(found)


class FeatureMatch:
    """Watches two networks and says how far the outputs of their blocks are apart.

    Parameters
    ----------
    model : nn.Module
        The decomposed network.
    dense : nn.Module
        In eval mode, on the same device.
    places : sequence of str, optional
        Names of modules of both; by default the `blocks` of the decomposed layers.

    Raises
    ------
    ConfigError
        A place is not in both networks.
    """

    def __init__(self, model: nn.Module, dense: nn.Module, places: Sequence[str] | None = None) -> None:
        self.dense = dense
        self.places = blocks(dense, changed_layers(model, dense)) if places is None else tuple(places)
        self._mine: dict[str, Any] = {}
        self._theirs: dict[str, Any] = {}
        self._handles: list[RemovableHandle] = []
        for network, store in ((model, self._mine), (dense, self._theirs)):
            for place in self.places:
                try:
                    module = network.get_submodule(place)
                except AttributeError:
                    self.close()
                    raise ConfigError(f"there is no module {place!r} whose outputs could be compared") from None

                def hook(_m: nn.Module, _a: Any, output: Any, to: dict[str, Any] = store, at: str = place) -> None:
                    to[at] = output

                self._handles.append(module.register_forward_hook(hook))

    def teach(self, inputs: tuple[Any, ...]) -> Any:
        """Run the dense model, and return its outputs."""
        self._theirs.clear()
        with torch.no_grad():
            return self.dense(*inputs)

    def loss(self) -> Tensor:
        """Return the mean over blocks of ‖mine − dense‖² / ‖dense − its mean over examples‖², of the last runs.

        Outputs that are no tensors, or of another shape, are left out; 0 when nothing is left.
        """
        parts = []
        for place in self.places:
            mine, theirs = self._mine.get(place), self._theirs.get(place)
            if not isinstance(mine, Tensor) or not isinstance(theirs, Tensor) or mine.shape != theirs.shape:
                continue
            target = theirs.float()
            spread = (target - target.mean(0, keepdim=True)).square().mean()
            parts.append((mine.float() - target).square().mean() / spread.clamp_min(1e-12))
        self._mine.clear()
        return torch.stack(parts).mean() if parts else torch.zeros(())

    def close(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
