"""The attentions as operators of PyTorch (`torch.ops.astroattn`), and the functions that call them.

An operator runs kernels that a compiler need not look into: it has a fake, which tells shapes without computing, and a
backward operator. In a graph plain PyTorch is one too where it decides on its way how to go on, from a sequence or its
length; linear attention is traced as it stands.

Tensors are [B, H, N, D] of any strides. Outputs and gradients have the strides of the query, the key or the value where
they have as many columns, and are contiguous elsewhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from astroattn.ops import plain, streaming
from astroattn.ops.backends import check_devices, choose_backend, run_kernel
from astroattn.ops.causal import CausalState
from astroattn.ops.layout import Budget
from astroattn.ops.noting import ExactKeys, is_asked, tell
from astroattn.ops.rows import dense_rows, empty_rows
from astroattn.ops.streaming import Memory


def near_far_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    budget: Budget,
    *,
    scale: float,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Near field, exact keys and a Hebbian hidden layer for the rest: `near_far.near_far_attention`.

    Args:
        query, key: [B, H, N, D]; with `budget.cross` [B, H, Nq, D] of another sequence. value: [B, H, N, Dv].
        budget: how much of each. scale: multiplies q.k.
        bias: [1 or B, 1 or H, Nq, N], added to that, finite at real tokens, or None.
        lengths: real tokens of each sequence [B], which come first; None: all are real. Not with a grid.
        backend: as in `AstroConfig`; no Triton kernel has a bias or queries of another sequence.

    Returns:
        The output [B, H, Nq, Dv] in the dtype of the query, and log p [B, H, Nq] in float32 at least; zeros and -inf
        for queries that are padding, and for those of another sequence that see no key.

    Raises:
        ValueError: the backend cannot run here; the tensors are on different devices.
    """
    check_devices((query, key, value, bias, lengths))
    beside = " with a bias" if bias is not None else " across sequences" if budget.cross else ""
    backend = choose_backend(backend, "near_far" + beside, query, value)
    asked = not in_graph() and is_asked(budget)
    if backend == "torch" and not in_graph() and not asked:
        return plain.near_far_attention(query, key, value, bias, lengths, budget, scale)
    out, log_p, *_, keys = _call(_near_far, NearFar)(query, key, value, bias, lengths, *budget, scale, backend)
    if asked:
        tell(ExactKeys(budget, keys, query.shape[2], lengths))
    return out, log_p


def near_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    phase: Tensor,
    budget: Budget,
    *,
    activation: str,
    scale: float,
    lengths: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Near field, exact keys and a static hidden layer for the rest: `static.near_linear_attention`; no kernel has it.

    Arguments, results and errors as in `near_far_attention` and `linear_attention`.
    """
    check_devices((query, key, value, weight, phase, lengths))
    choose_backend(backend, "near_linear", query, value)
    if not in_graph():
        return plain.near_linear_attention(query, key, value, weight, phase, lengths, budget, activation, scale)
    out: tuple[Tensor, Tensor] = _near_linear(query, key, value, weight, phase, lengths, *budget, activation, scale)
    return out


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    phase: Tensor,
    *,
    activation: str,
    scale: float,
    key_mask: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """A static hidden layer, bidirectional: `static.linear_attention`.

    Args:
        query: [B, H, Nq, D]. key, value: [B, H, Nk, D], [B, H, Nk, Dv]. weight: W [1 or B, H, m, D]. phase: b
            [1 or B, H, m]; kernels give it no gradient. key_mask: real keys [B, Nk]. activation: the name of phi.
        scale, backend, results and errors: as in `near_far_attention`.
    """
    backend = choose_backend(backend, "linear", query, value)
    inputs = (query, key, value, weight, phase, key_mask, activation, scale**0.5)
    check_devices(inputs)
    if backend == "torch":
        return plain.linear_attention(*inputs)
    out, log_p, *_ = _call(_linear, Linear)(*inputs, backend)
    return out, log_p


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    phase: Tensor,
    *,
    activation: str,
    near: int,
    scale: float,
    key_mask: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """A static hidden layer, causal, with the `near` latest keys exact: `causal.causal_linear_attention`.

    Arguments, results and errors as in `linear_attention`, with as many queries as keys.
    """
    backend = choose_backend(backend, "causal", query, value)
    inputs = (query, key, value, weight, phase, key_mask, activation, near, scale**0.5)
    check_devices(inputs)
    if backend == "torch" and not in_graph():
        return plain.causal_attention(*inputs)[:2]
    out, log_p, *_ = _call(_causal, Causal)(*inputs, backend)
    return out, log_p


def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    phase: Tensor,
    *,
    activation: str,
    near: int,
    scale: float,
    key_mask: Tensor | None = None,
    state: CausalState | None = None,
    backend: str = "auto",
) -> tuple[Tensor, CausalState]:
    """As `causal_attention`, on from a state (None: from the first token): the output and the state behind it.

    The kernels have no gradients here: where one is wanted, plain PyTorch computes it. For a single token they change
    the state in place, so that a CUDA graph can repeat the call.
    """
    backend = choose_backend(backend, "causal", query, value)
    inputs = (query, key, value, weight, phase, key_mask, activation, near, scale**0.5, state)
    check_devices((*inputs, *(state or ())))
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value, weight))
    if backend == "torch" or differentiable:
        out, _, state = plain.causal_attention(*inputs)
    elif state is not None and query.shape[2] == 1:
        out, _ = run_kernel(backend, "step", "recurrent_step", *inputs)
    else:
        out, _, state = run_kernel(backend, "causal", "causal_attention_forward", *inputs)
    return out, state


def stream(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory: Memory,
    entries: int,
    newest: int,
    lengths: Tensor | None = None,
    soft_cap: float | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Memory]:
    """A memory of fixed size: `streaming.stream`, with its arguments and results.

    The kernels have no derivatives and no graph: where one is wanted, plain PyTorch computes it.

    Raises:
        ValueError: as in `near_far_attention`.
    """
    backend = choose_backend(backend, "streaming", query, value)
    check_devices((query, key, value, *memory[:-1]))
    inputs = (query, key, value, memory, entries, newest, lengths, soft_cap)
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value, *memory))
    if backend == "torch" or differentiable or in_graph() or _is_transformed():
        return streaming.stream(*inputs)
    out: tuple[Tensor, Tensor, Memory] = run_kernel(backend, "streaming", "stream", *inputs)
    return out


def _call(operator: Callable[..., Any], function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """How to call an operator: in eager mode with gradients, by a function that costs less and knows `torch.func`."""
    graph = in_graph() or not torch.is_grad_enabled()
    apply: Callable[..., Any] = operator if graph else function.apply
    return apply


def in_graph() -> bool:
    """Whether a graph is being made, of which an attention is one node: its steps depend on the numbers it is given."""
    return torch.compiler.is_compiling() or bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def _is_transformed() -> bool:
    """Whether tensors may stand for others (`torch.func.vmap`) or carry tangents, which a kernel would not see."""
    return bool(torch._C._are_functorch_transforms_active()) or forward_ad._current_level >= 0


class _Once(torch.autograd.Function):
    """Copies of `count` gradients that depend on all the tensors behind them, in a way that has no derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.clone() for x in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(
            "astroattn: the kernels of an astrocyte have no second derivative; AstroConfig(backend='torch') has one"
        )


def _once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward whose gradients have none themselves: whoever asks for a second derivative is told so.

    PyTorch's `once_differentiable` would do where the backward pass goes everywhere. Of `autograd.grad`, which goes
    only to the inputs it is given, and of `torch.func` a second derivative would be zero in silence.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            found: tuple[Tensor | None, ...] = backward(ctx, *gradients)
        if in_graph() or not torch.is_grad_enabled():
            return found
        tensors = [x for x in found if x is not None]
        behind = [x for x in (*gradients, *ctx.saved_tensors) if x is not None]
        copies = iter(_Once.apply(len(tensors), *tensors, *behind))
        return tuple(None if x is None else next(copies) for x in found)

    return run


# `torch.library.custom_op` would bring the compiler, seconds of imports, into the first call of every process.
_LIBRARY = torch.library.Library("astroattn", "FRAGMENT")


def _operator(name: str, schema: str) -> Callable[[Callable[..., Any]], torch._ops.OpOverload]:
    """Make a function an operator on every device."""

    def register(function: Callable[..., Any]) -> torch._ops.OpOverload:
        _LIBRARY.define(name + schema)
        _LIBRARY.impl(name, _on_one_device(function), "CompositeExplicitAutograd")
        overload: torch._ops.OpOverload = getattr(torch.ops.astroattn, name).default
        return overload

    return register


def _fake(operator: torch._ops.OpOverload) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """What an operator returns, without computing it."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        torch.library.register_fake(operator.name(), _on_one_device(function), lib=_LIBRARY)
        return function

    return register


def _on_one_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same, for tensors on one device only."""

    def run(*args: Any) -> Any:
        check_devices(args)
        return function(*args)

    return run


def _new_rows(like: Tensor, columns: int) -> Tensor:
    """An empty tensor for results, as the kernels lay them out."""
    return empty_rows(dense_rows(like), columns)


def _as_rows(x: Tensor, like: Tensor) -> Tensor:
    """The same numbers, laid out as `_new_rows` lays them out."""
    rows = _new_rows(like, x.shape[-1])
    return x if x.stride() == rows.stride() else rows.copy_(x)


def _new_log_p(query: Tensor) -> Tensor:
    return query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))


def _gradients(*inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(_new_rows(x, x.shape[-1]) for x in inputs)


# Near and far

_BUDGET = (
    "Tensor? lengths, SymInt[]? grid, SymInt prefix, SymInt tile, bool by_content, SymInt near, SymInt exact_keys, "
    "SymInt num_hidden, SymInt steps, bool cross, SymInt key_error"
)


def _budget_of(grid: Sequence[int] | None, *numbers: Any) -> Budget:
    return Budget(None if grid is None else (grid[0], grid[1]), *numbers)


@_operator(
    "near_far_attention",
    f"(Tensor query, Tensor key, Tensor value, Tensor? bias, {_BUDGET}, float scale, str backend) "
    "-> (Tensor out, Tensor log_p, Tensor order, Tensor winners, Tensor mass, Tensor keys)",
)
def _near_far(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    bias, lengths, *numbers, scale, backend = rest
    inputs = (query, key, value, bias, lengths, _budget_of(*numbers), scale)
    if backend == "torch":
        out, *others = plain.near_far_forward(*inputs)
        return _as_rows(out, query), *others
    return tuple(run_kernel(backend, "near_far", "near_far_forward", *inputs))


@_fake(_near_far)
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    budget, tokens, queries = _budget_of(*rest[2:-2]), key.shape[2], query.shape[2]
    layout, body = budget.at(tokens, query.shape[3], queries), tokens - budget.prefix
    asked = budget.asked(tokens, queries)
    order = query.new_empty(*query.shape[:2], asked, dtype=torch.int32)
    winners = order.new_empty(*query.shape[:2], body)
    most = budget.most_keys(tokens, query.shape[3], queries, rest[1])
    keys = order.new_empty(*query.shape[:2], layout.all_subtiles(asked), _any_number(most))
    mass = torch.empty_like(winners, dtype=torch.float32)
    return _new_rows(query, value.shape[-1]), _new_log_p(query), order, winners, mass, keys


@_operator(
    "near_far_attention_backward",
    "(Tensor d_out, Tensor d_log_p, Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor out, Tensor log_p, "
    f"Tensor order, Tensor winners, Tensor mass, Tensor keys, {_BUDGET}, float scale, bool with_bias, str backend) "
    "-> (Tensor d_query, Tensor d_key, Tensor d_value, Tensor d_bias)",
)
def _near_far_backward(d_out: Tensor, d_log_p: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    tensors, (lengths, *numbers, scale, with_bias, backend) = rest[:10], rest[10:]
    budget = _budget_of(*numbers)
    if backend == "torch" or with_bias:  # no kernel has the gradient of a bias, which is N x N
        query, key, value, bias, _, _, order, winners, mass, keys = tensors
        given = (query, key, value, bias, order, winners, mass, keys, lengths, budget, scale)
        grads = plain.near_far_backward(d_out, d_log_p, *given)
    else:
        grads = run_kernel(backend, "near_far", "near_far_backward", d_out, d_log_p, *tensors, lengths, budget, scale)
    d_bias = grads[3].contiguous() if with_bias else tensors[0].new_empty(0)
    return *map(_as_rows, grads[:3], tensors[:3]), d_bias


@_fake(_near_far_backward)
def _(
    d_out: Tensor, d_log_p: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    d_bias = query.new_empty(0) if bias is None or not rest[-2] else bias.new_empty(bias.shape)
    return *_gradients(query, key, value), d_bias


def _any_number(size: int) -> int:
    """A size that an exported graph for many lengths may know nothing of: it cannot prove that a root is one."""
    if torch.compiler.is_exporting() and isinstance(size, torch.SymInt):
        return torch.library.get_ctx().new_dynamic_size()
    return size


class NearFar(torch.autograd.Function):
    """`astroattn::near_far_attention` for eager mode: it costs less, and knows `torch.func`."""

    @staticmethod
    def forward(*args: Any) -> Any:
        return _near_far(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        query, key, value, bias, lengths, *ctx.settings = inputs
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(query, key, value, bias, *output, lengths)

    @staticmethod
    @_once
    def backward(ctx: Any, d_out: Tensor, d_log_p: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        *settings, backend = ctx.settings
        wanted = ctx.needs_input_grad[3]
        *grads, d_bias = _near_far_backward(d_out, d_log_p, *ctx.saved_tensors, *settings, wanted, backend)
        return *grads, d_bias if wanted else None, *[None] * (1 + len(ctx.settings))


# Near field, exact keys and a static layer

_NEAR_LINEAR = (
    f"Tensor query, Tensor key, Tensor value, Tensor weight, Tensor phase, {_BUDGET}, str activation, float scale"
)


@_operator("near_linear_attention", f"({_NEAR_LINEAR}) -> (Tensor out, Tensor log_p)")
def _near_linear(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, phase: Tensor, lengths: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    *numbers, activation, scale = rest
    given = (weight, phase, lengths, _budget_of(*numbers), activation, scale)
    out, log_p = plain.near_linear_attention(query, key, value, *given)
    return _as_rows(out, query), log_p


@_operator(
    "near_linear_attention_backward",
    f"(Tensor d_out, Tensor d_log_p, {_NEAR_LINEAR}) "
    "-> (Tensor d_query, Tensor d_key, Tensor d_value, Tensor d_weight)",
)
def _near_linear_backward(
    d_out: Tensor,
    d_log_p: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    phase: Tensor,
    lengths: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    *numbers, activation, scale = rest
    given = (weight, phase, lengths, _budget_of(*numbers), activation, scale)
    *grads, d_weight = plain.near_linear_backward(d_out, d_log_p, query, key, value, *given)
    return *map(_as_rows, grads, (query, key, value)), d_weight


@_fake(_near_linear_backward)
def _(
    d_out: Tensor, d_log_p: Tensor, query: Tensor, key: Tensor, value: Tensor, weight: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    return *_gradients(query, key, value), weight.new_empty(weight.shape)


class NearLinear(torch.autograd.Function):
    """The gradients of `astroattn::near_linear_attention`."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:6])
        ctx.settings = inputs[6:]

    @staticmethod
    @_once
    def backward(ctx: Any, d_out: Tensor, d_log_p: Tensor) -> tuple[Tensor | None, ...]:
        grads = _near_linear_backward(d_out, d_log_p, *ctx.saved_tensors, *ctx.settings)
        return *grads, *[None] * (2 + len(ctx.settings))


# Linear attention

_HIDDEN = "Tensor query, Tensor key, Tensor value, Tensor weight, Tensor phase, Tensor? key_mask, str activation"


@_operator(
    "linear_attention",
    f"({_HIDDEN}, float scale_root, str backend) "
    "-> (Tensor out, Tensor log_p, Tensor kv_state, Tensor z_state, Tensor top)",
)
def _linear(query: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *inputs, backend = rest
    return tuple(run_kernel(backend, "linear", "linear_attention_forward", query, *inputs))


@_fake(_linear)
def _(query: Tensor, key: Tensor, value: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, ...]:
    columns, sizes = value.shape[-1], (*query.shape[:2], weight.shape[2])
    z_state = query.new_empty(sizes, dtype=torch.float32)
    out, log_p = _new_rows(query, columns), _new_log_p(query)
    return out, log_p, z_state.new_empty(*sizes, columns), z_state, torch.empty_like(z_state)


@_operator(
    "linear_attention_backward",
    f"(Tensor d_out, Tensor d_log_p, {_HIDDEN}, float scale_root, Tensor out, Tensor log_p, Tensor kv_state, "
    "Tensor z_state, Tensor top, bool with_weight, str backend) "
    "-> (Tensor d_query, Tensor d_key, Tensor d_value, Tensor d_weight)",
)
def _linear_backward(d_out: Tensor, d_log_p: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *inputs, with_weight, backend = rest
    inputs = [d_out, d_log_p, *inputs]
    *grads, d_weight = run_kernel(backend, "linear", "linear_attention_backward", *inputs, with_weight=with_weight)
    return *grads, inputs[5].new_empty(0) if d_weight is None else d_weight


class Linear(torch.autograd.Function):
    """`astroattn::linear_attention` for eager mode."""

    @staticmethod
    def forward(*args: Any) -> Any:
        return _linear(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, activation, scale_root, backend = inputs
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(*tensors, *output)
        ctx.settings = (activation, scale_root, backend)

    @staticmethod
    @_once
    def backward(ctx: Any, d_out: Tensor, d_log_p: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        activation, scale_root, backend = ctx.settings
        tensors, wanted = ctx.saved_tensors, ctx.needs_input_grad[3]
        *grads, d_weight = _linear_backward(
            *(d_out, d_log_p, *tensors[:6], activation, scale_root, *tensors[6:], wanted, backend)
        )
        return *grads, d_weight if wanted else None, *[None] * 5


# Causal attention


@_operator(
    "causal_attention",
    f"({_HIDDEN}, SymInt near, float scale_root, str backend) -> (Tensor out, Tensor log_p)",
)
def _causal(query: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *inputs, backend = rest
    if backend == "torch":
        out, log_p, _ = plain.causal_attention(query, *inputs)
        return _as_rows(out, query), log_p
    inputs = [query, *inputs]
    out, log_p, _ = run_kernel(backend, "causal", "causal_attention_forward", *inputs, with_state=False)
    return out, log_p


@_fake(_near_linear)
@_fake(_causal)
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return _new_rows(query, value.shape[-1]), _new_log_p(query)


@_operator(
    "causal_attention_backward",
    f"(Tensor d_out, Tensor d_log_p, {_HIDDEN}, SymInt near, float scale_root, Tensor out, Tensor log_p, "
    "bool with_weight, str backend) -> (Tensor d_query, Tensor d_key, Tensor d_value, Tensor d_weight)",
)
def _causal_backward(d_out: Tensor, d_log_p: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *inputs, out, log_p, with_weight, backend = rest
    if backend == "torch":
        *grads, d_weight = plain.causal_attention_backward(d_out, d_log_p, *inputs)
        return *map(_as_rows, grads, inputs[:3]), d_weight if with_weight else d_weight.new_empty(0)
    given = (d_out, d_log_p, *inputs, out, log_p)
    *grads, d_weight = run_kernel(backend, "causal", "causal_attention_backward", *given, with_weight=with_weight)
    return *grads, inputs[3].new_empty(0) if d_weight is None else d_weight


@_fake(_linear_backward)
@_fake(_causal_backward)
def _(
    d_out: Tensor, d_log_p: Tensor, query: Tensor, key: Tensor, value: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    with_weight = rest[-2]
    return *_gradients(query, key, value), weight.new_empty(weight.shape if with_weight else 0)


class Causal(torch.autograd.Function):
    """`astroattn::causal_attention` for eager mode."""

    @staticmethod
    def forward(*args: Any) -> Any:
        return _causal(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, activation, near, scale_root, backend = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.settings = (activation, near, scale_root, backend)

    @staticmethod
    @_once
    def backward(ctx: Any, d_out: Tensor, d_log_p: Tensor) -> tuple[Tensor | None, ...]:
        *settings, backend = ctx.settings
        *tensors, out, log_p = ctx.saved_tensors
        wanted = ctx.needs_input_grad[3]
        *grads, d_weight = _causal_backward(d_out, d_log_p, *tensors, *settings, out, log_p, wanted, backend)
        return *grads, d_weight if wanted else None, *[None] * 6


for _op, _function in ((_near_far, NearFar), (_near_linear, NearLinear), (_linear, Linear), (_causal, Causal)):
    torch.library.register_autograd(_op.name(), _function.backward, setup_context=_function.setup_context, lib=_LIBRARY)
