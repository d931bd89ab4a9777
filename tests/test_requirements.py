"""``requirements.lock``: every package of ``constraints.txt``, each with a hash, from nowhere in particular."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINE = re.compile(r"([A-Za-z0-9._-]+)(?:\[[a-z,]+\])?==([^ ]+) --hash=sha256:[0-9a-f]{64}")


def _name(text: str) -> str:
    return re.sub(r"[-_.]+", "-", text).lower()


def test_the_lock_has_what_the_constraints_name_with_hashes() -> None:
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    found = {}
    for line in lines:
        match = LINE.fullmatch(line)
        assert match, line  # no address, no path, no package without a hash
        found[_name(match[1])] = match[2].partition("+")[0]  # PyTorch's builds differ in what follows the +
    pins = [line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    assert {_name(name): version for name, version in pins}.items() <= found.items()
