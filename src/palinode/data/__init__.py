"""Data sets: files and hub names in, examples, token ids and batches out (spec/data.md §4).

`examples` says what a forget set may be, `tokenize` turns it into ids with the scored tokens
marked, `batches` puts rows together. Formats are read in `sources`.
"""

from palinode.data.examples import (
    Example,
    Form,
    Message,
    Question,
    at_most,
    fingerprint_examples,
    parse_columns,
    plain_questions,
    read_examples,
    sample_examples,
    shared_rows,
)
from palinode.data.sources import Row, read_rows
from palinode.data.tokenize import PromptStyle, TokenRow, end_id, prompt_ids, tokenize

__all__ = [
    "Example",
    "Form",
    "Message",
    "PromptStyle",
    "Question",
    "Row",
    "TokenRow",
    "at_most",
    "end_id",
    "fingerprint_examples",
    "parse_columns",
    "plain_questions",
    "prompt_ids",
    "read_examples",
    "read_rows",
    "sample_examples",
    "shared_rows",
    "tokenize",
]
