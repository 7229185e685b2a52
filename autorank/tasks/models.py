"""Where models come from: a module, a function, or a name such as ``python:…``, ``timm:…`` or ``torchhub:…``."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from autorank.copying import model_copy
from autorank.errors import ConfigError, MissingExtraError, ModelError, describe
from autorank.privacy import remember
from autorank.tasks.factories import call, extend_path, near, resolve
from autorank.tasks.randomness import PrivateRandom
from autorank.tasks.weights import load_into, read_weights

SCHEMES = ("python", "timm", "torchvision", "torchhub")


class ModelSource(Protocol):
    """Something that gives the one template of which all models are copies."""

    def template(self) -> nn.Module:
        """Return the model itself, in eval mode on the CPU; callers copy it."""


class GivenModel:
    """A module of the user's, or the one that a function of the user's makes; the user's object is copied."""

    def __init__(self, model: nn.Module | Callable[[], nn.Module]) -> None:
        if isinstance(model, nn.Module):
            made = _copied(model)
        elif callable(model):
            name = getattr(model, "__name__", "the model factory")
            made = _module(_seeded_call(name, model, {}), name)
        else:
            raise ModelError(f"model must be a module or a function that returns one, not a {type(model).__name__}")
        self._model = made.cpu().eval()

    def template(self) -> nn.Module:
        """Return the copy."""
        return self._model


class NamedModel:
    """A model made by a named factory, with weights from a file.

    When this is pickled, the name and the weights travel; the factory is called again on the other side.
    """

    def __init__(self, name: str, args: Mapping[str, Any], weights: str | Path | None) -> None:
        self.name, self.args, self._directory = name, dict(args), os.getcwd()
        self._model: nn.Module | None = build(name, args)
        self._state: dict[str, Any] | None = None
        if weights is not None:
            load_into(self._model, read_weights(weights), str(weights))
        self._model.cpu().eval()

    def template(self) -> nn.Module:
        """Return the model, made again if this came out of a pickle."""
        if self._model is None:
            extend_path(self._directory)
            self._model = build(self.name, self._offline_args()).cpu().eval()
            load_into(self._model, self._state or {}, f"the task's copy of {self.name}")
            self._state = None
        return self._model

    def _offline_args(self) -> dict[str, Any]:
        # The weights travel with the task: nothing has to be downloaded a second time.
        return self.args | ({"pretrained": False} if self.args.get("pretrained") is True else {})

    def __getstate__(self) -> dict[str, Any]:
        state = self._state if self._model is None else self._model.state_dict()
        return self.__dict__ | {"_model": None, "_state": state}


ModelLike = nn.Module | Callable[[], nn.Module] | NamedModel


def as_source(model: ModelLike) -> ModelSource:
    """Return the source of what the user gave as a model."""
    return model if isinstance(model, NamedModel) else GivenModel(model)


def build(name: str, args: Mapping[str, Any]) -> nn.Module:
    """Make the model that `name` names, with fixed random numbers.

    Parameters
    ----------
    name : str
        ``python:package.module:function``, ``timm:name``, ``torchvision:name`` or ``torchhub:repository:name`` (the
        repository being ``owner/name[:branch]`` or a local directory; its code is run).
    args : mapping
        Keyword arguments of the factory.

    Raises
    ------
    ModelError
        If there is no such model or making it fails.
    MissingExtraError
        If timm or torchvision is not installed.
    """
    remember(args)  # in every process that has them: what fails there must not tell
    scheme, colon, rest = name.partition(":")
    if not colon or scheme not in SCHEMES or not rest:
        raise ConfigError(
            f"model {name!r} must be python:package.module:function, timm:name, torchvision:name or "
            "torchhub:repository:name"
        )
    maker = {"python": _python, "timm": _timm, "torchvision": _torchvision, "torchhub": _torchhub}[scheme]
    return _module(_seeded_call(name, *maker(rest, dict(args))), name)


def _python(rest: str, args: dict[str, Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    return resolve(rest, ModelError), args


def _timm(rest: str, args: dict[str, Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    timm = _extra("timm")
    if rest.startswith(("hf-hub:", "hf_hub:", "local-dir:")) or timm.is_model(rest):
        return timm.create_model, {"model_name": rest, **args}
    raise ModelError(f"timm has no model {rest!r}{near(rest, timm.list_models())}")


def _torchvision(rest: str, args: dict[str, Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    _extra("torchvision")
    from torchvision import models

    if rest in (known := models.list_models()):
        return models.get_model, {"name": rest, **args}
    raise ModelError(f"torchvision has no model {rest!r}{near(rest, known)}")


def _torchhub(rest: str, args: dict[str, Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    repository, colon, entry = rest.rpartition(":")
    if not colon or not repository:
        raise ModelError(f"'torchhub:{rest}' must be torchhub:repository:name")

    def load(**args: Any) -> Any:
        import torch

        # Naming a repository is asking for its code to run, as naming a Python module is; a prompt would hang a worker.
        local = Path(repository).is_dir()
        where: dict[str, Any] = {"source": "local"} if local else {"source": "github", "trust_repo": True}
        try:
            return torch.hub.load(repository, entry, **where, verbose=False, **args)
        except RuntimeError as error:
            if "Missing dependencies" in str(error) and any(name in str(error) for name in ("timm", "torchvision")):
                raise MissingExtraError(f"{error}: pip install torchvision timm") from error
            raise

    return load, args


def _extra(package: str) -> Any:
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingExtraError(
            f"{package} models need autorank's extra 'vision': pip install torchvision timm ({describe(error)})"
        ) from error
    except Exception as error:  # a torchvision built for another torch raises RuntimeError on import
        raise MissingExtraError(
            f"{package} is installed but does not import ({describe(error)}); it has to fit the build of torch"
        ) from error


def _seeded_call(name: str, function: Callable[..., Any], args: Mapping[str, Any]) -> Any:
    with PrivateRandom(0):
        return call(name, function, args, ModelError)


def _module(made: Any, name: str) -> nn.Module:
    if not isinstance(made, nn.Module):
        raise ModelError(f"{name} returned a {type(made).__name__}, not a torch.nn.Module")
    return _unwrapped(made)


def _unwrapped(model: nn.Module) -> nn.Module:
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return _unwrapped(model.module)
    compiled = getattr(model, "_orig_mod", None)
    return _unwrapped(compiled) if isinstance(compiled, nn.Module) else model


def _copied(model: nn.Module) -> nn.Module:
    try:
        return model_copy(_unwrapped(model))
    except ModelError as error:
        raise ModelError(f"{error}; pass a function that makes the model") from error
