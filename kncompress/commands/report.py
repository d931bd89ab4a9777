"""``report``: one self-contained HTML page from any set of run folders."""

import importlib.util
from dataclasses import asdict
from pathlib import Path

from kncompress.config import ReportConfig
from kncompress.errors import UserError
from kncompress.reports.report_page import report_page
from kncompress.runs.past_runs import Run, read_runs
from kncompress.runs.record import RunRecord
from kncompress.runs.whole_file import write_text


def check(config: ReportConfig) -> list[Run]:
    """Plotly is installed and there are runs, which are returned."""
    if importlib.util.find_spec("plotly") is None:
        raise UserError("report: needs plotly: pip install 'kncompress[reports]'")
    return read_runs(config.folders)


def run(config: ReportConfig, run_dir: Path, runs: list[Run]) -> dict[str, float]:
    """Write ``report.html`` in ``run_dir``; returns the number of runs in it."""
    with RunRecord.open(run_dir, "report", asdict(config), config.seed) as record:
        file = run_dir / "report.html"
        write_text(file, report_page(runs, config.title, config.baselines))
        metrics: dict[str, float] = {"runs": len(runs)}
        record.finish("finished", metrics)
        print(f"report: {file}", flush=True)
    return metrics
