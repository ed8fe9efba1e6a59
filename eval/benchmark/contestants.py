"""What the benchmark times, and the gate that each contestant passes before: it must compute what it claims to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from astroattn import AstroConfig, AstrocyteAttention
from astroattn.cost import budget_of
from astroattn.hidden import draw_orthogonal
from astroattn.ops.backends import choose_backend
from astroattn.ops.choosing import Choice
from astroattn.ops.near_far import attend
from eval.common import relative_error

CONFIGS = {
    # Random inputs ask for other numbers of exact keys than real ones, which take some 35 to 82 at 197 to 4,097 tokens.
    "default": AstroConfig(exact_keys=64),
    "near 64, m = 64": AstroConfig(tiles="position", tile=64, near=64, exact_keys=0, num_hidden=64),
    "random, m = 64": AstroConfig(hidden="random", num_hidden=64),
}
REFERENCE_LIMIT = {"cpu": 4096, "cuda": 16384}  # tokens up to which our plain PyTorch is timed, too
GATE_LENGTHS = (317, 2063)  # odd
# Most relative error where plain PyTorch in the same precision has less than half of it, and most error of what must
# come out exactly. Other people's attention may be as rough as it likes, within reason.
BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
PROPERTY_BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}
ROUGH = 0.1
WORSE_CHOICES = 1.1  # how much farther from softmax a kernel's choices may be than those of float64

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class GateError(Exception):
    """A contestant does not compute what it claims to."""


@dataclass(frozen=True)
class Problem:
    """What all contestants are given: random queries, keys and values [B, H, N, D]."""

    batch: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    seed: int

    def draw(self, tokens: int, sets: int = 1) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Sets of query, key and value; the same for the same seed and length."""
        generator = torch.Generator(self.device).manual_seed(self.seed + tokens)
        shape = (sets, 3, self.batch, self.heads, tokens, self.head_dim)
        drawn = torch.randn(shape, generator=generator, device=self.device).to(self.dtype)
        return [(query, key, value) for query, key, value in drawn]


@dataclass(frozen=True)
class Contestant:
    """One attention.

    Attributes:
        name, backend: who it is; the backend as in `AstroConfig`, or whose code it is.
        kernel: what computes it.
        attend: from query, key and value to the output.
        products: counted products of length D per query at a length, None where nobody counts them.
        plain: given inputs, the same attention in plain PyTorch of any precision; None where there is no other.
        limit: the longest sequence that it is timed on.
        has_backward: whether it has gradients. approximates: whether it stands for softmax without being it.
    """

    name: str
    backend: str
    kernel: str
    attend: Attention
    products: Callable[[int], float] | None = None
    plain: Callable[..., Attention] | None = None
    limit: int = 2**62
    has_backward: bool = True
    approximates: bool = False

    @property
    def label(self) -> str:
        """How tables and figures call it."""
        return f"{self.name}, plain" if self.backend == "torch" else self.name


def make_contestants(problem: Problem) -> list[Contestant]:
    """SDPA first, then ours, our plain PyTorch, and materialised features."""
    found = [
        Contestant("SDPA", "torch.nn", "sdpa", F.scaled_dot_product_attention, lambda n: 2 * n, lambda *_: softmax)
    ]
    for name, config in CONFIGS.items():
        ours, plain = (_module(problem, replace(config, backend=backend)) for backend in ("auto", "torch"))
        operation = "linear" if config.hidden == "random" else "near_far"
        row = torch.empty(1, 1, 1, problem.head_dim, dtype=problem.dtype, device=problem.device)
        kernel = choose_backend("auto", operation, row, row)
        chosen = partial(_given_choices, config, kernel)
        twin = chosen if operation == "near_far" and kernel != "torch" else partial(always, plain)
        products = partial(_products, plain)
        found.append(Contestant(name, "auto", kernel, ours, products, twin, approximates=True))
        if kernel != "torch":  # else they are the same
            limit = REFERENCE_LIMIT[problem.device.type]
            found.append(Contestant(name, "torch", "torch", plain, products, limit=limit, approximates=True))
    found.append(Contestant("phi in memory, m = 64", "torch.nn", "torch", _materialised, lambda n: 4 * 64))
    return found


def _module(problem: Problem, config: AstroConfig) -> AstrocyteAttention:
    return AstrocyteAttention(problem.heads, problem.head_dim, config).to(problem.device)


def _products(module: AstrocyteAttention, tokens: int) -> float:
    return module.cost(tokens, tokens).products


def always(attention: Attention, *_: Tensor) -> Attention:
    return attention


def _given_choices(config: AstroConfig, kernel: str, query: Tensor, key: Tensor, value: Tensor) -> Attention:
    """Plain near + far attention with the tiles, clusters and exact keys that a kernel chooses on these inputs.

    A kernel of low precision chooses otherwise where two keys are as good; that is no error, but moves the output.
    """
    choice = _choose(config, kernel, query, key, value)
    layout = budget_of(config, key.shape[2], None).at(key.shape[2], key.shape[3])

    def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        work = torch.promote_types(query.dtype, torch.float32)
        q, k, v = (x.to(work).flatten(0, 1) for x in (query, key, value))
        out, _ = attend(q * query.shape[-1] ** -0.5, k, v, layout, choice)
        return out.unflatten(0, query.shape[:2]).to(query.dtype)

    return plain


def _choose(config: AstroConfig, kernel: str, query: Tensor, key: Tensor, value: Tensor) -> Choice:
    budget = budget_of(config, key.shape[2], None)
    scale = query.shape[-1] ** -0.5
    _, _, *chosen = torch.ops.astroattn.near_far_attention(query, key, value, None, None, *budget, scale, kernel)
    return Choice(*(x.flatten(0, 1) for x in chosen))


def softmax(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1) @ value


def _materialised(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The paper's attention as one writes it down: phi(q) and phi(k) [B, H, N, m] lie in memory."""
    phi_query, phi_key = features(draw_weight(query), query, key)
    return phi_query @ (phi_key.mT @ value) / (phi_query @ phi_key.sum(-2)[..., None])


def draw_weight(query: Tensor) -> Tensor:
    """W [H, 64, D] of the static layer, for such queries."""
    return _weight(query.shape[1], query.shape[3], query.device, query.dtype)


@cache
def _weight(heads: int, dim: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return draw_orthogonal((heads, 64, dim), torch.Generator().manual_seed(0)).to(device, dtype)


def features(weight: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """The responses phi(q) and phi(k) of the static layer, each up to a factor that cancels."""
    gains = []
    for x in (query, key):
        x = x * x.shape[-1] ** -0.25
        gains.append(x @ weight.mT - x.square().sum(-1, keepdim=True) / 2)
    phi_query = (gains[0] - gains[0].amax(-1, keepdim=True)).exp()
    return phi_query, (gains[1] - gains[1].amax((-2, -1), keepdim=True)).exp()


def run_pass(attention: Attention, query: Tensor, key: Tensor, value: Tensor, d_out: Tensor | None) -> list[Tensor]:
    """The output, and with d_out the gradients of query, key and value."""
    if d_out is None:
        return [attention(query, key, value)]
    inputs = [x.detach().requires_grad_() for x in (query, key, value)]
    out = attention(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, d_out)]


def check_results(contestant: Contestant, problem: Problem, tokens: int, backward: bool) -> None:
    """Hold the results of a contestant at a small length to plain PyTorch in float64.

    The relative error may be twice that (gradients: three times) of plain PyTorch in the contestant's own precision,
    or `BOUNDS`. What a kernel chooses is taken as chosen, but must bring the output as near to softmax.

    Raises:
        GateError: it is not.
    """
    if contestant.plain is None:
        return
    (inputs,) = problem.draw(tokens)
    plain = contestant.plain(*inputs)
    d_out = draw_gradient(problem, tokens) if backward else None
    exact_inputs = [x.double() for x in inputs]
    ours = run_pass(contestant.attend, *inputs, d_out)
    same = run_pass(plain, *inputs, d_out)
    exact = run_pass(plain, *exact_inputs, None if d_out is None else d_out.double())
    bound = BOUNDS[problem.dtype] if contestant.backend == "auto" else ROUGH
    for number, (mine, theirs, right) in enumerate(zip(ours, same, exact, strict=True)):
        error, allowed = relative_error(mine, right), max(bound, (3 if number else 2) * relative_error(theirs, right))
        if not error <= allowed:  # NaN is not
            what = ("output", "query's gradient", "key's gradient", "value's gradient")[number]
            raise GateError(
                f"{contestant.label}, {problem.dtype}, {tokens} tokens: error of the {what} {error:.1e}, "
                f"allowed {allowed:.1e}"
            )
    config = CONFIGS.get(contestant.name)
    if config is None or config.hidden == "random":
        return
    target, reference = softmax(*exact_inputs), _module(problem, replace(config, backend="torch"))
    error = relative_error(exact[0], target)
    allowed = WORSE_CHOICES * relative_error(reference(*exact_inputs), target)
    if not error <= allowed:
        raise GateError(
            f"{contestant.label}, {problem.dtype}, {tokens} tokens: with its choices {error:.2f} from "
            f"softmax, allowed {allowed:.2f}"
        )


def check_properties(contestant: Contestant, problem: Problem, tokens: int, backward: bool) -> None:
    """At any length: the shares of a query sum to one, in the output and in the gradient of the values.

    Raises:
        GateError: a constant value does not come out as it went in, the values' gradients do not sum to those of the
            output, or a number is not finite.
    """
    (inputs,) = problem.draw(tokens)
    half = problem.head_dim // 2
    inputs[2][..., :half] = 1
    d_out = draw_gradient(problem, tokens) if backward else None
    with torch.inference_mode(not backward):
        results = run_pass(contestant.attend, *inputs, d_out)
    bound = PROPERTY_BOUNDS[problem.dtype] if contestant.name in CONFIGS else ROUGH
    errors = {"a constant value": float((results[0][..., :half].float() - 1).abs().max())}
    if d_out is not None:
        errors["the sum of the values' gradients"] = relative_error(
            results[3].sum(2, dtype=torch.float32), d_out.sum(2, dtype=torch.float32)
        )
    for what, error in errors.items():
        if not error <= bound:
            raise GateError(
                f"{contestant.label}, {problem.dtype}, {tokens} tokens: {what} comes out with an error of "
                f"{error:.1e}, allowed {bound:.1e}"
            )
    if not all(bool(x.isfinite().all()) for x in results):
        raise GateError(f"{contestant.label}, {problem.dtype}, {tokens} tokens: not finite")


def measure_error(contestant: Contestant, problem: Problem) -> float | None:
    """How far it is from softmax in float64, relative, at the longest length of the gate; None where it is no other."""
    if not contestant.approximates:
        return None
    (inputs,) = problem.draw(GATE_LENGTHS[-1])
    with torch.inference_mode():
        return relative_error(contestant.attend(*inputs), softmax(*(x.double() for x in inputs)))


def draw_gradient(problem: Problem, tokens: int) -> Tensor:
    """A gradient of the output, whose sum over the tokens is far from zero."""
    return problem.draw(tokens + 1)[0][0][:, :, 1:] + 1
