"""transformers: the streaming memories of a patched decoder, as layers of its cache.

Import this module only where transformers is installed. A patched module looks for its layer of the cache it is called
with, and puts a `StreamingLayer` in the place of an empty, growing one. Whatever else is in a cache (static, sliding,
quantised layers, one that has tokens already) stays, and the model's own attention answers.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, EncoderDecoderCache

from astroattn.attention import AstrocyteAttention
from astroattn.ops.causal import CausalState
from astroattn.ops.streaming import Memories, Memory, each_of, select_rows, together
from astroattn.patching.site import CORE, RECORD

NO_ROLL_BACK = (
    "a streaming memory cannot forget its latest tokens, which are merged with others; assisted decoding and whatever "
    "else takes tokens back needs the model's own attention (astroattn.unpatch)"
)
FORMAT = "astroattn streaming memory 2"
# `crop` of older transformers is told how many tokens to keep, that of newer ones how many to remove, less than 0.
KEEPS = "max_length" in inspect.signature(DynamicLayer.crop).parameters


class StreamingLayer(CacheLayerMixin):  # type: ignore[misc]
    """The memory of one attention module: `update` hands on the new tokens alone, which the astrocyte then writes.

    Attributes:
        memory: what the tokens so far have left behind, None before the first; a tuple of memories where the budgets of
            key heads differ. seen: tokens, padding included.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.memory: Memories | None = None
        self.seen = 0
        self.owner: str | None = None  # the module that is about to hand over its tokens

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """There is nothing to be made before the first tokens."""
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The new keys and values as they are: the memory needs the queries, too, and is written when it is read."""
        if self.owner is None:
            raise RuntimeError(
                "cache: it holds a streaming memory, which only the patched module that made it can read; start with a "
                "new cache after astroattn.unpatch"
            )
        self.is_initialized = True
        return key_states, value_states

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Length and offset of a mask over all tokens so far; transformers before 5.4 gives their positions."""
        return self.seen + (len(query_length) if isinstance(query_length, Tensor) else query_length), 0

    def get_seq_length(self) -> int:
        """Tokens seen, as positions go on from there."""
        return self.seen

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.20

    def reset(self) -> None:
        """Forget everything."""
        self.memory, self.seen, self.is_initialized = None, 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let these rows of the batch, in this order, be the batch."""
        self._replace(lambda memory: select_rows(memory, beam_idx))

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Let each row be `repeats` rows."""
        if self.memory is not None:
            self.reorder_cache(torch.arange(len(each_of(self.memory)[0].counts)).repeat_interleave(repeats))

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Raises RuntimeError, but where nothing is to be taken back."""
        count = next((value for value in (*args, *kwargs.values()) if isinstance(value, int)), None)
        keeps_all = count is not None and (count >= self.seen if KEEPS else count in (0, self.seen))
        if not keeps_all:
            raise RuntimeError(f"crop: {NO_ROLL_BACK}")

    def offload(self) -> None:
        """To the CPU."""
        self._move(torch.device("cpu"))

    def prefetch(self) -> None:
        """Back to where it is used, when it is used."""

    def _move(self, device: torch.device) -> None:
        if self.memory is not None and each_of(self.memory)[0].key.device != device:
            self._replace(lambda memory: Memory(*[*(x.to(device) for x in memory[:-1]), memory.counts]))

    def _replace(self, change: Callable[[Memory], Memory]) -> None:
        if self.memory is not None:
            self.memory = together([change(memory) for memory in each_of(self.memory)])

    def attend(self, core: AstrocyteAttention, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """Read and write the new tokens, as `AstrocyteAttention.decode`. If anything fails the memory is as it was.

        Raises:
            ValueError: a memory of another module or another batch.
        """
        self._move(key.device)
        try:
            answer, memory = core.decode(query, key, value, self.memory, **options)
        except ValueError as error:  # the call itself was found fit before
            raise ValueError(f"cache: it is not one of this model and this batch: {error}") from None
        assert not isinstance(memory, CausalState)
        self.memory = memory
        self.seen += key.shape[2]
        return answer


class _Running(threading.local):
    """By the id of its site, the layer that belongs to the call a module of this thread is in."""

    def __init__(self) -> None:
        self.layers: dict[int, StreamingLayer] = {}


_running = _Running()


def find_layer(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a module with a streaming memory: have a layer for it in the cache it is called with."""
    site, core = getattr(module, RECORD), getattr(module, CORE)
    caches = [each for each in (*args, *kwargs.values()) if isinstance(each, Cache)]
    cache = caches[0] if caches else None
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    index = getattr(module, "layer_idx", None)
    if cache is None or index is None or site.seen is not None:
        return
    if (fresh := cache.layer_class_to_replicate) is not None:
        while len(cache.layers) <= index:
            cache.layers.append(fresh())
    layer: Any = cache.layers[index] if index < len(cache.layers) else None
    if type(layer) is DynamicLayer and layer.get_seq_length() == 0 and not core.exact:
        layer = cache.layers[index] = StreamingLayer()
    if isinstance(layer, StreamingLayer):
        if core.exact:
            raise RuntimeError(f"{site.name}: its cache holds a streaming memory, which an exact module cannot read")
        layer.owner = site.name
        _running.layers[id(site)] = layer


def release_layer(module: nn.Module, args: Any, output: Any) -> None:
    """Forward hook: the other half of `find_layer`, also where the forward fails."""
    if (layer := _running.layers.pop(id(getattr(module, RECORD)), None)) is not None:
        layer.owner = None


def layer_of(module: nn.Module) -> StreamingLayer | None:
    """The layer that belongs to the call the module is in, if there is one."""
    return _running.layers.get(id(getattr(module, RECORD)))


def save_memory(cache: Cache, path: str | Path) -> None:
    """Write the streaming memories of a cache to a file, from which another process can go on.

    Args:
        cache: what a patched model was called with, or has returned (`past_key_values`). path: a .safetensors file.

    Raises:
        TypeError: no cache. ValueError: a layer that is no streaming memory, or has seen no token.
    """
    if not isinstance(cache, Cache):
        raise TypeError(f"cache: {type(cache).__name__}; expected a transformers Cache")
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, StreamingLayer) or layer.memory is None:
            raise ValueError(f"cache: layer {index} is a {type(layer).__name__}; only streaming memories can be saved")
        for number, memory in enumerate(each_of(layer.memory)):
            tensors |= {f"{index}.{number}.{name}": x.contiguous() for name, x in memory._asdict().items()}
        seen.add(layer.seen)
    if len(seen) != 1:
        raise ValueError(f"cache: its layers have seen {sorted(seen)} tokens; expected one number, of one or more")
    save_file(tensors, path, metadata={"format": FORMAT, "seen": str(seen.pop()), "layers": str(len(cache.layers))})


def load_memory(path: str | Path) -> Cache:
    """The cache that `save_memory` has written, for the same patched model.

    Raises:
        FileNotFoundError: no such file. ValueError: a file that `save_memory` has not written.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"path: {path} is no file")
    with safe_open(path, framework="pt") as file:
        about = file.metadata() or {}
        if about.get("format") != FORMAT:
            raise ValueError(f"path: {path} was not written by save_memory")
        layers, names = [], file.keys()
        for index in range(int(about["layers"])):
            layer = StreamingLayer()
            count = len({name.split(".")[1] for name in names if name.startswith(f"{index}.")})
            parts = [Memory(*(file.get_tensor(f"{index}.{n}.{name}") for name in Memory._fields)) for n in range(count)]
            layer.memory = together(parts)
            layer.seen, layer.is_initialized = int(about["seen"]), True
            layers.append(layer)
    return Cache(layers=layers)
