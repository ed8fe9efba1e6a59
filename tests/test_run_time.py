"""Who answers a call: whatever an astrocyte may not is the model's own attention's, counted, with one warning."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from patching_models import ALL, TIMM_VIT, build, image
from timm.layers import Attention
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertSelfAttention

from astroattn import AstroConfig, AstrocyteAttention, fallbacks, patch
from astroattn.patching import probe

SHORT = AstroConfig(near=2, exact_keys=0, tile=2, num_hidden=4)
CAUSAL_REASON = "causal attention needs a streaming memory or a static layer"
TOKENS = 60  # beyond what the near field of any config here covers
SQUARE = nn.Transformer.generate_square_subsequent_mask(TOKENS)


def encoder(layers: int = 2) -> nn.TransformerEncoder:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True), layers).eval()


def tokens() -> Tensor:
    return torch.randn(2, TOKENS, 32, generator=torch.Generator().manual_seed(1))


def ids() -> Tensor:
    return torch.randint(5, 90, (2, TOKENS), generator=torch.Generator().manual_seed(1))


PADDED = torch.arange(TOKENS) < torch.tensor([TOKENS, 41])[:, None]

# A model whose causality is not known before it runs, and how it runs.
CAUSAL_CALLS: dict[
    str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor], Callable[[nn.Module], Tensor]]
] = {
    "TransformerEncoder": (encoder, lambda m: m(tokens(), mask=SQUARE), lambda m: m(tokens())),
    "TransformerEncoder, padded": (
        encoder,
        lambda m: m(
            tokens(), mask=SQUARE, src_key_padding_mask=torch.zeros(2, TOKENS).masked_fill(~PADDED, -torch.inf)
        ),
        lambda m: m(tokens()),
    ),
    "TransformerEncoderLayer": (
        lambda: encoder(1).layers[0],
        lambda m: m(tokens(), src_mask=SQUARE, is_causal=True),
        lambda m: m(tokens()),
    ),
    "timm Attention": (
        lambda: Attention(32, num_heads=4).eval(),
        lambda m: m(tokens(), is_causal=True),
        lambda m: m(tokens()),
    ),
    "timm Attention, a causal mask": (
        lambda: Attention(32, num_heads=4).eval(),
        lambda m: m(tokens(), attn_mask=SQUARE),
        lambda m: m(tokens()),
    ),
    "wrapped CLIP": (
        lambda: nn.ModuleDict({"clip": build(ALL["clip"]).text_model}),
        lambda m: m["clip"](ids(), attention_mask=PADDED.long())[0],
        None,
    ),
    "wrapped GPT-2": (
        lambda: nn.ModuleDict({"gpt": build(ALL["gpt2"]).transformer}),
        lambda m: m["gpt"](ids(), use_cache=False)[0],
        None,
    ),
}


def needs_is_causal(case: str) -> None:
    """Skip the test where the attention of timm takes no `is_causal`."""
    if case == "timm Attention" and "is_causal" not in inspect.signature(Attention.forward).parameters:
        pytest.skip("this timm has no is_causal")


@pytest.mark.parametrize("config", [AstroConfig(near=2, exact_keys=8, tile=4), SHORT], ids=["keys", "short"])
@pytest.mark.parametrize("case", [name for name, (_, _, plain) in CAUSAL_CALLS.items() if plain])
def test_causality_seen_at_run_time_is_the_hosts(case: str, config: AstroConfig) -> None:
    needs_is_causal(case)
    make, causal, plain = CAUSAL_CALLS[case]
    model = make()
    with torch.no_grad():
        before = causal(model)
        report = patch(model, config)
        with pytest.warns(UserWarning, match="left to the model's own attention") as caught:
            torch.testing.assert_close(causal(model), before, rtol=1e-5, atol=1e-6)
        assert len(caught) == len(report.patched)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            causal(model)
        counts = fallbacks(model)
        assert [list(reasons.values()) for reasons in counts.values()] == [[2]] * len(report.patched)
        assert all(CAUSAL_REASON in each for reasons in counts.values() for each in reasons)
        plain(model)
        assert fallbacks(model) == counts  # calls that are not causal are the astrocyte's


@pytest.mark.parametrize("host", ["sdpa", "eager"])
@pytest.mark.parametrize("case", [name for name in CAUSAL_CALLS if "wrapped" in name])
def test_causality_that_is_only_said_by_the_mask(case: str, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module says nothing of it, or something else, as the attribute is a model's own affair; no probe sees it."""

    def no_input(model: nn.Module) -> None:
        raise probe.NoProbe("none")

    monkeypatch.setattr(probe, "make_inputs", no_input)
    make, causal, _ = CAUSAL_CALLS[case]
    model = make()
    for each in model.children():
        if not hasattr(each, "set_attn_implementation"):
            pytest.skip("in this transformers the text model is a part without an implementation of its own")
        each.set_attn_implementation(host)
    with torch.no_grad():
        before = causal(model)
        for module in model.modules():
            if hasattr(module, "is_causal"):
                module.is_causal = False
        report = patch(model, SHORT)
        for module in model.modules():
            if hasattr(module, "is_causal"):
                module.is_causal = True
        with pytest.warns(UserWarning, match=CAUSAL_REASON):
            torch.testing.assert_close(causal(model), before, rtol=1e-5, atol=1e-5)
    assert len(fallbacks(model)) == len(report.patched) == 2


@pytest.mark.parametrize("config", [AstroConfig(near=TOKENS), AstroConfig(hidden="exact")], ids=["near", "exact"])
@pytest.mark.parametrize("case", [name for name, (_, _, plain) in CAUSAL_CALLS.items() if plain and "mask" not in name])
def test_a_near_field_that_covers_the_sequence_is_causal(case: str, config: AstroConfig) -> None:
    needs_is_causal(case)
    make, causal, _ = CAUSAL_CALLS[case]
    model = make()
    with torch.no_grad():
        before = causal(model)
        patch(model, config)
        torch.testing.assert_close(causal(model), before, rtol=1e-5, atol=1e-6)
    assert fallbacks(model) == {}


def test_torchs_own_attention_drops_out_in_training() -> None:
    model, x = encoder().train(), tokens()
    patch(model, SHORT)
    call = {"need_weights": False, "attn_mask": SQUARE, "is_causal": True}
    with pytest.warns(UserWarning, match=CAUSAL_REASON):
        one = model.layers[0].self_attn(x, x, x, **call)[0]
    other = model.layers[0].self_attn(x, x, x, **call)[0]
    assert not torch.equal(one, other)


def test_pruned_heads_are_the_hosts() -> None:
    module, x = Attention(32, num_heads=4).eval(), tokens()
    patch(module, SHORT)
    module.num_heads, module.head_dim, module.scale = 8, 4, 4**-0.5  # another model made of it
    expected = Attention.forward.__get__(module)
    with pytest.warns(UserWarning, match="another number of heads"):
        found = module(x)
    assert torch.equal(found, expected(x))


def test_integer_masks_are_the_hosts() -> None:
    model = build(ALL["bert"])
    model.set_attn_implementation("eager")
    mask = torch.full((2, 1, 1, TOKENS), 3)
    positions = {"position_ids": torch.arange(TOKENS)[None]}
    with torch.no_grad():
        before = model(ids(), attention_mask=mask, **positions)[0]
        patch(model, SHORT)
        with pytest.warns(UserWarning, match="a mask of integers"):
            torch.testing.assert_close(model(ids(), attention_mask=mask, **positions)[0], before)


def test_calls_are_counted_when_a_graph_is_made() -> None:
    """A graph can neither count nor warn when it runs; who answers is decided when it is made."""
    model = encoder()
    patch(model, SHORT)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad(), pytest.warns(UserWarning, match=CAUSAL_REASON):
        compiled(tokens(), mask=SQUARE, is_causal=True)
    assert sorted(fallbacks(model)) == ["layers.0.self_attn", "layers.1.self_attn"]


# classes that compute attention by themselves


def by_hand(self: nn.Module, x: Tensor, *_: object, **__: object) -> tuple[Tensor, None]:
    query, key, value = (layer(x).unflatten(-1, (4, 8)).transpose(1, 2) for layer in (self.query, self.key, self.value))
    return ((2 * query @ key.mT).softmax(-1) @ value).transpose(1, 2).flatten(2), None


class Own(BertSelfAttention):
    forward = by_hand


class Sometimes(BertSelfAttention):
    by_itself = False

    def forward(self, *args: object, **kwargs: object) -> tuple[Tensor, None]:
        return by_hand(self, *args, **kwargs) if self.by_itself else super().forward(*args, **kwargs)


def wrapped_bert(cls: type[nn.Module]) -> nn.ModuleDict:
    """A model that no input can be made up for, with another class in its first layer."""
    model = build(ALL["bert"])
    model.encoder.layer[0].attention.self.__class__ = cls
    return nn.ModuleDict({"model": model})


def test_a_subclass_with_its_own_softmax_is_exact_in_the_report() -> None:
    model = wrapped_bert(Own)
    report = patch(model, SHORT)
    rows = [(row.class_name, row.status, row.reason) for row in report.rows]
    assert rows == [
        ("Own", "exact", "a subclass that computes attention by itself"),
        ("BertSelfAttention", "astrocyte", "checked in model alone"),
    ]


def test_a_forward_that_turns_out_to_compute_by_itself_is_counted() -> None:
    model = wrapped_bert(Sometimes)
    first = model["model"].encoder.layer[0].attention.self
    report = patch(model, SHORT)
    assert len(report.patched) == 2
    with torch.no_grad():
        model["model"](ids())
        assert fallbacks(model) == {}
        first.by_itself = True
        with pytest.warns(UserWarning, match="without an attention call that could be handed over") as caught:
            model["model"](ids())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model["model"](ids())
    assert len(caught) == 1
    assert [list(reasons.values()) for reasons in fallbacks(model).values()] == [[2]]


def test_a_forward_put_on_an_instance_is_counted() -> None:
    model = build(ALL["bert"])
    patch(model, SHORT)
    first = model.encoder.layer[0].attention.self
    first.forward = by_hand.__get__(first)
    with pytest.warns(UserWarning, match="without an attention call"):
        model(ids())
    assert list(fallbacks(model)) == ["encoder.layer.0.attention.self"]


class Mixer(Attention):
    """Named like nothing of attention, with a forward of its own that calls SDPA."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class Renamed(Attention):
    """Nothing of its own but the name."""


class Written(Attention):
    """Softmax written out."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        return self.proj(((query @ key.mT * self.scale).softmax(-1) @ value).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("cls", [Mixer, Renamed, Written])
def test_subclasses_of_timm_are_found_by_what_they_call(cls: type[nn.Module], wrapped: bool) -> None:
    vit = timm.create_model("vit_tiny_patch16_224", **TIMM_VIT).eval()
    vit.blocks[0].attn.__class__ = cls
    model = nn.Sequential(vit) if wrapped else vit
    with torch.no_grad():
        before = model(image())
        report = patch(model, AstroConfig(near=1000))
        row = report.rows[0]
        found = ["exact", "astrocyte"][cls is not Written]
        assert (row.class_name, row.status) == (cls.__name__, found)
        assert ("written out by hand" in row.reason) == (cls is Written)
        calls: list[int] = []
        for each in model.modules():
            if isinstance(each, AstrocyteAttention):
                each.register_forward_hook(lambda *_: calls.append(1))
        torch.testing.assert_close(model(image()), before, rtol=1e-4, atol=1e-5)
        assert len(calls) == len(report.patched) == (1 if cls is Written else 2)
    assert fallbacks(model) == {}
