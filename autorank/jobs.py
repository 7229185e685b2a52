"""Sweeps as jobs on a Ray cluster: submitted, listed, followed and stopped over its job server."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import secrets
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from shlex import join
from typing import TYPE_CHECKING, Any

from autorank.errors import ConfigError, JobError, MissingExtraError, did_you_mean, one_line
from autorank.remotestore import is_url

if TYPE_CHECKING:
    from autorank.config import SweepConfig

_SWEEP = "autorank.sweep_dir"
_ASKS = "autorank.stops"
_ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_EXTRA = "jobs need what Ray's dashboard needs (autorank's extra 'cluster'): pip install 'ray[default]'"
_TOKEN = "RAY_AUTH_TOKEN_PATH (a file) or RAY_AUTH_TOKEN must give the token of the cluster"
_GONE_AT_REBOOT = ("/tmp", "/var/tmp", "/dev", "/run", "/proc")
_INTERRUPTED = 130
_POLL = 0.5
_TRIES = 60
"""How often an interrupted connection is taken up again before the following ends."""
_LISTENED = re.compile(r"^(\d+)/(\d+) (?:complete|pruned|failed)\b", re.M)


@dataclass(frozen=True)
class Job:
    """A sweep on a cluster.

    Attributes
    ----------
    id : str
    state : {"waiting", "running", "done", "stopped", "failed"}
    sweep : str
        Its sweep directory, on the cluster.
    started : float
        Unix time in seconds; 0 when it is not known.
    why : str
        Of a failed job, in one line.
    trials : tuple of (done, asked for), or None
        As its log says; None when that is not known.
    """

    id: str
    state: str
    sweep: str
    started: float = 0.0
    why: str = ""
    trials: tuple[int, int] | None = None

    @property
    def over(self) -> bool:
        """Whether nothing of it runs any more."""
        return self.state not in ("waiting", "running")


def check_sweep_dir(path: str | None) -> list[str]:
    """Return what speaks against a sweep directory of a job.

    Raises
    ------
    ConfigError
        It is no path that outlives the job.
    """
    wanted = "an absolute path on storage that all nodes of the cluster share, such as --sweep-dir /shared/sweeps/net"
    if not path:
        raise ConfigError(f"a job needs a sweep directory that outlives it: {wanted}")
    if is_url(path):
        raise ConfigError(f"sweep_dir: a job keeps what was uploaded in its sweep directory, so no URL: give {wanted}")
    if not path.startswith("/"):
        raise ConfigError(f"sweep_dir: {path} would be gone with the job; give {wanted}")
    top = next((top for top in _GONE_AT_REBOOT if Path(os.path.normpath(path)).is_relative_to(top)), "")
    return [f"{path} lies below {top}, which is each node's own and does not last; better {wanted}"] if top else []


class Jobs:
    """The jobs of autorank on one cluster.

    Parameters
    ----------
    address : str or None
        Of the cluster's dashboard, such as ``http://head:8265``; by default RAY_API_SERVER_ADDRESS or RAY_ADDRESS.

    Raises
    ------
    JobError
        There is no job server, or it refuses the token.
    MissingExtraError
        ``ray[default]`` is not installed.
    """

    def __init__(self, address: str | None = None) -> None:
        self.address = _address(address)
        # Ray reads the first once, when it is imported, and would take the second from other variables.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ["RAY_API_SERVER_ADDRESS"] = self.address
        try:
            import aiohttp  # noqa: F401
            from ray.job_submission import JobSubmissionClient
        except ImportError:
            raise MissingExtraError(_EXTRA) from None
        for handler in logging.getLogger("ray").handlers:  # its modules set levels of their own
            handler.setLevel(logging.ERROR)
        with self._one_line():
            self._client = JobSubmissionClient(self.address)

    @property
    def open_to_all(self) -> bool:
        """Whether the server answers without a token."""
        import requests

        with self._one_line():
            return requests.get(f"{self.address}/api/version", timeout=30).status_code == 200

    def submit(
        self,
        config: SweepConfig,
        *,
        code: Path | None = None,
        exclude: Sequence[str] = (),
        paths_are_there: bool = False,
        driver_cpus: float = 0,
        driver_gpus: float = 0,
    ) -> tuple[str, list[str]]:
        """Start a sweep on the cluster.

        Parameters
        ----------
        config : SweepConfig
            With `sweep_dir`, a path on the cluster.
        code, exclude, paths_are_there
            As `autorank.jobfiles.pack` takes them; the code lies in the current directory by default.
        driver_cpus, driver_gpus : float
            Reserved for the process that leads the sweep; with none it runs on the head node.

        Returns
        -------
        str
            The job's id.
        list of str
            What a person should know.
        """
        from autorank.jobfiles import pack

        notes = check_sweep_dir(config.sweep_dir)
        assert config.sweep_dir is not None
        with tempfile.TemporaryDirectory(prefix="autorank-job-") as folder:
            notes += pack(config, Path(folder), code or Path.cwd(), exclude=exclude, paths_are_there=paths_are_there)
            named = self._start("search", config.sweep_dir, [], (driver_cpus, driver_gpus), folder)
        return named, notes

    def resume(
        self, sweep_dir: str, changes: Mapping[str, Any], *, driver_cpus: float = 0, driver_gpus: float = 0
    ) -> str:
        """Go on with a sweep that a job began, with settings that `autorank resume` takes. Returns the new job's id."""
        from autorank.jobfiles import refuse_secrets

        check_sweep_dir(sweep_dir)
        refuse_secrets(changes)  # whoever lists jobs sees their arguments
        arguments = [f"--{key.replace('_', '-')}={value}" for key, value in changes.items()]
        return self._start("resume", sweep_dir, arguments, (driver_cpus, driver_gpus))

    def _start(
        self, what: str, sweep: str, arguments: Sequence[str], driver: tuple[float, float], folder: str | None = None
    ) -> str:
        name = re.sub(r"[^A-Za-z0-9]+", "-", Path(sweep).name).strip("-").lower()[:40] or "sweep"
        job = f"autorank-{name}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"
        with self._one_line():
            return str(
                self._client.submit_job(
                    entrypoint=_entrypoint(what, sweep, job, *arguments),
                    submission_id=job,
                    runtime_env={"working_dir": folder} if folder else {},
                    metadata={"autorank": version("autorank"), _SWEEP: sweep},
                    entrypoint_num_cpus=driver[0] or None,
                    entrypoint_num_gpus=driver[1] or None,
                )
            )

    def all(self) -> list[Job]:
        """Return the jobs of autorank, the newest first."""
        with self._one_line():
            found = self._client.list_jobs()
        jobs = [_job(one) for one in found if one.submission_id and _SWEEP in (one.metadata or {})]
        return sorted(jobs, key=lambda job: -job.started)

    def with_trials(self, job: Job) -> Job:
        """Return a job with the number of its trials, from its log."""
        try:
            told = _LISTENED.findall(self.log(job.id))
        except JobError:
            return job  # the node that held its log is gone
        return Job(**{**vars(job), "trials": (int(told[-1][0]), int(told[-1][1]))}) if told else job

    def get(self, name: str) -> Job:
        """Return one job of autorank; JobError when there is none of that id."""
        jobs = {job.id: job for job in self.all()}
        if name not in jobs:
            raise JobError(
                f"{self.address} has no job {name!r} of autorank{did_you_mean(name, jobs)}; `autorank jobs` lists them"
            )
        return jobs[name]

    def log(self, name: str) -> str:
        """Return what a job printed so far."""
        with self._one_line():
            return str(self._client.get_job_logs(name))

    def follow(self, name: str, write: Callable[[str], object]) -> Job:
        """Write what a job prints until it is over, and return the job; a connection that breaks is taken up again."""
        shown = tries = 0

        async def tail(skip: int) -> None:
            nonlocal shown, tries
            place = 0
            chunks: AsyncIterator[str] = self._client.tail_job_logs(name)
            async for chunk in chunks:
                fresh = chunk[max(0, skip - place) :]
                place += len(chunk)
                if fresh:
                    write(fresh)
                    shown, tries = shown + len(fresh), 0

        while True:
            try:
                with self._one_line():
                    asyncio.run(tail(shown))
                    job = self.get(name)
                if job.over:
                    write(self.log(name)[shown:])
                    return job
            except JobError:
                tries += 1
                if tries > _TRIES:
                    raise
            time.sleep(_POLL)

    def stop(self, name: str, now: bool = False) -> None:
        """Ask a job to finish its running trials and save, or end it now.

        The question is put by a small job of its own, which leaves a file in the sweep directory.
        """
        job = self.get(name)
        if job.over:
            raise JobError(f"{name} does not run: it is {job.state}")
        with self._one_line():
            if now:
                self._client.stop_job(name)
                return
            asks = f"{name}-stop-{secrets.token_hex(2)}"
            self._client.submit_job(
                entrypoint=_entrypoint("stop", job.sweep, name), submission_id=asks, metadata={_ASKS: name}
            )
            while not (status := self._client.get_job_status(asks)).is_terminal():
                time.sleep(_POLL)
            said = self.log(asks).strip().rpartition("\n")[2]
            self._client.delete_job(asks)
        if status != "SUCCEEDED":
            raise JobError(f"{name} could not be asked to stop ({said}); --now ends it at once")

    @contextmanager
    def _one_line(self) -> Iterator[None]:
        """Turn what Ray raises into one line."""
        import aiohttp
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            said = str(error)
            if said.startswith("Authentication failed"):
                raise JobError(f"{self.address} refuses the token: {_TOKEN}") from None
            raise JobError(f"{self.address} asks for a token, and there is none here: {_TOKEN}") from None
        except ConnectionError:
            raise JobError(
                f"no Ray job server answers at {self.address}: is the cluster up, with its dashboard, and is this the "
                "dashboard's port (8265 by default)?"
            ) from None
        except (RuntimeError, OSError, KeyError, ValueError, aiohttp.ClientError) as error:
            raise JobError(f"{self.address}: {_last_line(str(error)) or type(error).__name__}") from None


def _address(given: str | None) -> str:
    address = given or next(filter(None, map(os.environ.get, _ADDRESSES)), None)
    example = "such as http://HEAD:8265"
    if address is None:
        raise ConfigError(f"which cluster? Give --address, or set {_ADDRESSES[0]}: its dashboard, {example}")
    if not re.match(r"https?://[^/@\s]+/?$", address):
        raise ConfigError(f"address {address!r}: give the address of the cluster's dashboard, {example}")
    return address.rstrip("/")


def _entrypoint(what: str, *arguments: str) -> str:
    # `exec`: signals reach Python itself, not a shell before it.
    return "exec " + join(["python", "-m", "autorank.jobrun", what, *arguments])


def _job(details: Any) -> Job:
    status, code = str(details.status.value), details.driver_exit_code
    states = {"PENDING": "waiting", "RUNNING": "running", "SUCCEEDED": "done", "STOPPED": "stopped"}
    state = states.get(status, "stopped" if code == _INTERRUPTED else "failed")
    why = _last_line(details.message or "") if state == "failed" else ""
    return Job(details.submission_id, state, details.metadata[_SWEEP], (details.start_time or 0) / 1000, why)


def _last_line(text: str) -> str:
    """Return what is worth reading of a server's words, which may be a whole traceback or log."""
    return one_line(next((line for line in reversed(text.splitlines()) if line.strip()), ""), 300)
