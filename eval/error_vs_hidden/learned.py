"""Static hidden weights trained on sample data to attend as softmax does."""

from __future__ import annotations

import torch
from torch import Tensor

from astroattn import AstroConfig, AstrocyteAttention
from astroattn.distillation.rows import log_products
from astroattn.distillation.transfer import start_from_data
from astroattn.fidelity.calls import AttentionCall
from astroattn.hidden import LearnedHidden

RATE = 0.05  # of Adam, falling to 0 as a cosine
NORMALISER = 0.1  # weight of the squared error of log p in the loss, which else does not see the size of p


def learn(query: Tensor, key: Tensor, num_hidden: int, steps: int, seed: int = 0) -> LearnedHidden:
    """Train the weights of every head on queries and keys [B, H, N, D], a few sequences at a time.

    As `distill` does, but for the loss: KL(softmax | network), with a small share of the squared error of log p.
    """
    generator = torch.Generator().manual_seed(seed)
    config = AstroConfig(hidden="learned", num_hidden=num_hidden, near=0, exact_keys=0)
    network = AstrocyteAttention(query.shape[1], query.shape[-1], config)
    assert isinstance(network.hidden, LearnedHidden)
    start_from_data({"": network}, [[("", AttentionCall(query, key, key, {"scale": 1.0}))]], 1, seed)
    optimiser = torch.optim.Adam(network.hidden.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    with torch.enable_grad():
        for _ in range(steps):
            some = torch.randint(len(query), (2,), generator=generator)
            logits = query[some] @ key[some].mT
            log_shares, log_p = attend(network.hidden, query[some], key[some])
            divergence = (logits.softmax(-1) * (log_p[..., None] - log_shares)).sum(-1)
            loss = (divergence + NORMALISER * (log_p - logits.logsumexp(-1)).square()).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return network.hidden.requires_grad_(False)


def attend(hidden: LearnedHidden, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """log phi(q).phi(k) [B, H, N, N] and log p [B, H, N], for queries and keys [B, H, N, D]."""
    log_shares = log_products(hidden, query, key)
    return log_shares, log_shares.logsumexp(-1)
