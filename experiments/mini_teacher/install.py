"""Install a finished ``mini_teacher`` run as ``model=mini``, with its provenance.

Usage: python experiments/mini_teacher/install.py RUN; needs $KNCOMPRESS_DATA for the evaluation.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import kncompress
from kncompress.formats.pretrained import load_model, save_model

ASSET = Path(kncompress.__file__).parent / "assets" / "mini"
PROMPTS = ("The history of the city", "In mathematics, a", "The army marched")
PAGE = """# Provenance of the bundled teacher

GPT-2 architecture, {parameters:,} parameters, float16 weights, byte-level BPE of 8192 tokens.

- command: `{command}`
- seed {seed}; {tokens:,.0f} training tokens in {steps:,.0f} steps; {hours:.2f} hours on {cores} cores ({processor})
- versions: {versions}
- data: the training articles of the sample (Wikipedia, CC BY-SA, carried by gensim 4.4.0); WikiText-2 train (CC BY-SA;
  `@-@` marks and spacing undone, `<unk>` one special token that is never a training target); Wikipedia extracts (CC
  BY-SA, turboderp-org/exllamav2 da07facd); pages of digital.gov (CC0, GSA/digitalgov.gov 49795832) and of 18F (CC0,
  18F/18f.gsa.gov 0a55c75e); ten public-domain books from GITenberg (1342, 1661, 3261, 15122, 16215, 18304, 52834,
  14263, 16351, 14881). The validation and test articles of the sample and of WikiText-2 are not in it.

| text | perplexity | bits per byte | tokens scored |
|---|---|---|---|
{scores}

Windows of 512 tokens without overlap, token-weighted; WikiText-2 as prose (`data.text_format=wikitext`). Perplexity is
per token of this tokenizer: compare models of other tokenizers by bits per byte.

Greedy continuations:

{continuations}
"""


def evaluate(source: str) -> dict[str, float]:
    """Metrics of the installed model on a text."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        line = [sys.executable, "-m", "kncompress", "evaluate", "model=mini", f"data.source={source}", f"run_dir={run}"]
        subprocess.run(line, check=True)
        return json.loads((run / "result.json").read_text())["metrics"]


def continuations() -> str:
    """Three greedy continuations as a list."""
    from transformers import AutoTokenizer

    model, tokenizer = load_model(ASSET, dtype=torch.float32), AutoTokenizer.from_pretrained(ASSET)
    lines = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        text = " ".join(tokenizer.decode(out[0], skip_special_tokens=True).split())
        lines.append(f"- **{prompt}**{text.removeprefix(prompt)}")
    return "\n".join(lines)


def main(run: Path) -> None:
    """Copy the model, measure it, write the page."""
    from transformers import AutoTokenizer

    record = json.loads((run / "run.json").read_text())
    result = json.loads((run / "result.json").read_text())
    if record["status"] != "finished":
        sys.exit(f"{run}: the run is {record['status']}")
    shutil.rmtree(ASSET, ignore_errors=True)
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    save_model(load_model(run / "model", dtype=torch.float32), ASSET, tokenizer, torch.float16)
    texts = {
        "WikiText-2 test": f"{os.environ['KNCOMPRESS_DATA']}/wikitext2/wiki.test.raw",
        "sample, test articles": "sample",
    }
    scores = []
    for name, source in texts.items():
        m = evaluate(source)
        scores.append(f"| {name} | {m['perplexity']:.2f} | {m['bits_per_byte']:.4f} | {m['tokens']:,.0f} |")
    kept = ("torch", "lightning", "transformers", "tokenizers")
    (ASSET / "PROVENANCE.md").write_text(
        PAGE.format(
            parameters=int(result["metrics"]["parameters/student"]),
            command="python -m kncompress train +experiment=mini_teacher",
            seed=record["seed"],
            tokens=result["metrics"]["tokens"],
            steps=result["metrics"]["steps"],
            hours=record["wall_seconds"] / 3600,
            cores=record["machine"]["cores"],
            processor=record["machine"]["processor"],
            versions=", ".join(f"{name} {record['versions'][name]}" for name in kept),
            scores="\n".join(scores),
            continuations=continuations(),
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
