"""Data sets: files and hub names in, examples, token ids and batches out (spec/data.md §4).

`examples` says what a forget set may be, `tokenize` turns it into ids with the scored tokens
marked, `batches` puts rows together. Formats are read in `sources`.
"""
