"""Reports: records in, content as values, and from that the terminal, Markdown, pictures and the page."""

from __future__ import annotations

from palinode.report.run_report import headline

__all__ = ["headline"]
