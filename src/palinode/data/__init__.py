"""Data sets: files and hub names in, examples, token ids and batches out (spec/data.md §4).

`examples` says what a forget set may be, `tokenize` turns it into ids with the scored tokens
marked, `batches` puts rows together. Formats are read in `sources`.
"""

from palinode.data.examples import (
    Example,
    Question,
    at_most,
    fingerprint_examples,
    parse_columns,
    read_examples,
    sample_examples,
)
from palinode.data.tokenize import PromptStyle, prompt_ids

__all__ = [
    "Example",
    "PromptStyle",
    "Question",
    "at_most",
    "fingerprint_examples",
    "parse_columns",
    "prompt_ids",
    "read_examples",
    "sample_examples",
]
