"""Reads the JSON files of a model's folder. It knows that they come from anywhere, not what is in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hotgraph_server.errors import ModelLoadError


def read_json(path: Path, *, is_optional: bool = False) -> dict[str, Any]:
    """A JSON object. A missing file reads as {} where `is_optional`; anything else wrong raises ModelLoadError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if is_optional:
            return {}
        raise ModelLoadError(f"{path}: is missing") from error
    except OSError as error:
        raise ModelLoadError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{path}: is no valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path}: is no JSON object")
    return value
