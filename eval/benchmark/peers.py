"""Other people's attention, on the same GPU in the same run: what is installed, and what its authors report of it.

Each is called as it is, with its own settings. One that is not importable, refuses the inputs or does not compute what
it claims to has no row, and the reason is told.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from eval.benchmark.contestants import (
    GATE_LENGTHS,
    Attention,
    Contestant,
    Problem,
    always,
    check_properties,
    check_results,
    draw_weight,
    features,
    softmax,
)
from eval.benchmark.rows import Row

WINDOW = 64  # keys on either side that FlexAttention's block mask leaves
HALF = (torch.float16, torch.bfloat16)


class Peer(NamedTuple):
    """One of them.

    Attributes:
        name: what it is called. module, packages: what is imported, and the packages that may have brought it.
        attend: from the module, query, key and value to the output.
        dtypes: that it takes. backward: whether it has gradients. approximates: whether it is rough by intention.
        plain: the same attention in plain PyTorch, given the problem.
    """

    name: str
    module: str
    packages: tuple[str, ...]
    attend: Callable[..., Tensor]
    dtypes: tuple[torch.dtype, ...] = HALF
    backward: bool = True
    approximates: bool = False
    plain: Callable[[Problem], Attention] = lambda problem: softmax


class Reported(NamedTuple):
    """Milliseconds of a forward pass by length, as somebody reports them: of another machine, and not measured here."""

    name: str
    source: str
    milliseconds: dict[int, float]


_SHAPE = "float16, batch 1, 12 heads of 64, forward"
_LENGTHS = (1024, 2048, 4096, 8192, 16384)
REPORTED = tuple(
    Reported(name, f"reported by MonarchAttention's README on {gpu}, {_SHAPE}", dict(zip(_LENGTHS, times, strict=True)))
    for gpu, name, times in (
        ("H100", "MonarchAttention", (0.015, 0.021, 0.031, 0.056, 0.105)),
        ("H100", "flash-attn 4", (0.020, 0.032, 0.103, 0.394, 1.532)),
        ("H100", "SDPA", (0.019, 0.045, 0.117, 0.471, 1.813)),
        ("A100", "MonarchAttention", (0.022, 0.029, 0.050, 0.100, 0.189)),
        ("A100", "flash-attn 2", (0.034, 0.090, 0.323, 1.239, 4.576)),
    )
)


def _flash(module: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """All three versions take [B, N, H, D]; some return log sums beside the output."""
    found = module.flash_attn_func(*(x.transpose(1, 2) for x in (query, key, value)))
    out: Tensor = found[0] if isinstance(found, tuple) else found
    return out.transpose(1, 2)


def _cudnn(module: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(query, key, value)


def _sage(module: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    out: Tensor = module.sageattn(query, key, value, tensor_layout="HND", is_causal=False)
    return out


def _sparge(module: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    out: Tensor = module.spas_sage2_attn_meansim_topk_cuda(query, key, value, tensor_layout="HND", is_causal=False)
    return out


def _flex(module: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    mask = _block_mask(module, key.shape[2], key.device)
    out: Tensor = _compiled(module.flex_attention, query.is_cuda)(query, key, value, block_mask=mask)
    return out


@cache
def _compiled(function: Callable[..., Any], on_gpu: bool) -> Callable[..., Any]:
    """As its authors say: as they stand, both of FlexAttention's functions have N x N numbers in memory."""
    return torch.compile(function) if on_gpu else function


@cache  # a CUDA graph may read it as long as it lives
def _block_mask(module: Any, tokens: int, device: torch.device) -> Any:
    create = _compiled(module.create_block_mask, device.type == "cuda")
    return create(_in_window, None, None, tokens, tokens, device=device)


def _in_window(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return (query - key).abs() <= WINDOW


def _window(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    place = torch.arange(key.shape[2], device=key.device)
    seen = _in_window(None, None, place[:, None], place)
    logits = query @ key.mT * query.shape[-1] ** -0.5
    return logits.masked_fill(~seen, -torch.inf).softmax(-1) @ value


def _flash_linear(module: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal; the features of the static layer are made by PyTorch."""
    phi = features(draw_weight(query), query, key)
    out: Tensor = module.chunk_linear_attn(*(x.transpose(1, 2).contiguous() for x in (*phi, value)))[0]
    return out.transpose(1, 2)


def _causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    phi_query, phi_key = features(draw_weight(query), query, key)
    shares = (phi_query @ phi_key.mT).tril()
    return shares @ value / shares.sum(-1, keepdim=True)


PEERS = (
    Peer("flash-attn 2", "flash_attn", ("flash-attn",), _flash),
    Peer("flash-attn 3", "flash_attn_interface", ("flash-attn-3", "flashattn-hopper"), _flash),
    Peer("flash-attn 4", "flash_attn.cute", ("flash-attn-4", "flash-attn-cute"), _flash),
    Peer("cuDNN", "torch", ("torch",), _cudnn),
    Peer("SageAttention", "sageattention", ("sageattention",), _sage, backward=False, approximates=True),
    Peer("SpargeAttention", "spas_sage_attn", ("spas-sage-attn",), _sparge, backward=False, approximates=True),
    Peer(
        *("fla, causal, m = 64", "fla.ops.linear_attn", ("flash-linear-attention", "fla-core"), _flash_linear),
        dtypes=(torch.float32, *HALF),
        plain=lambda problem: _causal,
    ),
    Peer(
        *(f"FlexAttention, near {2 * WINDOW + 1}", "torch.nn.attention.flex_attention", ("torch",), _flex),
        dtypes=(torch.float32, *HALF),
        plain=lambda problem: _window,
    ),
)


def find_peers(problem: Problem, backward: bool) -> tuple[list[Contestant], list[Row]]:
    """Those that run on this problem, and a row for each of all: its version, and why it is not measured, or None."""
    contestants, rows = [], []
    for peer in PEERS:
        version = _version(peer)
        reason = "not installed" if version is None else None
        if version is not None:
            found = _contestant(peer, version)
            reason = _refusal(peer, found, problem, backward)
            contestants += [found] if reason is None else []
        rows.append({"part": "peers", "name": peer.name, "version": version, "reason": reason})
    return contestants, rows


def _version(peer: Peer) -> str | None:
    """Of the package, None where the module is not there."""
    try:
        if find_spec(peer.module) is None:
            return None
    except ModuleNotFoundError:  # a package above it
        return None
    for package in peer.packages:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return "of an unknown version"


def _contestant(peer: Peer, version: str) -> Contestant:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return peer.attend(import_module(peer.module), query, key, value)

    kernel = f"{peer.packages[0]} {version}"
    return Contestant(peer.name, "peer", kernel, attend, has_backward=peer.backward, approximates=peer.approximates)


def _refusal(peer: Peer, contestant: Contestant, problem: Problem, backward: bool) -> str | None:
    """Why it is not measured: it does not take the inputs, or does not pass the gate."""
    if problem.dtype not in peer.dtypes:
        return f"does not take {str(problem.dtype).removeprefix('torch.')}"
    backward = backward and peer.backward
    gated = contestant if peer.approximates else replace(contestant, plain=partial(always, peer.plain(problem)))
    try:
        for tokens in GATE_LENGTHS:
            check_results(gated, problem, tokens, backward)
            check_properties(contestant, problem, tokens, backward)
    except Exception as error:  # whatever other people's code raises
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return None


def reported_rows() -> list[Row]:
    """What others report of themselves: to stand beside what is measured, not among it."""
    return [
        {"part": "reported", "name": each.name, "source": each.source, "tokens": tokens, "milliseconds": time}
        for each in REPORTED
        for tokens, time in each.milliseconds.items()
    ]
