"""Which settings a reload takes over."""

from __future__ import annotations

from hotgraph_server.config import LoggingSettings, ModelSettings, SchedulerSettings, ServerSettings, Settings
from hotgraph_server.reloading import RELOADABLE, reload_settings
from hotgraph_server.settings import OPTIONS_BY_PATH


def test_reloadable_settings_exist() -> None:
    """A setting that was renamed is not forgotten here."""
    assert OPTIONS_BY_PATH.keys() >= RELOADABLE


def test_each_setting_is_taken_over_or_named() -> None:
    """What can change does, what cannot stays and is named, what is the same is not mentioned."""
    current = Settings()
    wanted = Settings(
        model=ModelSettings(source="other"),
        server=ServerSettings(drain_grace_seconds=5.0, max_request_seconds=9.0),
        scheduler=SchedulerSettings(max_waiting=7, default_max_tokens=9, num_slots=2),
        logging=LoggingSettings(level="debug", format="json"),
    )
    reload = reload_settings(current, wanted)
    assert set(reload.changed) == RELOADABLE
    assert set(reload.waiting) == {
        "model.source",
        "server.max_request_seconds",
        "scheduler.num_slots",
        "logging.format",
    }
    assert reload.settings == Settings(
        server=ServerSettings(drain_grace_seconds=5.0),
        scheduler=SchedulerSettings(max_waiting=7, default_max_tokens=9),
        logging=LoggingSettings(level="debug"),
    )
    assert reload_settings(current, current).changed == reload_settings(current, current).waiting == ()
