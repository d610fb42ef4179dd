"""Tables in Markdown, as the pages of docs/ have them."""

from __future__ import annotations


def table(lines: list[list[str]]) -> str:
    """Return the lines of cells as a table; the first line is its header."""
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
