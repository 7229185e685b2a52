"""The command line; thin: it reads flags, calls the package, and prints."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from autorank import cli_jobs
from autorank.errors import AutorankError, ConfigError, SweepError

app = typer.Typer(
    help="Find smaller and faster copies of a trained PyTorch network.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

Sweep = Annotated[str, typer.Argument(help="Sweep directory, as the search printed it, or its URL.")]
Model = Annotated[
    str | None,
    typer.Option(
        help="Model factory: python:pkg.mod:factory, timm:NAME, torchvision:NAME or torchhub:REPO:NAME "
        "(the last three need the extra 'vision')."
    ),
]
Weights = Annotated[
    str | None, typer.Option(help="Weights: a .safetensors file, or a .pt/.pth state dict (read weights only).")
]
Data = Annotated[
    str | None,
    typer.Option(
        help="Data: digits, hf:NAME, parquet:DIR-OR-FILES, imagefolder:DIR or python:pkg.mod:factory. "
        "The validation split is taken off the training data."
    ),
]
ModelArg = Annotated[
    list[str] | None, typer.Option("--model-arg", help="KEY=VALUE for the model factory; may be repeated.")
]
DataArg = Annotated[
    list[str] | None,
    typer.Option("--data-arg", help="KEY=VALUE for the data (image_size, mean, std, augment, …); may be repeated."),
]
Device = Annotated[str | None, typer.Option(help="auto (default), cpu, cuda or cuda:N.")]
Trials = Annotated[int | None, typer.Option(min=1, help="How many plans to try (default 40).")]
MaxTime = Annotated[str | None, typer.Option(help="Start no trial after this time: 90s, 30m, 1h30m.")]
TrialTimeout = Annotated[
    str | None, typer.Option(help="End a trial that takes longer, as failed: 90s, 30m (default: none does).")
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Trials at a time (default: cores / threads; on a cluster what is free).")
]
Executor = Annotated[str | None, typer.Option(help="ray (default), or inline: one process, no Ray, no MLflow.")]
Address = Annotated[
    str | None,
    typer.Option(help="Ray cluster to join: auto or HOST:PORT (default local: a Ray of its own on this machine)."),
]
CpusPerTrial = Annotated[
    float | None,
    typer.Option("--cpus-per-trial", help="CPUs that Ray sets aside for a trial (default 1; 0.5 is allowed)."),
]
GpusPerTrial = Annotated[
    float | None,
    typer.Option(
        "--gpus-per-trial", help="GPUs likewise (default 0; with --address and --device cuda 1; 0.5 is allowed)."
    ),
]
MaxDrop = Annotated[
    float | None,
    typer.Option(help="Score that the recommended model may lose (default: 1 point of accuracy, 2 % of others)."),
]
TrackingUri = Annotated[
    str | None, typer.Option(help="MLflow server or database (default: mlflow.db beside the sweep directory).")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on standard error.")]


@app.command()
def search(
    config: Annotated[
        Path | None, typer.Argument(help="Sweep file (YAML) with any of these settings; flags win over it.")
    ] = None,
    model: Model = None,
    weights: Weights = None,
    data: Data = None,
    model_arg: ModelArg = None,
    data_arg: DataArg = None,
    validation: Annotated[
        str | None, typer.Option(help="Size of the validation split: a fraction (default 0.1) or a number of examples.")
    ] = None,
    space: Annotated[
        str | None,
        typer.Option(help="Search space: a YAML file or a shipped name (see `autorank spaces`; default: default)."),
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(help="How plans are chosen: auto (default), knapsack, tpe, … (see `autorank strategies`)."),
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", help="KEY=VALUE for the strategy; may be repeated.")
    ] = None,
    reuse: Annotated[
        str | None, typer.Option(help="An earlier sweep on the same model and data, whose trials are not run again.")
    ] = None,
    trials: Trials = None,
    max_time: MaxTime = None,
    trial_timeout: TrialTimeout = None,
    objectives: Annotated[
        str | None,
        typer.Option(
            help="Two or three of accuracy (the score), macs, params, bytes, bops, latency (default accuracy,macs)."
        ),
    ] = None,
    constraint: Annotated[
        list[str] | None, typer.Option(help='Bound on every point, such as "macs_kept<=0.5"; may be repeated.')
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=0, help="Fine-tune steps of a trial (default 100; 0: no fine-tune).")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate of the fine-tune (default 0.02).")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of split, batches and search (default 0).")] = None,
    device: Device = None,
    sweep_dir: Annotated[
        str | None,
        typer.Option(
            help="Where the sweep is kept: a directory, or an fsspec URL such as s3://bucket/sweeps/net "
            "(default: a new directory under sweeps/)."
        ),
    ] = None,
    executor: Executor = None,
    workers: Workers = None,
    address: Address = None,
    cpus_per_trial: CpusPerTrial = None,
    gpus_per_trial: GpusPerTrial = None,
    tracking_uri: TrackingUri = None,
    max_drop: MaxDrop = None,
    quiet: Quiet = False,
) -> None:
    """Run a sweep: try formats and ranks for every layer, and print the front of score against cost.

    Example: autorank search --model python:my.net:make --weights net.safetensors --data parquet:data/ --trials 60
    """
    flags = _flags(locals())
    from autorank.config import read_config
    from autorank.sweep import search as run_search

    settings = read_config(config, flags)
    result = run_search(**settings.model_dump(), progress=not quiet)
    _print_result(result)


@app.command()
def resume(
    sweep: Sweep,
    trials: Trials = None,
    max_time: MaxTime = None,
    trial_timeout: TrialTimeout = None,
    executor: Executor = None,
    workers: Workers = None,
    address: Address = None,
    cpus_per_trial: CpusPerTrial = None,
    gpus_per_trial: GpusPerTrial = None,
    device: Device = None,
    tracking_uri: TrackingUri = None,
    max_drop: MaxDrop = None,
    quiet: Quiet = False,
) -> None:
    """Go on with a sweep after any stop; finished trials are never run again. More --trials extend it.

    What is not given stays as it was when the sweep was started, whatever is called default below.
    """
    from autorank.sweep import resume as run_resume

    result = run_resume(
        sweep,
        progress=not quiet,
        trials=trials,
        max_time=max_time,
        trial_timeout=trial_timeout,
        executor=executor,
        workers=workers,
        address=address,
        cpus_per_trial=cpus_per_trial,
        gpus_per_trial=gpus_per_trial,
        device=device,
        tracking_uri=tracking_uri,
        max_drop=max_drop,
    )
    _print_result(result)


@app.command()
def profile(
    model: Model = None,
    weights: Weights = None,
    data: Data = None,
    model_arg: ModelArg = None,
    data_arg: DataArg = None,
    input_shape: Annotated[
        list[str] | None,
        typer.Option("--input", help="Shape of one example instead of --data, such as 3x224x224; once per input."),
    ] = None,
    space: Annotated[
        str | None, typer.Option(help="Also count the candidates that this search space gives each layer.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the layers of a model, what they cost, and which are left alone and why. Needs --data or --input."""
    from autorank.show import print_profile

    print_profile(
        model=model,
        weights=weights,
        data=data,
        model_args=_pairs(model_arg, "--model-arg") or {},
        data_args=_pairs(data_arg, "--data-arg") or {},
        shapes=[_shape(text) for text in input_shape or []],
        space=space,
        as_json=as_json,
    )


@app.command()
def front(
    sweep: Sweep,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
) -> None:
    """Print the front of a sweep (also while it runs): the points that no other point beats."""
    from autorank.show import print_front
    from autorank.sweep import open_sweep

    if as_json and as_csv:
        raise ConfigError("--json and --csv were both given; choose one")
    print_front(open_sweep(sweep), "json" if as_json else "csv" if as_csv else "table")


@app.command()
def watch(
    sweep: Sweep,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between looks.")] = 1.0,
) -> None:
    """Follow a sweep from another shell, from its journal alone, until it ends; Ctrl-C ends the watching only."""
    from autorank.remotewatch import followed
    from autorank.show import print_result
    from autorank.sweep import open_sweep
    from autorank.terminal import watch as follow

    with followed([sweep], _say) as (directory,):
        state = follow(directory, interval)
    if state.stage == "ended":
        print_result(open_sweep(sweep))
    elif state.stage == "stopped":
        raise SweepError(f"no process works on {sweep}, which did not end by itself: `autorank resume {sweep}` goes on")


@app.command()
def dashboard(
    places: Annotated[
        list[str] | None,
        typer.Argument(help="Sweep directories, or directories of sweeps, or URLs of either (default: sweeps)."),
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port (default: the first free one from 5000 on).")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 127.0.0.1 is this machine alone.")] = "127.0.0.1",
    tracking_uri: Annotated[
        str | None, typer.Option(help="MLflow server or database (default: the database beside the sweeps).")
    ] = None,
    browser: Annotated[bool, typer.Option(help="Open the page in the browser.")] = True,
) -> None:
    """Serve the live dashboard and MLflow, in one process on one port, until Ctrl-C."""
    from autorank.dashboards.server import serve
    from autorank.remotewatch import followed

    with followed(places or ["sweeps"], _say, folders=True) as directories:
        serve(directories, host=host, port=port, tracking_uri=tracking_uri, browse=browser, say=typer.echo)


@app.command()
def export(
    sweep: Sweep,
    point: Annotated[
        str | None, typer.Option(help="Trial number or plan id from `autorank front`; or best, cheapest, knee.")
    ] = None,
    max_drop: Annotated[float | None, typer.Option(help="Cheapest point that loses at most this many points.")] = None,
    min_score: Annotated[float | None, typer.Option(help="Cheapest point with at least this score.")] = None,
    max_macs: Annotated[float | None, typer.Option(help="Best point with at most this share of the MACs.")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory to write (default: SWEEP/exports/NUMBER).")] = None,
    formats: Annotated[str, typer.Option(help="Of safetensors, pt2, onnx.")] = "safetensors,pt2,onnx",
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier export.")] = False,
) -> None:
    """Write the chosen model as plan.json + safetensors, .pt2 and ONNX, each loaded back and compared.

    Without --point, --max-drop, --min-score or --max-macs the recommended point is written.
    """
    from autorank.show import print_choice
    from autorank.sweep import open_sweep

    found = open_sweep(sweep)
    rule = {"point": point, "max_drop": max_drop, "min_score": min_score, "max_macs": max_macs}
    print_choice(found, found.best(**rule))  # type: ignore[arg-type]
    result = found.export(
        out,
        formats=[name.strip() for name in formats.split(",") if name.strip()],
        overwrite=overwrite,
        say=lambda line: typer.echo(line, err=True),
        point=point,
        max_drop=max_drop,
        min_score=min_score,
        max_macs=max_macs,
    )
    failed = [check for check in result.checks if not check.passed]
    said = f"{len(failed)} of {len(result.checks)} checks failed, see report.md" if failed else "all checks passed"
    typer.echo(f"exported to {result.directory}: {said}")


@app.command()
def spaces(name: Annotated[str | None, typer.Argument(help="Print this space's file.")] = None) -> None:
    """List the search spaces that ship with autorank, or print one as a start for your own."""
    from autorank.show import print_spaces

    print_spaces(name)


@app.command()
def strategies(
    markdown: Annotated[bool, typer.Option("--markdown", help="As Markdown.")] = False,
) -> None:
    """List the strategies by which plans are chosen, with their options."""
    from autorank.show import print_strategies

    print_strategies(markdown)


@app.command()
def formats(
    markdown: Annotated[bool, typer.Option("--markdown", help="As Markdown, with the reasons.")] = False,
) -> None:
    """Show which decomposition format takes which kind of layer, and why not where it does not."""
    from autorank.show import print_formats

    print_formats(markdown)


@app.command()
def demo(
    directory: Annotated[Path, typer.Option(help="Where to keep weights and sweep.")] = Path("sweeps"),
    trials: Annotated[int, typer.Option(min=1, help="How many plans to try.")] = 40,
) -> None:
    """Train a small network on scikit-learn's digits, search on it, print the front, export the best model."""
    from autorank.demo import run

    run(directory, trials)


@app.command()
def version() -> None:
    """Print the versions of autorank and of what it stands on."""
    from autorank.trial import versions

    for name, number in versions().items():
        typer.echo(f"{name} {number}")


def main() -> None:
    """Run the command line; what a user can get wrong ends in one line on standard error and exit status 2."""
    try:
        app()
    except AutorankError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


_NO_SETTINGS = {"config", "quiet", "model_arg", "data_arg", "option", "constraint", "steps", "lr"}


def _flags(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of `search` as settings; most have a setting's name and value."""
    same = {name: value for name, value in given.items() if name not in _NO_SETTINGS}
    paths = {name: given[name] or None for name in ("reuse", "sweep_dir")}
    return {
        **same,
        **paths,
        "model_args": _pairs(given["model_arg"], "--model-arg"),
        "data_args": _pairs(given["data_arg"], "--data-arg"),
        "validation": _number(given["validation"], "--validation"),
        "strategy": _given(name=given["strategy"], options=_pairs(given["option"], "--option")),
        "constraints": given["constraint"] or None,
        "recovery": _given(steps=given["steps"], lr=given["lr"]),
    }


def _print_result(result: Any) -> None:
    from autorank.show import print_result

    print_result(result)
    if result.ended == "interrupted":
        raise typer.Exit(130)


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _given(**values: Any) -> dict[str, Any] | None:
    """Return the values that are not None; None when there are none."""
    return {key: value for key, value in values.items() if value is not None} or None


def _pairs(items: list[str] | None, flag: str) -> dict[str, Any] | None:
    """Read KEY=VALUE items; values are read as YAML scalars, so 3 is a number and [0.5, 0.5] a list."""
    import yaml

    if not items:
        return None
    pairs = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise ConfigError(f"{flag} {item!r}: write KEY=VALUE")
        try:
            pairs[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"{flag} {item!r}: the value is not readable") from None
    return pairs


def _number(text: str | None, flag: str) -> int | float | None:
    if text is None:
        return None
    try:
        return int(text) if text.strip().lstrip("+-").isdigit() else float(text)
    except ValueError:
        raise ConfigError(
            f"{flag} {text!r} is not a number; give a fraction such as 0.1 or a count such as 500"
        ) from None


def _shape(text: str) -> tuple[int, ...]:
    parts = text.lower().replace(",", "x").split("x")
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ConfigError(f"--input {text!r}: write the shape of one example, such as 3x224x224")
    return tuple(int(part) for part in parts)


cli_jobs.register(app, search, _flags)

if __name__ == "__main__":
    main()
