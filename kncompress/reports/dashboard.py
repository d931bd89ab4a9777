"""A W&B workspace and a report for a project of ``train`` runs, as code (extra ``dashboard``).

They read what ``loggers`` and ``wandb_content`` log. ``as_json`` is the model that the server is sent, which
wandb-workspaces checks without the server.
"""

import json
from typing import Any

from kncompress.config import ObjectiveConfig
from kncompress.runs.logged_names import MAPS, MAPS_PICTURE, SAMPLES, STEP

PERPLEXITY, PARAMETERS = "perplexity/student", "parameters/student"
LOSSES = ("loss", *ObjectiveConfig.TERMS)
_GROUPS = ("compression/factors", "compression/terms", "compression/start", "compression/ratio")


def pareto_panels() -> list[Any]:
    """Perplexity against parameters, with the lowest perplexity so far, and the ratio of parameters beside it."""
    import wandb_workspaces.reports.v2 as wr

    parameters, perplexity = wr.SummaryMetric(PARAMETERS), wr.SummaryMetric(PERPLEXITY)
    scatter = wr.ScatterPlot(
        title="perplexity against parameters", x=parameters, y=perplexity, log_y=True, running_ymin=True
    )
    bars = wr.BarPlot(title="perplexity by factors", metrics=[perplexity], groupby=wr.Config("compression/factors"))
    return [scatter, bars]


def loss_panels() -> list[Any]:
    """Every term of the loss, and the perplexity on the validation split, over the steps."""
    import wandb_workspaces.reports.v2 as wr

    terms = [wr.LinePlot(title=f"train/{name}", x=STEP, y=[f"train/{name}"]) for name in LOSSES]
    validation = wr.LinePlot(title="validation perplexity", x=STEP, y=["validation/perplexity"], log_y=True)
    return [validation, *terms]


def map_panels() -> list[Any]:
    """The error of every map: heat maps of the runs side by side, and the table of all."""
    import wandb_workspaces.reports.v2 as wr

    pictures = wr.MediaBrowser(title="error of the maps", media_keys=[MAPS_PICTURE], num_columns=2)
    return [pictures, wr.WeavePanelSummaryTable(table_name=MAPS)]


def sweep_panels() -> list[Any]:
    """What a sweep varies against what came of it, as parallel coordinates; and how the settings of runs differ."""
    import wandb_workspaces.reports.v2 as wr

    coordinate = wr.ParallelCoordinatesPlotColumn
    columns = [coordinate(wr.Config(name), display_name=name.rpartition("/")[2]) for name in _GROUPS]
    columns += [coordinate(wr.Config("optimizer.lr"), display_name="lr", log=True)]
    columns += [coordinate(wr.SummaryMetric(name), log=True) for name in (PARAMETERS, PERPLEXITY)]
    return [wr.ParallelCoordinatesPlot(title="sweep", columns=columns), wr.RunComparer(diff_only="split")]


def sample_panels() -> list[Any]:
    """Texts of teacher and student."""
    import wandb_workspaces.reports.v2 as wr

    return [wr.WeavePanelSummaryTable(table_name=SAMPLES)]


_PARTS = {
    "Perplexity against parameters": pareto_panels,
    "Loss terms": loss_panels,
    "Maps": map_panels,
    "Sweep": sweep_panels,
    "Samples": sample_panels,
}


def workspace(entity: str, project: str, title: str) -> Any:
    """The workspace: a section for each part, runs in the groups of their sweeps."""
    import wandb_workspaces.workspaces as ws

    sections = [ws.Section(name=name, panels=panels(), is_open=True) for name, panels in _PARTS.items()]
    columns = [f"summary:{PARAMETERS}", f"summary:{PERPLEXITY}", *(f"config:{name}.value" for name in _GROUPS)]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=title,
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis=STEP),
        runset_settings=ws.RunsetSettings(groupby=[ws.Metric("Group")], pinned_columns=columns),
    )


def wandb_report(entity: str, project: str, title: str) -> Any:
    """The report: the same parts as headings with their panels, on all runs of the project."""
    import wandb_workspaces.reports.v2 as wr

    blocks: list[Any] = [wr.TableOfContents()]
    for name, panels in _PARTS.items():
        blocks += [wr.H2(name), wr.PanelGrid(runsets=[wr.Runset(name="all runs")], panels=panels())]
    return wr.Report(entity=entity, project=project, title=title, blocks=blocks, width="fluid")


def as_json(built: Any) -> str:
    """What ``save`` would send: the model of a workspace or a report, checked by wandb-workspaces, as JSON."""
    content = json.loads(built._to_model().model_dump_json(by_alias=True, exclude_none=True))
    return json.dumps(content, indent=2) + "\n"
