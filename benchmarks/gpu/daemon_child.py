"""The real daemon over a model with random weights, as a process of its own: what the client's side of latency is measured on.

`python -m benchmarks.gpu.daemon_child --socket PATH --config tiny --device cpu`. It ends on SIGTERM, like any daemon.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.gpu.models import make_loaded
from benchmarks.gpu.report import device_of, dtype_of, make_parser, run_ahead_of
from benchmarks.gpu.service import NumberTokenizer, make_settings
from graphcache import Clock
from hotgraph_client import Client, HotgraphError
from hotgraph_server.config import ServerSettings, Settings
from hotgraph_server.daemon import Parts, serve
from hotgraph_server.engine import TorchEngine
from hotgraph_server.threads import run_event_loop

START_SECONDS = 180.0
STOP_SECONDS = 30.0


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until told to end; returns the daemon's exit status."""
    parser = make_parser("The daemon over a model with random weights.")
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--num-slots", type=int, default=64)
    parser.add_argument("--kv-tokens", type=int, default=32768)
    parser.add_argument("--batch-invariant", action="store_true", help="results do not depend on what else runs")
    arguments = parser.parse_args(argv)
    loaded = make_loaded(
        arguments.config,
        device=device_of(arguments),
        dtype=dtype_of(arguments),
        batch_invariant=arguments.batch_invariant,
    )
    settings = make_settings(loaded, num_slots=arguments.num_slots, kv_tokens=arguments.kv_tokens)
    settings = settings.model_copy(update={"server": ServerSettings(listen=(f"unix:{arguments.socket}",))})

    async def build(settings: Settings, clock: Clock) -> Parts:
        engine = TorchEngine(loaded, settings, clock=clock, run_ahead=run_ahead_of(arguments))
        return Parts(engine, NumberTokenizer(loaded.model.vocabulary_size), loaded.model_id)

    return int(run_event_loop(serve(settings, build=build)))


@contextlib.contextmanager
def daemon_process(arguments: argparse.Namespace, *, num_slots: int = 64, kv_tokens: int = 32768) -> Iterator[str]:
    """Such a daemon as a child of this process, serving; gives its target, and ends it.

    Raises RuntimeError when it does not come to serve, or ends with an error.
    """
    with tempfile.TemporaryDirectory(prefix="hotgraph-bench-") as folder:
        socket = Path(folder) / "bench.sock"
        command = [sys.executable, "-m", "benchmarks.gpu.daemon_child", "--socket", str(socket)]
        command += ["--device", arguments.device, "--config", arguments.config]
        command += ["--num-slots", str(num_slots), "--kv-tokens", str(kv_tokens)]
        command += ["--run-ahead", str(run_ahead_of(arguments))]
        command += ["--dtype", arguments.dtype] if arguments.dtype else []
        command += ["--batch-invariant"] if getattr(arguments, "batch_invariant", False) else []
        paths = [str(Path(__file__).parents[2]), *sys.path]  # the child finds what this process found
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
        with subprocess.Popen(command, env=environment) as child:
            try:
                target = f"unix:{socket}"
                _wait_until_serving(child, target, socket)
                yield target
            finally:
                child.send_signal(signal.SIGTERM)
                try:
                    status = child.wait(STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    child.kill()
                    raise RuntimeError("the daemon did not end") from None
        if status != 0:
            raise RuntimeError(f"the daemon ended with status {status}")


def _wait_until_serving(child: subprocess.Popen[bytes], target: str, socket: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if child.poll() is not None:
            raise RuntimeError(f"the daemon ended with status {child.returncode} before it served")
        if socket.exists():
            try:
                with Client(target) as client:
                    client.get_model(timeout=5.0)
                return
            except HotgraphError:
                pass  # it listens before its model is there
        time.sleep(0.1)
    raise RuntimeError("the daemon did not come to serve")


if __name__ == "__main__":
    sys.exit(main())
