"""The grid of patches behind the tokens of a vision transformer, as the patch embedding laid it out."""

from __future__ import annotations

import threading
from typing import Any, cast

from torch import Tensor, nn

PREFIX_TOKENS = ("cls_token", "class_embedding", "distillation_token", "dist_token", "register_tokens", "reg_token")


class PatchGrid:
    """Remembers the (rows, columns) that the convolution of a patch embedding last put out.

    Images may change size from call to call and thread to thread, so the size is kept per thread. A thread that has
    seen no image (checkpointed layers are run again by the thread of the backward pass) takes the latest size of all.
    """

    def __init__(self, conv: nn.Conv2d, prefix: int) -> None:
        self.conv = conv
        self.prefix = prefix  # tokens before those of the patches: CLS, registers
        self.latest: tuple[int, int] | None = None
        self._thread = threading.local()
        self._sites = 0
        self._handle: Any = None

    def watch(self) -> None:
        """Look at the convolution on behalf of one more site."""
        if self._sites == 0:
            self._handle = self.conv.register_forward_hook(self)
        self._sites += 1

    def unwatch(self) -> None:
        """Undo one `watch`."""
        self._sites -= 1
        if self._sites == 0:
            self._handle.remove()
            self._handle = None

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.latest = self._thread.size = (output.shape[-2], output.shape[-1])

    def of(self, tokens: int) -> tuple[int, int] | None:
        """The grid of a sequence of that many tokens, None if they are not prefix and patches."""
        for size in (getattr(self._thread, "size", None), self.latest):
            if size is not None and size[0] * size[1] + self.prefix == tokens:
                return size
        return None

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_thread", "latest")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, latest=None, _thread=threading.local())


def find_grid(modules: dict[str, nn.Module], name: str) -> tuple[nn.Conv2d, int] | None:
    """The convolution of the patch embedding that feeds the module of that name, and the number of prefix tokens.

    In timm both are attributes of the model. In transformers it is the only strided convolution below the module's
    nearest ancestor that has any, and the prefix tokens are counted from the parameters beside it.
    """
    while name:
        name = name.rpartition(".")[0]
        tower = modules[name]
        proj = getattr(getattr(tower, "patch_embed", None), "proj", None)
        if isinstance(proj, nn.Conv2d) and hasattr(tower, "num_prefix_tokens"):
            return proj, cast(int, tower.num_prefix_tokens)
        convs = [path for path, conv in tower.named_modules() if isinstance(conv, nn.Conv2d) and max(conv.stride) > 1]
        if len(convs) > 1:
            return None
        if convs:
            embeddings = tower.get_submodule(convs[0].partition(".")[0])
            prefix = sum(_tokens(key, value) for key, value in embeddings.named_parameters())
            return cast(nn.Conv2d, tower.get_submodule(convs[0])), prefix
    return None


def _tokens(name: str, parameter: Tensor) -> int:
    if name.rpartition(".")[2] not in PREFIX_TOKENS:
        return 0
    return parameter.shape[-2] if parameter.dim() > 1 else 1
