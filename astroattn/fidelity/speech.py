"""What a model that turns speech into text writes, and how many of the words are others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from astroattn.fidelity.metrics import Array, Value, bootstrap
from astroattn.fidelity.passes import find_speech_encoder
from astroattn.imports import needs
from astroattn.models import FRAME_MASK, SPEECH_INPUTS
from astroattn.patching.survey import select, survey

with needs("eval"):
    import jiwer
    import numpy as np

MAX_NEW_TOKENS = 200  # 30 s hold about 100 words; a model that repeats itself must end

# Lower case; a hyphen parts words, all other punctuation goes. Numbers and spelling stay as they are written.
NORMALISE = jiwer.Compose(
    [
        jiwer.ToLowerCase(),
        jiwer.SubstituteRegexes({r"[-‐-―]": " "}),
        jiwer.RemovePunctuation(),
        jiwer.RemoveMultipleSpaces(),
        jiwer.Strip(),
        jiwer.ReduceToListOfListOfWords(),
    ]
)


def within_encoder(model: nn.Module, where: Any) -> Any:
    """What `where` of `patch` means, without the decoder of a model that turns speech into text.

    A decoder is never compared: it must not be patched either where the config, as that of a control, could.

    Raises:
        ValueError: `where` means no module of the encoder.
    """
    encoder = find_speech_encoder(model)
    if encoder is None:
        return where
    inside = set(map(id, encoder.modules()))
    chosen: set[str] = {each.name for each in select(survey(model), where) if id(each.module) in inside}
    if not chosen:
        raise ValueError(f"where: {where!r} means no attention module of the encoder, which is what is compared")

    def is_chosen(name: str, module: nn.Module) -> bool:
        return name in chosen

    return is_chosen


def transcribe(model: Any, hidden: Tensor, inputs: Mapping[str, Any], tokenizer: Any) -> list[str]:
    """Greedy transcripts of a batch, of at most `MAX_NEW_TOKENS` tokens, from the encoder's hidden states [B, N, D]."""
    from transformers.modeling_outputs import BaseModelOutput

    longest = min(MAX_NEW_TOKENS, (getattr(model.config, "max_target_positions", None) or 2 * MAX_NEW_TOKENS) // 2)
    rest = {name: value for name, value in inputs.items() if name not in (*SPEECH_INPUTS, FRAME_MASK)}
    encoded = BaseModelOutput(last_hidden_state=hidden)
    with _quiet():
        ids = model.generate(encoder_outputs=encoded, max_new_tokens=longest, do_sample=False, num_beams=1, **rest)
    texts: list[str] = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return texts


@contextmanager
def _quiet() -> Iterator[None]:
    """No advice from transformers on settings that its own Whisper hands to its own `generate`, batch after batch."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def word_error(texts: Sequence[str], references: Sequence[str], seed: int) -> Value:
    """Words put in, left out or changed, over the words of the references (at least one); both as `NORMALISE` says."""
    error, count = count_word_errors(texts, references)
    return bootstrap(lambda rows: error[rows].sum() / max(count[rows].sum(), 1), len(error), seed)


def count_word_errors(texts: Sequence[str], references: Sequence[str]) -> tuple[Array, Array]:
    """Per text: words put in, left out or changed, and words of the reference."""
    errors, words = [], []
    for text, reference in zip(texts, references, strict=True):
        found = jiwer.process_words(reference, text, NORMALISE, NORMALISE)
        missed = found.substitutions + found.deletions
        errors.append(missed + found.insertions)
        words.append(found.hits + missed)
    return np.array(errors), np.array(words)
