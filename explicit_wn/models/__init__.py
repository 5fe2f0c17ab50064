"""Whole models, whoever wrote them and whichever way their weights are normed."""

from .checking import Finding, Findings, check
from .conversion import convert, fold
from .initializing import assign_all
from .reporting import Report, Row, report
from .verbs import apply_all, cached, normed, recompute_all

__all__ = [
    "Finding",
    "Findings",
    "Report",
    "Row",
    "apply_all",
    "assign_all",
    "cached",
    "check",
    "convert",
    "fold",
    "normed",
    "recompute_all",
    "report",
]
