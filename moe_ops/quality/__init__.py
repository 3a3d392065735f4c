"""What quantization costs a whole model: `compare` against a reference, tables, plots and pages of it."""

from .measure import compare
from .report import Comparison, LayerQuality, QualityReport, WorstToken, combine

__all__ = ["Comparison", "LayerQuality", "QualityReport", "WorstToken", "combine", "compare"]
