"""The settings of a sweep: one YAML file, flags that win over it, one-line errors."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from autorank.errors import ConfigError
from autorank.privacy import filled, lost
from autorank.quant.settings import QuantSettings
from autorank.recover import Recovery
from autorank.remotestore import is_url
from autorank.settings import made
from autorank.yamlfile import explain, parse, read_text

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}

NO_CLIENT = (
    "ray:// is not supported: Ray Tune would search inside the cluster, away from the sweep directory; make this "
    "machine a node (ray start --address=HOST:PORT --num-cpus=0) and give HOST:PORT, or run the sweep in the cluster: "
    "autorank submit"
)

FILE_SCHEMES = ("parquet", "imagefolder")
"""Data sources that name files or directories."""

RESUMABLE = frozenset(
    {"trials", "max_time", "trial_timeout", "max_drop", "tracking", "tracking_uri", "experiment"}
    | {"executor", "workers", "address", "cpus_per_trial", "gpus_per_trial", "device"}
)
"""Settings that may be given anew when a sweep goes on; the others shape its results."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class StrategyConfig(_Section):
    """Which strategy proposes plans, and its options."""

    name: str = "auto"
    options: dict[str, Any] = Field(default_factory=dict)


class PruningConfig(_Section):
    """Early stopping of hopeless trials before the fine-tune.

    `patience` is how many earlier trials must be better at the same cheap fidelity and no costlier (0: never stop
    early), `margin` by how much, in units of the score.
    """

    patience: int = Field(default=3, ge=0)
    margin: float = Field(default=2.0, ge=0)


class LatencyConfig(_Section):
    """How latency is measured: batch size and number of threads."""

    batch: int = Field(default=1, ge=1)
    threads: int = Field(default=1, ge=1)


class SweepConfig(_Section):
    """Everything that a sweep depends on; docs/sweepfile.md says what each key is."""

    model: str | None = None
    model_args: dict[str, Any] = Field(default_factory=dict)
    weights: str | None = None
    data: str | None = None
    data_args: dict[str, Any] = Field(default_factory=dict)
    validation: float = Field(0.1, gt=0)
    space: str | dict[str, Any] = "default"
    strategy: StrategyConfig = StrategyConfig()
    trials: int = Field(40, ge=1)
    max_time: float | None = Field(None, gt=0)
    trial_timeout: float | None = Field(None, gt=0)
    objectives: tuple[str, ...] = ("score", "macs")
    constraints: tuple[str, ...] = ()
    seed: int = Field(0, ge=0, lt=2**32)
    device: str = "auto"
    executor: Literal["ray", "inline"] = "ray"
    address: str | None = None
    workers: int | None = Field(None, ge=1)
    cpus_per_trial: float | None = Field(None, gt=0)
    gpus_per_trial: float | None = Field(None, ge=0)
    threads: int = Field(1, ge=1)
    lookahead: int | None = Field(None, ge=1)
    sweep_dir: str | None = None
    tracking: bool = True
    tracking_uri: str | None = None
    experiment: str = Field("autorank", min_length=1)
    recovery: Recovery = Recovery()
    quantization: QuantSettings = QuantSettings()
    pruning: PruningConfig = PruningConfig()
    latency: LatencyConfig = LatencyConfig()
    calibration: int = Field(512, ge=1)
    max_drop: float | None = Field(None, ge=0)
    predictions: Literal["curvature", "measured"] = "curvature"
    reuse: str | None = None

    @property
    def cluster(self) -> str | None:
        """Address of the Ray cluster that the sweep joins; None for a Ray of its own, or none at all."""
        return None if self.executor == "inline" or self.address == "local" else self.address

    @property
    def cpus(self) -> float:
        """CPUs that are set aside for a trial."""
        return self.cpus_per_trial or float(self.threads)

    def gpus(self, device: str) -> float:
        """Return how many GPUs are set aside for a trial: on a cluster one where trials run on GPUs, else none."""
        if self.gpus_per_trial is not None:
            return self.gpus_per_trial
        return float(self.cluster is not None and device.startswith("cuda"))

    @model_validator(mode="before")
    @classmethod
    def _threads(cls, data: Any) -> Any:
        # Filled in once: threads shape the last digits of results, so a resumed sweep keeps them.
        cpus = data.get("cpus_per_trial")
        if data.get("threads") is None and isinstance(cpus, int | float) and 1 <= cpus < float("inf"):
            return {**data, "threads": int(cpus)}
        return data

    @field_validator("address")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        if value is not None and value.startswith("ray://"):
            raise PydanticCustomError("address", "{why}", {"why": NO_CLIENT})
        host, colon, port = (value or "auto").rpartition(":")
        if value not in (None, "local", "auto") and not (host and colon and port.isdigit() and 0 < int(port) < 65536):
            raise ValueError("local, auto, or host:port of a Ray cluster, such as 10.0.0.1:6379")
        return value

    @field_validator("gpus_per_trial")
    @classmethod
    def _whole_gpus(cls, value: float | None) -> float | None:
        if value is not None and value > 1 and value != int(value):
            raise ValueError("a fraction of one GPU, or a whole number of them")
        return value

    @field_validator("max_time", "trial_timeout", mode="before")
    @classmethod
    def _duration(cls, value: object) -> object:
        return parse_duration(value) if isinstance(value, str) else value

    @field_validator("validation")
    @classmethod
    def _fraction_or_count(cls, value: float) -> float:
        if value >= 1 and value != int(value):
            raise ValueError("a fraction below 1 or a whole number of examples")
        return value

    @field_validator("weights", "data", "space", "sweep_dir", "reuse", mode="before")
    @classmethod
    def _path(cls, value: object) -> object:
        path = os.fspath(value) if isinstance(value, os.PathLike) else value
        if isinstance(path, str) and (len(path) > 4000 or max(map(len, path.split("/"))) > 255):
            raise ValueError("a path: it is too long for one")
        return path

    @field_validator("recovery", mode="before")
    @classmethod
    def _recovery(cls, value: object) -> object:
        return _section(Recovery, "recovery", value) if isinstance(value, Mapping) else value

    @field_validator("quantization", mode="before")
    @classmethod
    def _quantization(cls, value: object) -> object:
        return _section(QuantSettings, "quantization", value) if isinstance(value, Mapping) else value

    @field_validator("objectives", "constraints", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("strategy", mode="before")
    @classmethod
    def _named(cls, value: object) -> object:
        return {"name": value} if isinstance(value, str) else value


def _section(kind: type[Any], what: str, given: Mapping[str, Any]) -> object:
    """Return a section's settings; what is said of a key or a value becomes an error of the section."""
    try:
        return made(kind, what, given)
    except ConfigError as error:
        raise PydanticCustomError(what, "{error}", {"error": str(error).removeprefix(f"{what}: ")}) from None


def parse_duration(text: str) -> float:
    """Return seconds from ``"90"``, ``"90s"``, ``"30m"``, ``"1.5h"`` or ``"1h30m"``."""
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd]?)", text.replace(" ", ""))
    if not parts or "".join(n + u for n, u in parts) != text.replace(" ", ""):
        raise ValueError("a time such as 90s, 30m, 1.5h or 1h30m")
    return sum(float(number) * _UNITS[unit or "s"] for number, unit in parts)


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with the values of `over` in their place, section by section; None in `over` means not given."""
    result = dict(base)
    for key, value in over.items():
        if value is None:
            continue
        section = result.get(key)
        if isinstance(value, Mapping) and isinstance(section, Mapping) and key != "space":
            result[key] = {**section, **value}
        else:
            result[key] = value
    return result


def read_config(path: Path | None, flags: Mapping[str, Any]) -> SweepConfig:
    """Read a sweep file and lay the flags over it.

    Relative paths in the file (weights, space, data) are taken from the file's own directory.

    Raises
    ------
    ConfigError
        One line: file, key, what is wrong, what is allowed.
    """
    data: dict[str, Any] = {}
    where = "the command line"
    if path is not None:
        where = str(path)
        loaded = parse(read_text(path, ConfigError), where, ConfigError)
        if not isinstance(loaded, Mapping):
            raise ConfigError(f"{path}: a sweep file is a mapping of keys such as model, data, trials")
        data = rooted({str(k): v for k, v in loaded.items()}, path.resolve().parent)
        if isinstance(data.get("strategy"), str) and isinstance(flags.get("strategy"), Mapping):
            data["strategy"] = {"name": data["strategy"]}
        flagged, filed = flags.get("strategy"), data.get("strategy")
        if (
            isinstance(flagged, Mapping)
            and isinstance(filed, Mapping)
            and flagged.get("name", filed.get("name")) != (filed.get("name"))
        ):
            data["strategy"] = {}  # another strategy has other options
    return make_config(merged(data, rooted(flags, Path.cwd())), where)


def make_config(data: Mapping[str, Any], where: str = "settings") -> SweepConfig:
    """Validate settings; ConfigError names `where`, the key and what is allowed."""
    try:
        return SweepConfig.model_validate(dict(data))
    except ValidationError as error:
        raise ConfigError(f"{where}: {explain(error, SweepConfig)}") from None


def whole(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as they are used: with the values of the environment in the place of ``${NAME}``.

    Raises
    ------
    ConfigError
        A variable is not set, or a secret is missing because it was not kept with the sweep.
    """
    if gone := lost(settings):
        raise ConfigError(
            f"{gone} holds a secret, and secrets are not kept with a sweep: give it again, or start sweeps with "
            "${NAME} in its place, which stands for the environment's variable NAME"
        )
    try:
        return {key: filled(value) for key, value in settings.items()}
    except KeyError as error:
        raise ConfigError(f"the settings name ${{{error.args[0]}}}, which is not set in the environment") from None


def rooted(settings: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """Return the settings with paths that exist below `root` made absolute, so that they hold from any directory."""
    data = dict(settings)
    for key in ("weights", "space"):
        value = data.get(key)
        if isinstance(value, str) and _is_there(root / value, Path.is_file):
            data[key] = str((root / value).resolve())
    if isinstance(data.get("reuse"), str) and not is_url(data["reuse"]):
        data["reuse"] = os.path.abspath(root / data["reuse"])
    source = data.get("data")
    if isinstance(source, str):
        scheme, _, rest = source.partition(":")
        if scheme in FILE_SCHEMES:
            rooted_parts = (_rooted(scheme, part, root) for part in parts_of(scheme, rest))
            data["data"] = f"{scheme}:{','.join(rooted_parts)}"
    return data


def parts_of(scheme: str, place: str) -> list[str]:
    """Return the places that a data source names: ``parquet:`` takes several, with commas between them."""
    return place.split(",") if scheme == "parquet" else [place]


def _rooted(scheme: str, part: str, root: Path) -> str:
    pattern = scheme == "parquet" and glob.has_magic(part) and not part.startswith("~")
    return str((root / part).resolve()) if pattern or _is_there(root / part) else part


def _is_there(path: Path, look: Callable[[Path], bool] = Path.exists) -> bool:
    try:
        return look(path)
    except (OSError, ValueError):  # a name that no file can have
        return False
