"""Causal attention to a memory of fixed size: the newest tokens as they are, all older ones merged into entries.

    o = sum_i exp(q.k_i + b_i) v_i / p,   p = sum_i exp(q.k_i + b_i)

A new token is an entry with b = 0. Tokens are written in blocks, at the same positions however a text is cut. Where the
memory is full at the end of a block, as many entries of all but the newest join others, those whose joining changes
what is read least. With d = q - u, the deviation of the queries from their mean u, and masses m (the attention an entry
has had of late), joining i and j changes what is read by

    mu (d.(k_i - k_j)) (v_i - v_j) + mu/2 (d.(k_i - k_j))^2 (v_ij - o) + ...,   mu = m_i m_j / (m_i + m_j),

v_ij their mean value and o the mean of what is read; the mean of its square over queries with second moments M is

    cost_ij = mu^2 s (|v_i - v_j|^2 + SECOND_ORDER s |v_ij - o|^2),   s = (k_i - k_j)^T M (k_i - k_j).

The joint entry has the means of k and v with weights exp(b + u.k), and the b with which it has their mass at u. With a
soft cap c, c tanh(x / c) stands in the place of every product x of a query and a key that is read; what joining costs
is counted as without. Ours; merging keys and values of a cache as such is known (CaM, KVMerger).

Queries are [B, H, G, N, D] times the scale, keys and values [B, H, N, D] and [B, H, N, Dv], with H key heads that G
query heads read; float32 at least.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SINKS = 4  # first tokens, which never join others: much attention goes there for want of anything better
BLOCK, SMALL_BLOCK, SMALL = 8, 4, 64  # tokens between two mergers; in a memory of less than so many entries
FORGETTING = 2.5  # over the entries: how much of the attention an entry has had is forgotten per token
QUERY_DECAY = 0.996  # of the statistics of queries and outputs, per token
SECOND_ORDER = 0.25
LEAST_MASS = 1e-6  # of an entry: what nobody has attended to yet may be wanted


class Memory(NamedTuple):
    """What the tokens so far leave behind: W entries, at most as many as were asked for; statistics; the schedule.

    key [B, H, W, D], value [B, H, W, Dv] and log_weight b [B, H, W, G] are what is read. attention [B, H, W] is the
    mean attention of a block's queries to an entry, newest blocks first, times age [B, H, W], the sum of those weights;
    block_attention [B, H, W] the sum over the block that is being written. query [B, H, G, D], square [B, H, D] and
    output [B, H, Dv] are running means of q, q^2 and o, times weight [B], and block_* their sums over that block.
    counts [B, 3], on the CPU: entries stored, tokens in the block, tokens seen.
    """

    key: Tensor
    value: Tensor
    log_weight: Tensor
    attention: Tensor
    age: Tensor
    block_attention: Tensor
    query: Tensor
    square: Tensor
    output: Tensor
    block_query: Tensor
    block_square: Tensor
    block_output: Tensor
    weight: Tensor
    counts: Tensor


Memories = Memory | tuple[Memory, ...]  # one for all key heads, or one for each of their budgets
ENTRIES = ("key", "value", "log_weight", "attention", "age", "block_attention")  # fields with W at dimension 2


def each_of(memories: Memories) -> tuple[Memory, ...]:
    """All of them."""
    return (memories,) if isinstance(memories, Memory) else memories


def together(parts: list[Memory]) -> Memories:
    """The other way round: one by itself, several as a tuple."""
    return parts[0] if len(parts) == 1 else tuple(parts)


def block_of(entries: int) -> int:
    """Tokens that are written before the memory makes room: the fewer the truer and the dearer."""
    return BLOCK if entries >= SMALL else SMALL_BLOCK


def empty_memory(query: Tensor, key: Tensor, value: Tensor) -> Memory:
    """The memory before the first token, for tokens like these."""
    batch, heads, groups, _, dim = query.shape
    columns = value.shape[-1]

    def new(*shape: int) -> Tensor:
        return key.new_zeros(batch, heads, *shape)

    means = [new(groups, dim), new(dim), new(columns)]
    entries = [new(0, dim), new(0, columns), new(0, groups), new(0), new(0), new(0)]
    counts = torch.zeros(batch, 3, dtype=torch.long, device="cpu")
    return Memory(*[*entries, *means, *map(torch.zeros_like, means), key.new_zeros(batch), counts])


def stream(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory: Memory,
    entries: int,
    newest: int,
    lengths: Tensor | None = None,
    soft_cap: float | None = None,
) -> tuple[Tensor, Tensor, Memory]:
    """Read and write N tokens, one block after the other.

    Args:
        query, key, value: as above. memory: what the tokens before these left behind; it is not changed.
        entries: most entries to store, a multiple of the block. newest: tokens that are not merged yet, at least.
        lengths: real tokens of each sequence [B], on the CPU, which come first; None: all are.
        soft_cap: c as above, positive; None: there is none.

    Returns:
        The output [B, H, G, N, Dv] and log p [B, H, G, N], zeros and -inf for padding; and the new memory.
    """
    batch, count, block = len(key), key.shape[2], block_of(entries)
    lengths = torch.full((batch,), count, device="cpu") if lengths is None else lengths
    out = query.new_zeros(*query.shape[:-1], value.shape[-1])
    log_p = query.new_full(query.shape[:-1], -torch.inf)
    done = torch.zeros_like(lengths)
    while int((take := torch.minimum(block - memory.counts[:, 1], lengths - done)).max()) > 0:
        n, first = int(take.max()), int(done[0])
        alike = bool((take == n).all() and (done == first).all() and (memory.counts[:, 0] == memory.counts[0, 0]).all())
        if alike:
            now = slice(first, first + n)
            part, log, memory = _piece(query[..., now, :], key[:, :, now], value[:, :, now], memory, None, soft_cap)
            out[..., now, :], log_p[..., now] = part, log
        else:  # each row goes on in its own block
            tokens = (done[:, None] + torch.arange(n, device="cpu")).clamp(max=count - 1)
            q, k, v = (_take_tokens(x, tokens.to(key.device)) for x in (query, key, value))
            part, log, memory = _piece(q, k, v, memory, take, soft_cap)
            rows, steps = (torch.arange(n, device="cpu") < take[:, None]).nonzero(as_tuple=True)
            places = tokens[rows, steps]
            out[rows, :, :, places], log_p[rows, :, :, places] = part[rows, :, :, steps], log[rows, :, :, steps]
        done = done + take
        full = (memory.counts[:, 1] == block).nonzero()[:, 0]
        if len(full) == batch:
            memory = _end_block(memory, entries, newest, soft_cap)
        elif len(full):
            memory = _put_rows(memory, full, _end_block(select_rows(memory, full), entries, newest, soft_cap))
    return out, log_p, memory


def soft_capped(logits: Tensor, soft_cap: float | None) -> Tensor:
    """c tanh(x / c), or x where there is no c."""
    return logits if soft_cap is None else soft_cap * (logits / soft_cap).tanh()


def select_rows(memory: Memory, rows: Tensor) -> Memory:
    """The memory of these sequences of the batch, in this order."""
    return Memory(*(x.index_select(0, rows.to(x.device)) for x in memory))


def _take_tokens(x: Tensor, tokens: Tensor) -> Tensor:
    """The tokens [B, n] of [B, ..., N, D]."""
    index = tokens.view(len(tokens), *[1] * (x.dim() - 3), -1, 1)
    return x.gather(-2, index.expand(*x.shape[:-2], -1, x.shape[-1]))


def _piece(
    query: Tensor, key: Tensor, value: Tensor, memory: Memory, take: Tensor | None, soft_cap: float | None
) -> tuple[Tensor, Tensor, Memory]:
    """Write n tokens of a block, then read each with what came before it; of each row the first `take` (None: all)."""
    (groups, n), device, old = query.shape[2:4], key.device, memory[: len(ENTRIES)]
    added = (key, value, *(x.new_zeros(*x.shape[:2], n, *x.shape[3:]) for x in old[2:]))
    grown = (_insert(x, y, memory.counts[:, 0], take) for x, y in zip(old, added, strict=True))
    new = memory._replace(**dict(zip(ENTRIES, grown, strict=True)))
    logits = soft_capped(query.flatten(2, 3) @ new.key.mT, soft_cap).unflatten(2, (groups, n))
    logits = logits + new.log_weight.movedim(-1, 2).unsqueeze(3)
    width = new.key.shape[2]
    if take is None:
        real = None
        if n > 1:
            future = torch.ones(n, width, dtype=torch.bool, device=device).triu(width - n + 1)
            logits = logits.masked_fill(future, -torch.inf)
        written = torch.full((len(key),), n, device="cpu")
    else:
        steps, slots = torch.arange(n, device=device), torch.arange(width, device=device)
        seen = slots <= (memory.counts[:, :1].to(device) + steps)[..., None]  # [B, n, W]
        logits = logits.masked_fill(~seen[:, None, None], -torch.inf)
        real, written = (steps < take.to(device)[:, None])[:, None, None], take
    log_p = logits.logsumexp(-1)
    shares = (logits - log_p[..., None]).exp()
    out = (shares.flatten(2, 3) @ new.value).unflatten(2, (groups, n))
    with torch.no_grad():
        read = [shares, query, query.square(), out]
        if real is not None:
            read = [x.masked_fill(~real[..., None], 0) for x in read]
        attention, q, square, o = (x.sum(3) for x in read)
        new = new._replace(
            block_attention=new.block_attention + attention.mean(2),
            block_query=memory.block_query + q,
            block_square=memory.block_square + square.mean(2),
            block_output=memory.block_output + o.mean(2),
            counts=memory.counts + written[:, None],
        )
    return out, log_p, new


def _insert(old: Tensor, new: Tensor, stored: Tensor, take: Tensor | None) -> Tensor:
    """The entries [B, H, W, ...] with new ones behind the stored ones of each row."""
    if take is None:
        return torch.cat([old[:, :, : int(stored[0])], new], 2)
    width, n = int((stored + take).max()), new.shape[2]
    slot = torch.arange(width, device=old.device)
    place = slot - stored.to(old.device)[:, None]  # among the new ones [B, W]
    here = (place >= 0) & (place < take.to(old.device)[:, None])

    def spread(x: Tensor) -> Tensor:
        return x.view(len(x), 1, width, *[1] * (old.dim() - 3))

    grown = torch.cat([old, old.new_zeros(*old.shape[:2], max(width - old.shape[2], 0), *old.shape[3:])], 2)
    index = spread(place.clamp(0, n - 1)).expand(*new.shape[:2], width, *new.shape[3:])
    return torch.where(spread(here), new.gather(2, index), grown[:, :, :width])


def _put_rows(memory: Memory, rows: Tensor, part: Memory) -> Memory:
    """The memory with these rows replaced; what a row has beyond its stored entries is never read."""
    fields = []
    for old, new in zip(memory, part, strict=True):
        if old.dim() > 2 and new.shape[2] < old.shape[2] and new.shape[3:] == old.shape[3:]:
            new = torch.cat([new, old.new_zeros(*new.shape[:2], old.shape[2] - new.shape[2], *new.shape[3:])], 2)
        fields.append(old.index_copy(0, rows.to(old.device), new))
    return Memory(*fields)


def _end_block(memory: Memory, entries: int, newest: int, soft_cap: float | None) -> Memory:
    """Take a block into the statistics, and make room for the next one."""
    with torch.no_grad():
        block = block_of(entries)
        fast, slow = (1 - FORGETTING / entries) ** block, QUERY_DECAY**block
        rates = {"attention": fast, "query": slow, "square": slow, "output": slow}
        means = {name: _blend(getattr(memory, name), getattr(memory, f"block_{name}") / block, rate)
                 for name, rate in rates.items()}  # fmt: skip
        one = torch.ones((), dtype=memory.age.dtype, device=memory.age.device)
        memory = memory._replace(
            **means,
            **{f"block_{name}": torch.zeros_like(getattr(memory, f"block_{name}")) for name in rates},
            age=_blend(memory.age, one, fast),
            weight=_blend(memory.weight, one, slow),
            counts=memory.counts * torch.tensor([1, 0, 1], device="cpu"),
        )
    full = (memory.counts[:, 0] == entries).nonzero()[:, 0]
    if len(full) == len(memory.counts):
        return _merge(memory, block, newest, soft_cap)
    if len(full):
        return _put_rows(memory, full, _merge(select_rows(memory, full), block, newest, soft_cap))
    return memory


def _blend(mean: Tensor, new: Tensor, rate: float) -> Tensor:
    return rate * mean + (1 - rate) * new


def _merge(memory: Memory, block: int, newest: int, soft_cap: float | None) -> Memory:
    """Let as many entries as a block has join others, of all but the newest: only such take others in as stay."""
    count = memory.key.shape[2] - max(newest - block, 0)  # at the end of the next block these are the newest
    old = [getattr(memory, name)[:, :, :count] for name in ENTRIES]
    key, value, log_weight, attention, age, block_attention = old
    mean = memory.query / memory.weight[:, None, None, None]
    with torch.no_grad():
        cost = _cost(memory, key, value, attention / age)
        later = torch.ones_like(cost[0, 0], dtype=torch.bool).tril(-1)
        later[:, :SINKS] = False
        worst = cost.masked_fill(~later, torch.inf).amin(-1)
        gone = torch.zeros_like(worst, dtype=torch.bool)
        gone.scatter_(-1, worst.topk(block, largest=False).indices, True)
        closed = gone.clone()
        closed[..., :SINKS] = True
        into = cost.masked_fill(closed[..., None, :], torch.inf).argmin(-1)
        into = torch.where(gone, into, torch.arange(count, device=key.device))
        alone = torch.ones_like(worst).scatter_add_(-1, into, torch.ones_like(worst)) == 2
        stay = gone.to(torch.uint8).argsort(dim=-1, stable=True)[..., : count - block]

    def join(x: Tensor) -> Tensor:
        index = into.view(*into.shape, *[1] * (x.dim() - 3)).expand_as(x)
        return torch.zeros_like(x).scatter_add(2, index, x)

    drive = log_weight + soft_capped(key @ mean.mT, soft_cap)  # b + u.k for each query head
    top = torch.full_like(drive, -torch.inf).scatter_reduce(2, into[..., None].expand_as(drive), drive, "amax")
    shares = (drive - top.gather(2, into[..., None].expand_as(drive))).exp()
    total = join(shares)
    # The heads share keys and values: an entry's part in theirs is the mean of its part in each head's mass.
    part = (drive.log_softmax(2)).logsumexp(-1)
    high = torch.full_like(part, -torch.inf).scatter_reduce(2, into, part, "amax")
    part = (part - high.gather(2, into)).exp()
    part = part / join(part).clamp_min(torch.finfo(part.dtype).tiny).gather(2, into)
    joint_key, joint_value = join(key * part[..., None]), join(value * part[..., None])
    joint_weight = (
        top + total.clamp_min(torch.finfo(total.dtype).tiny).log() - soft_capped(joint_key @ mean.mT, soft_cap)
    )
    merged = (
        torch.where(alone[..., None], key, joint_key),
        torch.where(alone[..., None], value, joint_value),
        torch.where(alone[..., None], log_weight, joint_weight),
        join(attention),
        torch.zeros_like(age).scatter_reduce(2, into, age, "amax"),
        block_attention[:, :, :count],
    )
    fields = {}
    for name, x in zip(ENTRIES, merged, strict=True):
        index = stay.view(*stay.shape, *[1] * (x.dim() - 3)).expand(*stay.shape, *x.shape[3:])
        fields[name] = torch.cat([x.gather(2, index), getattr(memory, name)[:, :, count:]], 2)
    return memory._replace(**fields, counts=memory.counts - torch.tensor([block, 0, 0], device="cpu"))


def _cost(memory: Memory, key: Tensor, value: Tensor, mass: Tensor) -> Tensor:
    """What joining two entries costs [B, H, P, P], as above."""
    square = memory.square / memory.weight[:, None, None]
    half = square.shape[-1] // 2
    if square.shape[-1] == 2 * half:  # the two axes of a rotary plane, which turns with the distance
        square = (0.5 * (square[..., :half] + square[..., half:])).repeat(1, 1, 2)
    mass = mass + LEAST_MASS
    mine, theirs = mass[..., :, None], mass[..., None, :]
    part = mine / (mine + theirs)
    turn = _distances(key * square.sqrt()[:, :, None])
    apart = _distances(value)
    off = (value - (memory.output / memory.weight[:, None, None])[:, :, None]).square().sum(-1)
    lever = part * off[..., :, None] + (1 - part) * off[..., None, :] - part * (1 - part) * apart
    return (part * theirs).square() * turn * (apart + SECOND_ORDER * turn * lever.clamp_min(0))


def _distances(x: Tensor) -> Tensor:
    """Squared distances between rows [B, H, P, P]."""
    square = x.square().sum(-1)
    return (square[..., :, None] + square[..., None, :] - 2 * x @ x.mT).clamp_min(0)
