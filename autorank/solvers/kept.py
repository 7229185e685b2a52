"""Results that several fits of a layer share, kept while they fit into a bound, found by the content of what they need.

Whether a result is found or computed changes nothing but the time: every entry is a function of its key.
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping

import torch
from torch import Tensor

LIMIT = 1 << 30
"""Bytes that one process keeps: the fits of all layers of a ResNet-50 in one format."""


class Kept:
    """Dictionaries of tensors by key; those that were not asked for longest go when there is no room.

    Parameters
    ----------
    limit : int
        Bytes of all entries together; a larger entry is handed out and not kept.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self.bytes = 0
        self._entries: OrderedDict[Hashable, tuple[dict[str, Tensor], int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return what is kept under `key`, or what `make` returns; the tensors are shared: leave them be."""
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return dict(self._entries[key][0])
        made = make()
        size = sum(tensor.numel() * tensor.element_size() for tensor in made.values())
        with self._lock:
            if size <= self.limit and key not in self._entries:
                self._entries[key] = dict(made), size
                self.bytes += size
                while self.bytes > self.limit:
                    self.bytes -= self._entries.popitem(last=False)[1][1]
        return made

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()
            self.bytes = 0


class Digests:
    """Digests of tensors that stay as they are (statistics), computed once for each as long as it lives."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], int, str]] = {}

    def __call__(self, tensor: Tensor) -> str:
        """Return the digest of `tensor`, of its present content where PyTorch knows that it was changed."""
        version = 0 if tensor.is_inference() else tensor._version
        known = self._known.get(id(tensor))
        if known is not None and known[0]() is tensor and known[1] == version:
            return known[2]
        found = digest(tensor)
        self._known = {k: v for k, v in self._known.items() if v[0]() is not None}
        self._known[id(tensor)] = weakref.ref(tensor), version, found
        return found


def digest(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's type, shape and bytes."""
    plain = tensor.detach().cpu().contiguous()
    found = hashlib.sha256(f"{plain.dtype}{tuple(plain.shape)}".encode())
    found.update(plain.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def digest_all(tensors: Mapping[str, Tensor], *texts: str) -> str:
    """Return the SHA-256 of named tensors, in whatever order, and of texts that go with them."""
    parts = [f"{name}={digest(tensor)}" for name, tensor in sorted(tensors.items())]
    return hashlib.sha256("\n".join([*texts, *parts]).encode()).hexdigest()


KEPT = Kept()
"""What the fits of this process share."""

DIGESTS = Digests()
"""Digests of the statistics that this process uses."""
