"""`attn_layer`: the attention of a block of timm, patched when it is built.

What timm is given is a class that makes modules of timm's own, with a site on each: all that is done with a patched
model (saving, comparing, patching again, unpatching) is done with a model built so.
"""

from __future__ import annotations

import copyreg
from typing import Any

from astroattn.attention import AstrocyteAttention
from astroattn.checks import check_grid
from astroattn.config import AstroConfig, Preset, as_config
from astroattn.imports import needs
from astroattn.patching.checking import make_core
from astroattn.patching.grid import PatchGrid
from astroattn.patching.sdpa import SdpaSite
from astroattn.patching.site import install
from astroattn.plan import Plan

NAME = "attn_layer"  # of the sites: where in a model a block is, is not known when its attention is built


def attn_layer(
    config: AstroConfig | Preset | None = None,
    *,
    grid: tuple[int, int] | None = None,
    prefix: int = 1,
) -> type:
    """The class to give timm as `attn_layer=`: attentions that are astrocytes from the start.

        timm.create_model("vit_tiny_patch16_224", attn_layer=astroattn.attn_layer(grid=(14, 14)))

    The model is what `patch(timm.create_model(...), config)` makes, with the same `state_dict` keys, so that timm's
    weights load; a learned hidden layer adds keys of its own. `patch`, `unpatch` and `save` take it as they take any
    patched model. Nothing is checked by a forward, as in `patch`, and the attention of one block cannot know what lies
    around it: the grid of patches is given here, or found by calling `patch(model, config)` on the whole model.

    A padding mask in a call (`attn_mask`) is honoured; a call with any other mask, or with `is_causal` where the config
    cannot serve it, is answered by softmax, with a warning the first time (`fallbacks` counts them).

    Args:
        config: what the astrocytes do, as in `patch`; a `Plan` is of a whole model, and is given to `patch`.
        grid: (rows, columns) of the patches, as the images of a model with patches of 16 and 224 pixels a side have
            (14, 14). None: the tokens are treated as a sequence. So they are, with a warning, where a sequence has
            other than prefix + rows * columns tokens.
        prefix: tokens before those of the patches: CLS and registers.

    Returns:
        A class whose arguments are those of `timm.layers.Attention`, and whose calls make one. timm takes it in
        `VisionTransformer` and in its blocks from version 1.0.23 on.

    Raises:
        TypeError, ValueError: an argument that is none; a config for causal attention only.
        ImportError: timm is not installed.
    """
    with needs("eval"):
        import timm  # noqa: F401
    if isinstance(config, Plan):
        raise TypeError("config: a plan is of a whole model; build it without attn_layer and patch(model, plan)")
    chosen = as_config(config)
    if (reason := AstrocyteAttention(1, 1, chosen).refusal(causal=False)) is not None:
        raise ValueError(f"config: {reason}")
    if type(prefix) is not int or prefix < 0:
        raise ValueError(f"prefix: {prefix!r}; must be an int of at least 0")
    if grid is not None:
        check_grid(grid)
        grid = (grid[0], grid[1])

    return AttnLayer(chosen, grid, prefix)


class AttnLayer(type):
    """A class whose calls make patched attentions of timm: timm wants one, to ask what it is a subclass of."""

    config: AstroConfig
    grid: tuple[int, int] | None
    prefix: int

    def __new__(cls, *settings: Any) -> AttnLayer:
        names = ("config", "grid", "prefix")
        return super().__new__(cls, "AstrocyteAttentionLayer", (), dict(zip(names, settings, strict=True)))

    def __init__(cls, *settings: Any) -> None:
        super().__init__(cls.__name__, (), {})

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        from timm.layers import Attention

        module = Attention(*args, **kwargs)
        grid = None if cls.grid is None else PatchGrid(cls.prefix, cls.grid)
        install(
            SdpaSite(NAME, Attention.__name__, grid),
            module,
            make_core(module, (module.num_heads, module.head_dim), cls.config),
        )
        return module


# A model of timm holds the arguments that it was made with.
copyreg.pickle(AttnLayer, lambda cls: (AttnLayer, (cls.config, cls.grid, cls.prefix)))
