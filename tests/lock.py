"""Write ``requirements.lock`` from pip's report of what it would install: `make lock`.

Usage: python tests/lock.py REPORT.json REQUIREMENTS.lock
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

HEAD = """# The packages of constraints.txt with hashes of their files: Linux x86-64, Python 3.11, PyTorch for CPUs.
# pip install --require-hashes -r requirements.lock && pip install --no-deps kncompress
# Made by `make lock`.
"""
EXTRA = re.compile(r"([A-Za-z0-9._-]+)\[([A-Za-z0-9._,-]+)\]")


def lock(packages: list[dict[str, Any]]) -> str:
    """A line a package, and one with the extras that others want of it: pip wants both pinned."""
    extras: dict[str, set[str]] = {}
    for package in packages:
        for text in package["metadata"].get("requires_dist", []):
            if (match := EXTRA.match(text)) and "extra ==" not in text:
                extras.setdefault(_name(match[1]), set()).update(match[2].split(","))
    lines = []
    for package in sorted(packages, key=lambda p: str(p["metadata"]["name"]).lower()):
        name, version = package["metadata"]["name"], package["metadata"]["version"]
        wanted = ",".join(sorted(extras.get(_name(name), ())))
        digest = package["download_info"]["archive_info"]["hashes"]["sha256"]
        lines += [
            f"{entry}=={version} --hash=sha256:{digest}\n" for entry in (name, f"{name}[{wanted}]")[: 1 + bool(wanted)]
        ]
    return HEAD + "".join(lines)


def _name(text: str) -> str:
    return re.sub(r"[-_.]+", "-", text).lower()


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(lock(json.loads(Path(sys.argv[1]).read_text())["install"]))
