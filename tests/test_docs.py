"""The pages under ``docs/``: the picture is that of the package, the files they name exist, the API pages render."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import ModuleType

import pytest
from test_floors import FLOORS, PACKAGE

ROOT = PACKAGE.parent
DOCS = Path(__file__).parents[1] / "docs"
ROOMS = "|".join(FLOORS)
# The package itself; data.
NO_ROOMS = {"__init__", "__pycache__", "assets", "conf"}


@pytest.fixture(scope="module")
def drawing() -> ModuleType:
    spec = importlib.util.spec_from_file_location("architecture", DOCS / "architecture.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_shows_every_room_on_its_floor(drawing: ModuleType) -> None:
    drawn = {room: floor for floor, rooms in enumerate(drawing.FLOORS) for room, _ in rooms}
    rooms = {entry.stem for entry in PACKAGE.iterdir() if entry.is_dir() or entry.suffix == ".py"} - NO_ROOMS
    assert rooms <= set(drawn), "add it to FLOORS in docs/architecture.py and run that file"
    assert {room: max(FLOORS[room], 0) for room in drawn} == drawn
    svg = DOCS / "architecture.svg"
    assert svg.read_text() == drawing.picture(), "run: python docs/architecture.py"
    words = [element.text for element in ET.parse(svg).iter() if element.tag.endswith("text")]
    assert rooms <= set(words)


def test_no_words_of_the_picture_leave_their_box(drawing: ModuleType) -> None:
    """Boxes and texts of one row, by a generous width of a character."""
    root = ET.parse(DOCS / "architecture.svg").getroot()
    boxes = [{k: float(e.attrib[k]) for k in ("x", "y", "width", "height")} for e in root if "rx" in e.attrib]
    for element in (e for e in root if e.tag.endswith("text") and e.attrib["text-anchor"] == "middle"):
        x, y = float(element.attrib["x"]), float(element.attrib["y"])
        inside = [b for b in boxes if b["x"] < x < b["x"] + b["width"] and b["y"] < y < b["y"] + b["height"]]
        if inside and element.text:
            width = 0.56 * float(element.attrib["font-size"]) * len(element.text)
            assert width < inside[0]["width"], element.text


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md", "README.md"])
def test_files_that_a_page_names_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)\)", text)
    for link in links:
        assert ((ROOT / page).parent / link).exists(), link
    # Without a suffix a room's name may begin the name of a metric (compression/factors).
    named = re.findall(rf"`((?:tests|docs|experiments|kncompress)/[\w./]*|(?:{ROOMS})/(?:[\w/]+\.\w+)?)`", text)
    for name in set(named) - {"docs/api/"}:  # made by make docs
        assert (ROOT / name).exists() or (PACKAGE / name).exists(), name


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_what_is_public_says_what_it_is(file: Path) -> None:
    tree = ast.parse(file.read_text())
    if not tree.body:
        return
    assert ast.get_docstring(tree), "the module"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


@pytest.mark.slow
def test_api_pages_render_without_warnings(tmp_path: Path) -> None:
    line = [sys.executable, "-W", "error", "-m", "pdoc", "-d", "google", "-o", str(tmp_path / "api"), "kncompress"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "warn" not in done.stderr.lower(), done.stderr
    folder = tmp_path / "api" / "kncompress"
    pages = {str(page.relative_to(folder).with_suffix("")) for page in folder.rglob("*.html")}
    # A room with a public surface of its own (``__all__``) has one page, with what it gives to others.
    surfaces = {file.parent.name for file in PACKAGE.glob("*/__init__.py") if "__all__" in file.read_text()}
    modules = {str(file.relative_to(PACKAGE).with_suffix("")) for file in PACKAGE.rglob("*.py")}
    plain = {name for name in modules if name.partition("/")[0] not in surfaces and "__" not in name}
    assert plain | surfaces <= pages
    product = (folder / "kron.html").read_text()
    assert 'id="kronecker_linear"' in product and "<h6" in product  # Args and Raises became headings
