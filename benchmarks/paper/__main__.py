"""The comparison with the paper "Hybrid JIT-CUDA Graph Optimization for Low-Latency LLM Inference", and its other tables.

`python -m benchmarks.paper ttft --device cuda --config llama2-7b --out FOLDER` writes FOLDER/ttft.json and its tables as CSV,
Markdown and LaTeX. The paper's setting is Llama-2-7B at batch 1; the weights here are random, which no time depends on.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from benchmarks.gpu.report import Report, make_parser, numbers, say
from benchmarks.gpu.service import run
from benchmarks.paper import compare, coverage, parts
from benchmarks.paper.bench import Bench
from benchmarks.paper.modes import MODES
from benchmarks.paper.tables import write_tables

COMMANDS: dict[str, Callable[[Bench], Awaitable[None]]] = {
    "ttft": compare.ttft,
    "ttft-long": compare.ttft_long,
    "decode": compare.decode,
    "captures": coverage.captures,
    "rolling": coverage.rolling,
    "coverage": coverage.coverage,
    "ablation": parts.ablation,
}
IPC = "ipc"
ALL = "all"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 when a check of a command failed."""
    parser = make_parser("The comparison of the paper, and its other tables.")
    parser.add_argument("command", choices=(*COMMANDS, IPC, ALL))
    parser.add_argument("--modes", type=lambda text: tuple(text.split(",")), default=tuple(MODES))
    parser.add_argument("--lengths", type=numbers, default=(10, *range(50, 501, 50)), help="prompt tokens")
    parser.add_argument("--iterations", type=int, default=5, help="for the mean of TTFT")
    parser.add_argument("--p99-iterations", type=int, default=100, help="for its p99")
    parser.add_argument("--long-lengths", type=numbers, default=(10, 100, 500), help="prompt tokens of the long run")
    parser.add_argument("--long-iterations", type=int, default=1000, help="of the long run")
    parser.add_argument("--gap-ms", type=float, default=30.0, help="between lone requests")
    parser.add_argument("--repeats", type=int, default=3, help="warm passes of decoding")
    parser.add_argument("--decode-from", type=int, default=10, help="prompt tokens of the decode table")
    parser.add_argument("--decode-to", type=int, default=407, help="its longest context")
    parser.add_argument("--decode-points", type=numbers, default=(20, 50, 100, 150, 200, 250, 300, 350, 400))
    parser.add_argument("--longest", type=int, default=500, help="of captures, rolling and coverage")
    parser.add_argument("--stride", type=int, default=1, help="leaves lengths out there, to save time")
    parser.add_argument("--capacity", type=int, default=512, help="graphs that the paper's rolling cache holds")
    parser.add_argument(
        "--budget-graphs", type=int, default=10, help="graphs that the budget of ours holds, for rolling"
    )
    parser.add_argument("--walk", type=int, default=200, help="random prompts of rolling and coverage")
    parser.add_argument("--ablation-prompt", type=int, default=100)
    parser.add_argument("--ablation-tokens", type=int, default=128)
    parser.add_argument("--out", type=Path, required=True, help="the folder to write to")
    arguments = parser.parse_args(argv)
    try:
        compare.check_modes(arguments.modes)
    except ValueError as error:
        parser.error(str(error))
    statuses = []
    for name in (*COMMANDS, IPC) if arguments.command == ALL else (arguments.command,):
        report = Report(name, arguments)
        bench = Bench(arguments, report)
        if name == IPC:
            parts.ipc(bench)
        else:
            command = COMMANDS[name]

            async def work(command: Callable[[Bench], Awaitable[None]] = command, bench: Bench = bench) -> None:
                await command(bench)

            run(work)
        bench.drop_models()
        statuses.append(report.finish(arguments.out / f"{name}.json"))
        for path in write_tables(report.to_dict(), arguments.out):
            if path.suffix == ".md":
                say(path.read_text(encoding="utf-8"))
    return max(statuses)


if __name__ == "__main__":
    sys.exit(main())
