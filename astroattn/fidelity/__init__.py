"""What changed when attention was replaced: per head, per layer, embeddings, logits, task, time, memory, cost."""

from astroattn.fidelity.comparison import compare, control_configs
from astroattn.fidelity.diagnosis import LayerFidelity
from astroattn.fidelity.items import load_items
from astroattn.fidelity.metrics import METRICS, Metric, Value
from astroattn.fidelity.result import Fidelity, Row
from astroattn.fidelity.saved import load_result
from astroattn.fidelity.verdict import Verdict

__all__ = [
    "METRICS",
    "Fidelity",
    "LayerFidelity",
    "Metric",
    "Row",
    "Value",
    "Verdict",
    "compare",
    "control_configs",
    "load_items",
    "load_result",
]
