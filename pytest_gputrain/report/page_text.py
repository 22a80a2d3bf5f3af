"""Texts from outside, made fit for the page: what cannot be shown is replaced, what is too long is cut.

Escaping is the template's work. Here are the things that escaping does not do.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from urllib.parse import quote

_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|.)", re.DOTALL)
# Control characters, those that turn the direction of text around, halves of surrogate pairs: with them one
# text can look like another, or the page cannot be written.
_UNSHOWABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)
_DIGITS = re.compile(r"\d+")


def clean(text: object) -> str:
    """As text without terminal colours; what cannot be shown is �."""
    plain = str(text).replace("\r\n", "\n")
    return _UNSHOWABLE.sub("\ufffd", _ANSI.sub("", plain)) if _UNSHOWABLE.search(plain) else plain


def cut(text: str, most: int, whole: str = "report.json") -> str:
    """``text`` in about ``most`` characters: its beginning, a note of what is missing, its end."""
    if len(text) <= most:
        return text
    head, tail = most * 3 // 5, most * 2 // 5
    note = f"[… {len(text) - head - tail:,} characters left out; whole in {whole} …]"
    return f"{text[:head]}\n{note}\n{text[-tail:]}"


def cut_line(text: str, most: int) -> str:
    """One line of at most ``most`` characters; the end is kept too, since ids differ there."""
    line = " ".join(text.split())
    if len(line) <= most:
        return line
    tail = most // 3
    return f"{line[: most - tail - 3]} … {line[-tail:]}"


def first_line(message: str) -> tuple[str, str]:
    """The first line that says something, and the rest."""
    head, _, rest = message.strip("\n").partition("\n")
    return (head.strip(), rest) if head.strip() or not rest else first_line(rest)


def anchor(test: str) -> str:
    """The same for the same test in every report, so that links to tomorrow's report find it."""
    words = re.sub(r"[^A-Za-z0-9_]+", "-", test.rpartition("/")[2]).strip("-")[-60:].strip("-")
    return f"{words or 'test'}-{hashlib.sha256(test.encode('utf-8', 'replace')).hexdigest()[:8]}"


def signature(line: str) -> str:
    """What a line says without its numbers: tests with the same are failures of one kind."""
    return _DIGITS.sub("#", line)[:400]


def link(path: object) -> str | None:
    """A path inside the report's folder as an address; None for what leads elsewhere or is none."""
    if not isinstance(path, str) or not path or path.startswith(("/", "\\", "~")):
        return None
    parts = path.replace("\\", "/").split("/")
    # A colon in the first part would make it a scheme: javascript:, file:.
    if ".." in parts or ":" in parts[0]:
        return None
    return quote(clean(path))


def ranges(numbers: Sequence[int]) -> str:
    """``0, 2–7, 9``"""
    runs: list[list[int]] = []
    for one in sorted(set(numbers)):
        if runs and one == runs[-1][1] + 1:
            runs[-1][1] = one
        else:
            runs.append([one, one])
    return ", ".join(f"{low}" if low == high else f"{low}–{high}" for low, high in runs)
