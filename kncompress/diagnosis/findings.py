"""A finding: one thing that was looked at, how it stands, and what to do."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "note", "broken"]
"""``ok``; ``note``: something works less well or not at all, and the verbs can do without; ``broken``: they cannot."""


@dataclass(frozen=True)
class Finding:
    """One line of the answer; ``todo`` is empty where there is nothing to do."""

    area: str
    name: str
    level: Level
    text: str
    todo: str = ""


def findings_text(findings: list[Finding]) -> str:
    """The findings by area, a line each, and what to do on a line of its own."""
    lines: list[str] = []
    for index, finding in enumerate(findings):
        if index == 0 or findings[index - 1].area != finding.area:
            lines.append(f"{'' if index == 0 else chr(10)}{finding.area}")
        lines.append(f"  {finding.level:<7} {finding.name}: {finding.text}")
        if finding.todo:
            lines.append(f"          do: {finding.todo}")
    return "\n".join(lines)
