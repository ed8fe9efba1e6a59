"""The grid of patches behind the tokens of a vision transformer, as the patch embedding laid it out.

Images change size from call to call, and layers under gradient checkpointing run again in the backward pass, after
other images. So a size belongs to the pass it was seen in, and what a layer was given is remembered with its size:
that is what checkpointing gives it again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from astroattn.ops.layout import plain
from astroattn.patching.site import Site, site_of

Size = tuple[int, int]  # rows, columns

PREFIX_TOKENS = ("cls_token", "class_embedding", "distillation_token", "dist_token", "register_tokens", "reg_token")
HANDLES = "astroattn_grid"  # the attribute of a module that holds the handles of the hooks below, by name
WRAPPED = "base_layer"  # what PEFT calls the layer that it adds to
FORWARD = -1  # the number of the backward pass while there is none

AMBIGUOUS = (
    "astroattn: a layer runs again in the backward pass, and images of {} patches have given as many tokens: which of "
    "them these are cannot be told where the tensors saved for it were copied; do not copy them (save_on_cpu), or do "
    "not checkpoint these layers"
)


class PatchGrid:
    """The (rows, columns) that the projection of a patch embedding puts out; copies of a model share it.

    `size` is known from the start, for a module that is built before there is an embedding to look at.
    """

    def __init__(self, prefix: int, size: Size | None = None) -> None:
        self.prefix = prefix  # tokens before those of the patches: CLS, registers
        self._thread = threading.local()  # image, layer: the size last seen, and in which pass
        self._given = size
        self._known: set[Size] = set() if size is None else {size}
        self._inputs: dict[StorageWeakRef, Size] = {}  # of layers, while they live

    def look(self, tower: nn.Module, args: Any) -> None:
        """Forward pre-hook of the tower: a new image; modules may have been replaced since the last."""
        if torch.compiler.is_compiling():
            return
        self._thread.image = None
        found = _embeddings(tower)
        hung = found is not None and HANDLES in vars(found[0])
        if not hung or any(site.grid is not self for _, site in _sites(tower)):
            place_grids(tower)

    def watch(self, embeddings: nn.Module, args: Any) -> None:
        """Forward pre-hook of the patch embedding: a new image, through whatever projects it now."""
        if torch.compiler.is_compiling():
            return
        self._thread.image = None
        if (projection := _projection(embeddings)) is not None:
            _hang(projection, "forward_hook", self.note)

    def note(self, projection: nn.Module, args: Any, output: Tensor) -> None:
        """Forward hook of the projection: this is the size."""
        size = (plain(output.shape[-2]), plain(output.shape[-1]))
        self._thread.image = size, _pass()
        if not torch.compiler.is_compiling():
            self._known.add(size)
            for each in [each for each in list(self._inputs) if each.expired()]:
                self._inputs.pop(each, None)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the modules on the way to an attention: what one is given belongs to that size."""
        if torch.compiler.is_compiling():
            return
        given = next((each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)), None)
        if given is None or given.dim() != 3 or (key := _storage(given)) is None:
            return
        now, tokens = _pass(), plain(given.shape[1])
        size = None if now == FORWARD else self._inputs.get(key)
        if size is not None and self._fits(size, tokens):
            self._thread.layer = size, now
        elif (size := self._current(now, tokens)) is not None:
            self._inputs[key] = size

    def of(self, tokens: int) -> Size | None:
        """The grid of a sequence of that many tokens, None if they are not prefix and patches.

        Raises:
            RuntimeError: a layer that runs again may have had images of several sizes.
        """
        tokens, now = plain(tokens), _pass()
        current = self._current(now, tokens)
        if current is not None or (now == FORWARD and hasattr(self._thread, "image")):
            return current
        fitting = sorted(size for size in self._known if self._fits(size, tokens))
        if len(fitting) > 1:
            raise RuntimeError(AMBIGUOUS.format(" and ".join(f"{rows} x {columns}" for rows, columns in fitting)))
        return fitting[0] if fitting else None

    def _current(self, now: int, tokens: int) -> Size | None:
        for seen in (getattr(self._thread, "layer", None), getattr(self._thread, "image", None)):
            if seen is not None and seen[1] == now and self._fits(seen[0], tokens):
                size: Size = seen[0]
                return size
        return None

    def _fits(self, size: Size, tokens: int) -> bool:
        return size[0] * size[1] + self.prefix == tokens

    def __deepcopy__(self, memo: Any) -> PatchGrid:
        return self  # so that a block copied within its model still has the grid

    def __reduce__(self) -> tuple[Callable[..., PatchGrid], tuple[int, Size | None]]:
        return PatchGrid, (self.prefix, self._given)


def place_grids(model: nn.Module) -> None:
    """Give every site that may see patches the grid of its tower, and hang the hooks of the grids; take away others."""
    modules = dict(model.named_modules())
    for module in modules.values():
        for handle in vars(module).get(HANDLES, {}).values():
            handle.remove()
        module.__dict__.pop(HANDLES, None)  # not before, as this may be broken off
    grids: dict[int, PatchGrid] = {}
    for name, site in _sites(model):
        above, found = name, None
        while above and found is None:
            above = above.rpartition(".")[0]
            found = _embeddings(modules[above])
        if found is None or (projection := _projection(found[0])) is None:
            continue  # it keeps the grid it has: its tower may be around the model
        tower, (embeddings, prefix) = modules[above], found
        grid = grids.setdefault(id(tower), site.grid or PatchGrid(prefix))
        grid.prefix, site.grid = prefix, grid
        _hang(tower, "forward_pre_hook", grid.look)
        _hang(embeddings, "forward_pre_hook", grid.watch)
        _hang(projection, "forward_hook", grid.note)
        way = [modules[name]]
        while (name := name.rpartition(".")[0]) != above:
            # what runs again may be a module's forward without its hooks, as in transformers: then a child comes first
            way += [modules[name], *modules[name].children()]
        for module in way:
            _hang(module, "forward_pre_hook", grid.enter, with_kwargs=True)


def _sites(model: nn.Module) -> Iterator[tuple[str, Site]]:
    """The sites that may see patches, each with the name of its module."""
    for name, module in model.named_modules():
        if (site := site_of(module)) is not None and site.sees_patches(module):
            yield name, site


def _hang(module: nn.Module, kind: str, hook: Callable[..., Any], **options: Any) -> None:
    handles = vars(module).setdefault(HANDLES, {})
    if hook.__name__ not in handles:
        handles[hook.__name__] = getattr(module, f"register_{kind}")(hook, **options)


def _embeddings(tower: nn.Module) -> tuple[nn.Module, int] | None:
    """The module that makes tokens of an image for what lies beside it, and the number of prefix tokens.

    In timm both are attributes of the model. In transformers it holds the only strided convolution below the tower,
    and the prefix tokens are counted from its parameters.
    """
    embed, prefix = getattr(tower, "patch_embed", None), getattr(tower, "num_prefix_tokens", None)
    if isinstance(embed, nn.Module) and isinstance(prefix, int) and hasattr(embed, "proj"):
        return embed, prefix
    convs = _strided(tower)
    if len(convs) != 1:
        return None
    embeddings = tower.get_submodule(convs[0].partition(".")[0])
    return embeddings, sum(_tokens(key, value) for key, value in embeddings.named_parameters())


def _projection(embeddings: nn.Module) -> nn.Module | None:
    """What puts out the grid of patches, [B, C, rows, columns]."""
    proj = getattr(embeddings, "proj", None)
    if isinstance(proj, nn.Module) and any(isinstance(each, nn.Conv2d) for each in proj.modules()):
        return proj
    convs = _strided(embeddings)
    return embeddings.get_submodule(convs[0]) if len(convs) == 1 else None


def _strided(module: nn.Module) -> list[str]:
    """The names of the strided convolutions; one that PEFT adds to counts once."""
    convs = [name for name, conv in module.named_modules() if isinstance(conv, nn.Conv2d) and max(conv.stride) > 1]
    wrapped = [name.removesuffix(WRAPPED) for name in convs if name.endswith(WRAPPED)]
    return [name for name in convs if name.endswith(WRAPPED) or not any(name.startswith(each) for each in wrapped)]


def _tokens(name: str, parameter: Tensor) -> int:
    if name.rpartition(".")[2] not in PREFIX_TOKENS:
        return 0
    return parameter.shape[-2] if parameter.dim() > 1 else 1


def _pass() -> int:
    """The number of the backward pass that runs this, FORWARD if none does."""
    return FORWARD if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


def _storage(tensor: Tensor | None) -> StorageWeakRef | None:
    """What a detached or saved tensor has in common with the original, None where there is no such thing."""
    try:
        return None if tensor is None else StorageWeakRef(tensor.untyped_storage())
    except (NotImplementedError, RuntimeError):  # inside torch.func
        return None
