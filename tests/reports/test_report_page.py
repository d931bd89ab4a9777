"""The report page: its numbers are those of the runs, it needs no network, and a browser draws it without errors."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from markupsafe import escape

from kncompress.errors import UserError
from kncompress.reports.figures import pareto_figure, pareto_front
from kncompress.reports.report_page import report_page
from kncompress.runs.past_runs import read_runs

SCORES = {"0": (400, 40.0), "1": (500, 30.0), "2": (600, 35.0), "10": (700, 25.0)}
SAMPLE = {"prompt": "Once <upon>", "text": "a time", "teacher": "a cat & a dog"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sweep of four finished runs and one that failed, and a rival that was only measured."""
    for name, (parameters, perplexity) in SCORES.items():
        run = tmp_path / "sweep" / name
        run.mkdir(parents=True)
        record = {"verb": "train", "status": "finished", "command": ["kncompress", "train", f"seed={name}"]}
        record |= {"machine": {"cores": 2}, "git": {"sha": "abc"}}
        (run / "run.json").write_text(json.dumps(record))
        metrics = {"parameters/student": parameters, "perplexity/student": perplexity}
        metrics |= {"parameters/teacher": 1000, "perplexity/teacher": 20.0}
        (run / "result.json").write_text(json.dumps({"status": "finished", "metrics": metrics}))
        (run / "metrics.csv").write_text(
            "step,train/loss,validation/loss\n1,3.5,\n2,3.0,nan\n3,2.5,2.75\n3000,2."
        )  # killed
        maps = [{"name": f"layers.{layer}.mlp.up", "shape": "8x4(x)2x2", "error": 0.1 * layer, "weighted": None}
                for layer in (1, 2)]  # fmt: skip
        (run / "compression.json").write_text(json.dumps({"rows": maps}))
        (run / "config.yaml").write_text("data: {source: a <b> text, test: null}\ntrainer: {test_tokens: 512}\n")
        (run / "samples.json").write_text(json.dumps([SAMPLE | {"student": f"of run {name}"}]))
    measured = tmp_path / "sweep" / "rival <model>"
    measured.mkdir()
    (measured / "run.json").write_text(json.dumps({"verb": "evaluate", "status": "finished", "command": []}))
    result = {"status": "finished", "metrics": {"parameters": 550, "perplexity": 31.0}}
    (measured / "result.json").write_text(json.dumps(result))
    failed = tmp_path / "sweep" / "3"
    failed.mkdir()
    (failed / "run.json").write_text(json.dumps({"verb": "train", "status": "failed", "command": []}))
    return tmp_path / "sweep"


def figures(page: str) -> list[list[dict[str, Any]]]:
    """The traces of every picture, from the arguments of ``Plotly.newPlot``."""
    found = []
    for match in re.finditer(r"Plotly\.newPlot\(\s*\"[a-z-]+\",\s*", page):
        found.append(json.JSONDecoder().raw_decode(page, match.end())[0])
    return found


def test_the_pictures_and_the_table_have_the_runs_numbers(folder: Path) -> None:
    runs = read_runs([str(folder)])
    assert [run.name for run in runs] == ["rival <model>", "0", "1", "2", "3", "10"]
    page = report_page(runs, "shapes </script>", {"published": [650, 33.0]})
    embedded = json.loads(re.search(r'<script type="application/json" id="runs">(.*?)</script>', page)[1])
    scores = {row["name"]: row["metrics"].get("perplexity/student") for row in embedded}
    assert scores == {name: score for name, (_, score) in SCORES.items()} | {"3": None, "rival <model>": None}
    pareto, train, validation, maps = figures(page)
    traces = {trace["name"]: list(zip(trace["x"], trace["y"], strict=True)) for trace in pareto}
    assert traces["runs"] == list(SCORES.values())
    assert traces["front"] == [SCORES["0"], SCORES["1"], SCORES["10"]]
    assert traces["dense"] == [(1000, 20.0)] and traces["baselines"] == [(650, 33.0), (550, 31.0)]
    assert [(trace["x"], trace["y"]) for trace in train] == [([1, 2, 3], [3.5, 3.0, 2.5])] * 4
    assert [(trace["x"], trace["y"]) for trace in validation] == [([3], [2.75])] * 4
    assert [trace["name"] for trace in maps] == list(SCORES) and [trace["visible"] for trace in maps] == [True] + [
        False
    ] * 3
    assert maps[0]["z"] == [[0.1], [0.2]] and maps[0]["text"] == [["8x4(x)2x2"]] * 2
    assert "<td>3</td><td>train</td><td>failed</td><td>-</td>" in page
    assert "python -m kncompress train seed=10" in page and page.count("shapes </script>") == 0
    assert "Measured on a &lt;b&gt; text, split: test, tokens: 512, context: the model&#39;s." in page
    found = re.search(r'<table +class="samples">.*?</table>', page, re.DOTALL)[0]
    cells = [html.unescape(cell) for cell in re.findall(r"<t[dh]>(.*?)</t[dh]>", found)]
    rows = [cells[i : i + 2] for i in range(0, len(cells), 2)]
    assert rows[:3] == [["", "Once <upon> …"], ["the text itself", "a time"], ["dense", "a cat & a dog"]]
    assert rows[3:] == [[name, f"of run {name}"] for name in SCORES]


def test_one_training_has_a_headline_its_terms_and_tokens(folder: Path) -> None:
    run = folder / "0"
    found = json.loads((run / "result.json").read_text())
    found["metrics"] |= {
        "perplexity/start": 90.0,
        "gap_closed": 0.5391,
        "kl/student": 0.25,
        "tokens_per_second": 1234.5,
    }
    found["metrics"] |= {"compare/same_top": 71.25, "compare/kl_99": 2.5, "unseen/perplexity/student": 77.0}
    (run / "result.json").write_text(json.dumps(found))
    (run / "metrics.csv").write_text(
        "step,train/loss,train/logits,train/hidden,train/tokens,validation/loss,validation/perplexity\n"
        "9,3.5,2.5,1.0,1000,,\n19,3.0,2.25,0.75,2000,2.5,12.18\n"
    )
    page = report_page(read_runs([str(run)]), "one")
    told = "1,000 → 400 parameters (40.0%), perplexity 90.00 → 40.00 (dense 20.00), 54% of the gap closed, KL 0.250, "
    assert f"<li>0: {told}same likeliest token 71.2%, trained at 1,234 tokens/s</li>" in page
    assert "<th>compare/kl_99</th>" in page and "<th>unseen/perplexity/student</th>" in page and "8 bits: KL" in page
    _, train, terms, validation, _ = figures(page)
    assert [(trace["x"], trace["y"]) for trace in train] == [([1000, 2000], [3.5, 3.0])]
    assert {trace["name"]: trace["y"] for trace in terms} == {"logits": [2.5, 2.25], "hidden": [1.0, 0.75]}
    assert [(trace["x"], trace["y"]) for trace in validation] == [([2000], [12.18])]
    assert "training tokens" in page and "Perplexity, validation" in page


def test_what_differs_is_told_and_what_does_not_is_not(folder: Path) -> None:
    for number, name in enumerate(SCORES):
        file = folder / name / "run.json"
        words = ["+experiment=x", f"factors.mlp.right=[1,{number}]", f"run_dir=r/{name}", "hydra.mode=RUN"]
        file.write_text(json.dumps(json.loads(file.read_text()) | {"command": ["kncompress", "train", *words]}))
    runs = read_runs([str(folder)])
    assert {run.name: run.differs for run in runs if run.differs} == {
        name: f"mlp.right=[1,{number}]" for number, name in enumerate(SCORES)
    }
    page = report_page(runs, "shapes")
    pareto, train, *_ = figures(page)
    assert next(trace["hovertext"] for trace in pareto if trace["name"] == "runs")[0] == "0: mlp.right=[1,0]"
    assert "10: mlp.right=[1,3]" in [trace["name"] for trace in train]
    assert page.count("<td>mlp.right=[1,3]</td>") == 1


def test_different_texts_are_told(folder: Path) -> None:
    (folder / "2" / "config.yaml").write_text("data: {source: another}\n")
    texts = {run.name: run.text for run in read_runs([str(folder)])}
    assert texts["2"] == "another, split: test, tokens: all, context: the model's"
    page = report_page(read_runs([str(folder)]), "shapes")
    assert "different texts" in page and f"{escape(texts['2'])}: 2" in page


@pytest.mark.parametrize(
    ("verb", "config", "text"),
    [
        ("evaluate", "data: {source: sample, split: auto}", "sample, split: test, tokens: all, context: the model's"),
        ("evaluate", "data: {source: a, test: b, split: train}\ntokens: 9", "a, split: train, tokens: 9"),
        ("evaluate", "data: {source: a, test: b, split: test}\nstride: 8", "b, split: test, tokens: all"),
        ("evaluate", "data: {source: a, test: b, split: auto}", "a, split: auto (test where"),
        ("plan", "data: {source: a, split: auto}\nvalidation_tokens: 64", "a, split: validation, tokens: 64"),
        ("train", "seed: 1", ""),
    ],
)
def test_the_text_is_the_one_that_was_scored(verb: str, config: str, text: str, folder: Path) -> None:
    (folder / "0" / "run.json").write_text(json.dumps({"verb": verb, "status": "finished", "command": []}))
    (folder / "0" / "config.yaml").write_text(config)
    (run,) = read_runs([str(folder / "0")])
    assert run.text.startswith(text) and bool(run.text) == bool(text)
    assert run.text.endswith(", stride: 8") == ("stride" in config)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("run.json", '{"verb": "train", "status": 1}', "run.json: status=1: must be a valid string"),
        ("result.json", '{"status": "finished", "metrics": {"loss": "low"}}', 'result.json: metrics.loss="low": must'),
        ("metrics.csv", "step,loss\n1,2,3\n", "metrics.csv: line 2: has 3 columns, not 2"),
        ("compression.json", '{"rows": [{"name": "a", "error": "x"}]}', 'compression.json: rows[0].error="x": must'),
        ("samples.json", '[{"text": 1}]', "samples.json: [0].text=1: must be a valid string"),
        ("config.yaml", "data: {source: [a", "config.yaml: not valid YAML"),
        ("config.yaml", "data: 7", "config.yaml: data=7: a group of keys"),
    ],
)
def test_a_damaged_file_is_named(name: str, content: str, words: str, folder: Path) -> None:
    (folder / "0" / name).write_text(content)
    with pytest.raises(UserError) as caught:
        read_runs([str(folder / "0")])
    assert str(caught.value).startswith(f"runs={folder / '0'}: {words}")


def test_reports_alone_are_no_runs(folder: Path) -> None:
    (folder / "0" / "run.json").write_text(json.dumps({"verb": "report", "status": "finished", "command": []}))
    with pytest.raises(UserError, match="no run in it but earlier reports"):
        read_runs([str(folder / "0")])


def test_the_page_loads_nothing(folder: Path) -> None:
    page = report_page(read_runs([str(folder)]), "shapes")
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=[\"']?(https?:)?//", page)
    assert page.count("plotly.js v") == 1


def test_front_keeps_equal_points_and_drops_beaten_ones() -> None:
    assert pareto_front([(2, 2), (1, 3), (2, 2), (2, 3), (3, 1)]) == [1, 0, 2, 4]
    assert pareto_front([(1, 2, 3), (1, 2, 4), (0, 3, 4)]) == [2, 0]


@pytest.mark.parametrize(("make", "message"), [(False, "no such folder"), (True, "no run in it")])
def test_folders_without_runs_are_the_users_to_fix(make: bool, message: str, tmp_path: Path) -> None:
    if make:
        (tmp_path / "x").mkdir()
    with pytest.raises(UserError, match=message):
        read_runs([str(tmp_path / "x")])


def _chromium() -> str | None:
    """An installed Chromium or Chrome that runs."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    for file in filter(None, map(shutil.which, names)):
        if subprocess.run([file, "--version"], capture_output=True, check=False).returncode == 0:
            return file
    return None


def test_a_browser_draws_it_without_errors(folder: Path, tmp_path: Path) -> None:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    (file := tmp_path / "report.html").write_text(report_page(read_runs([str(folder)]), "shapes"))
    with api.sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        program = own if Path(own).exists() else _chromium()
        if program is None:
            pytest.skip("no Chromium: apt-get install chromium, or python -m playwright install chromium")
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1600})
        errors: list[str] = []
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.route("http*://**", lambda route: errors.append(route.request.url) or route.abort())
        page.goto(file.as_uri())
        page.wait_for_selector("#maps .main-svg .heatmaplayer image, #maps .main-svg .heatmaplayer path")
        # What the picture has drawn, back from pixels to values, against the cells of the table.
        drawn = page.evaluate(_DRAWN)
        table = page.evaluate(_TABLE)
        page.locator("#maps .updatemenu-header").click()
        page.locator("#maps .updatemenu-dropdown-button").nth(2).click()
        shown = page.evaluate("document.querySelector('#maps').data.filter(t => t.visible).map(t => t.name)")
        browser.close()
    assert errors == []
    assert shown == ["2"]
    finished = {row[0]: (float(row[3].replace(",", "")), float(row[5])) for row in table if row[5] != "-"}
    assert finished == SCORES
    assert [pytest.approx(point, rel=0.01) for point in drawn] == list(finished.values())


_DRAWN = """() => {
  const plot = document.querySelector("#pareto"), runs = plot.data.findIndex(t => t.name == "runs");
  const { xaxis, yaxis } = plot._fullLayout;
  const uid = plot._fullData[runs].uid;
  return [...plot.querySelectorAll(`.scatterlayer .trace${uid} .points path`)].map(mark => {
    const at = mark.transform.baseVal.consolidate().matrix;
    return [xaxis.p2d(at.e), yaxis.p2d(at.f)];
  });
}"""
_TABLE = """() => [...document.querySelectorAll("#table tr")].slice(1).map(
  row => [...row.querySelectorAll("td")].map(cell => cell.textContent))"""


def test_a_log_scale_has_several_numbers_where_values_are_near() -> None:
    """Perplexities of 24 and 47 stood beside a single 30."""

    def shown(*perplexities: float) -> list[float]:
        runs = [(str(number), (1e6 + number, value)) for number, value in enumerate(perplexities)]
        ticks = pareto_figure(runs, [], {}, {name: name for name, _ in runs}).layout.yaxis.tickvals
        return [tick for tick in ticks if min(perplexities) <= tick <= max(perplexities)]

    assert shown(24.3, 47.4) == [25, 30, 40]
    assert shown(24.3, 780.0) == [30, 50, 70, 100, 150, 200, 300, 500, 700]
