"""A small GLUE download in the official layouts, with what makes each of them different."""

from pathlib import Path

WORDS = ("river", "mill", "letter", "bridge", "snow", "hill", "wind", "sea")

STSB = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2"
MNLI = (
    "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
    "sentence2_parse\tsentence1\tsentence2"
)


def sentences(count: int) -> list[str]:
    """Different short sentences, one of them with a quotation mark that is never closed."""
    found = [f"The {WORDS[i % 8]} and the {WORDS[(i // 8 + i) % 8]} number {i}." for i in range(count)]
    found[1] = 'The "mill stood by the river , he said .'
    return found


def write(file: Path, *lines: str, encoding: str = "utf-8", end: str = "\n") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes((end.join(lines) + end).encode(encoding))


def make_glue(folder: Path, train: int = 12, dev: int = 6, test: int = 4) -> Path:
    """CoLA without header, MRPC with a byte order mark, QQP with a broken row, MNLI with two dev sets, and so on."""
    for split, count in (("train", train), ("dev", dev)):
        make_single(folder, split, sentences(count))
        make_pairs(folder, split, pairs_of(count))
        make_mnli(folder / "MNLI", split, pairs_of(count))
    if test:
        make_tests(folder, pairs_of(test))
    return folder


def pairs_of(count: int) -> list[tuple[str, str]]:
    """Pairs of different sentences."""
    found = sentences(2 * count)
    return list(zip(found[:count], found[count:], strict=True))


def make_single(folder: Path, split: str, texts: list[str]) -> None:
    """CoLA and SST-2, whose sentences end in a space."""
    rows = [f"gj04\t{i % 2}\t{'*' * (i % 2)}\t{text}" for i, text in enumerate(texts)]
    write(folder / "CoLA" / f"{split}.tsv", *rows)
    rows = [f"{text} \t{i % 2}" for i, text in enumerate(texts)]
    write(folder / "SST-2" / f"{split}.tsv", "sentence\tlabel", *rows)


def make_pairs(folder: Path, split: str, pairs: list[tuple[str, str]]) -> None:
    """MRPC, STS-B, QQP, QNLI, RTE and WNLI."""
    both, name = list(enumerate(pairs)), f"{split}.tsv"
    head = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"
    rows = [f"{i % 2}\t{i}\t{i + 9}\t{a}\t{b}" for i, (a, b) in both]
    write(folder / "MRPC" / name, head, *rows, encoding="utf-8-sig", end="\r\n")
    rows = [f"{i}\tnews\tf\t2012\t7\tnone\tnone\t{a}\t{b}\t{i % 6 * 0.9:.3f}" for i, (a, b) in both]
    write(folder / "STS-B" / name, f"{STSB}\tscore", *rows)
    rows = [f"{i}\t1\t2\t{a}\t{b}\t{i % 2}" for i, (a, b) in both]
    head = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate"
    write(folder / "QQP" / name, head, *rows[:2], "7\t1\t2\tis this row cut", *rows[2:])
    rows = [f"{i}\t{a}\t{b}\t{('entailment', 'not_entailment')[i % 2]}" for i, (a, b) in both]
    write(folder / "QNLI" / name, "index\tquestion\tsentence\tlabel", *rows)
    write(folder / "RTE" / name, "index\tsentence1\tsentence2\tlabel", *rows)
    rows = [f"{i}\t{a}\t{b}\t{i % 2}" for i, (a, b) in both]
    write(folder / "WNLI" / name, "index\tsentence1\tsentence2\tlabel", *rows)


def make_mnli(folder: Path, split: str, pairs: list[tuple[str, str]]) -> None:
    """The training file has one annotator's label before the gold label, the dev files have five."""
    labels = ("entailment", "neutral", "contradiction")
    files = {"train": 1} if split == "train" else {"dev_matched": 5, "dev_mismatched": 5}
    for name, votes in files.items():
        head = "\t".join([MNLI, *(f"label{n + 1}" for n in range(votes)), "gold_label"])
        rows = [f"{i}\tp\tp\tfiction\t(a)\t(b)\t(A)\t(B)\t{a}\t{b}" for i, (a, b) in enumerate(pairs)]
        rows = ["\t".join([row, *["neutral"] * votes, labels[i % 3]]) for i, row in enumerate(rows)]
        write(folder / f"{name}.tsv", head, *rows)


def make_tests(folder: Path, pairs: list[tuple[str, str]]) -> None:
    """Test sets, without labels, of some tasks, and the diagnostic set."""
    both = list(enumerate(pairs))
    write(folder / "CoLA" / "test.tsv", "index\tsentence", *(f"{i}\t{a}" for i, (a, _) in both))
    write(folder / "STS-B" / "test.tsv", STSB, *(f"{i}\tn\tf\t2\t7\tn\tn\t{a}\t{b}" for i, (a, b) in both))
    rows = [f"{i}\t{a}\t{b}" for i, (a, b) in both]
    write(folder / "QQP" / "test.tsv", "id\tquestion1\tquestion2", *rows)
    write(folder / "diagnostic" / "diagnostic.tsv", "index\tsentence1\tsentence2", *rows)
    rows = [f"{i}\tp\tp\tfiction\t(a)\t(b)\t(A)\t(B)\t{a}\t{b}" for i, (a, b) in both]
    for name in ("test_matched", "test_mismatched"):
        write(folder / "MNLI" / f"{name}.tsv", MNLI, *rows)
