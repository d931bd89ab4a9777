"""The help texts: read from the verb table, the config dataclasses and ``conf/``, without Hydra."""

import inspect
from collections.abc import Mapping

from kncompress.cli.presets import GROUPS_WITH_PATHS, defaults_of, groups, options
from kncompress.cli.schema import keys
from kncompress.cli.verbs import Verb
from kncompress.config import ModelRunConfig

_PLACES = {"model": " | folder | file | hub id", "factors": " | YAML file"}


def overview(verbs: Mapping[str, Verb]) -> str:
    """The answer to ``--help``."""
    rows = "\n".join(f"  {verb.name:<10} {verb.summary}" for verb in verbs.values())
    first = next(iter(verbs))
    return f"""\
usage: kncompress VERB [-m] [key=value ...]

verbs:
{rows}

options:
  -h, --help        this text; after a verb: its groups, keys and examples
  --version         the version
  -m, --multirun    after a verb: a sweep, one job for each combination of a=1,2 b=3,4
  --show            after a verb: print the composed configuration and stop
  completion SHELL  a script for bash or zsh that completes verbs and keys: source <(kncompress completion bash)

example: kncompress {first} factors=kngpt2 trainer.steps=100"""


def verb_help(verb: Verb) -> str:
    """The answer to ``VERB --help``: groups and choices, keys with type, default and meaning, examples."""
    defaults = defaults_of(verb.name)
    lines = [f"usage: kncompress {verb.name} [-m] [--show] [key=value ...]", "", verb.summary]
    lines += [inspect.cleandoc(verb.config.__doc__ or "").replace("``", ""), "", "groups (group=choice):"]
    for group in groups():
        if group in defaults or group == "experiment" or (group == "sweep" and verb.name == "train"):
            marked = [f"{name} (default)" if name == defaults.get(group) else name for name in options(group)]
            place = _PLACES[group] if group in GROUPS_WITH_PATHS else ""
            lines.append(f"  {group:<10} {' | '.join(marked)}{place}")
    lines += ["", "keys (key=value):"]
    for key in keys(verb.config):
        lines.append(f"  {key.path}: {key.type} = {key.default}")
        if key.doc:
            lines.append(f"      {key.doc.replace('``', '')}")
    lines += ["", "examples:", *(f"  kncompress {verb.name} {words}" for words in _examples(verb, defaults))]
    return "\n".join(lines)


def _examples(verb: Verb, defaults: Mapping[str, str]) -> list[str]:
    found = [f"{'model=./my-model ' if issubclass(verb.config, ModelRunConfig) else ''}run_dir=runs/first"]
    if verb.name == "report":
        found = ["runs=[runs/first,runs/second]"]
    if "factors" in defaults:
        found += ["factors='./my plan.yaml'", "-m factors=kngpt2,kronypt_81m"]
        found.append("-m factors.mlp.right=[1,2],[2,1] factors.mlp.terms=1,2")
    if verb.name == "glue":
        found.append("teacher=mini student=runs/first/model data.source=hub 'tasks=[cola,rte]' seeds=3")
    if verb.name == "generate":
        found = [
            "model=runs/first/model prompt='The river, in spring,' tokens=40",
            "prompt='' samples=3 temperature=0.6",
        ]
        found.append("model=runs/first/model compare=asset:mini prompts=prompts.txt temperature=0")
    if "trainer" in defaults:
        found += ["experiment=wikitext_ilkd trainer.steps=100", "resume=runs/first"]
    if "data" in defaults:
        found.append("data.source=/texts/a.txt data.text_format=plain")
    return found
