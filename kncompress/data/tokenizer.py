"""Byte-level BPE tokenizers: trained on text, or loaded with a model."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kncompress.errors import UserError
from kncompress.hub import has, local_folder
from kncompress.terminal import first_line

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<unk>"


def train_tokenizer(documents: Iterable[str], vocab_size: int, context: int) -> Any:
    """A byte-level BPE of ``vocab_size`` with GPT-2's pre-tokenisation, as a transformers tokenizer.

    ``<unk>``, which published text puts for rare words, becomes one special token that is never a training target.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        # lstrip: the space before an unknown word belongs to it, or a lone space would become a target.
        special_tokens=[END_OF_TEXT, AddedToken(UNKNOWN, lstrip=True)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_without_unknown(documents), trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise UserError(
            f"model.architecture.vocab_size={vocab_size}: the text yields only {tokenizer.get_vocab_size()} tokens"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=UNKNOWN,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def _without_unknown(documents: Iterable[str]) -> Iterator[str]:
    return (document.replace(UNKNOWN, " ") for document in documents)


def load_tokenizer(path: str | Path, gguf_file: str | None = None) -> Any:
    """The tokenizer of a model folder or hub id, or the one inside a GGUF file of that folder.

    Raises UserError where there is none.
    """
    from transformers import AutoTokenizer

    folder = local_folder(path, gguf_file or "tokenizer", "model.tokenizer")
    if gguf_file is None and not has(folder, "tokenizer"):  # transformers would make up an empty one
        raise UserError(f"model.tokenizer={path}: no tokenizer could be loaded there (no tokenizer.json)")
    options = {"gguf_file": gguf_file} if gguf_file else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, **options
        )  # fmt: skip
    except Exception as error:  # whatever a damaged file makes the many readers of tokenizers raise
        raise UserError(f"model.tokenizer={path}: no tokenizer could be loaded there ({first_line(error)})") from error
    for name in ("gguf_file", "local_files_only"):  # how it was loaded is not saved along with it
        tokenizer.init_kwargs.pop(name, None)
    return tokenizer


def check_fit(tokenizer: Any, vocab_size: int, name: str) -> None:
    """Raises UserError where the tokenizer has ids that the model's embedding lacks."""
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"model.tokenizer={name}: the tokenizer has {len(tokenizer)} tokens and the model's embedding only "
            f"{vocab_size} rows; give the tokenizer that the model was trained with"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(f"model.tokenizer={name}: no end-of-text token, which separates documents")


def first_token(tokenizer: Any) -> int | None:
    """Id of the token with which the tokenizer begins every text; None where it adds none.

    Models that always saw it write nonsense without it: Gemma's perplexity grows by orders of magnitude
    (EleutherAI/lm-evaluation-harness 1465). So a window or block from the middle of a text gets it too, in the place
    of its own first token, as llama.cpp does (ggml-org/llama.cpp 1303).
    """
    begin = tokenizer.bos_token_id
    return begin if begin is not None and tokenizer("")["input_ids"][:1] == [begin] else None


def ignored_token(tokenizer: Any) -> int | None:
    """Id of the token that stands for an unknown word and so is no target; None where there is none."""
    unknown = tokenizer.unk_token_id
    return None if unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id) else unknown
