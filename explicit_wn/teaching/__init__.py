"""What helps to see the work: its steps, weights that are out of date, and the initialization of the paper."""

from .data_dependent import data_dependent_init
from .record import Record, Recording, record
from .stale import StaleWeightError, detect_stale
from .steps import Step, Steps, steps

__all__ = [
    "Record",
    "Recording",
    "StaleWeightError",
    "Step",
    "Steps",
    "data_dependent_init",
    "detect_stale",
    "record",
    "steps",
]
