"""torch.nn: MultiheadAttention, TransformerEncoderLayer and TransformerEncoder, whose fast paths must not bypass."""

from __future__ import annotations

import copy
import io
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from astroattn import AstroConfig, AstrocyteAttention
from astroattn.patching import fallbacks, patch, unpatch
from astroattn.patching.site import CROSS_IN_ORDER

EXACT = AstroConfig(near=100_000)
SHORT = AstroConfig(near=2, exact_keys=0, tile=2, num_hidden=4)
STATIC = AstroConfig(hidden="random", near=2, exact_keys=0, tile=2, num_hidden=4)

LAYER = {"d_model": 16, "nhead": 4, "dim_feedforward": 32, "dropout": 0.0}


def pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def layer(**settings: object) -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(**LAYER | {"batch_first": True} | settings).eval()


def encoder(**settings: object) -> nn.TransformerEncoder:
    model = nn.TransformerEncoder(layer(**settings), 2).eval()
    for index, parameter in enumerate(model.parameters()):  # its layers start as copies
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
    return model


def tokens(batch_first: bool = True) -> Tensor:
    x = torch.randn(3, 11, 16, generator=torch.Generator().manual_seed(1))
    return x if batch_first else x.transpose(0, 1)


PADDING = torch.arange(11) >= torch.tensor([11, 8, 5])[:, None]  # True for padding, rows left aligned
FLOAT_PADDING = torch.zeros(3, 11).masked_fill(PADDING, float("-inf"))
CAUSAL = nn.Transformer.generate_square_subsequent_mask(11)

CASES = {
    "layer": (layer, {}),
    "layer, norm first": (lambda: layer(norm_first=True), {}),
    "layer, sequence first": (lambda: layer(batch_first=False), {}),
    "layer, no bias": (lambda: layer(bias=False), {}),
    "layer, padded": (layer, {"src_key_padding_mask": PADDING}),
    "layer, causal": (layer, {"src_mask": CAUSAL, "is_causal": True}),
    "encoder": (encoder, {}),
    "encoder, padded": (encoder, {"src_key_padding_mask": PADDING}),
    "encoder, sequence first, padded": (lambda: encoder(batch_first=False), {"src_key_padding_mask": PADDING}),
    "encoder, causal and padded": (encoder, {"mask": CAUSAL, "src_key_padding_mask": FLOAT_PADDING}),
}


def real(case: str, output: Tensor) -> Tensor:
    """The rows of real tokens: the fast paths put zeros in those of padding."""
    if "padded" not in case:
        return output
    output = output.transpose(0, 1) if "sequence first" in case else output
    return output[~PADDING]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("grad", [torch.no_grad, nullcontext])
def test_no_fast_path_bypasses(case: str, grad: object) -> None:
    make, inputs = CASES[case]
    model = make()
    x = tokens("sequence first" not in case)
    with grad():
        before = model(x, **inputs)
        report = patch(model, EXACT if "causal" not in case else AstroConfig(hidden="random", near=100_000))
        assert report.probe.startswith("every"), report.probe
        calls: list[int] = []
        for module in model.modules():
            if isinstance(module, AstrocyteAttention):
                module.register_forward_hook(lambda *args: calls.append(1))
        after = model(x, **inputs)
        assert len(calls) == len(report.patched) == (2 if "encoder" in case else 1)
        torch.testing.assert_close(real(case, after), real(case, before), rtol=1e-4, atol=1e-5)
        patch(model, STATIC)
        assert not torch.allclose(real(case, model(x, **inputs)), real(case, before), atol=1e-4)
        assert fallbacks(model) == {}
        unpatch(model)
        assert torch.equal(model(x, **inputs), before)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("heads", [1, 4])
def test_multihead_attention(batch_first: bool, heads: int) -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(16, heads, batch_first=batch_first).eval()
    x = tokens(batch_first)
    for padding in (None, PADDING):
        with torch.no_grad():
            before = model(x, x, x, key_padding_mask=padding, need_weights=False)[0]
            patch(model, EXACT)
            torch.testing.assert_close(model(x, x, x, key_padding_mask=padding, need_weights=False)[0], before)
            patch(model, SHORT)
            assert not torch.allclose(model(x, x, x, key_padding_mask=padding, need_weights=False)[0], before)
            unpatch(model)
            assert torch.equal(model(x, x, x, key_padding_mask=padding, need_weights=False)[0], before)


def test_values_may_be_others_than_keys() -> None:
    torch.manual_seed(0)
    model, x = nn.MultiheadAttention(16, 4, batch_first=True).eval(), tokens()
    before = model(x, x, x + 1, need_weights=False)[0]
    patch(model, EXACT)
    torch.testing.assert_close(model(x, x, x + 1, need_weights=False)[0], before)
    assert fallbacks(model) == {}


@pytest.mark.parametrize(
    "masks",
    [
        {"attn_mask": torch.randn(11, 11)},
        {"attn_mask": torch.randn(12, 11, 11)},
        {"attn_mask": torch.randn(12, 11, 11), "key_padding_mask": PADDING},
        {"attn_mask": torch.zeros(11, 11, requires_grad=True)},
        {"key_padding_mask": torch.randn(3, 11)},
    ],
    ids=["pairs", "heads", "heads and padding", "learned", "keys"],
)
def test_numbers_that_are_added_to_the_scores_are_a_bias(masks: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    model, x = nn.MultiheadAttention(16, 4, batch_first=True).eval(), tokens()
    real = ~masks.get("key_padding_mask", torch.zeros(3, 11)).bool() | ("attn_mask" not in masks)
    before = model(x, x, x, need_weights=False, **masks)[0]
    for config in (EXACT, AstroConfig(hidden="random", near=4)):  # which has none: torch answers
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            patch(model, config)
            after = model(x, x, x, need_weights=False, **masks)[0]
        torch.testing.assert_close(after[real], before[real])
        assert bool(fallbacks(model)) == (config is not EXACT)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (lambda x: ((x, x + 1, x + 1), {"need_weights": False}), "cross attention"),
        (lambda x: ((x, x, x), {}), "need_weights=True"),
        (lambda x: ((x, x, x), {"need_weights": False, "attn_mask": torch.rand(11, 11) > 0.8}), "a dense mask"),
        (lambda x: ((x[0],) * 3, {"need_weights": False}), "without a batch"),
    ],
)
def test_calls_it_cannot_represent_are_torchs(arguments: object, reason: str) -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    args, kwargs = arguments(tokens())
    before = model(*args, **kwargs)
    patch(model, SHORT)
    with pytest.warns(UserWarning, match=reason):
        after = model(*args, **kwargs)
    torch.testing.assert_close(after[0], before[0])
    assert (after[1] is None) == (before[1] is None)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"add_bias_kv": True}, "extra key and value"),
        ({"add_zero_attn": True}, "extra zero key"),
        ({"kdim": 8}, "other widths"),
    ],
)
def test_settings_it_cannot_represent_stay_exact(settings: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        patch(nn.MultiheadAttention(16, 4, **settings))


def test_a_decoder_keeps_its_cross_attention() -> None:
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(**LAYER, batch_first=True), 2).eval()
    report = patch(model, STATIC)
    assert [row.name for row in report.patched] == ["layers.0.self_attn", "layers.1.self_attn"]
    assert {row.reason for row in report.exact} == {CROSS_IN_ORDER}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_copies(duplicate: object) -> None:
    model, x = encoder(), tokens()
    with torch.no_grad():
        original = model(x, src_key_padding_mask=PADDING)
        patch(model, SHORT)
        before = model(x, src_key_padding_mask=PADDING)
        twin = duplicate(model)
        assert torch.equal(twin(x, src_key_padding_mask=PADDING), before)
        unpatch(twin)
        assert torch.equal(twin(x, src_key_padding_mask=PADDING), original)
        assert twin.use_nested_tensor
        assert torch.equal(model(x, src_key_padding_mask=PADDING), before)


def test_compiles_with_padding() -> None:
    model, x = encoder(), tokens()
    patch(model, STATIC)
    with torch.no_grad():
        before = model(x, src_key_padding_mask=PADDING)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, src_key_padding_mask=PADDING), before)
