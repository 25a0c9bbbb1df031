"""Starts real daemons, runs client tests of any languages against them, and holds the tests to the list of cases.

`python -m tests.interop go=clients/go/test.sh` runs the command; more of them may follow and share the daemons. `--record`
keeps what passed for docs/clients.md. `python -m tests.interop serve` starts the daemons and waits, so that one may run tests
by hand.
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from tests.interop.harness import Harness, serving
from tests.interop.results import CASES, read_report, update_page


def run_until_stopped(main: Coroutine[Any, Any, bool]) -> bool:
    """Runs it; a signal cancels it, so that all that it started ends too. Raises CancelledError then."""

    async def run() -> bool:
        task = asyncio.ensure_future(main)
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        return await task

    return asyncio.run(run())


async def test(commands: dict[str, list[str]], *, is_recorded: bool) -> bool:
    """Whether every command ended with 0 and reported every case."""
    begin = time.monotonic()
    are_good = []
    with tempfile.TemporaryDirectory(prefix="hg") as path:
        folder = Path(path)
        async with serving(folder) as harness:
            print(f"daemons serve after {time.monotonic() - begin:.0f} s", flush=True)
            for language, command in commands.items():
                await harness.wait_serving()
                are_good.append(await test_one(harness, language, command, is_recorded=is_recorded))
    return all(are_good)


async def test_one(harness: Harness, language: str, command: list[str], *, is_recorded: bool) -> bool:
    begin = time.monotonic()
    report = harness.folder / f"{language}.report"
    report.touch()
    status = await harness.run(command, report)
    result = read_report(report.read_text(encoding="utf-8"))
    missing = [case for case in CASES if case not in result.passed]
    seconds = time.monotonic() - begin
    print(f"{language}: {len(result.passed)} of {len(CASES)} cases passed in {seconds:.0f} s, exit status {status}")
    for case in missing:
        print(f"  not passed: {case}: {CASES[case]}")
    sys.stdout.flush()
    if is_recorded and status == 0:
        result.write(language)
        update_page()
    return status == 0 and not missing


async def serve() -> bool:
    """Until it is interrupted."""
    with tempfile.TemporaryDirectory(prefix="hg") as path:
        async with serving(Path(path)) as harness:
            print(f"export HOTGRAPH_INTEROP={harness.addresses}", flush=True)
            return await asyncio.Event().wait()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.interop", description=__doc__)
    parser.add_argument("--record", action="store_true", help="write what passed into docs/clients.md")
    parser.add_argument(
        "tests", nargs="+", metavar="NAME=COMMAND", help="a language and what runs its tests; or `serve`"
    )
    arguments = parser.parse_args()
    commands = {}
    for test_argument in arguments.tests:
        name, _, command = test_argument.partition("=")
        commands[name] = shlex.split(command)
    is_serving = arguments.tests == ["serve"]
    if not is_serving and not all(commands.values()):
        parser.error("say NAME=COMMAND for each language")
    try:
        return 0 if run_until_stopped(serve() if is_serving else test(commands, is_recorded=arguments.record)) else 1
    except asyncio.CancelledError:
        return 130


if __name__ == "__main__":
    sys.exit(main())
