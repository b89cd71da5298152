"""The page of a recording: read back in Chromium, where there is one, and as a picture."""

import asyncio
import json
from pathlib import Path

import pytest
from browser import CHROMIUM, chromium_page
from recordings import HEADER, line, lines_of, recorded, submitted

from agentrt.__main__ import main
from agentrt.cli_trace import draw, write_page
from agentrt.errors import RequestInvalid
from agentrt.trace_page import page
from agentrt.trace_timeline import timeline

ROOT = Path(__file__).parents[1]


def test_names_cannot_leave_the_pages_data():
    lines = [HEADER, submitted("r0", 10.0, "</script><b>x"), line("end", at=15)]
    made = page(timeline(lines))
    assert "</script><b>" not in made
    assert "\\u003c/script>" in made


# ---- the page in a browser

ROWS = """[...document.querySelectorAll(".row")].map(row => {
  const track = row.querySelector(".track").getBoundingClientRect();
  return [row.dataset.agent, [...row.querySelectorAll(".span")].map(span => {
    const box = span.getBoundingClientRect();
    return [span.dataset.kind, (box.left - track.left) / track.width, box.width / track.width,
            box.width];
  })];
})"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)")
async def test_the_page_shows_what_was_recorded(tokenizer, template, tmp_path):
    """100 agents: each row of the page against the recording's own lines."""
    recording, path = tmp_path / "run.jsonl", tmp_path / "run.html"
    await recorded(tokenizer, template, recording, 100, max_batch=32)
    await asyncio.to_thread(write_page, recording, path)
    lines = lines_of(recording)

    def look():
        with chromium_page(tmp_path / "profile") as shown:
            shown.size(1400, 900)
            shown.open(path)
            rows = shown.value(ROWS)
            charts = shown.value('document.querySelectorAll(".chart path[d^=M]").length')
            facts = shown.value('document.getElementById("facts").textContent')
            visible = shown.value('document.querySelector(".row").getBoundingClientRect().height')
            before = shown.value('document.querySelector(".track").clientWidth')
            shown.click("#in")
            after = shown.value('document.querySelector(".track").clientWidth')
            assert shown.console == []
            assert [url for url in shown.requested if not url.startswith("file:")] == []
            return rows, charts, facts, visible, after / before

    rows, charts, facts, row_height, zoomed = await asyncio.to_thread(look)
    assert {name for name, _ in rows} == {f"agent {number}" for number in range(100)}
    assert "agents 100" in facts
    assert "requests 200" in facts
    assert charts >= 4
    assert row_height >= 12  # 100 of them are three screens of 500 pixels
    assert zoomed == pytest.approx(2, rel=0.01)

    start, seconds = lines[0]["at"], timeline(lines).seconds
    by_agent = dict(rows)
    for number in range(100):
        check_row(by_agent[f"agent {number}"], lines, f"agent {number}", start, seconds)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)")
def test_the_command_draws_a_picture_of_the_page(tmp_path, capsys):
    path, picture = tmp_path / "run.jsonl", tmp_path / "run.png"
    lines = [HEADER, *(submitted(f"r{n}", 10.0, f"agent {n}") for n in range(20))]
    path.write_text("".join(json.dumps(each) + "\n" for each in [*lines, line("end", at=15)]))
    assert main(["trace", str(path), "--png", str(picture)]) == 0
    assert capsys.readouterr().out.split() == [str(path.with_suffix(".html")), str(picture)]
    drawn, shown = picture.read_bytes(), (ROOT / "examples" / "timeline.png").read_bytes()
    assert drawn[:24] == shown[:24]  # a PNG, as wide and as high as the README's
    assert len(drawn) > 10_000  # and not an empty one


def test_a_picture_that_cannot_be_drawn_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RequestInvalid, match="needs Chromium"):
        draw(tmp_path / "run.html", tmp_path / "run.png")
    browser = tmp_path / "chromium"
    browser.write_text("#!/bin/sh\necho no display >&2\nexit 3\n")
    browser.chmod(0o755)
    with pytest.raises(RequestInvalid, match=r"did not write .*run\.png: no display"):
        draw(tmp_path / "run.html", tmp_path / "run.png")


def check_row(spans, lines, name, start, seconds):
    """Tools and requests of one agent where the page draws them, to half a thousandth."""
    tools = [x for x in lines if x["kind"] == "tool" and x["agent"] == name]
    drawn = [span for span in spans if span[0] == "tool"]
    assert len(drawn) == len(tools) == 1
    requests = [x["request"] for x in lines if x["kind"] == "submitted" and x["agent"] == name]
    assert len(requests) == 2
    expected = []
    for request in requests:
        steps = [x for x in lines if x["kind"] == "step"]
        prefill = [x for x in steps if request in [each for each, _ in x["prefill"]]]
        decode = [x for x in steps if request in x["decode"]]
        expected.append(("prefill", prefill[0]["begin"]))
        expected.append(("decode", prefill[-1]["end"] if decode else None))
    wanted = [("tool", tools[0]["begin"]), *((k, at) for k, at in expected if at is not None)]
    for kind, at in wanted:
        left = (at - start) / seconds
        assert any(
            span[0] == kind and span[1] == pytest.approx(left, abs=1.5e-3) for span in spans
        ), (name, kind, left, spans)
    assert all(width >= 1 for *_, width in spans)
    assert {"prefill", "decode", "tool"} <= {span[0] for span in spans}
