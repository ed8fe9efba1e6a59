"""A pretrained decoder whose cache has a fixed size: nats above the original, agreement, recall, time and memory.

For every model, number of entries and cache: the loss above the original's in nats per token, KL to the original's
predictions, and how often both name the same next token. `--task recall` hides a fact in a long text and asks for it;
`--task speed` streams tokens and times a step. Every cache but ours is re-implemented in `eval/generate/caches.py`.

    python -m eval.generate --json out/generate.json --figure out/generate.png
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AttentionInterface

import astroattn
from astroattn import AstroConfig
from astroattn.ops.streaming import block_of
from eval.common import FigureOption, JsonOption, LimitOption, print_rows, rounded, write_figure, write_json
from eval.generate.caches import NAMES, attend
from eval.generate.speed import measure_speed
from eval.generate.subjects import LOADERS, Subject

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OURS = "astroattn"
PEER = "eval_cache"  # the name of the attention function below
_settings: dict[str, Any] = {}


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float | None = None, **_: Any
) -> tuple[Tensor, None]:
    """What transformers calls for a peer: a whole text without padding."""
    heads, _, dim = key.shape[1:]
    scale = dim**-0.5 if scaling is None else scaling
    query = (query * scale).unflatten(1, (heads, -1)).flatten(0, 1)
    out = attend(query=query, key=key.flatten(0, 1), value=value.flatten(0, 1), **_settings)
    return out.unflatten(0, (-1, heads)).flatten(1, 2).transpose(1, 2), None


AttentionInterface.register(PEER, _attention)


@contextmanager
def with_cache(model: nn.Module, name: str, entries: int) -> Iterator[None]:
    """The model with such a cache of so many entries, for texts without padding."""
    if name == OURS:
        with astroattn.patched(model, AstroConfig(hidden="streaming", entries=entries)):
            yield
        return
    before = model.config._attn_implementation
    _settings.update(name=name, size=entries, block=block_of(entries))
    model.set_attn_implementation(PEER)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.inference_mode()
def predict(model: nn.Module, text: Tensor, start: int) -> Tensor:
    """Log-probabilities of the tokens after `start`."""
    predictions: Tensor = model(text, use_cache=False).logits[0, start:-1].log_softmax(-1)
    return predictions


def measure_loss(subject: Subject, names: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """One row per budget and cache, the mean over all scored tokens."""
    truth = [predict(subject.model, text, subject.start) for text in tqdm(subject.texts, "original", unit="text")]
    targets = [text[0, subject.start + 1 :, None] for text in subject.texts]
    tokens = sum(len(target) for target in targets)
    original = -sum(float(x.gather(1, y).sum()) for x, y in zip(truth, targets, strict=True)) / tokens
    for entries in subject.budgets:
        for name in tqdm(names, f"{subject.name}, {entries} entries", unit="cache"):
            lost = kl = same = 0.0
            with with_cache(subject.model, name, entries):
                for text, theirs, target in zip(subject.texts, truth, targets, strict=True):
                    ours = predict(subject.model, text, subject.start)
                    lost += float((theirs - ours).gather(1, target).sum())
                    kl += float((theirs.exp() * (theirs - ours)).sum())
                    same += float((theirs.argmax(-1) == ours.argmax(-1)).sum())
            yield rounded(
                {
                    "model": subject.name,
                    "tokens": max(text.shape[1] for text in subject.texts),
                    "entries": entries,
                    "cache": name,
                    "nats above": lost / tokens,
                    "KL": kl / tokens,
                    "agreement": same / tokens,
                    "original": original,
                    "scored": tokens,
                }
            )


def plot(rows: list[dict[str, Any]]) -> Figure:
    """Nats above the original against the number of entries, a line a cache; a panel a model."""
    from matplotlib.figure import Figure

    models = list(dict.fromkeys((row["model"], row["tokens"]) for row in rows))
    figure = Figure(figsize=(5 * len(models), 3.6), layout="constrained")
    for axes, (model, tokens) in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        mine = [row for row in rows if (row["model"], row["tokens"]) == (model, tokens)]
        for name in dict.fromkeys(row["cache"] for row in mine):
            points = [row for row in mine if row["cache"] == name and row["nats above"] > 0]
            style = {"color": "#D55E00", "linewidth": 2.5} if name == OURS else {"linewidth": 1, "alpha": 0.8}
            axes.plot([p["entries"] for p in points], [p["nats above"] for p in points], "o-", label=name, **style)
        budgets = sorted({row["entries"] for row in mine})
        axes.set(xscale="log", yscale="log", xlabel="entries per key head", title=f"{model}, up to {tokens:,} tokens")
        axes.set_xticks(budgets, map(str, budgets))
        axes.minorticks_off()
    first = figure.axes[0]
    first.set_ylabel("nats per token above the original")
    first.legend(fontsize="small")
    return figure


def main(
    json: JsonOption = None,
    figure: FigureOption = None,
    limit: LimitOption = None,
    models: Annotated[list[str] | None, typer.Option("--model", help=f"Of {', '.join(LOADERS)}; all if none.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens of a text of SmolLM2.", min=64)] = None,
    entries: Annotated[list[int] | None, typer.Option(help="Budgets in place of the model's own.")] = None,
    caches: Annotated[list[str] | None, typer.Option("--cache", help=f"Of {OURS}, {', '.join(NAMES)}.")] = None,
    speed: Annotated[int | None, typer.Option(help="Time steps up to so many tokens instead.", min=1024)] = None,
) -> None:
    """Compare caches of fixed size on pretrained decoders."""
    names = tuple(caches) if caches else (*NAMES, OURS)
    if lost := [name for name in names if name not in (*NAMES, OURS)]:
        raise typer.BadParameter(f"{lost[0]!r}; must be one of {OURS}, {', '.join(NAMES)}", param_hint="--cache")
    rows: list[dict[str, Any]] = []
    for name in models or LOADERS:
        if name not in LOADERS:
            raise typer.BadParameter(f"{name!r}; must be one of {', '.join(LOADERS)}", param_hint="--model")
        subject = LOADERS[name](tokens)
        if subject is None:
            Console().print(f"{name}: not here; the docstring of eval/generate/subjects.py says where it comes from")
            continue
        budgets = tuple(entries) if entries else subject.budgets
        subject = Subject(subject.name, subject.model, subject.texts[:limit], subject.start, budgets)
        for row in measure_speed(subject, speed) if speed else measure_loss(subject, names):
            rows.append(row)
            if json:  # at once, so that a run that breaks off is not lost
                write_json(json, rows, seed=0)
    if not rows:
        raise typer.Exit(2)
    print_rows(rows, title="A step" if speed else "A cache of fixed size")
    if figure and not speed:
        write_figure(figure, plot(rows))


if __name__ == "__main__":
    typer.run(main)
