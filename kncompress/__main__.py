"""The command line: ``python -m kncompress VERB [overrides]``. Imports nothing heavy."""

import errno
import sys
from collections.abc import Sequence

from kncompress import __version__
from kncompress.cli.overrides import split_flags, unknown_verb
from kncompress.cli.streams import message, open_pipes
from kncompress.cli.usage import overview, verb_help
from kncompress.cli.verbs import Verb
from kncompress.config import (
    BenchConfig,
    CompressConfig,
    DashboardConfig,
    DoctorConfig,
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    GlueConfig,
    InspectConfig,
    PlanConfig,
    ReportConfig,
    TrainConfig,
)
from kncompress.errors import UserError
from kncompress.runs.process import disk_error

VERBS: dict[str, Verb] = {
    verb.name: verb
    for verb in (
        Verb("train", TrainConfig, "kncompress.commands.train", "Factor a model and repair it by distillation."),
        Verb("compress", CompressConfig, "kncompress.commands.compress", "Factor a model, without training."),
        Verb("plan", PlanConfig, "kncompress.commands.plan", "Choose every map's factors within a parameter budget."),
        Verb("inspect", InspectConfig, "kncompress.commands.inspect", "Count what factors save, without weights."),
        Verb("evaluate", EvaluateConfig, "kncompress.commands.evaluate", "Measure a model's perplexity."),
        Verb("bench", BenchConfig, "kncompress.commands.bench", "Measure speed and memory beside rivals."),
        Verb("export", ExportConfig, "kncompress.commands.export", "Write a model that runs without this package."),
        Verb("doctor", DoctorConfig, "kncompress.commands.doctor", "Check this installation and machine."),
        Verb("report", ReportConfig, "kncompress.commands.report", "One HTML page from run folders."),
        Verb(
            "generate",
            GenerateConfig,
            "kncompress.commands.generate",
            "Write text, two models side by side.",
            texts=("prompt",),
        ),
        Verb("dashboard", DashboardConfig, "kncompress.commands.dashboard", "A W&B workspace and report as code."),
        Verb("glue", GlueConfig, "kncompress.commands.glue", "Fine-tune on GLUE with ILKD.", {"teacher": "model"}),
    )
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; ``argv`` is what follows the program's name.

    Returns the exit code: 0 done, 1 failed, 2 the user's to fix, 130 after SIGINT, 143 after SIGTERM.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    with open_pipes():
        return _exit_code(words)


def _exit_code(words: list[str]) -> int:
    try:
        return _command(words)
    except UserError as error:
        print(message(f"kncompress: {error}"), file=sys.stderr)
        return 2
    except OSError as error:
        if full := disk_error(error):
            print(message(f"kncompress: {f'{error.filename}: ' if error.filename else ''}{full}"), file=sys.stderr)
            return 1
        if error.errno != errno.ENAMETOOLONG:
            raise
        print(message(f"kncompress: {error.filename}: longer than the name of a file may be"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except SystemExit as stop:  # SIGTERM before a job began
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)


def _command(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(overview(VERBS))
        return 0
    if words[0] == "--version":
        print(f"kncompress {__version__}")
        return 0
    # A flag may stand before the verb too.
    position = next((index for index, word in enumerate(words) if not word.startswith("-")), 0)
    name = words.pop(position)
    if name == "completion":
        from kncompress.cli.completion import completion

        print(completion(words, VERBS))
        return 0
    if name not in VERBS:
        raise unknown_verb(name, list(VERBS))
    line = split_flags(words)
    if line.help:
        print(verb_help(VERBS[name]))
        return 0
    try:
        from kncompress.cli.dispatch import dispatch
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name}: this package is missing; install kncompress again with pip") from error

    return dispatch(VERBS[name], line)


if __name__ == "__main__":
    sys.exit(main())
