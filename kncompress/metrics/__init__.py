"""Measures of a language model: perplexity, bits per byte, divergence from a teacher, last words."""

from kncompress.metrics.last_word import LastWords, last_words
from kncompress.metrics.perplexity import Comparison, Perplexity, bits_per_byte, compare, perplexity
from kncompress.metrics.token_mean import TokenMean
from kncompress.metrics.windows import Window, sliding_windows

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
