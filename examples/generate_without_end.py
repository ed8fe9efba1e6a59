"""Let a decoder read and write on and on with a memory of fixed size, and look at what the memory holds.

Run it as a script (`python examples/generate_without_end.py --help`), or cell by cell in an editor that knows `# %%`.
Give it the folder or the id of a decoder of transformers with its tokenizer (`--model`), and a text to start from
(`--text`); without them a tiny Llama with random weights writes nonsense, letter by letter, and needs no network.

A decoder keeps the key and the value of every token it has read, so that its memory grows with the text. Patched with
`hidden="streaming"` each key head keeps a fixed number of entries: the newest tokens as they are, the first four, which
much attention goes to for want of anything better, and in between old tokens, most of them merged with others.
"""

# %% What we need
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from torch.nn.functional import one_hot
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedModel as Decoder

import astroattn
from astroattn import AstroConfig, AstrocyteAttention
from astroattn.fidelity.calls import find_astrocytes
from astroattn.ops.streaming import SINKS, Memory

MARK = 1e-6  # of a token, in its value
SHOWN = 5  # tokens of an entry
CHUNK = 512  # tokens of a text that are read at once


# %% A decoder, patched, and the way from text to tokens and back
def load(model: str | None, entries: int) -> tuple[Decoder, Callable[[str], list[int]], Callable[[list[int]], str]]:
    """The decoder with a memory of so many entries for each key head; encode and decode."""
    if model is None:
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        decoder = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=128, initializer_range=0.2))
        encode, decode = (lambda text: [min(ord(x), 127) for x in text]), (lambda ids: "".join(map(chr, ids)))
    else:
        decoder = AutoModelForCausalLM.from_pretrained(model)
        tokenizer = AutoTokenizer.from_pretrained(model)
        encode, decode = (lambda text: tokenizer(text).input_ids), tokenizer.decode
    astroattn.patch(decoder, AstroConfig(hidden="streaming", entries=entries))
    return decoder.eval(), encode, decode


# %% Which tokens an entry is made of
def mark_tokens(core: AstrocyteAttention, tokens: int) -> None:
    """Give each token that a layer writes a mark: a column of its own in the values, in which it alone is not zero.

    Values that are merged become weighted means, and the marks with them: in the end those of an entry are the weights
    of the tokens it is made of. They are too small to have a say, but by rounding, in what is merged. They take room, a
    column for every token of the text.
    """
    decode = core.decode

    def decode_marked(query: Tensor, key: Tensor, value: Tensor, state: Memory | None = None, **options: Any) -> Any:
        seen = 0 if state is None else int(state.counts[0, 2])
        marks = MARK * one_hot(torch.arange(seen, seen + value.shape[2]), tokens).expand(*value.shape[:3], -1)
        out, memory = decode(query, key, torch.cat([value, marks.to(value)], -1), state, **options)
        return out[..., : value.shape[-1]], memory

    core.decode = decode_marked


def without_marks(memory: Memory, columns: int) -> Memory:
    """The memory as it is when nobody looks."""
    fields = ("value", "output", "block_output")
    return memory._replace(**{name: getattr(memory, name)[..., :columns] for name in fields})


# %% Reading and writing
@torch.inference_mode()
def write(decoder: Decoder, prompt: list[int], tokens: int, console: Console) -> tuple[list[int], list[Memory]]:
    """Read the prompt, then write, a hundred tokens at a time in one cache; the text and the memories in the end."""
    columns = next(iter(find_astrocytes(decoder).values())).head_dim
    cache = DynamicCache()
    text = torch.tensor([prompt])
    while text.shape[1] < tokens:
        text = decoder.generate(
            text, past_key_values=cache, max_new_tokens=min(100, tokens - text.shape[1]), do_sample=True,
            pad_token_id=0, eos_token_id=None, prefill_chunk_size=CHUNK,
        )  # fmt: skip
        memories = [without_marks(layer.memory, columns) for layer in cache.layers]
        size = sum(x.numel() * x.element_size() for memory in memories for x in memory)
        console.print(f"{text.shape[1]:7,} tokens, {size / 1000:9,.1f} kB of memory")
    return text[0].tolist(), [layer.memory for layer in cache.layers]


# %% Kinds of entries
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


def show_kinds(memories: list[Memory], newest: int, console: Console) -> None:
    """A table: how many entries of each kind a head has, and how much of its attention they had of late."""
    table = Table("layer", "what", "entries", "attention", title="What the memory holds, mean of the heads")
    for number, memory in enumerate(memories):
        use = (memory.attention / memory.age.clamp_min(1e-6))[0]
        for name, flags in describe(memory, newest).items():
            count = flags.sum(1).float().mean()
            share = (use * flags).sum(1) / use.sum(1)
            table.add_row(str(number), name, f"{count:.1f}", f"{share.mean():.1%}")
    console.print(table)


def show_entries(
    memory: Memory, head: int, text: list[int], decode: Callable[[list[int]], str], console: Console, most: int
) -> None:
    """A table of the entries of a key head with the most attention of late: their tokens, weightiest first."""
    use = (memory.attention / memory.age.clamp_min(1e-6))[0, head]
    marks = memory.value[0, head, :, -len(text) :] / MARK
    table = Table("attention", "tokens", "from", "to", "made of (weight, place)", title="Entries, heaviest first")
    for entry in use.argsort(descending=True)[:most].tolist():
        places = marks[entry].nonzero()[:, 0].tolist()
        weights, top = (x.tolist() for x in marks[entry].topk(min(SHOWN, len(places))))
        parts = [
            f"{decode([text[place]])!r} ({weight:.0%}, {place})" for weight, place in zip(weights, top, strict=True)
        ]
        more = [f"and {len(places) - len(parts)} more"] if len(places) > len(parts) else []
        ends = (f"{places[end]:,}" for end in (0, -1))
        table.add_row(f"{use[entry] / use.sum():.1%}", f"{len(places):,}", *ends, escape(", ".join([*parts, *more])))
    console.print(table)


# %% All of it
def main(
    model: Annotated[str | None, typer.Option(help="A decoder: a folder or an id. Default: a tiny random one.")] = None,
    text: Annotated[
        Path | None, typer.Option(help="A file to read before writing.", exists=True, dir_okay=False)
    ] = None,
    entries: Annotated[int, typer.Option(help="Keys and values that each key head keeps.")] = 64,
    tokens: Annotated[int, typer.Option(help="Length of the text, read and written.", min=2)] = 500,
    layer: Annotated[int, typer.Option(help="The layer whose entries are shown.", min=0)] = 0,
    head: Annotated[int, typer.Option(help="Its key head.", min=0)] = 0,
    most: Annotated[int, typer.Option(help="Entries that are shown.", min=1)] = 20,
) -> None:
    """Read and write a text with a memory of fixed size."""
    console = Console()
    decoder, encode, decode = load(model, entries)
    layers = list(find_astrocytes(decoder).values())
    heads = getattr(decoder.config, "num_key_value_heads", decoder.config.num_attention_heads)
    for option, given, count in (("--layer", layer, len(layers)), ("--head", head, heads)):
        if given >= count:
            raise typer.BadParameter(f"{given}; there are 0 to {count - 1}", param_hint=option)
    mark_tokens(layers[layer], tokens)
    prompt = encode(text.read_text("utf-8"))[: tokens - 1] if text else []
    ids, memories = write(decoder, prompt or [decoder.config.bos_token_id or 0], tokens, console)
    show_kinds(memories, AstroConfig(hidden="streaming", entries=entries).near, console)
    console.print(f"Layer {layer}, key head {head}:")
    show_entries(memories[layer], head, ids, decode, console, most)


if __name__ == "__main__":
    typer.run(main)
