"""The user's code of the sweeps that are disturbed: a tiny network whose forward pass can be made to go wrong.

A file in the directory that the environment names is a trap, called after what happens and to whom, ``hang-any`` or
``raise-1f2e3d``: to the next trial, once, or always to the plan with this signature. While a file ``hold`` is there,
trials wait. Every network that a process runs is noted in ``runs``.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

PLACE = "AUTORANK_FAULTS"
DRIVER = "AUTORANK_FAULTS_DRIVER"
"""Process id of the driver, in which nothing is sprung that is for any trial."""

CGROUP = "cgroup"
"""File in the directory of the traps: the list of processes of a group of little memory."""

_seen: set[str] = set()


def signature(model: nn.Module) -> str:
    """Return what a plan does to the network's shapes."""
    shapes = [(name, tuple(value.shape)) for name, value in model.state_dict().items()]
    return hashlib.sha256(repr(shapes).encode()).hexdigest()[:12]


class Net(nn.Sequential):
    """Looks for traps before every forward pass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        place = os.environ.get(PLACE)
        if place and not torch.compiler.is_compiling():
            return x.new_tensor(_spring(self, Path(place))) + super().forward(x)
        return super().forward(x)


def _spring(model: nn.Module, place: Path) -> float:
    """Do what a trap says; what is returned is added to the outputs."""
    me = signature(model)
    if me not in _seen:
        _seen.add(me)
        with (place / "runs").open("a") as file:
            file.write(f"{os.getpid()} {me}\n")
    in_trial = str(os.getpid()) != os.environ.get(DRIVER)
    while in_trial and (place / "hold").exists():
        time.sleep(0.01)
    for trap in sorted(place.glob("*-*")):
        what, whom = trap.name.split("-")
        if whom == me or (whom == "any" and in_trial and _taken(trap)):
            return float(_HAPPENS[what](place) or 0.0)
    return 0.0


def _taken(trap: Path) -> bool:
    """Whether this process is the one that springs a trap that springs once."""
    try:
        trap.rename(trap.with_name(f"sprung.{trap.name.replace('-', '.')}"))
    except FileNotFoundError:
        return False
    return True


def _raise(place: Path) -> None:
    raise KeyError("a bug of mine")


def _exit(place: Path) -> None:
    sys.exit("the user's code ends the process")


def _die(place: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _hang(place: Path) -> None:
    while True:
        time.sleep(1)


def _freeze(place: Path) -> None:
    """Hang with the interpreter's lock held, as a library written in C may."""
    ctypes.PyDLL(None).pause()


def _fill(place: Path) -> None:
    """Use up the memory: the kernel kills us in a group of little memory, where there is one; else we are refused."""
    group = place / CGROUP
    if group.exists():
        Path(group.read_text()).write_text(str(os.getpid()))
    else:
        import resource

        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
    kept = []
    while True:
        kept.append(torch.ones(1 << 24))


def _nan(place: Path) -> float:
    return float("nan")


_HAPPENS: dict[str, Any] = {
    "raise": _raise,
    "exit": _exit,
    "die": _die,
    "hang": _hang,
    "freeze": _freeze,
    "fill": _fill,
    "nan": _nan,
}


def network() -> nn.Module:
    """Return a network whose kernels are of low rank but for a little noise, as those of trained ones are."""
    torch.manual_seed(0)
    made = Net(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 2),
    )
    with torch.no_grad():
        for index in (3, 5):
            kernel: Any = made[index].weight
            rows, columns = torch.randn(len(kernel), 5), torch.randn(5, kernel[0].numel())
            kernel.copy_((rows @ columns * 0.1).reshape(kernel.shape) + 0.02 * torch.randn(kernel.shape))
    return made


def data() -> dict[str, Any]:
    """Return what the network itself says of noise, but for an error, so that every plan has a score of its own."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(192, 3, 8, 8, generator=generator)
    with torch.no_grad():
        said = nn.Sequential.forward(network().eval(), images)
    targets = said + 0.1 * said.std() * torch.randn(said.shape, generator=generator)
    parts = [(images[a:b], targets[a:b]) for a, b in ((0, 96), (96, 144), (144, 192))]
    splits = dict(zip(("train", "validation", "test"), parts, strict=True))
    loss = nn.functional.mse_loss
    return {**splits, "loss": loss, "metric": nn.functional.l1_loss, "metric_name": "mae", "direction": "min"}
