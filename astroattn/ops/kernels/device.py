"""What a GPU has that blocks must fit into."""

from __future__ import annotations

from functools import cache

import torch

# Bytes of shared memory that a block may have, by compute capability; elsewhere (GeForce, L4, L40) the least of them.
SHARED = {capability: kilobytes * 1024 for capability, kilobytes in (((8, 0), 163), ((9, 0), 227), ((10, 0), 227))}
LEAST_SHARED = 99 * 1024
WITHOUT_GPU = (9, 0)  # what CPU tensors (interpreter, compilation) are taken to lie on


def is_small(device: torch.device) -> bool:
    """Whether a block has less shared memory than on an H100; such GPUs have no wgmma either."""
    capability = capability_of(device) if device.type == "cuda" else WITHOUT_GPU
    return shared_memory(capability) < SHARED[9, 0]


def shared_memory(capability: tuple[int, int]) -> int:
    return SHARED.get(capability, LEAST_SHARED)


@cache
def capability_of(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
