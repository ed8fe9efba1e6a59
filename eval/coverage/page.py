"""The page of the docs, made from the rows: counts, what stands in the way, well-known models, and every type."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import timm

from eval.coverage.examining import Status

Row = dict[str, Any]

# In the order of the tables, and what each means.
STATUSES = {
    "equal": "every self-attention module is an astrocyte",
    "in part": "some are, or some calls are left to the model's own attention, with a warning",
    "refused": "none can be; `patch` raises and says why",
    "crashed": "`patch` or the patched model raises something else",
    "silently different": "the patched model is not what its report says",
    "no attention": "the library recognises no attention module in it: convolutions, recurrence and the like",
    "could not be built or run": "a limit of this check, not of the library: no small config or no input was found",
}

# Pretrained models that many people use: their library and type.
WELL_KNOWN = {
    "BERT": ("transformers", "bert"),
    "RoBERTa": ("transformers", "roberta"),
    "XLM-RoBERTa": ("transformers", "xlm-roberta"),
    "DistilBERT": ("transformers", "distilbert"),
    "DeBERTa": ("transformers", "deberta"),
    "DeBERTa-v2, v3": ("transformers", "deberta-v2"),
    "MPNet": ("transformers", "mpnet"),
    "ELECTRA": ("transformers", "electra"),
    "ALBERT": ("transformers", "albert"),
    "ModernBERT": ("transformers", "modernbert"),
    "ESM-2": ("transformers", "esm"),
    "XLNet": ("transformers", "xlnet"),
    "Longformer": ("transformers", "longformer"),
    "BART": ("transformers", "bart"),
    "T5": ("transformers", "t5"),
    "NLLB, M2M-100": ("transformers", "m2m_100"),
    "GPT-2": ("transformers", "gpt2"),
    "GPT-NeoX, Pythia": ("transformers", "gpt_neox"),
    "gpt-oss": ("transformers", "gpt_oss"),
    "OPT": ("transformers", "opt"),
    "Bloom": ("transformers", "bloom"),
    "Falcon": ("transformers", "falcon"),
    "Llama": ("transformers", "llama"),
    "Mistral": ("transformers", "mistral"),
    "Mixtral": ("transformers", "mixtral"),
    "Gemma": ("transformers", "gemma"),
    "Gemma 2": ("transformers", "gemma2"),
    "Gemma 3": ("transformers", "gemma3_text"),
    "Qwen2": ("transformers", "qwen2"),
    "Qwen3": ("transformers", "qwen3"),
    "Phi-3": ("transformers", "phi3"),
    "DeepSeek-V3": ("transformers", "deepseek_v3"),
    "ViT": ("transformers", "vit"),
    "DeiT": ("transformers", "deit"),
    "BEiT": ("transformers", "beit"),
    "Swin": ("transformers", "swin"),
    "DINOv2": ("transformers", "dinov2"),
    "DINOv3": ("transformers", "dinov3_vit"),
    "VideoMAE": ("transformers", "videomae"),
    "SegFormer": ("transformers", "segformer"),
    "DETR": ("transformers", "detr"),
    "SAM": ("transformers", "sam"),
    "CLIP": ("transformers", "clip"),
    "SigLIP": ("transformers", "siglip"),
    "LLaVA": ("transformers", "llava"),
    "Qwen2-VL": ("transformers", "qwen2_vl"),
    "Whisper": ("transformers", "whisper"),
    "Wav2Vec2": ("transformers", "wav2vec2"),
    "HuBERT": ("transformers", "hubert"),
    "WavLM": ("transformers", "wavlm"),
    "AST": ("transformers", "audio-spectrogram-transformer"),
    "ViT (timm)": ("timm", "vision_transformer"),
    "DeiT (timm)": ("timm", "deit"),
    "EVA-02 (timm)": ("timm", "eva"),
    "BEiT (timm)": ("timm", "beit"),
    "Swin (timm)": ("timm", "swin_transformer"),
    "MaxViT (timm)": ("timm", "maxxvit"),
    "Hiera (timm)": ("timm", "hiera"),
    "PVT v2 (timm)": ("timm", "pvt_v2"),
    "torch.nn.TransformerEncoder": ("torch", "TransformerEncoder"),
    "ViT (torchvision)": ("torchvision", "vit_b_32"),
}

INTRODUCTION = """# Coverage: which models can be patched

Made by `python -m eval.coverage --json docs/results/coverage.json --page docs/coverage.md` with {versions}.

A tiny model with random weights of every type in transformers' AutoModel mapping, of every family of timm (a small one,
with attention where the family has any), and of others is run on two sequences of odd length, one of them padded where
the model takes a mask. Then it is patched (`patch(model, inputs=)` has these sequences, for types for which it cannot
make up its own)

- with a near field over the whole sequence, which is softmax attention: outputs must be the original's to rounding
  (1e-4 of the largest);
- with a static layer and with the default config, which are not: outputs must be finite, must change where astrocytes
  answer, and must not depend on what stands in the padding, if the original's do not. A causal module has no default
  config, which needs the whole sequence;
- and unpatched: outputs must be the original's bit for bit, and so must the keys of the state dict.

Cross attention and pooling by one query are no self-attention of a sequence, and are not counted. Where its queries
have no order, in {crossing} types, cross attention is taken over too; in tiny models, with fewer queries than it needs,
it is softmax attention. A tiny model has the modules of its type, not the config of every checkpoint: a checkpoint may
turn on what its type can do without.

How a model is called, and what is around it, is another question. `python -m eval.situations --count 500 --seed 0`
draws 500 situations: 29 tiny models, six configs, 17 masks, five dtypes (autocast among them), 19 wrappers (compiled,
exported, copied, pickled, saved, sharded, offloaded, parametrized, with LoRA, checkpointed, in two threads, ...), put
around before or after patching, in training and evaluation, and patched under other modes of the caller. It prints
each in which the model is not what its report says as a line that repeats it; a sample is among the tests.
{situations}"""


def count_statuses(rows: list[Row]) -> list[Row]:
    """One row a status, with the number of types of each library and of all."""
    libraries = list(dict.fromkeys(row["library"] for row in rows))
    counts = Counter((row["status"], row["library"]) for row in rows)
    table = []
    for status in STATUSES:
        numbers = {library: counts[status, library] for library in libraries}
        table.append({"status": status} | numbers | {"all": sum(numbers.values())})
    return table


def count_pretrained(rows: list[Row]) -> list[Row]:
    """One row a status, with how many of timm's pretrained names belong to a family that has it."""
    statuses = {row["type"]: row["status"] for row in rows if row["library"] == "timm"}
    names = (timm.model_entrypoint(name.partition(".")[0]).__module__ for name in timm.list_pretrained())
    counts = Counter(statuses.get(name.rpartition(".")[2]) for name in names)
    return [{"status": status, "pretrained names": counts[status]} for status in STATUSES]


def count_reasons(rows: list[Row]) -> list[tuple[str, int, int]]:
    """Why modules stay exact, and for how many types that is refused or in part; most first."""
    counts = Counter(
        (reason, row["status"])
        for row in rows
        if row["status"] in ("refused", "in part")
        for reason in {_general(each) for each in row["reasons"]}
    )
    reasons = dict.fromkeys(reason for reason, _ in counts)
    table = [(reason, counts[reason, "refused"], counts[reason, "in part"]) for reason in reasons]
    return sorted(table, key=lambda line: (-line[1] - line[2], line[0]))


def say_situations(rows: list[Row]) -> str:
    """What came of the situations, in one sentence."""
    counts = Counter(row["came"] for row in rows)
    patched, refused, wrong = counts["patched"], counts["refused"], counts["wrong"]
    rest = len(rows) - patched - refused - wrong
    return (
        f"Of {len(rows)} that were examined, {patched} ran patched and were what the report says, {refused} could not "
        f"be patched, and in {rest} the\noriginal itself raises, cannot be wrapped or does not repeat itself; "
        f"{wrong or 'none'} went wrong."
    )


def format_page(result: dict[str, Any], situations: list[Row], oldest: dict[str, Any] | None = None) -> str:
    """The page, from what the JSON holds (rows and versions), the rows of `eval.situations`, and the same JSON of the
    oldest versions that are supported, where there is one.
    """
    rows: list[Row] = result["rows"]
    parts = [
        INTRODUCTION.format(
            versions=_versions(result),
            situations=say_situations(situations),
            crossing=sum(row.get("crossing", 0) > 0 for row in result["rows"]),
        ),
        _counts(rows),
        "## What stands in the way\n\nNumber of types; one type may have several reasons. "
        "[What they mean, and what can be done](troubleshooting.md#why-a-module-stays-exact).",
        _table(
            [
                ["reason", "refused", "in part"],
                *([reason, str(none), str(some)] for reason, none, some in count_reasons(rows)),
            ]
        ),
        "## Well-known models",
        _table([["model", "type", "status", "modules", "reasons"], *_well_known(rows)]),
        *_faults(rows),
        *(_oldest(oldest, rows) if oldest else []),
        "## Every type",
        *(_list(rows, status) for status in STATUSES),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _versions(result: dict[str, Any]) -> str:
    return ", ".join(f"{name} {result['versions'][name]}" for name in ("torch", "transformers", "timm"))


def _counts(rows: list[Row]) -> str:
    lines = count_statuses(rows)
    numbers = [[*map(str, line.values()), STATUSES[line["status"]]] for line in lines]
    return _table([[*lines[0], "meaning"], *numbers])


def _oldest(result: dict[str, Any], rows: list[Row]) -> list[str]:
    """What the oldest versions come to, and the types that ran with both and came out otherwise."""
    now = {(row["library"], row["type"]): row["status"] for row in rows}
    others = [
        [f"`{row['type']}`", row["library"], row["status"], now[key], "; ".join(row["reasons"])]
        for row in result["rows"]
        if (key := (row["library"], row["type"])) in now and now[key] != row["status"]
        if Status.NOT_RUN not in (row["status"], now[key])
    ]
    return [
        f"## With the oldest versions\n\n{_versions(result)}: `make oldest`, then `.venv-oldest/bin/python -m "
        "eval.coverage --json docs/results/coverage_oldest.json`.",
        _counts(result["rows"]),
        "Types that ran with both and came out otherwise:",
        _table([["type", "library", "oldest", "above", "reasons with the oldest"], *others]),
        *_faults(result["rows"]),
    ]


def _well_known(rows: list[Row]) -> list[list[str]]:
    found = {(row["library"], row["type"]): row for row in rows}
    lines = []
    for name, key in WELL_KNOWN.items():
        if row := found.get(key):
            modules = f"{row['patched']} of {row['total']}" if row["total"] else "-"
            lines.append([name, f"`{key[1]}`", row["status"], modules, "; ".join(row["reasons"])])
    return lines


def _faults(rows: list[Row]) -> list[str]:
    """Types that crash or differ, each with what happens."""
    faults = [row for row in rows if row["status"] in ("crashed", "silently different")]
    if not faults:
        return []
    lines = [[f"`{row['type']}`", row["library"], row["status"], "; ".join(row["reasons"])] for row in faults]
    return ["## Faults", _table([["type", "library", "status", "what happens"], *lines])]


def _list(rows: list[Row], status: str) -> str:
    mine = [row for row in rows if row["status"] == status]
    lines = [f"**{status[0].upper()}{status[1:]}** ({len(mine)})."]
    for library in dict.fromkeys(row["library"] for row in mine):
        names = ", ".join(f"`{row['type']}`" for row in mine if row["library"] == library)
        lines.append(f"{library}: {names}.")
    return "\n\n".join(lines) if mine else ""


def _general(reason: str) -> str:
    """A reason without the numbers of one model."""
    return re.sub(r"differs by [\d.e+-]+|differs by inf", "differs", reason)


def _table(lines: list[list[str]]) -> str:
    lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
