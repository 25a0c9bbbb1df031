"""How the process ends, for its supervisor: whether to try again, and which error ends it how."""

from __future__ import annotations

import enum
from typing import Final

from hotgraph_server.errors import (
    AddressInUseError,
    EngineFailedError,
    HotgraphError,
    ModelLoadError,
    NotPossibleError,
    SettingsError,
)


class ExitStatus(enum.IntEnum):
    """What the process tells its supervisor; the numbers of sysexits.h."""

    OK = 0
    UNAVAILABLE = 69  # an address or a device is not to be had now: trying again may help
    FAILED = 70  # the engine failed: a fresh process serves again
    CONFIGURATION = 78  # settings or model are bad: trying again changes nothing


EXIT_STATUSES: Final[dict[type[HotgraphError], ExitStatus]] = {
    SettingsError: ExitStatus.CONFIGURATION,
    ModelLoadError: ExitStatus.CONFIGURATION,
    AddressInUseError: ExitStatus.UNAVAILABLE,
    NotPossibleError: ExitStatus.UNAVAILABLE,
    EngineFailedError: ExitStatus.FAILED,
}
