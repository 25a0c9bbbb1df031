"""`hotgraph bench`: load on a daemon through gRPC, honest latencies, and a comparison with transformers' generate.

The definitions of what is measured, and the schema of the files, are in the README beside this file. `command.bench` is
the command; it is not imported here, so that nothing is loaded that a caller does not use.
"""

from hotgraph_server.bench.load import Limit, Sender, closed_loop, open_loop
from hotgraph_server.bench.result import Result, Throughput, evaluate
from hotgraph_server.bench.sample import Sample, ServerView
from hotgraph_server.bench.summary import Summary, summarize
from hotgraph_server.bench.workload import Lengths, RandomWorkload, TextWorkload, Work, Workload

__all__ = [
    "Lengths",
    "Limit",
    "RandomWorkload",
    "Result",
    "Sample",
    "Sender",
    "ServerView",
    "Summary",
    "TextWorkload",
    "Throughput",
    "Work",
    "Workload",
    "closed_loop",
    "evaluate",
    "open_loop",
    "summarize",
]
