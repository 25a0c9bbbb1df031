"""Starts real daemons, runs client tests of any languages against them, and holds the tests to the list of cases.

`python -m tests.interop go=clients/go/test.sh` runs the command; more of them may follow and share the daemons. `--record`
keeps what passed for docs/clients.md. `python -m tests.interop serve` starts the daemons and waits, so that one may run tests
by hand.
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import sys
import tempfile
import time
from pathlib import Path

from tests.interop.harness import Harness, serving
from tests.interop.results import CASES, read_report, update_page


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


async def serve() -> None:
    """Until it is interrupted."""
    with tempfile.TemporaryDirectory(prefix="hg") as path:
        async with serving(Path(path)) as harness:
            print(f"export HOTGRAPH_INTEROP={harness.addresses}", flush=True)
            await asyncio.Event().wait()


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
    try:
        if arguments.tests == ["serve"]:
            asyncio.run(serve())
        elif not all(commands.values()):
            parser.error("say NAME=COMMAND for each language")
        else:
            return 0 if asyncio.run(test(commands, is_recorded=arguments.record)) else 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
