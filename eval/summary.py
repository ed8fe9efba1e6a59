"""The table of measured fidelity on the benchmarks page, made from the committed results of `astroattn compare`.

python -m eval.summary        # prints the table; `python -m eval.overview` puts it into docs/benchmarks.md
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from eval.common import run_script

RESULTS = Path(__file__).parent.parent / "docs" / "results"
PHOTOS = ("top1_agreement", "logit_error", "accuracy")
TEXTS = ("embedding_cosine", "similarity_r", "same_neighbour")
SPEECH = ("hidden_error", "speech_error", "word_error")
PLAN = ", with a plan"
CASES = {
    "vit_tiny_224_odd": ("ViT-tiny/16, 224 px, 250 photos, odd half", PHOTOS),
    "vit_tiny_224_odd_plan": ("the same" + PLAN, PHOTOS),
    "minilm_512": ("MiniLM, 128 texts of 512 tokens, odd half", TEXTS),
    "minilm_512_plan": ("the same" + PLAN, TEXTS),
    "vit_tiny_448": ("ViT-tiny/16 at 448 px, 100 photos, odd half", PHOTOS),
    "vit_tiny_448_plan": ("the same" + PLAN, PHOTOS),
    "whisper_tiny_en": ("Whisper tiny.en, encoder, 14 clips", SPEECH),
    "whisper_tiny_en_odd_plan": ("the same, 7 clips, odd half" + PLAN, SPEECH),
    "vit_tiny_1024": ("ViT-tiny/16 at 1,024 px, 16 photos, odd half", PHOTOS),
    "vit_tiny_1024_plan": ("the same" + PLAN, PHOTOS),
}
SHOWN = {
    "top1_agreement": "top-1 agreement {:.3f}",
    "logit_error": "logit error {:.3f}",
    "accuracy": "top-1 {:.1%}",
    "embedding_cosine": "embedding cosine {:.4f}",
    "similarity_r": "correlation of similarities {:.4f}",
    "same_neighbour": "same nearest neighbour {:.1%}",
    "hidden_error": "error of the hidden states {:.3f}",
    "speech_error": "where there is speech {:.3f}",
    "word_error": "words that differ {:.1%}",
}
COMPARED = ("accuracy",)  # the original has its own


def measure() -> list[dict[str, Any]]:
    """One row per committed result, as text; time is that of a batch relative to the original's."""
    rows = []
    for name, (title, metrics) in CASES.items():
        result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["rows"]
        patched, original, random = (_values(result[row]) for row in ("patched", "original", "random"))
        rows.append(
            {
                "what": title,
                "positions": f"{patched['positions']:.0f} of {patched['keys']:,.0f}",
                "cost": f"{patched['cost']:.0%}",
                "time": f"{patched['seconds'] / original['seconds']:.2f}",
                "patched": ", ".join(_show(metric, patched, original) for metric in metrics),
                "random features": SHOWN[metrics[0]].format(random[metrics[0]]),
            }
        )
    return rows


def _values(row: dict[str, Any]) -> dict[str, float]:
    return {name: value["value"] for name, value in row["values"].items()}


def _show(metric: str, patched: dict[str, float], original: dict[str, float]) -> str:
    text = SHOWN[metric].format(patched[metric])
    if metric in COMPARED:
        text += f" (original {SHOWN[metric].format(original[metric]).split()[-1]})"
    return text


def format_markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Print the table of measured fidelity."""
    print(format_markdown(measure()))


if __name__ == "__main__":
    run_script(main)
