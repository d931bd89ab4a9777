"""Write three local tasks: SST-2's dev set, which of four sentences comes next, and passages for ``lambada``.

Sentences and passages are of a text that no fit has read.
Usage: python experiments/smollm2/tasks.py TEXT SST2_DEV FOLDER
"""

import csv
import json
import random
import re
import sys
from pathlib import Path

ITEMS = 200
"""Of each task."""
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
SENTENCE = re.compile(r"[A-Z][^.!?\n*#|\[\]\"]{40,240}[.!?](?= [A-Z]|$)")


def passages(text: str) -> list[list[str]]:
    """Paragraphs that are nothing but three or more plain sentences."""
    found = []
    for paragraph in text.split("\n"):
        sentences = SENTENCE.findall(paragraph)
        if len(sentences) >= 3 and len(" ".join(sentences)) > 0.95 * len(paragraph):
            found.append(sentences)
    return found


def next_sentences(paragraphs: list[list[str]], draw: random.Random) -> list[dict[str, object]]:
    """Two sentences, and the third of the same paragraph among those of three others."""
    rows = []
    for paragraph in paragraphs[:ITEMS]:
        choices = [paragraph[2], *(other[2] for other in draw.sample(paragraphs, 4) if other is not paragraph)][:4]
        right = choices[0]
        draw.shuffle(choices)
        rows.append(
            {"context": " ".join(paragraph[:2]), "choices": [f" {c}" for c in choices], "answer": choices.index(right)}
        )
    return rows


def last_words(paragraphs: list[list[str]]) -> list[str]:
    """Passages that end in a word which they have used before."""
    found = []
    for paragraph in paragraphs:
        passage = " ".join(paragraph[:3])[:-1]
        before, _, word = passage.rpartition(" ")
        if re.fullmatch("[a-z]{4,}", word) and re.search(rf"\b{word}\b", before):
            found.append(passage)
    return found[:ITEMS]


def sentiments(dev: Path) -> list[dict[str, object]]:
    """Reviews, and whether they are good."""
    with dev.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))[:ITEMS]
    question = "\nQuestion: Is this sentence positive or negative?\nAnswer:"  # as in the harness's own task
    choices = [" negative", " positive"]
    return [
        {"context": row["sentence"].strip() + question, "choices": choices, "answer": int(row["label"])} for row in rows
    ]


def main(text: Path, dev: Path, folder: Path) -> None:
    """Write the files."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    paragraphs = passages(text.read_text(encoding="utf-8", errors="replace"))
    draw.shuffle(paragraphs)
    for name, rows in (("next_sentence", next_sentences(paragraphs, draw)), ("sst2", sentiments(dev))):
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        (folder / f"{name}.yaml").write_text(TASK.format(name=f"local_{name}", data=data.resolve()), encoding="utf-8")
    (folder / "passages.txt").write_text("\n".join(last_words(paragraphs[ITEMS:])) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
