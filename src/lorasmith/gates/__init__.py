"""Gates: named thresholds on measured values, as data; what is not measured has not passed."""

from __future__ import annotations

from lorasmith.gates.evaluate import GUIDE_GATES, evaluate, split_costs, with_required
from lorasmith.gates.metrics import METRICS, Metric

__all__ = ["GUIDE_GATES", "METRICS", "Metric", "evaluate", "split_costs", "with_required"]
