"""The version of Palinode, apart from everything that has to be imported for it."""

__version__ = "0.1.0"
