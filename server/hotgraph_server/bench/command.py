"""`hotgraph bench`: flags to settings, then the run, its tables and its files. It measures nothing itself."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Coroutine
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, TypeVar

import typer

from hotgraph_client import Client, Model, TlsConfig
from hotgraph_server.bench.arrivals import KINDS
from hotgraph_server.bench.compare import ComparisonError
from hotgraph_server.bench.environment import describe_environment, usable_cpus
from hotgraph_server.bench.load import Limit
from hotgraph_server.bench.progress import run_progress
from hotgraph_server.bench.record import write_csv, write_json
from hotgraph_server.bench.report import render_comparison, render_result
from hotgraph_server.bench.result import evaluate
from hotgraph_server.bench.run import LoadSettings, describe_model, run_load
from hotgraph_server.bench.run_comparison import ComparisonSettings, run_comparison
from hotgraph_server.bench.sender import Connection, RequestOptions
from hotgraph_server.bench.transformers_process import ChildError
from hotgraph_server.bench.workload import Lengths
from hotgraph_server.cli.child import ChildDaemon
from hotgraph_server.cli.connection import ConnectionOptions, seconds
from hotgraph_server.cli.extras import require_server
from hotgraph_server.cli.failures import CommandError, ExitStatus
from hotgraph_server.cli.models import DEFAULT_MODEL, progress_bar
from hotgraph_server.cli.options import with_groups
from hotgraph_server.cli.output import console

T = TypeVar("T")

DEFAULT_REQUESTS = 100

_START_SECONDS = 300.0

_LOAD, _WORK, _OUTPUT, _COMPARE = "Load", "Requests", "Output", "Comparison"


def _lengths(text: str) -> Lengths:
    try:
        return Lengths.parse(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _gate(text: str) -> tuple[int, float]:
    clients, _, ratio = text.partition("=")
    try:
        return int(clients), float(ratio)
    except ValueError:
        raise typer.BadParameter(f"no gate: {text!r}; write CLIENTS=RATIO, such as 8=2.5") from None


@with_groups
def bench(
    connection: ConnectionOptions,
    rate: Annotated[
        float | None,
        typer.Option(
            min=0.001, help="Open loop: so many requests a second, whatever the server does.", rich_help_panel=_LOAD
        ),
    ] = None,
    clients: Annotated[
        int,
        typer.Option("--clients", "-c", min=1, max=4096, help="Closed loop: so many clients.", rich_help_panel=_LOAD),
    ] = 1,
    requests: Annotated[
        int | None,
        typer.Option(
            "--requests",
            "-n",
            min=1,
            help=f"Stop after so many requests. Default: {DEFAULT_REQUESTS}, unless --duration is given.",
            rich_help_panel=_LOAD,
        ),
    ] = None,
    duration: Annotated[
        str | None, typer.Option(metavar="TIME", help="Send no more after this, such as 30s.", rich_help_panel=_LOAD)
    ] = None,
    gap: Annotated[
        str,
        typer.Option(metavar="TIME", help="Closed loop: pause of a client between requests.", rich_help_panel=_LOAD),
    ] = "0s",
    arrivals: Annotated[str, typer.Option(help="Open loop: poisson or constant.", rich_help_panel=_LOAD)] = "poisson",
    warmup: Annotated[int, typer.Option(min=0, help="Requests before measuring begins.", rich_help_panel=_LOAD)] = 8,
    prompt_tokens: Annotated[
        str,
        typer.Option(
            metavar="LENGTHS", help="Prompt lengths: 128, 16,64,256 in turn, or 10-500.", rich_help_panel=_WORK
        ),
    ] = "128",
    output_tokens: Annotated[
        str, typer.Option(metavar="LENGTHS", help="Tokens to generate, likewise.", rich_help_panel=_WORK)
    ] = "64",
    prompt_file: Annotated[
        Path | None,
        typer.Option(help="Take prompts from this file, a line each, not random token ids.", rich_help_panel=_WORK),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.", rich_help_panel=_WORK)] = 0.0,
    ignore_eos: Annotated[
        bool, typer.Option(help="Go on to the asked length past the model's end of text.", rich_help_panel=_WORK)
    ] = True,
    graph_policy: Annotated[str, typer.Option(help="prefer, require or eager_only.", rich_help_panel=_WORK)] = "prefer",
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Of prompts and arrivals. Default: drawn, so that no prompt of an earlier run is still cached.",
            rich_help_panel=_WORK,
        ),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write everything, sample by sample.", rich_help_panel=_OUTPUT),
    ] = None,
    csv_file: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Write a row a request.", rich_help_panel=_OUTPUT)
    ] = None,
    compare_transformers: Annotated[
        bool,
        typer.Option(
            "--compare-transformers",
            help="Start a daemon and transformers' generate in turn on this CPU and compare their tokens/s.",
            rich_help_panel=_COMPARE,
        ),
    ] = False,
    model: Annotated[
        str, typer.Option(help="Folder or embedded model that both sides load.", rich_help_panel=_COMPARE)
    ] = DEFAULT_MODEL,
    compare_clients: Annotated[
        str, typer.Option(metavar="COUNTS", help="Numbers of clients to compare with.", rich_help_panel=_COMPARE)
    ] = "1,8",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; each runs both sides.", rich_help_panel=_COMPARE)] = 3,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of either side. Default: all.", rich_help_panel=_COMPARE)
    ] = None,
    gate: Annotated[
        list[str] | None,
        typer.Option(metavar="CLIENTS=RATIO", help="Fail below this ratio. Repeatable.", rich_help_panel=_COMPARE),
    ] = None,
) -> None:
    """Measures a running daemon: TTFT, TPOT, ITL, end to end and tokens/s, under open- or closed-loop load.

    With --rate requests arrive at random moments and wait for nobody; latency counts from the moment they were due.
    Otherwise --clients clients each send their next request when the last one ended. A run without a single success fails.
    """
    drawn = secrets.randbits(32) if seed is None else seed
    gates = dict(map(_gate, gate or []))
    if compare_transformers:
        _compare(
            model,
            _counts(compare_clients),
            gates,
            seed=drawn,
            rounds=rounds,
            threads=threads or usable_cpus(),
            num_prompt_tokens=_single(prompt_tokens, "--prompt-tokens"),
            num_output_tokens=_single(output_tokens, "--output-tokens"),
            json_file=json_file,
        )
        return
    if gates:
        raise typer.BadParameter("--gate goes with --compare-transformers")
    if arrivals not in KINDS:
        raise typer.BadParameter(f"--arrivals is one of {', '.join(KINDS)}")
    duration_seconds = seconds(duration)
    settings = LoadSettings(
        seed=drawn,
        limit=Limit(requests or (None if duration_seconds else DEFAULT_REQUESTS), duration_seconds),
        num_clients=clients,
        rate_per_second=rate,
        arrivals=arrivals,
        gap_seconds=seconds(gap) or 0.0,
        prompt_lengths=_lengths(prompt_tokens),
        output_lengths=_lengths(output_tokens),
        prompt_file=prompt_file,
        num_warmup=warmup,
        options=RequestOptions(temperature, ignore_eos, graph_policy, seconds(connection.timeout)),
    )
    _load(_connection(connection), settings, json_file=json_file, csv_file=csv_file)


def _load(connection: Connection, settings: LoadSettings, *, json_file: Path | None, csv_file: Path | None) -> None:
    started = datetime.now(UTC)
    environment = describe_environment()
    limit = settings.limit
    with run_progress(
        console(stderr=True), num_requests=limit.num_requests, seconds=limit.duration_seconds
    ) as progress:
        try:
            run = _run(run_load(connection, settings, begin=progress.begin, report=progress.report))
        except (OSError, ValueError) as error:
            raise CommandError(str(error), ExitStatus.USAGE) from None
    result = evaluate(run.samples)
    if json_file is not None:
        document = {
            "kind": "load",
            "start_time": started.isoformat(),
            "target": connection.target,
            "settings": settings.to_dict(),
            "environment": environment,
            "model": describe_model(run.model),
            "result": result.to_dict(),
            "requests": [sample.to_dict() for sample in run.samples],
        }
        _write(lambda: write_json(json_file, document))
    if csv_file is not None:
        _write(lambda: write_csv(csv_file, run.samples))
    console().print(render_result(result, _heading(run.model, settings)))
    if result.num_ok == 0:
        raise CommandError("no request went well: there is nothing to report")


def _compare(
    model: str,
    clients: tuple[int, ...],
    gates: dict[int, float],
    *,
    seed: int,
    rounds: int,
    threads: int,
    num_prompt_tokens: int,
    num_output_tokens: int,
    json_file: Path | None,
) -> None:
    require_server("hotgraph bench --compare-transformers")
    if missing := set(gates) - set(clients):
        raise typer.BadParameter(f"--gate for {min(missing)} clients, which --compare-clients leaves out")
    settings = ComparisonSettings(_folder(model), threads, seed, clients, rounds, num_prompt_tokens, num_output_tokens)
    started = datetime.now(UTC)
    environment = describe_environment()
    with TemporaryDirectory(prefix="hotgraph-bench-") as folder:
        socket = Path(folder) / "daemon.sock"
        target = f"unix:{socket}"
        # As a user gets it, but for prefix caching: no prompt shall be cheaper than another.
        flags = ["--model", str(settings.folder), "--device", "cpu", "--dtype", "float32", "--no-prefix-caching"]
        flags += ["--num-threads", str(threads)]
        daemon = ChildDaemon(socket, flags, Path(folder) / "daemon.log")
        with daemon, Client(target) as client:
            daemon.wait_until_serving(client, _START_SECONDS, console(stderr=True))
            with console(stderr=True).status("") as status:
                try:
                    run = _run(run_comparison(target, settings, progress=status.update))
                except (ChildError, ComparisonError) as error:
                    raise CommandError(str(error)) from None
    if json_file is not None:
        document = {
            "kind": "comparison",
            "start_time": started.isoformat(),
            "settings": settings.to_dict(),
            "environment": environment,
            "model": run.model,
            "transformers": run.transformers,
            "result": [line.to_dict() for line in run.comparison.lines],
        }
        _write(lambda: write_json(json_file, document))
    heading = (
        f"{model}, float32 on {threads} CPU threads; {num_prompt_tokens} prompt tokens, {num_output_tokens} output tokens,"
        f" {rounds} rounds; seed {seed}"
    )
    console().print(render_comparison(run.comparison, heading))
    if missed := run.comparison.missed(gates):
        raise CommandError("slower than asked for: " + "; ".join(missed))


def _heading(model: Model, settings: LoadSettings) -> str:
    """What was run, in a line."""
    load = (
        f"{settings.num_clients} clients"
        if settings.rate_per_second is None
        else f"{settings.rate_per_second:g} requests/s"
    )
    prompts = f"{settings.prompt_lengths} prompt tokens" if settings.prompt_file is None else str(settings.prompt_file)
    device = model.device_name or model.device
    return (
        f"{model.id}, {model.dtype} on {device}; {load}; {prompts}, {settings.output_lengths} output tokens;"
        f" seed {settings.seed}"
    )


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Runs it on uvloop where that is installed, as the daemon does."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(work)
    return uvloop.run(work)


def _connection(options: ConnectionOptions) -> Connection:
    try:
        token = None if options.token_file is None else options.token_file.read_text(encoding="utf-8").strip()
        tls: bool | TlsConfig | None = options.tls or None
        if options.tls_ca or options.tls_cert or options.tls_key or options.tls_server_name:
            tls = TlsConfig.from_files(
                root_certificates=options.tls_ca,
                private_key=options.tls_key,
                certificate_chain=options.tls_cert,
                server_name=options.tls_server_name,
            )
    except (OSError, ValueError) as error:
        raise CommandError(str(error), ExitStatus.SETTINGS) from None
    return Connection(options.target, token, tls)


def _folder(model: str) -> Path:
    """The folder that both sides load. An embedded model is fetched when it is not there yet."""
    if Path(model).is_dir():
        return Path(model)
    from hotgraph_server.models import registry

    if model not in registry.EMBEDDED:
        names = ", ".join(registry.EMBEDDED)
        raise CommandError(f"{model!r} is no folder and no embedded model ({names})", ExitStatus.USAGE)
    with progress_bar(console(stderr=True)) as progress:
        return registry.pull(model, progress=progress)


def _counts(text: str) -> tuple[int, ...]:
    lengths = _lengths(text)
    if lengths.is_range or len(set(lengths.values)) != len(lengths.values):
        raise typer.BadParameter(f"no list of different counts: {text!r}")
    return lengths.values


def _single(text: str, option: str) -> int:
    lengths = _lengths(text)
    if lengths.is_range or len(lengths.values) != 1:
        raise typer.BadParameter(f"{option} is one length in a comparison")
    return lengths.values[0]


def _write(work: Any) -> None:
    try:
        work()
    except OSError as error:
        raise CommandError(f"the result could not be written: {error}") from None
