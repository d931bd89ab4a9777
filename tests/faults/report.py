"""Write ``docs/reliability.md`` from the counts of ``make test-faults``, and print them.

Usage: python tests/faults/report.py COUNTS.jsonl SECONDS DOCS/RELIABILITY.md
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

WRONG = ("lost", "traceback", "exit code")
HEAD = """# Reliability

What the program was put through, and what came of it. `make test-faults` tries all of it and writes this page
({minutes:.0f} minutes on two shared cores); `make test` tries a few. It is the real program on a tiny model: killed
at random moments and started again by the same command, its files flipped and cut, its disk full, its network gone.
After a kill the same command must give the result of a run that was not killed: the same bits of the weights, the same
metrics. A refused command must leave every file as it was.

**{faults:,} faults of {kinds} kinds: {lost} lost, {traceback} tracebacks, {code} wrong exit codes. {inputs:,} random
inputs to {parsers} parsers: {failed} failed.** Seeds: {seeds}.

| fault | tried | outcome | nothing lost |
|---|---:|---|---|
"""


def page(rows: list[dict[str, Any]], seconds: float) -> str:
    """The page."""
    fuzz = [row for row in rows if row["kind"] == "fuzz"]
    merged: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["kind"] != "fuzz":
            one = merged.setdefault(row["kind"], {"tried": 0, "outcomes": Counter()} | dict.fromkeys(WRONG, 0))
            one["tried"] += row["tried"]
            one["outcomes"].update(row["outcomes"])
            for name in WRONG:
                one[name] += row[name]
    text = HEAD.format(
        minutes=seconds / 60, faults=sum(row["tried"] for row in merged.values()), kinds=len(merged),
        lost=sum(row["lost"] for row in merged.values()), traceback=sum(row["traceback"] for row in merged.values()),
        code=sum(row["exit code"] for row in merged.values()), inputs=sum(row["tried"] for row in fuzz),
        parsers=len(fuzz), failed=sum(not row["passed"] for row in fuzz),
        seeds=", ".join(sorted({str(row["seed"]) for row in rows})),
    )  # fmt: skip
    for kind, row in sorted(merged.items()):
        outcome = "; ".join(f"{count} {name}" for name, count in row["outcomes"].most_common())
        wrong = ", ".join(f"{row[name]} {name}" for name in WRONG if row[name])
        text += f"| {kind} | {row['tried']} | {outcome} | {wrong or 'yes'} |\n"
    if fuzz:
        text += "\n| random input to | tried | refused by one line | slowest, seconds |\n|---|---:|---:|---:|\n"
        for row in fuzz:
            text += f"| {row['what']} | {row['tried']:,} | {row['refused']:,} | {row['slowest']} |\n"
    return text


def main(counts: Path, seconds: float, file: Path) -> int:
    """Exit code 1 where anything was lost or wrong."""
    rows = [json.loads(line) for line in counts.read_text().splitlines()]
    text = page(rows, seconds)
    file.write_text(text)
    print(text)
    return int(any(row.get(name) for row in rows for name in WRONG) or any(not row.get("passed", True) for row in rows))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[3])))
