"""What changed when attention was replaced: per head, per layer, embeddings, logits, task, time, memory, cost."""

from typing import TYPE_CHECKING

from astroattn.imports import lazily

if TYPE_CHECKING:
    from astroattn.fidelity.comparison import compare as compare
    from astroattn.fidelity.comparison import control_configs as control_configs
    from astroattn.fidelity.diagnosis import LayerFidelity as LayerFidelity
    from astroattn.fidelity.items import load_items as load_items
    from astroattn.fidelity.metrics import METRICS as METRICS
    from astroattn.fidelity.metrics import Metric as Metric
    from astroattn.fidelity.metrics import Value as Value
    from astroattn.fidelity.result import Fidelity as Fidelity
    from astroattn.fidelity.result import Row as Row
    from astroattn.fidelity.saved import load_result as load_result
    from astroattn.fidelity.verdict import Verdict as Verdict

_HOMES = {  # other modules of this package are used where nothing is compared, without what comparing needs
    "METRICS": "metrics",
    "Fidelity": "result",
    "LayerFidelity": "diagnosis",
    "Metric": "metrics",
    "Row": "result",
    "Value": "metrics",
    "Verdict": "verdict",
    "compare": "comparison",
    "control_configs": "comparison",
    "load_items": "items",
    "load_result": "saved",
}
__all__ = [*_HOMES]
__getattr__, __dir__ = lazily(__name__, _HOMES)
