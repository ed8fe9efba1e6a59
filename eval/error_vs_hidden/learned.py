"""Static hidden weights trained on sample data to attend as softmax does."""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from eval.error_vs_hidden.draws import sample_pairs

RATE = 0.05  # of Adam, falling to 0 as a cosine
NORMALISER = 0.1  # weight of the squared error of log p in the loss, which else does not see the size of p


@dataclass(frozen=True)
class Learned:
    """m neurons per head: phi(k) = exp(W_k k) / sqrt(m) while writing, phi(q) = exp(W_q q) / sqrt(m) while reading.

    Attributes:
        query_weight, key_weight: W_q and W_k [H, m, D].
    """

    query_weight: Tensor
    key_weight: Tensor

    def attend(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """log(sum_j phi_j(q) phi_j(k)) [B, H, N, N] and log p [B, H, N], for queries and keys [B, H, N, D]."""
        gain = key @ self.key_weight.mT
        top = gain.detach().amax(-2, keepdim=True)
        reading = query @ self.query_weight.mT + top
        best = reading.detach().amax(-1, keepdim=True)
        shares = (reading - best).exp() @ (gain - top).exp().mT
        log_shares = shares.clamp(min=torch.finfo(shares.dtype).tiny).log() + best - log(gain.shape[-1])
        return log_shares, log_shares.logsumexp(-1)


def learn(query: Tensor, key: Tensor, num_hidden: int, steps: int, seed: int = 0) -> Learned:
    """Train the weights of every head on queries and keys [B, H, N, D], a few sequences at a time.

    Neurons start as pairs of a query and a key that it attends to: W_k = q, W_q = k. The loss is KL(softmax | network),
    with a small share of the squared error of log p.
    """
    generator = torch.Generator().manual_seed(seed)
    head = torch.arange(query.shape[1])[:, None]
    sequence, token, attended = sample_pairs((query @ key.mT).softmax(-1), num_hidden, generator)
    query_weight = key[sequence, head, attended].requires_grad_()
    key_weight = query[sequence, head, token].requires_grad_()
    optimiser = torch.optim.Adam([query_weight, key_weight], RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    with torch.enable_grad():
        for _ in range(steps):
            some = torch.randint(len(query), (2,), generator=generator)
            logits = query[some] @ key[some].mT
            log_shares, log_p = Learned(query_weight, key_weight).attend(query[some], key[some])
            divergence = (logits.softmax(-1) * (log_p[..., None] - log_shares)).sum(-1)
            loss = (divergence + NORMALISER * (log_p - logits.logsumexp(-1)).square()).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return Learned(query_weight.detach(), key_weight.detach())
