"""The JSON files of a model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from agentrt.errors import WeightsInvalid


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where the file is absent, as most of them may be.

    Raises WeightsInvalid where the file holds something else.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except ValueError as exc:
        raise WeightsInvalid(f"{path} is truncated or no JSON: {exc}") from exc
    if not isinstance(content, dict):
        raise WeightsInvalid(f"{path} holds a {type(content).__name__}, not a JSON object")
    return content
