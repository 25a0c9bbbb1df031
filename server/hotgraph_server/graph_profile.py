"""The graph profile on disk: which shapes were hot, kept from one life of a daemon to the next. Losing it costs speed only."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Final

from graphcache import Profile
from hotgraph_server.batch import StepKey
from hotgraph_server.files import write_whole
from hotgraph_server.rpc import ServedModel
from hotgraph_server.rpc.graph import fitting_profile

logger = logging.getLogger("hotgraph.daemon")

PROFILE_ENTRIES: Final = 1000


def import_profile(path: Path | None, served: ServedModel) -> None:
    """Has what was hot captured. A file that is none, or of another model, is left alone, with a warning."""
    if path is None or not path.exists():
        return
    try:
        data = json.loads(path.read_text())
        profile = Profile.from_dict(data, StepKey.parse)
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("the graph profile %s cannot be read and is left alone: %s", path, error)
        return
    if data.get("model") != served.model_id:
        logger.warning("the graph profile %s was learned with another model", path)
        return
    known, num_unknown = fitting_profile(served, profile)
    num_queued, num_skipped = served.engine.graphs.import_profile(known)
    logger.info("graph profile: %d captures queued, %d skipped", num_queued, num_skipped + num_unknown)


def export_profile(path: Path | None, served: ServedModel) -> None:
    """Writes it. What keeps it from being written is a warning."""
    if path is None:
        return
    data = {"model": served.model_id, **served.engine.graphs.export_profile(PROFILE_ENTRIES).to_dict()}
    try:
        write_whole(path, json.dumps(data, indent=2) + "\n")
    except OSError as error:
        logger.warning("the graph profile cannot be written to %s: %s", path, error)
