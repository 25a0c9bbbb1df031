"""Which settings a running daemon takes over from changed ones, and which wait for a restart."""

from __future__ import annotations

from dataclasses import dataclass

from hotgraph_server.config import Section, Settings

# The others size what was allocated, captured, bound or told to gRPC when the daemon started.
RELOADABLE = frozenset(
    {
        "logging.level",
        "scheduler.default_max_tokens",
        "scheduler.max_waiting",
        "server.drain_grace_seconds",
    }
)


@dataclass(frozen=True, slots=True)
class Reload:
    """The settings in force after a reload, and the paths ("logging.level") of what changed and of what waits."""

    settings: Settings
    changed: tuple[str, ...]
    waiting: tuple[str, ...]


def reload_settings(current: Settings, wanted: Settings) -> Reload:
    """`current` with the reloadable settings of `wanted`."""
    changed: list[str] = []
    waiting: list[str] = []
    sections: dict[str, Section] = {}
    for section in Settings.model_fields:
        before, after = getattr(current, section), getattr(wanted, section)
        update = {}
        for name in type(before).model_fields:
            path = f"{section}.{name}"
            if getattr(before, name) == getattr(after, name):
                continue
            if path in RELOADABLE:
                changed.append(path)
                update[name] = getattr(after, name)
            else:
                waiting.append(path)
        sections[section] = before.model_copy(update=update)
    return Reload(current.model_copy(update=sections), tuple(changed), tuple(waiting))
