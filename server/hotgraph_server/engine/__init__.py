"""Runs batches: the engine's interface, the real one on torch, and a fake without it.

`TorchEngine` is imported on first use, so that whoever needs only the fake needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hotgraph_server.engine.fake import FakeEngine
from hotgraph_server.engine.interface import Engine
from hotgraph_server.engine.token_rules import History, TokenRule, echo_rule, hash_rule, script_rule

if TYPE_CHECKING:
    from hotgraph_server.engine.engine import TorchEngine

__all__ = [
    "Engine",
    "FakeEngine",
    "History",
    "TokenRule",
    "TorchEngine",
    "echo_rule",
    "hash_rule",
    "script_rule",
]


def __getattr__(name: str) -> object:
    if name == "TorchEngine":
        from hotgraph_server.engine.engine import TorchEngine

        return TorchEngine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
