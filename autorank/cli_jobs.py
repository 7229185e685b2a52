"""The commands that run sweeps on a cluster: submit, jobs, logs, stop."""

from __future__ import annotations

import inspect
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from autorank.errors import ConfigError, JobError

Address = Annotated[
    str | None,
    typer.Option(
        help="The cluster's dashboard, such as http://HEAD:8265 (default: RAY_API_SERVER_ADDRESS or RAY_ADDRESS)."
    ),
]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="A job, as `autorank jobs` lists it.")]
SweepDir = Annotated[
    str | None,
    typer.Option(help="Where the sweep is kept: an absolute path on storage that all nodes of the cluster share."),
]

_SUBMIT = """Run a sweep as a job on a Ray cluster; the flags are those of `search`, and this machine may go away.

    The sweep file, local weights and small local data, and the code of python: names (the current directory) are
    uploaded. The token of the cluster comes from RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN.
    """


def register(
    app: typer.Typer, search: Callable[..., None], flags: Callable[[Mapping[str, Any]], dict[str, Any]]
) -> None:
    """Add the commands to `app`; `submit` takes the parameters of `search`, which `flags` makes settings of."""
    app.command("submit")(_submit_like(search, flags))
    app.command("jobs")(jobs)
    app.command("logs")(logs)
    app.command("stop")(stop)


def _submit_like(
    search: Callable[..., None], flags: Callable[[Mapping[str, Any]], dict[str, Any]]
) -> Callable[..., None]:
    own = inspect.signature(_submit, eval_str=True).parameters
    same = inspect.signature(search, eval_str=True).parameters

    def submit(**given: Any) -> None:
        from autorank.config import read_config

        mine = {name: given.pop(name) for name in own if name not in ("settings", "sweep_dir")}
        if given["sweep_dir"] is None and mine["resume"]:
            raise ConfigError("--resume: give the sweep's directory on the cluster with --sweep-dir")
        settings = read_config(given.pop("config"), flags({"address": None, "quiet": False, **given}))
        _submit(settings=settings, sweep_dir=given["sweep_dir"], **mine)

    kept = [p for name, p in same.items() if name not in own and name not in ("address", "quiet")]
    added = [p.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD) for name, p in own.items() if name != "settings"]
    parameters = [*kept, *added]
    submit.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    submit.__annotations__ = {p.name: p.annotation for p in parameters}
    submit.__doc__ = _SUBMIT
    return submit


def _submit(
    *,
    settings: Any,
    sweep_dir: SweepDir = None,
    address: Address = None,
    code: Annotated[
        Path | None, typer.Option(help="Directory of the code of python: names (default: the current one).")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Pattern of code that is not uploaded; may be repeated.")
    ] = None,
    paths_on_cluster: Annotated[
        bool, typer.Option("--paths-on-cluster", help="Weights and data are paths on the cluster; upload none.")
    ] = False,
    driver_cpus: Annotated[
        float, typer.Option(min=0, help="Cores reserved for the process that leads the sweep (0: on the head node).")
    ] = 0,
    driver_gpus: Annotated[float, typer.Option(min=0, help="GPUs reserved for it, which measures the front.")] = 0,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on with the sweep in --sweep-dir, which a job began; --trials may extend it."
        ),
    ] = False,
) -> None:
    from autorank.jobs import Jobs, check_sweep_dir

    check_sweep_dir(settings.sweep_dir)
    if not resume and (settings.model is None or settings.data is None):
        raise ConfigError("name --model and --data, or model: and data: in a sweep file")
    changes = _changes(settings) if resume else {}
    server = Jobs(address)
    if server.open_to_all:
        _note(f"{server.address} asks for no token: whoever reaches it can run anything there")
    driver = {"driver_cpus": driver_cpus, "driver_gpus": driver_gpus}
    if resume:
        job = server.resume(settings.sweep_dir, changes, **driver)
    else:
        job, notes = server.submit(
            settings, code=code, exclude=exclude or (), paths_are_there=paths_on_cluster, **driver
        )
        for line in notes:
            _note(line)
    typer.echo(job)
    where = _where(address)
    _say(f"follow it: autorank logs {job} --follow{where}; stop it: autorank stop {job}{where}")


def _changes(settings: Any) -> dict[str, Any]:
    """Return what was given, when `autorank resume` takes it; anything else cannot change."""
    from autorank.config import RESUMABLE

    given = settings.model_dump(mode="json", exclude_unset=True)
    if "cpus_per_trial" in given:
        given.pop("threads", None)  # filled in from it; the sweep keeps its own
    names = RESUMABLE - {"address", "experiment", "tracking"}  # a job's cluster is its own; the others have no flag
    wrong = sorted(set(given) - names - {"sweep_dir"})
    if wrong:
        raise ConfigError(f"{wrong[0]} cannot change when a sweep is resumed; only {', '.join(sorted(names))} can")
    return {key: value for key, value in given.items() if key in names}


def jobs(
    address: Address = None,
    every: Annotated[bool, typer.Option("--all", help="Not only the last 20.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the sweeps on a cluster, the newest first: job, state, trials, sweep directory."""
    from autorank.captions import clean
    from autorank.jobs import Jobs
    from autorank.show import table
    from autorank.terminal import standard_output

    server = Jobs(address)
    found = server.all()
    shown = [server.with_trials(job) for job in (found if every else found[:20])]
    if as_json:
        typer.echo(json.dumps([vars(job) for job in shown], indent=2))
        return
    if not shown:
        typer.echo(f"{server.address} has no jobs of autorank")
        return
    rows = [
        (
            clean(job.id),
            job.state,
            "{} of {}".format(*job.trials) if job.trials else "",
            time.strftime("%Y-%m-%d %H:%M", time.localtime(job.started)) if job.started else "",
            clean(job.sweep, 200),
        )
        for job in shown
    ]
    columns = [("job", False), ("state", False), ("trials", True), ("started", False), ("sweep directory", False)]
    standard_output().print(table("", columns, rows))
    if len(found) > len(shown):
        _say(f"and {len(found) - len(shown)} older ones: --all")


def logs(
    job: JobId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job is over.")] = False,
    address: Address = None,
) -> None:
    """Print what a job printed; with --follow until it is over. Ctrl-C ends the following only."""
    from autorank.jobs import Jobs

    server = Jobs(address)
    found = server.get(job)
    if not follow:
        _write(server.log(job))
        return
    try:
        found = server.follow(job, _write)
    except KeyboardInterrupt:
        _say("no longer followed; the job goes on")
        return
    if found.state == "failed":
        raise JobError(f"{job} failed: {found.why}")
    _say(f"{job}: {found.state}")


def stop(
    job: JobId,
    now: Annotated[bool, typer.Option("--now", help="End it at once; finished trials are safe.")] = False,
    address: Address = None,
) -> None:
    """Ask a job to finish its running trials and save, as one Ctrl-C would; --now ends it at once."""
    from autorank.jobs import Jobs

    server = Jobs(address)
    server.stop(job, now)
    sweep = server.get(job).sweep
    _say(f"{job}: {'ended' if now else 'finishes its running trials and saves'}")
    _say(f"`autorank submit --resume --sweep-dir {sweep}{_where(address)}` goes on with it")


def _where(address: str | None) -> str:
    """Return the flag that a further command needs to reach the same cluster."""
    return f" --address {address}" if address else ""


def _write(text: str) -> None:
    """Print a log as it is, without what a terminal would act upon."""
    sys.stdout.write("".join(c for c in text if c.isprintable() or c in "\n\t"))
    sys.stdout.flush()


def _say(line: str) -> None:
    from autorank.captions import clean

    typer.echo(clean(line, 1000), err=True)


def _note(line: str) -> None:
    _say(f"note: {line}")
