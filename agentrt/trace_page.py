"""A timeline as one HTML page that needs nothing else: style, script and data are inside."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any, get_args

from agentrt.trace_timeline import Kind, Timeline

_KINDS: tuple[str, ...] = get_args(Kind)
_DIGITS = 6  # of seconds: microseconds


def page(timeline: Timeline) -> str:
    """The page's source."""
    data = json.dumps(_data(timeline), separators=(",", ":"))
    # Names come from callers: "</script>" in one must not end the data.
    safe = data.replace("<", "\\u003c")
    template = files("agentrt").joinpath("trace_page.html").read_text(encoding="utf-8")
    return template.replace("@@DATA@@", safe)


def _data(timeline: Timeline) -> dict[str, Any]:
    labels: dict[str, int] = {}
    rows = [
        {
            "agent": row.agent,
            "spans": [
                [
                    _KINDS.index(span.kind),
                    *_rounded(span.begin_s, span.end_s),
                    labels.setdefault(span.label, len(labels)),
                ]
                for span in row.spans
            ],
        }
        for row in timeline.rows
    ]
    header = timeline.header
    return {
        "model": f"{header['model']} ({header['kernels']}, weights {header['weights']})",
        "seconds": timeline.seconds,
        "requests": timeline.num_requests,
        "limits": {"device": header["device_bytes"], "host": header["host_bytes"]},
        "kinds": _KINDS,
        "labels": list(labels),
        "rows": rows,
        "steps": [
            [*_rounded(step.begin_s, step.end_s), step.prefill, step.decode]
            for step in timeline.steps
        ],
        "samples": [
            [*_rounded(each.at_s), each.tokens, each.bytes, each.output_tokens]
            for each in timeline.samples
        ],
    }


def _rounded(*seconds: float) -> list[float]:
    return [round(each, _DIGITS) for each in seconds]
