"""What a docstring says of a function and its parameters: Google, numpy and reST sections."""

from __future__ import annotations

import re
import textwrap

_PARAMETER_HEADINGS = r"args|arguments|params|parameters|other parameters|keyword arg(?:ument)?s"
_OTHER_HEADINGS = r"returns?|yields?|raises|examples?|notes?|warnings?|attributes|see also|todo"
_GOOGLE = re.compile(rf"(?i)(?:({_PARAMETER_HEADINGS})|{_OTHER_HEADINGS}):$")
_NUMPY = re.compile(rf"(?i)(?:({_PARAMETER_HEADINGS})|[a-z][a-z ]*)$")
_REST = re.compile(r":[a-z]+(?: [^:]*)?:")
# each matches an entry at the margin of its section: the names, then the start of the text
_ENTRIES = {
    "google": re.compile(r"\*{0,2}(\w+)(?: *\(.*?\))? *:(.*)"),
    "numpy": re.compile(r"(\w+(?: *, *\w+)*) *(?::.*)?$()"),
    "rest": re.compile(r":(?:param|parameter|arg|argument|key)(?: [^:]*?)?\s+\*{0,2}(\w+):(.*)"),
}


def parse_docstring(text: str) -> tuple[str, dict[str, str]]:
    """A docstring's text before its first section, and its parameters' descriptions."""
    sections = _split_sections(text.splitlines())
    documented: dict[str, str] = {}
    for kind, lines in sections[1:]:
        if kind in _ENTRIES:
            documented.update(_entries(_ENTRIES[kind], lines))
    return "\n".join(sections[0][1]).strip(), documented


def _split_sections(lines: list[str]) -> list[tuple[str, list[str]]]:
    sections: list[tuple[str, list[str]]] = [("summary", [])]
    for index, line in enumerate(lines):
        following = lines[index + 1] if index + 1 < len(lines) else ""
        google = _GOOGLE.match(line)
        numpy = _NUMPY.match(line) if re.fullmatch(r"-{3,}", following.strip()) else None
        if google:
            sections.append(("google" if google[1] else "other", []))
        elif numpy:
            sections.append(("numpy" if numpy[1] else "other", []))
        elif _REST.match(line) and sections[-1][0] != "rest":
            sections.append(("rest", [line]))
        elif not re.fullmatch(r"-{3,}", line.strip()):
            sections[-1][1].append(line)
    return sections


def _entries(pattern: re.Pattern[str], lines: list[str]) -> dict[str, str]:
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in textwrap.dedent("\n".join(lines)).splitlines():
        entry = pattern.match(line)
        if entry:
            current = [entry[2]]
            found.update({name.strip(): current for name in entry[1].split(",")})
        elif line[:1].isspace():
            current.append(line)
        elif line:
            current = []
    return {name: " ".join(" ".join(texts).split()) for name, texts in found.items()}
