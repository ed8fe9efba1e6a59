"""The queries, keys and values that attention modules read in the original, and what is made of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from astroattn.attention import AstrocyteAttention
from astroattn.distillation.rows import learned_layer, log_processes, softmax_rows
from astroattn.fidelity.calls import AttentionCall, read_call
from astroattn.fidelity.passes import call as run_model
from astroattn.hidden import LearnedHidden

Modules = Mapping[str, AstrocyteAttention]
Calls = list[tuple[str, AttentionCall]]  # of one forward, with the name of the module that was called

QUERIES = 64  # of a sequence, whose log p is compared
RIDGE = 1e-3  # of the mean square of the queries' entries
LEAST_CONSTANT = 0.5  # below which queries have too little in common to be moved together by all that is wanted


def read_calls(model: nn.Module, modules: Modules, inputs: Any) -> Calls:
    """The calls of a model's attention `modules` in one forward, in float32 at least; one or more of each module.

    Raises:
        ValueError: a module was not called.
    """
    calls: Calls = []

    def hook(name: str) -> Any:
        def keep(module: AstrocyteAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            query, key, value, options = read_call(module, args, kwargs)
            dtype = torch.promote_types(query.dtype, torch.float32)
            calls.append((name, AttentionCall(query.to(dtype), key.to(dtype), value.to(dtype), options)))

        return keep

    handles = [module.register_forward_pre_hook(hook(name), with_kwargs=True) for name, module in modules.items()]
    try:
        with torch.no_grad():
            run_model(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    if missing := modules.keys() - {name for name, _ in calls}:
        raise ValueError(
            f"batches: none of the calls on a batch reached {min(missing)}; the model does not run it on such input, "
            "or its own attention answers (a dense mask, for example)"
        )
    return calls


@torch.no_grad()
def start_from_data(modules: Modules, batches: Iterable[Calls], count: int, seed: int) -> None:
    """Make every neuron a pair of tokens: W_k a query, W_q a key drawn by this query's softmax attention; see `level`.

    Both are multiplied by sqrt(scale). Such a neuron is written to by the keys that its query attends to, and read by
    the queries that attend to its key. Of `count` batches the calls of a layer give equally many, and every layer draws
    by itself.
    """
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in modules}
    last: dict[str, AttentionCall] = {}
    draws = {name: generator(seed, place) for place, name in enumerate(modules)}
    for batch, calls in enumerate(batches):
        for name, module in modules.items():
            m, mine = module.configs[0].num_hidden, [call for of, call in calls if of == name]
            for number, call in enumerate(mine, batch * len(mine)):
                several = count * len(mine)
                if many := m * (number + 1) // several - m * number // several:
                    found[name].append(draw_pairs(call, many, draws[name]))
                last[name] = call.sequence(int(call.real_queries().sum(1).argmax()))
    for name, pairs in found.items():
        query, key = (torch.cat(side, 1) for side in zip(*pairs, strict=True))
        hidden = learned_layer(modules[name])
        hidden.key_weight.copy_(query)
        hidden.query_weight.copy_(key)
        level(hidden, last[name])


def level(hidden: LearnedHidden, call: AttentionCall) -> None:
    """Move W_q so that log p of the hidden layer is, in the mean over a sequence's queries, that of softmax attention.

    Beside keys that are attended exactly, all else is otherwise read many times too much or too little. The same vector
    is added to every neuron's weights: the one whose product with the queries is nearest to a constant.
    """
    real = call.real_queries()[0].nonzero()[:, 0]
    some = real[torch.linspace(0, len(real) - 1, min(QUERIES, len(real))).long()]
    softmax, learned = log_processes(hidden, call, some[None])
    query = call.query[0, :, real] * call.scale**0.5
    moment = query.mT @ query / len(real)
    ridge = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None] * RIDGE
    mean = query.mean(1)
    direction = torch.linalg.solve(moment + ridge.expand(moment.shape[:2]).diag_embed(), mean)
    constant = (direction * mean).sum(-1, keepdim=True)  # 1 where all queries have the same product with it
    wanted = (softmax - learned)[0].mean(-1, keepdim=True) / constant.clamp(min=LEAST_CONSTANT)
    hidden.query_weight.add_((wanted * direction)[:, None])


def generator(*numbers: int) -> torch.Generator:
    """Random numbers that only these numbers decide."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))


def draw_pairs(call: AttentionCall, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Queries of real tokens, and for each a key that it attends to: both [H, count, D], times sqrt(scale)."""
    heads = call.query.shape[1]
    place, share = torch.rand(2, heads, count, generator=generator, dtype=torch.float64).to(call.query.device)
    real = call.real_queries().nonzero()
    if not len(real):
        raise ValueError("batches: one holds nothing but padding")
    sequence, token = real[(place * len(real)).long()].unbind(-1)
    head = torch.arange(heads, device=call.query.device)[:, None]
    rows = call.query.new_empty(heads, count, call.key.shape[2])
    for index in sequence.unique().tolist():  # N x N attention of all sequences would be too much
        mine = sequence == index
        tokens, place_of = token[mine].unique(return_inverse=True)
        attention = softmax_rows(call.sequence(index), tokens[None])[0]
        rows[mine] = attention[head.expand_as(mine)[mine], place_of]
    # by the inverse of the distribution function: padding then does not move what is drawn
    cumulative = rows.double().cumsum(-1)
    attended = torch.searchsorted(cumulative, share[..., None] * cumulative[..., -1:], right=True)[..., 0]
    root = call.scale**0.5
    return call.query[sequence, head, token] * root, call.key[sequence, head, attended] * root


@torch.no_grad()
def output_errors(modules: Modules, exact: Modules, batches: Iterable[Calls]) -> dict[str, float]:
    """||output - softmax attention's|| / ||softmax attention's|| of every layer, over the real tokens of all calls."""
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in modules}
    for calls in batches:
        for name, call in calls:
            real = call.real_queries()
            out, truth = (
                side[name](call.query, call.key, call.value, **call.options).transpose(1, 2)[real].double()
                for side in (modules, exact)
            )
            sums[name] += torch.stack([(out - truth).square().sum(), truth.square().sum()]).cpu()
    return {name: (error / norm).sqrt().item() for name, (error, norm) in sums.items()}
