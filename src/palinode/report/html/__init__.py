"""A report as one self-contained HTML file: no network, opens from disk, safe with any text in it."""

from __future__ import annotations

from palinode.report.html.page import html_report

__all__ = ["html_report"]
