"""Points inside the daemon at which a test makes something happen: an error, no memory, a pause, the end of the process.

They are wrapped round the daemon's own functions by the test's program: what is shipped has none, and nothing to refuse.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

SERVER: Final = "hotgraph_server"

# Where, and whom a failure there reaches: "all" in flight, as the engine or the scheduler is beyond use; the one "call"; or
# "none", as it is in the background.
POINTS: Final = {
    "prefill": (f"{SERVER}.scheduler.planner:Planner._plan_prefill", "all"),
    "step": (f"{SERVER}.engine.fake:FakeEngine._run_step", "all"),
    "sampling": (f"{SERVER}.engine.fake:FakeEngine._sample", "all"),
    "capture_begin": ("graphcache.backends.eager:EagerBackend.capture", "none"),
    "capture_end": ("graphcache.task:CaptureTask._publish", "none"),
    "graph_swap": ("graphcache.store:GraphStore.publish", "none"),
    "evict": ("graphcache.store:GraphStore.evict", "call"),
    "alloc": (f"{SERVER}.scheduler.blocks:BlockManager.open", "all"),
    "free": (f"{SERVER}.scheduler.blocks:BlockManager.close", "all"),
    "detokenise": (f"{SERVER}.scheduler.detokenizer:Detokenizer.push", "all"),
    "send": (f"{SERVER}.scheduler.stream:RequestStream.put", "all"),
    "receive": (f"{SERVER}.scheduler.stream:RequestStream.__anext__", "call"),
}
ACTIONS: Final = {
    "raise": "raise RuntimeError('secret words of a failure')",
    "memory": "raise MemoryError",
    "sleep": "time.sleep(0.5)",
    "kill": "os.kill(os.getpid(), 9)",
}

# A point fires once each time that its file is put there, at the next call. The file holds the action.
PROGRAM: Final = """
import functools, importlib, os, time

actions = {actions!r}

def fail_once(path, flag):
    module, _, name = path.partition(":")
    kind, _, method = name.partition(".")
    owner = getattr(importlib.import_module(module), kind)
    own = getattr(owner, method)

    @functools.wraps(own)
    def failing(*args, **kwargs):
        try:
            with open(flag) as file:
                action = file.read()
            os.unlink(flag)
        except FileNotFoundError:
            return own(*args, **kwargs)
        exec(actions[action])
        return own(*args, **kwargs)

    setattr(owner, method, failing)

for path, flag in {flags!r}:
    fail_once(path, flag)
"""


def program(folder: Path, points: Iterable[str] = POINTS) -> str:
    """The statements that make these points, as `more` of a victim's program; what arms them lies in `folder`."""
    return PROGRAM.format(actions=ACTIONS, flags=[(POINTS[point][0], str(folder / point)) for point in points])


def arm(folder: Path, point: str, action: str) -> None:
    """The action happens at the next call of the point."""
    draft = folder / f"{point}.draft"
    draft.write_text(action)
    draft.rename(folder / point)  # never half written


def is_armed(folder: Path, point: str) -> bool:
    return (folder / point).exists()


def disarm(folder: Path, point: str) -> bool:
    """Whether it had not fired; now it does not any more."""
    try:
        (folder / point).unlink()
    except FileNotFoundError:
        return False
    return True
