"""How the tests read the documents."""

import re
from pathlib import Path

REPORT = Path(__file__).parents[1] / "docs" / "report.md"


def blocks(text: str, language: str) -> list[str]:
    """Return the fenced code blocks of a document, their indentation taken off."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", text, flags=re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", code, flags=re.MULTILINE) for indent, code in found]


def section(text: str, heading: str) -> str:
    """Return what stands under a heading, to the next one of its rank."""
    rank = heading.partition(" ")[0]
    return text.partition(f"\n{heading}\n")[2].partition(f"\n{rank} ")[0]


def documented_fields(heading: str) -> list[str]:
    """Return the names in the first column of a table of docs/report.md."""
    text = REPORT.read_text(encoding="utf-8")
    return re.findall(r"^\| `(\w+)` \|", section(text, f"## {heading}"), re.MULTILINE)
