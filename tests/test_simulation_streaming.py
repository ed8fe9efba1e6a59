"""The streaming memory in the words of the network, neuron by neuron, is the fast one."""

from __future__ import annotations

import pytest
import torch

from astroattn import AstroConfig, AstrocyteAttention
from astroattn.simulation import StreamingNetwork


@pytest.mark.parametrize(("entries", "dim"), [(32, 6), (32, 5), (64, 4)])
def test_the_network_that_joins_neurons_is_the_streaming_memory(entries: int, dim: int) -> None:
    generator = torch.Generator().manual_seed(entries + dim)
    query, key, value = (torch.randn(110, d, generator=generator, dtype=torch.float64) for d in (dim, dim, 3))
    config = AstroConfig(hidden="streaming", entries=entries)
    network = StreamingNetwork(config)
    last, calcium = network.stream(2 * query, key, value)
    core = AstrocyteAttention(1, dim, config)
    out, log_p = core.with_normaliser(2 * query[None, None], key[None, None], value[None, None], causal=True)
    torch.testing.assert_close(last, out[0, 0])
    torch.testing.assert_close(calcium.log(), log_p[0, 0])
    assert entries - 8 <= len(network.neurons) <= entries
    _, memory = core.decode(2 * query[None, None], key[None, None], value[None, None])
    weights = torch.stack([neuron.w for neuron in network.neurons])
    torch.testing.assert_close(weights, memory.key[0, 0])
    torch.testing.assert_close(torch.stack([n.g for n in network.neurons]).log(), memory.log_weight[0, 0, :, 0])


def test_another_hidden_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="hidden='random'; expected 'streaming'"):
        StreamingNetwork(AstroConfig(hidden="random"))
