"""What the documents hold: their code blocks, which the tests execute."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent.parent / "docs"

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line of the document where the text starts.

    Attributes:
        path: the document.
    """

    path: Path
    language: str
    text: str
    line: int

    def __str__(self) -> str:
        """Where it is."""
        return f"docs/{self.path.name}, line {self.line}"

    def execute(self, namespace: dict[str, Any]) -> None:
        """Run it as Python; tracebacks show the document's lines."""
        exec(compile("\n" * (self.line - 1) + self.text, self.path, "exec"), namespace)


def blocks(name: str, *languages: str) -> list[Block]:
    """The blocks of a document in these languages, in order."""
    path = DOCS / name
    text = path.read_text(encoding="utf-8")
    found = []
    for match in _BLOCK.finditer(text):
        if match[1] in languages:
            line = text.count("\n", 0, match.start(2)) + 1
            found.append(Block(path, match[1], match[2], line))
    return found


def execute(found: Iterable[Block]) -> dict[str, Any]:
    """Run blocks one after the other in one namespace, and return that."""
    namespace: dict[str, Any] = {"__name__": "document"}
    for block in found:
        block.execute(namespace)
    return namespace


def section(name: str, title: str) -> str:
    """What stands below a heading, up to the next one of its level or above.

    Returns:
        Nothing if there is no such heading.
    """
    text = (DOCS / name).read_text(encoding="utf-8")
    found = re.search(rf"^(#+) {re.escape(title)}$\n", text, re.M)
    if found is None:
        return ""
    rest = text[found.end() :]
    end = re.search(rf"^#{{1,{len(found[1])}}} ", rest, re.M)
    return rest[: end.start()] if end else rest
