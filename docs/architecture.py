"""Draws ``architecture.svg``: the rooms of the package on their floors, and the way of a run through them.

``python docs/architecture.py`` writes it beside this file; ``make docs`` does too. A test holds the table against the
folders of the package.
"""

from pathlib import Path
from xml.sax.saxutils import escape

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parent / "kncompress"

FLOORS: list[list[tuple[str, str]]] = [
    [
        ("errors", "one line for the user"),
        ("terminal", "tables, progress"),
        ("reading", "files, checked"),
        ("config", "every key, checked"),
        ("hub", "an id: a folder"),
        ("runs", "run folders"),
    ],
    [("kron", "shapes, products, best factors, layers: the mathematics, on torch alone")],
    [
        ("data", "text to token blocks"),
        ("distill", "losses, the objective"),
        ("anatomy", "where maps lie, plans, swaps, taps"),
    ],
    [
        ("compression", "moments, fits, repair"),
        ("formats", "folders, GGUF, ONNX, LoRA"),
        ("evaluation", "perplexity, tasks, text"),
        ("diagnosis", "what doctor looks at"),
    ],
    [("training", "teacher and student, optimiser, checkpoints, loggers, signals")],
    [
        ("planner", "candidates, harms, budgets"),
        ("glue", "tasks, readers, scores, fine-tuning"),
    ],
    [
        ("bench", "measurements, rivals, the machine's ceiling"),
        ("reports", "HTML page, figures, W&B content, summary"),
    ],
    [("cli", "Hydra, overrides, sweeps, search, resume, completion, help")],
    [("commands", "one file a verb")],
    [("__main__", "the table of verbs; imports nothing heavy")],
]
"""Floor -> rooms with what belongs there; a room that does not exist yet is not drawn."""

FLOW = ["experiment", "teacher and text", "plan", "student", "ILKD training", "evaluation", "model, record"]

WIDTH, LEFT, BAND, GAP, HEAD = 1080, 64, 62, 10, 96
INK, LINE, FILL, ACCENT, PAPER = "#1f2933", "#9aa5b1", "#eef2f6", "#1d4ed8", "#ffffff"


def exists(room: str) -> bool:
    """Whether the package has this room: a folder or a file."""
    return (PACKAGE / room).is_dir() or (PACKAGE / f"{room}.py").is_file()


def text(x: float, y: float, words: str, size: int = 13, anchor: str = "middle", extra: str = "") -> str:
    """One line of text."""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}"{extra}>{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, fill: str = FILL, stroke: str = LINE) -> str:
    """A rounded rectangle."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" fill="{fill}" stroke="{stroke}"/>'


def flow() -> list[str]:
    """The strip at the top: a run's stations, left to right."""
    step = (WIDTH - 2 * GAP) / len(FLOW)
    parts = []
    for index, name in enumerate(FLOW):
        x = GAP + index * step
        parts += [box(x, 34, step - 18, 30, PAPER, ACCENT), text(x + (step - 18) / 2, 53, name, 12)]
        if index + 1 < len(FLOW):
            parts.append(
                f'<path d="M {x + step - 17:g} 49 h 14" stroke="{ACCENT}" stroke-width="1.5" marker-end="url(#tip)"/>'
            )
    return [text(GAP, 20, "A run", 14, "start", ' font-weight="bold"'), *parts]


def floors() -> list[str]:
    """The house: a band for each floor, the highest at the top."""
    parts = [
        text(GAP, HEAD - 6, "Floors: a file imports only from floors below its own", 14, "start", ' font-weight="bold"')
    ]
    for place, floor in enumerate(reversed(range(len(FLOORS)))):
        y = HEAD + GAP + place * (BAND + GAP)
        parts.append(text(LEFT - 22, y + BAND / 2 + 6, str(floor), 18, "middle", f' fill="{LINE}"'))
        rooms = [room for room in FLOORS[floor] if exists(room[0])]
        width = (WIDTH - LEFT - GAP + GAP) / len(rooms) - GAP
        for index, (name, what) in enumerate(rooms):
            x = LEFT + index * (width + GAP)
            parts.append(box(x, y, width, BAND))
            parts.append(text(x + width / 2, y + 26, name, 15, "middle", ' font-weight="bold"'))
            parts.append(text(x + width / 2, y + 46, what, 12))
    top, bottom = HEAD + GAP, HEAD + GAP + len(FLOORS) * (BAND + GAP) - GAP
    parts.append(
        f'<path d="M 16 {top} V {bottom - 6}" stroke="{LINE}" stroke-width="1.5" fill="none" marker-end="url(#grey)"/>'
    )
    return parts


def picture() -> str:
    """The whole SVG."""
    height = HEAD + GAP + len(FLOORS) * (BAND + GAP)
    tips = "".join(
        f'<marker id="{name}" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M 0 0 L 8 4 L 0 8 z" fill="{colour}"/></marker>'
        for name, colour in (("tip", ACCENT), ("grey", LINE))
    )
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="system-ui, sans-serif" fill="{INK}" role="img">'
    )
    title = "<title>The way of a run, and the rooms of the package on their floors</title>"
    ground = f'<rect width="{WIDTH}" height="{height}" fill="{PAPER}"/>'
    lines = [head, title, f"<defs>{tips}</defs>", ground, *flow(), *floors(), "</svg>"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (HERE / "architecture.svg").write_text(picture(), encoding="utf-8")
