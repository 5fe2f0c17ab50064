"""Whole models, whoever wrote them and whichever way their weights are normed."""

from .conversion import convert, fold
from .from_r import load_r
from .reporting import Report, Row, report
from .verbs import apply_all, cached, normed, recompute_all

__all__ = ["Report", "Row", "apply_all", "cached", "convert", "fold", "load_r", "normed", "recompute_all", "report"]
