"""Measures of a language model: perplexity, bits per byte, divergence from a teacher, last words."""

from kncompress.evaluation.comparison import Comparison, compare
from kncompress.evaluation.last_word import LastWords, last_words
from kncompress.evaluation.perplexity import Perplexity, bits_per_byte, perplexity
from kncompress.evaluation.token_mean import TokenMean
from kncompress.evaluation.windows import Window, sliding_windows

__all__ = [
    "Comparison",
    "LastWords",
    "Perplexity",
    "TokenMean",
    "Window",
    "bits_per_byte",
    "compare",
    "last_words",
    "perplexity",
    "sliding_windows",
]
