"""Norms in checkpoints, without the model: state dicts here, files by `python -m explicit_wn`."""

from .state import Report, Row, fold, report, respell

__all__ = ["Report", "Row", "fold", "report", "respell"]
