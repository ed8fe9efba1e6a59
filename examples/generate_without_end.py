"""Let a decoder write on and on with a memory of fixed size, and look at what the memory holds.

Run it as a script (`python examples/generate_without_end.py --help`), or cell by cell in an editor that knows `# %%`.
Give it the folder or the id of a decoder of transformers (`--model`); without one it makes a tiny Llama with random
weights, which writes nonsense, and needs no network.

A decoder keeps the key and the value of every token it has read, so that its memory grows with the text. Patched with
`hidden="streaming"` each key head keeps a fixed number of entries: the newest tokens as they are, the first four, which
much attention goes to for want of anything better, and in between old tokens, most of them merged with others.
"""

# %% What we need
from __future__ import annotations

from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import astroattn
from astroattn import AstroConfig
from astroattn.ops.streaming import SINKS, Memory


# %% A decoder, patched
def load(model: str | None, entries: int) -> PreTrainedModel:
    """The decoder with a memory of so many entries for each key head."""
    if model is None:
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        decoder = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=256, initializer_range=0.2))
    else:
        decoder = AutoModelForCausalLM.from_pretrained(model)
    astroattn.patch(decoder, AstroConfig(hidden="streaming", entries=entries))
    return decoder.eval()


# %% Writing
@torch.inference_mode()
def write(decoder: PreTrainedModel, tokens: int, console: Console) -> list[Memory]:
    """Let it write so many tokens, a hundred at a time in one cache; the memories of its layers."""
    cache = DynamicCache()
    text = torch.tensor([[decoder.config.bos_token_id or 0]])
    while text.shape[1] < tokens:
        text = decoder.generate(
            text, past_key_values=cache, max_new_tokens=min(100, tokens - text.shape[1]), do_sample=True,
            pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        size = sum(x.numel() * x.element_size() for layer in cache.layers for x in layer.memory)
        console.print(f"{text.shape[1]:7,} tokens, {size / 1000:9,.1f} kB of memory")
    return [layer.memory for layer in cache.layers]


# %% What the memory holds
def describe(memory: Memory, newest: int) -> dict[str, Tensor]:
    """Kinds of entries of a layer, as flags for every head and entry [H, W]."""
    place = torch.arange(memory.key.shape[2]).expand(memory.key.shape[1:3])
    old = (place >= SINKS) & (place < memory.key.shape[2] - newest)
    merged = memory.log_weight[0].abs().amax(-1) > 0
    return {
        "the first tokens": place < SINKS,
        "old tokens, merged": old & merged,
        "old tokens as they were": old & ~merged,
        "the newest tokens": place >= memory.key.shape[2] - newest,
    }


def show(memories: list[Memory], newest: int, console: Console) -> None:
    """A table: how many entries of each kind a head has, and how much of its attention they had of late."""
    table = Table("layer", "what", "entries", "attention", title="What the memory holds, mean of the heads")
    for number, memory in enumerate(memories):
        use = (memory.attention / memory.age.clamp_min(1e-6))[0]
        for name, flags in describe(memory, newest).items():
            count = flags.sum(1).float().mean()
            share = (use * flags).sum(1) / use.sum(1)
            table.add_row(str(number), name, f"{count:.1f}", f"{share.mean():.1%}")
    console.print(table)


# %% All of it
def main(
    model: Annotated[str | None, typer.Option(help="A decoder: a folder or an id. Default: a tiny random one.")] = None,
    entries: Annotated[int, typer.Option(help="Keys and values that each key head keeps.")] = 64,
    tokens: Annotated[int, typer.Option(help="Length of the text.", min=2)] = 500,
) -> None:
    """Write a text with a memory of fixed size."""
    console = Console()
    decoder = load(model, entries)
    memories = write(decoder, tokens, console)
    show(memories, AstroConfig(hidden="streaming", entries=entries).near, console)


if __name__ == "__main__":
    typer.run(main)
