"""`torch.nn.MultiheadAttention`, also inside `TransformerEncoderLayer` and `TransformerEncoder`.

Its scores are out of reach (its fast paths are one fused kernel each), so the projections are written out here. A
TransformerEncoderLayer leaves its own fast path, which never calls `self_attn`, because a module below it has a
forward hook; a TransformerEncoder must not make nested tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from astroattn.checks import check_traceable
from astroattn.patching.dense_masks import DENSE, HIDDEN, Mask, read_mask
from astroattn.patching.site import Call, Site, attend, fall_back, replaced_forward, site_of

NESTED = "astroattn_use_nested_tensor"  # a TransformerEncoder's use_nested_tensor before it was patched


@dataclass(eq=False)
class MhaSite(Site):
    """A `torch.nn.MultiheadAttention`."""

    @classmethod
    def claims(cls, module: nn.Module) -> bool:
        return isinstance(module, nn.MultiheadAttention)

    @classmethod
    def refusal(cls, name: str, module: nn.Module) -> str | None:
        assert isinstance(module, nn.MultiheadAttention)
        reasons = {
            "a subclass of torch.nn.MultiheadAttention": type(module) is not nn.MultiheadAttention
            and not isinstance(module, MultiheadAttentionWithAstrocyte),
            "keys and values of other widths (kdim, vdim)": not module._qkv_same_embed_dim,
            "extra key and value (add_bias_kv)": module.bias_k is not None,
            "extra zero key (add_zero_attn)": module.add_zero_attn,
        }
        return next((reason for reason, holds in reasons.items() if holds), replaced_forward(module))

    @classmethod
    def crosses(cls, name: str, module: nn.Module) -> bool:
        return super().crosses(name, module) or name.rpartition(".")[2] == "multihead_attn"

    @classmethod
    def shape(cls, module: nn.Module) -> tuple[int, int] | None:
        assert isinstance(module, nn.MultiheadAttention)
        return module.num_heads, module.head_dim

    @classmethod
    def settle(cls, model: nn.Module) -> None:
        for encoder in model.modules():
            if not isinstance(encoder, nn.TransformerEncoder):
                continue
            before = vars(encoder).setdefault(NESTED, encoder.use_nested_tensor)
            patched = any(isinstance(site_of(module), MhaSite) for module in encoder.modules())
            encoder.use_nested_tensor = before and not patched
            if not patched:
                del vars(encoder)[NESTED]  # not before, as this may be broken off

    def take(self, module: nn.Module) -> None:
        if not isinstance(module, MultiheadAttentionWithAstrocyte):
            module.__class__ = MultiheadAttentionWithAstrocyte
        self.handles.append(module.register_forward_pre_hook(keep_off_fast_path))

    def release(self, module: nn.Module) -> None:
        cls: type = type(module)
        if cls is MultiheadAttentionWithAstrocyte:
            module.__class__ = nn.MultiheadAttention
        # else something has put a class over ours since, or taken ours away; without a site ours does as its base does


def keep_off_fast_path(module: nn.Module, args: Any) -> None:
    """Forward pre-hook that does nothing: with one below it, a TransformerEncoderLayer calls its modules."""


class MultiheadAttentionWithAstrocyte(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` with its projections written out and its scores left to an astrocyte."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `torch.nn.MultiheadAttention.forward`; what an astrocyte cannot represent is computed by that."""

        def host() -> tuple[Tensor, Tensor | None]:
            return nn.MultiheadAttention.forward(
                self,
                query,
                key,
                value,
                key_padding_mask=key_padding_mask,
                need_weights=need_weights,
                attn_mask=attn_mask,
                average_attn_weights=average_attn_weights,
                is_causal=is_causal,
            )

        if (site := site_of(self)) is None:  # unpatched under a hook or a class that still leads here
            return host()
        check_traceable(query)
        batch = query.shape[0 if self.batch_first else -2]
        mask, seen = _read_masks(key_padding_mask, None if is_causal else attn_mask, batch, self.num_heads)
        refusals = {
            "tensors without a batch or nested": query.dim() != 3 or query.is_nested,
            "cross attention, which the name of the module does not say": not (site.cross or _is_same(query, key)),
            "need_weights=True": need_weights,
            "is_causal without attn_mask": attn_mask is None and is_causal,
        }
        refusal = [*(reason for reason, holds in refusals.items() if holds), mask.refusal][0]
        if refusal is not None:
            fall_back(site, refusal)
            return host()
        q, k, v = self._project(query, key, value)
        call = Call(q, k, v, mask.real, is_causal or mask.causal, dropout=self.dropout if self.training else 0.0)
        call.documents, call.bias = mask.documents, mask.bias
        output = attend(self, call, lambda: _softmax(call, seen))
        output = output.transpose(1, 2).flatten(2)  # [B, N, E]
        output = self.out_proj(output if self.batch_first else output.transpose(0, 1))
        return output, None

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Queries, keys and values [B, H, N, D]."""
        if query is key and key is value:
            parts = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            weights = self.in_proj_weight.chunk(3)
            biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            parts = tuple(map(F.linear, (query, key, value), weights, biases))
        if not self.batch_first:
            parts = tuple(part.transpose(0, 1) for part in parts)
        return [part.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for part in parts]


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two arguments are one tensor, or views of it, which a full backward hook makes of every argument."""
    if one is other or torch.compiler.is_compiling() or one.dtype != other.dtype:
        return one is other
    try:
        return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()
    except RuntimeError:  # inside torch.func there is no storage
        return False


def _read_masks(padding: Tensor | None, mask: Tensor | None, batch: int, heads: int) -> tuple[Mask, Tensor | None]:
    """The masks of torch.nn (bool with True for what is hidden, or added to scores), and both as one where dense."""
    said = Mask()
    if padding is not None:
        real = ~padding if padding.dtype == torch.bool else padding
        said = read_mask(real[:, None, None, :], batch, padding.shape[-1])
    if mask is None or said.refusal is not None:
        return said, None
    if said.bias is not None:
        return Mask(refusal=DENSE), None
    if torch.compiler.is_compiling() or mask.shape[-1] != mask.shape[-2]:
        return Mask(refusal=DENSE), None
    seen = ~mask if mask.dtype == torch.bool else mask == 0
    if mask.dtype != torch.bool and (mask.requires_grad or not bool((seen | (mask <= HIDDEN)).all())):
        bias = mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (batch, heads))
        if said.real is not None:
            bias = bias.masked_fill(~said.real[:, None, None], -torch.inf)
        return read_mask(bias, batch, bias.shape[-1]), bias
    if mask.dim() != 2:
        return Mask(refusal=DENSE), None
    seen = seen[None, None] if said.real is None else seen & said.real[:, None, None]
    return read_mask(seen, batch, seen.shape[-1]), seen


def _softmax(call: Call, seen: Tensor | None) -> Tensor:
    """What the host computes: all of `F.multi_head_attention_forward` between its projections."""
    if seen is not None:
        return F.scaled_dot_product_attention(call.query, call.key, call.value, seen, call.dropout)
    mask = None if call.key_mask is None else call.key_mask[:, None, None, :]
    if call.bias is not None:
        mask = call.bias if mask is None else call.bias.masked_fill(~mask, torch.finfo(call.bias.dtype).min)
    if call.causal:
        causal = torch.ones(call.query.shape[2], call.key.shape[2], dtype=torch.bool, device=call.query.device).tril()
        if mask is None or mask.dtype == torch.bool:
            mask = causal if mask is None else causal & mask
        else:
            mask = mask.masked_fill(~causal, -torch.inf)
    return F.scaled_dot_product_attention(call.query, call.key, call.value, mask, call.dropout)
