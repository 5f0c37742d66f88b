"""`report.html`: one page about one run, made from the run's files alone, that opens offline."""

from ftb_llm.report.page import write_report
from ftb_llm.report.summary import summary_rows

__all__ = ["summary_rows", "write_report"]
