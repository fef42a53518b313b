"""The documents as the tests read them: which there are, and their fenced blocks."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^```(\w*)(?: title=\"([^\"\n]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the file that its title names, its text and the line that it begins on."""

    language: str
    title: str | None
    text: str
    line: int


def documents() -> list[Path]:
    """README, the other documents beside it, and all pages."""
    return [*(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING")), *sorted((ROOT / "docs").rglob("*.md"))]


def named(path: Path) -> str:
    """What to call a document."""
    return path.relative_to(ROOT).as_posix()


def blocks(path: Path) -> list[Block]:
    """The fenced blocks of a document, in order."""
    text = path.read_text()
    return [Block(m[1], m[2], m[3], text[: m.start()].count("\n") + 2) for m in FENCE.finditer(text)]
