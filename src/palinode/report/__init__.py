"""Reports: records in, words out."""

from __future__ import annotations

from palinode.report.summary import headline, markdown_report, terminal_table

__all__ = ["headline", "markdown_report", "terminal_table"]
