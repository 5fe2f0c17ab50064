"""Whole models, whoever wrote them and whichever way their weights are normed."""

from .checking import Finding, Findings, check
from .conversion import ForeignNormWarning, convert, fold
from .dropin import remove_spectral_norm, remove_weight_norm, spectral_norm, weight_norm
from .from_r import load_r
from .initializing import assign_all
from .reporting import Report, Row, report
from .verbs import apply_all, cached, normed, recompute_all

__all__ = [
    "Finding",
    "Findings",
    "ForeignNormWarning",
    "Report",
    "Row",
    "apply_all",
    "assign_all",
    "cached",
    "check",
    "convert",
    "fold",
    "load_r",
    "normed",
    "recompute_all",
    "remove_spectral_norm",
    "remove_weight_norm",
    "report",
    "spectral_norm",
    "weight_norm",
]
