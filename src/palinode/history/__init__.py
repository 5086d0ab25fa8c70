"""When was a row seen, and which checkpoint is the last that had not seen it.

Three kinds of evidence: a log kept while training (`exposures`), the order of the data rebuilt
(`orders`), and what checkpoints know (`onset`). `locate` puts them together; `plan` says which
checkpoints a training should keep.
"""
