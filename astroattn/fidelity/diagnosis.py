"""The diagnosing pass: what each layer and head gets wrong, alone and in company."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from astroattn.attention import AstrocyteAttention
from astroattn.fidelity.calls import AttentionCall, find_astrocytes, read_call
from astroattn.fidelity.passes import Outputs, forward, token_mask

Key = tuple[str, int]  # module name, number of its call within one forward pass


@dataclass(frozen=True)
class LayerFidelity:
    """How far one attention layer is from softmax; the lists have one value per head.

    Errors are relative: ||patched - original|| / ||original|| over all real tokens. *Isolated*: the layer reads the
    original's queries, keys and values. *Together*: the whole model is patched, so the errors of earlier layers count.

    Args:
        name: the attention module.
        call: number of the call within one forward pass; above 0 only where a module runs at several depths.
        isolated_error: of the attention output.
        isolated_cosine: mean cosine between the attention outputs of a token.
        normaliser_error: mean of |log normaliser - log normaliser of softmax|, in nats.
        together_error: of the attention output.
        together_cosine: mean cosine between the attention outputs of a token.
        hidden_error: of the hidden state that the layer's block gives, together; None where no block was found.
        index: of the module among the self-attention modules of the model, as `where` of `patch` counts them.
        cost_share: of the products of all attention calls, those of this one; None where they were not counted.
    """

    name: str
    call: int
    isolated_error: list[float]
    isolated_cosine: list[float]
    normaliser_error: list[float]
    together_error: list[float]
    together_cosine: list[float]
    hidden_error: float | None
    index: int | None = None
    cost_share: float | None = None


class Diagnosis:
    """Compares a patched model with itself under exact attention, batch after batch.

    With `exact` set on every `AstrocyteAttention` the patched model computes what the original does; its attention sees
    the original's queries, keys and values. Only the attention outputs and hidden states of one batch are kept.
    """

    def __init__(self, patched: nn.Module) -> None:
        self._model = patched
        self._astrocytes = find_astrocytes(patched)
        self._blocks = {name: _block_name(name) for name in self._astrocytes}
        self._sums: dict[Key, _Sums] = {}
        self._hidden: dict[Key, Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))

    def add(self, inputs: Any) -> Outputs:
        """Run both passes on a batch; the outputs of the exact pass come back."""
        mask = token_mask(inputs)
        attention: dict[Key, Tensor] = {}
        hidden: dict[Key, Tensor] = {}

        def isolate(key: Key, module: AstrocyteAttention, seen: AttentionCall, output: Tensor) -> None:
            attention[key] = output
            sums = self._sums.setdefault(key, _Sums(output.shape[1]))
            query, keys, value, options = seen
            softmax, log_softmax = module.with_normaliser(query, keys, value, **options)
            module.exact = False
            astrocyte, log_astrocyte = module.with_normaliser(query, keys, value, **options)
            module.exact = True
            real = seen.real_queries()
            sums.isolated += _compare(astrocyte, softmax, real)
            sums.normaliser += _masked_sum((log_astrocyte.double() - log_softmax.double()).abs(), real)

        def join(key: Key, module: AstrocyteAttention, seen: AttentionCall, output: Tensor) -> None:
            self._sums[key].together += _compare(output, attention.pop(key), seen.real_queries())

        def keep(key: Key, output: Tensor) -> None:
            hidden[key] = output

        def compare_hidden(key: Key, output: Tensor) -> None:
            original = hidden.pop(key)
            difference = (output.double() - original.double()).square().sum(-1)
            norm = original.double().square().sum(-1)
            if mask is not None and mask.shape == norm.shape:
                difference, norm = difference[mask], norm[mask]
            self._hidden[key] += torch.stack([difference.sum(), norm.sum()]).cpu()

        with self._exact(), self._hooks(isolate, keep):
            outputs = forward(self._model, inputs)
        with self._hooks(join, compare_hidden):
            forward(self._model, inputs)
        return outputs

    def layers(self) -> tuple[LayerFidelity, ...]:
        return tuple(
            LayerFidelity(
                name=name.removesuffix(".astrocyte"),
                call=number,
                isolated_error=_error(sums.isolated),
                isolated_cosine=_cosine(sums.isolated),
                normaliser_error=(sums.normaliser / sums.isolated[:, 3]).tolist(),
                together_error=_error(sums.together),
                together_cosine=_cosine(sums.together),
                hidden_error=self._hidden_error((self._blocks[name], number)),
            )
            for (name, number), sums in self._sums.items()
        )

    def _hidden_error(self, key: tuple[str | None, int]) -> float | None:
        block, number = key
        if block is None or (block, number) not in self._hidden:
            return None
        difference, norm = self._hidden[block, number]
        return float((difference / norm).sqrt())

    @contextmanager
    def _exact(self) -> Iterator[None]:
        for module in self._astrocytes.values():
            module.exact = True
        try:
            yield
        finally:
            for module in self._astrocytes.values():
                module.exact = False

    @contextmanager
    def _hooks(self, on_attention: Callable[..., None], on_hidden: Callable[..., None]) -> Iterator[None]:
        calls: Counter[str] = Counter()

        def attention_hook(name: str) -> Callable[..., None]:
            def hook(module: AstrocyteAttention, args: Any, kwargs: Any, output: Tensor) -> None:
                on_attention((name, calls[name]), module, read_call(module, args, kwargs), output)
                calls[name] += 1

            return hook

        def block_hook(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                state = output[0] if isinstance(output, tuple) else output
                if isinstance(state, Tensor):
                    on_hidden((name, calls[name]), state)
                calls[name] += 1

            return hook

        handles = [m.register_forward_hook(attention_hook(n), with_kwargs=True) for n, m in self._astrocytes.items()]
        for name in dict.fromkeys(block for block in self._blocks.values() if block is not None):
            handles.append(self._model.get_submodule(name).register_forward_hook(block_hook(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Sums:
    """Per head: squared error, squared norm, sum of cosines, count of tokens; and the sum of normaliser errors."""

    def __init__(self, heads: int) -> None:
        self.isolated = torch.zeros(heads, 4, dtype=torch.float64)
        self.together = torch.zeros(heads, 4, dtype=torch.float64)
        self.normaliser = torch.zeros(heads, dtype=torch.float64)


def _compare(output: Tensor, original: Tensor, real: Tensor) -> Tensor:
    output, original = output.double(), original.double()
    cosine = torch.cosine_similarity(output, original, dim=-1)
    parts = [(output - original).square().sum(-1), original.square().sum(-1), cosine, torch.ones_like(cosine)]
    return torch.stack([_masked_sum(part, real) for part in parts], dim=-1)


def _masked_sum(values: Tensor, real: Tensor) -> Tensor:
    """[B, H, N] summed to [H] over real tokens; a select, as a product would spread NaN from padding."""
    return values.masked_fill(~real[:, None], 0).sum((0, 2)).cpu()


def _error(sums: Tensor) -> list[float]:
    return (sums[:, 0] / sums[:, 1]).sqrt().tolist()


def _cosine(sums: Tensor) -> list[float]:
    return (sums[:, 2] / sums[:, 3]).tolist()


def _block_name(name: str) -> str | None:
    """The block of a layer: its path up to the last number, as in `encoder.layer.3` of `encoder.layer.3.attention`."""
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[-1] + 1]) if numbers else None
