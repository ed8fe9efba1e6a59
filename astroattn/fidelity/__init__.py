"""What changed when attention was replaced: per head, per layer, embeddings, logits, task, time, memory, cost."""

from astroattn.fidelity.comparison import compare, control_configs
from astroattn.fidelity.diagnosis import LayerFidelity
from astroattn.fidelity.metrics import METRICS, Metric, Value
from astroattn.fidelity.result import Fidelity, Row

__all__ = ["METRICS", "Fidelity", "LayerFidelity", "Metric", "Row", "Value", "compare", "control_configs"]
