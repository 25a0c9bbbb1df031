"""Captures work in the background and replays it: a cache of CUDA graphs, or of what stands in for them.

Give it a program (a function over static buffers for each key) and a backend; look graphs up while serving. It knows no
server, no model and no torch, but for `graphcache.backends.cuda`, which is imported by those who use it: `CudaBackend`.
"""

from graphcache.backends import EagerBackend, FakeBackend, FakeProgram
from graphcache.cache import GraphCache
from graphcache.clock import Clock, FakeClock, SystemClock
from graphcache.errors import (
    CacheClosedError,
    CaptureError,
    DeviceLostError,
    EventsGoneError,
    GraphCacheError,
    GraphStateError,
    UnknownGraphError,
)
from graphcache.events import Event, EventType, Listener
from graphcache.graph import TRANSITIONS, CaptureTimings, Graph, GraphInfo, GraphState, Priority, Segment
from graphcache.interface import Backend, Captured, NoTurns, Program, Turns
from graphcache.ladder import Ladder
from graphcache.ledger import BudgetInfo
from graphcache.optimiser import SizeHistogram, choose_ladder, ladder_seconds
from graphcache.policy import Candidate, EvictionPolicy, LfuPolicy, LruPolicy, ValuePolicy
from graphcache.profile import Profile, ProfileEntry
from graphcache.settings import CacheSettings, CacheStats
from graphcache.worker import CAPTURE_THREAD_NAME

__all__ = [
    "CAPTURE_THREAD_NAME",
    "TRANSITIONS",
    "Backend",
    "BudgetInfo",
    "CacheClosedError",
    "CacheSettings",
    "CacheStats",
    "Candidate",
    "CaptureError",
    "CaptureTimings",
    "Captured",
    "Clock",
    "DeviceLostError",
    "EagerBackend",
    "Event",
    "EventType",
    "EventsGoneError",
    "EvictionPolicy",
    "FakeBackend",
    "FakeClock",
    "FakeProgram",
    "Graph",
    "GraphCache",
    "GraphCacheError",
    "GraphInfo",
    "GraphState",
    "GraphStateError",
    "Ladder",
    "LfuPolicy",
    "Listener",
    "LruPolicy",
    "NoTurns",
    "Priority",
    "Profile",
    "ProfileEntry",
    "Program",
    "Segment",
    "SizeHistogram",
    "SystemClock",
    "Turns",
    "UnknownGraphError",
    "ValuePolicy",
    "choose_ladder",
    "ladder_seconds",
]
