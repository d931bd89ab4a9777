"""README and pages under ``docs/``: they name files that exist, the site builds, the picture is that of the package."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import ModuleType

import pytest
from test_floors import FLOORS, PACKAGE

from kncompress.anatomy.families import FAMILIES

ROOT = PACKAGE.parent
DOCS = Path(__file__).parents[1] / "docs"
# The package itself; data.
NO_ROOMS = {"__init__", "__pycache__", "assets", "conf"}
ROOMS = sorted({entry.stem for entry in PACKAGE.iterdir() if entry.is_dir() or entry.suffix == ".py"} - NO_ROOMS)


@pytest.fixture(scope="module")
def drawing() -> ModuleType:
    spec = importlib.util.spec_from_file_location("architecture", DOCS / "architecture.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_shows_every_room_on_its_floor(drawing: ModuleType) -> None:
    drawn = {room: floor for floor, rooms in enumerate(drawing.FLOORS) for room, _ in rooms}
    rooms = set(ROOMS)
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


PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(page.relative_to(ROOT)) for page in DOCS.glob("*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)\)", text)
    for link in (link for link in links if not link.startswith("api/")):  # made by make docs
        assert ((ROOT / page).parent / link).exists(), link
    # Without a suffix a room's name may begin the name of a metric (compression/factors).
    named = re.findall(
        rf"`((?:tests|docs|experiments|kncompress)/[\w./]*|(?:{'|'.join(ROOMS)})/(?:[\w/]+\.\w+)?)`", text
    )
    for name in set(named) - {"docs/api/"}:  # made by make docs
        assert (ROOT / name).exists() or (PACKAGE / name).exists(), name


def test_every_family_with_a_table_is_named() -> None:
    line = next(line for line in (DOCS / "models.md").read_text().split("\n\n") if line.startswith("Families"))
    assert set(re.findall(r"`(\w+)`", line)) - {"compress", "inspect"} == set(FAMILIES)


def test_readme_and_index_lead_to_every_page() -> None:
    pages = {page.name for page in DOCS.glob("*.md")} - {"index.md"}
    assert pages == set(re.findall(r"\]\(docs/(\w+\.md)\)", (ROOT / "README.md").read_text()))
    assert pages == set(re.findall(r"\]\((\w+\.md)\)", (DOCS / "index.md").read_text()))


def test_the_site_builds_and_a_broken_link_fails_it(tmp_path: Path) -> None:
    """As ``make docs`` builds it, of a copy of the pages; a stub stands for the API pages."""
    (command,) = re.findall(r"python -m (mkdocs build [^#\n]*)", (ROOT / "Makefile").read_text())

    def build() -> tuple[int, str]:
        environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
        line = [sys.executable, "-m", *command.split()]
        done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stderr

    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    shutil.copytree(DOCS, tmp_path / "docs", ignore=shutil.ignore_patterns("api"))
    (tmp_path / "docs" / "api").mkdir()
    (tmp_path / "docs" / "api" / "index.html").write_text("<html></html>")
    code, told = build()
    assert code == 0, told
    built = {page.stem for page in (tmp_path / "site").glob("*.html")}
    assert {page.stem for page in DOCS.glob("*.md")} <= built and (tmp_path / "site" / "api" / "index.html").exists()

    with (tmp_path / "docs" / "train.md").open("a") as page:
        page.write("[a](nowhere.md) [b](install.md#no-such-heading)\n")
    code, told = build()
    assert code != 0 and "nowhere.md" in told and "no-such-heading" in told


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
