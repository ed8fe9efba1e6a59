"""Single calls: padding, masks, caches, weights, dropout, grids, precision, gradients, compilation."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier, get_ident

import pytest
import timm
import torch
import transformers as t
from patching_models import (
    ALL,
    CAUSAL_MODELS,
    PATCHED,
    TEXT,
    TIMM_VIT,
    build,
    image,
    outputs,
    text,
)
from torch import Tensor, nn

from astroattn import AstroConfig, AstrocyteAttention
from astroattn.patching import fallbacks, patch, unpatch
from astroattn.patching.dense_masks import read_mask
from astroattn.patching.grid import PatchGrid
from astroattn.patching.masks import attention_mask
from astroattn.patching.site import drop_keys

EXACT = AstroConfig(near=100_000)
SHORT = AstroConfig(near=2, exact_keys=0, tile=2, num_hidden=4)
STATIC = replace(SHORT, hidden="random")
CONFIGS = {"exact": EXACT, "hebbian": SHORT, "random": STATIC, "default": AstroConfig()}
PADDED = [  # a causal model takes a static hidden layer
    (name, config)
    for name, tiny in PATCHED.items()
    for config in CONFIGS
    if tiny.padded and not (tiny.causal and config in ("hebbian", "default"))
]


def cores(model: nn.Module) -> list[AstrocyteAttention]:
    return [module for module in model.modules() if isinstance(module, AstrocyteAttention)]


def record(model: nn.Module) -> list[dict]:
    """The keyword arguments of every call of an astrocyte from now on, with the lengths of its queries and keys."""
    calls: list[dict] = []

    def note(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        calls.append(kwargs | {"queries": args[0].shape[2], "keys": args[1].shape[2]})

    for core in cores(model):
        core.register_forward_hook(note, with_kwargs=True)
    return calls


# padding


@pytest.mark.parametrize(("name", "config"), PADDED)
def test_a_row_alone_equals_the_row_padded_in_a_batch(name: str, config: str) -> None:
    tiny = PATCHED[name]
    model, batch = build(tiny), text()
    patch(model, CONFIGS[config])
    model = getattr(model, "text_model", model)  # of CLIP and SigLIP
    real = int(batch["attention_mask"][1].sum())
    alone = {key: value[1:, :real] for key, value in batch.items()}
    with torch.no_grad():
        padded, single = model(**batch)[0][1, :real], model(**alone)[0][0]
    torch.testing.assert_close(padded, single, rtol=1e-4, atol=1e-5 * float(single.abs().max()))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "modernbert", "clip", "whisper", "siglip"])
def test_modules_left_alone_run_what_they_ran(name: str, implementation: str) -> None:
    """Every module of the model is routed through our function; those without an astrocyte must not notice."""
    tiny = PATCHED[name]
    model, inputs = build(tiny), tiny.inputs()
    model.set_attn_implementation(implementation)
    last = [each for each, module in model.named_modules() if hasattr(module, "is_causal")][-1]
    last = last.replace("encoder_attn", "self_attn")
    last = {"modernbert": "layers.2.attn"}.get(name, last)
    hidden: list[Tensor] = []
    for each, module in model.named_modules():
        if hasattr(module, "is_causal") and each != last:
            module.register_forward_hook(lambda module, args, output: hidden.append(output[0].clone()))
    outputs(model, inputs)
    before, hidden[:] = list(hidden), []
    patch(model, EXACT if not tiny.causal else replace(EXACT, hidden="random"), where=last)
    assert len(cores(model)) == 1
    hidden.clear()  # of the probe
    outputs(model, inputs)
    assert len(before) == len(hidden) >= 1
    first = next(index for index, (a, b) in enumerate(zip(before, hidden, strict=True)) if a.shape == b.shape)
    assert torch.equal(before[first], hidden[first])
    for one, other in zip(before, hidden, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", list(PATCHED))
def test_eager_hosts_are_reproduced_too(name: str) -> None:
    tiny = PATCHED[name]
    model, inputs = build(tiny), tiny.inputs()
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")
    else:
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
    before = outputs(model, inputs)
    report = patch(model, EXACT)
    assert len(report.patched) == tiny.patched, str(report)
    for one, other in zip(before, outputs(model, inputs), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5 * float(one.abs().max()))
    patch(model, STATIC)
    assert any(not torch.allclose(a, b) for a, b in zip(before, outputs(model, inputs), strict=True))
    unpatch(model)
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(model, inputs), strict=True))


def test_left_padding_hides_keys() -> None:
    model = build(ALL["llama"])
    patch(model, STATIC)
    ids = text()["input_ids"][:1]
    padded = torch.cat([torch.full((1, 5), 7), ids], 1)
    mask = torch.cat([torch.zeros(1, 5), torch.ones(1, 20)], 1).long()
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        alone, batch = model(ids).logits, model(padded, attention_mask=mask, position_ids=positions).logits[:, 5:]
    torch.testing.assert_close(alone, batch, rtol=1e-4, atol=1e-5)


# calls that need more than an astrocyte represents


def test_a_dense_mask_falls_back_with_one_warning() -> None:
    model = build(ALL["bert"])
    inputs = {"input_ids": text()["input_ids"], "attention_mask": torch.rand(2, 1, 20, 20) > 0.3}
    with torch.no_grad():
        before = model(**inputs)[0]
    report = patch(model, SHORT)
    with pytest.warns(UserWarning, match="left to the model's own attention: a dense mask") as caught:
        after = model(**inputs)[0]
    assert [str(each.message).partition(":")[0] for each in caught] == [row.name for row in report.patched]
    torch.testing.assert_close(after, before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**inputs)
    counts = fallbacks(model)
    assert [sum(reasons.values()) for reasons in counts.values()] == [2, 2]


def test_a_float_padding_mask_is_a_key_mask() -> None:
    model, batch = build(ALL["bert"]), text()
    patch(model, SHORT)
    calls = record(model)
    with torch.no_grad():
        expected = model(**batch)[0]
        floats = (1.0 - batch["attention_mask"][:, None, None].float()) * torch.finfo(torch.float32).min
        found = model(input_ids=batch["input_ids"], attention_mask=floats)[0]
    assert torch.equal(found, expected)
    assert all(torch.equal(call["key_mask"], batch["attention_mask"].bool()) for call in calls)
    assert len(calls) == 4


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_padding_mask_may_be_written_out_for_every_query(dtype: torch.dtype) -> None:
    model, batch = build(ALL["bert"]), text()
    with torch.no_grad():
        before = outputs(model, batch)
        patch(model, EXACT)
        rows = batch["attention_mask"][:, None, None].bool().expand(-1, 1, 20, -1)
        if dtype != torch.bool:
            rows = torch.zeros(rows.shape).masked_fill(~rows, torch.finfo(dtype).min)
        found = model(input_ids=batch["input_ids"], attention_mask=rows)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found[0][real], before[0], rtol=1e-4, atol=1e-4)
    assert not fallbacks(model)
    other = rows.clone()
    other[0, 0, 3, 4] = False if dtype == torch.bool else torch.finfo(dtype).min
    with pytest.warns(UserWarning, match="a dense mask"):
        model(input_ids=batch["input_ids"], attention_mask=other)


@pytest.mark.parametrize("shape", [(2, 1, 1, 20), (2, 1, 20, 20), (1, 4, 20, 20)], ids=str)
@torch.no_grad()
def test_a_bias_is_not_a_mask(shape: tuple[int, ...]) -> None:
    model = build(ALL["bert"])
    inputs = {"input_ids": text()["input_ids"], "attention_mask": torch.linspace(-3, 2, 400)[: shape[-2] * 20]}
    inputs["attention_mask"] = inputs["attention_mask"].view(shape[-2:]).expand(shape)
    before = model(**inputs)[0]
    patch(model, EXACT)
    torch.testing.assert_close(model(**inputs)[0], before, atol=1e-5, rtol=1e-4)
    patch(model, SHORT)
    changed = model(**inputs)[0]
    assert not torch.allclose(changed, before, atol=1e-2)
    inputs["attention_mask"] = torch.zeros(shape)
    assert not torch.allclose(model(**inputs)[0], changed, atol=1e-2)
    assert not fallbacks(model)


@torch.no_grad()
def test_a_bias_on_a_single_key_in_a_graph() -> None:
    """A graph can only assert that a float mask is one of padding; here it need not be."""
    model = build(ALL["bert"])
    inputs = {"input_ids": torch.tensor([[7]]), "attention_mask": torch.full((1, 1, 1, 1), 0.3)}
    before = model(**inputs)[0]
    patch(model, SHORT)
    with pytest.warns(UserWarning, match="a bias on the scores in a graph"):
        after = torch.compile(model, backend="aot_eager")(**inputs)[0]
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_complete_key_mask_is_not_made_causal(name: str) -> None:
    """For SDPA a bool mask is all there is to it, also in a causal module."""
    model = build(ALL[name])
    inputs = {"input_ids": text()["input_ids"], "attention_mask": torch.ones(2, 1, 1, 20, dtype=torch.bool)}
    with torch.no_grad():
        before = model(**inputs, use_cache=False).logits
        patch(model, replace(EXACT, hidden="random"))
        after = model(**inputs, use_cache=False).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_t5_has_no_static_layers() -> None:
    with pytest.raises(ValueError, match=r"a bias for every query and key, which[\s\S]*cross attention"):
        patch(build(ALL["t5"]), STATIC)


@pytest.mark.skipif(
    not hasattr(t, "Dots3NoteTextConfig"), reason="this transformers has no config that varies by layer"
)
def test_a_config_that_varies_by_layer_can_be_read() -> None:
    every = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16}
    every |= {"qk_nope_head_dim": 8, "v_head_dim": 8}
    windows = {f"swa_{name}": value for name, value in every.items()} | {"swa_head_dim": 24}
    shape = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16, "vocab_size": 99}
    shape |= {"num_hidden_layers": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    config = t.Dots3NoteTextConfig(**shape, **every, **windows, qk_rope_head_dim=8, head_dim=8, pad_token_id=0)
    report = patch(t.Dots3NoteTextModel(config).eval(), STATIC)
    assert {(row.heads, row.status) for row in report.rows} == {(4, "exact"), (4, "astrocyte")}


def test_attention_weights_are_refused() -> None:
    for name in ("bert", "gpt2"):
        model = build(ALL[name])
        model.set_attn_implementation("eager")
        patch(model, STATIC)
        with pytest.raises(ValueError, match="forms no attention weights"):
            model(**text(), output_attentions=True)
        unpatch(model)
        assert len(model(**text(), output_attentions=True).attentions) == 2


def test_a_changed_attention_implementation_is_no_silent_bypass() -> None:
    model = build(ALL["bert"])
    patch(model, SHORT)
    model.set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match="changed to 'eager'"):
        model(**text())


def test_dropout_drops_keys_with_the_law_that_softmax_has_for_each_query() -> None:
    """Mean and variance of outputs over draws, where the astrocyte is softmax attention and where it is not."""
    p, draws = 0.3, 4000
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 12, 4)
    weights = (query @ key.mT / 2).softmax(-1)
    for config in (EXACT, replace(STATIC, near=0)):
        core = AstrocyteAttention(2, 4, config)
        rows = core(query, key, torch.eye(12).expand(1, 2, -1, -1))
        if config is EXACT:
            torch.testing.assert_close(rows, weights)
        outs = torch.stack([core(query, key, drop_keys(value, p)) for _ in range(draws)])
        variance = p / (1 - p) * rows.square() @ value.square()  # of sum_k a_k m_k / (1 - p) v_k, m_k independent
        spread = (variance / draws).sqrt()
        assert ((outs.mean(0) - rows @ value).abs() / spread).max() < 5
        torch.testing.assert_close(outs.var(0), variance, rtol=0.25, atol=1e-3)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["bert", "timm vit"])
def test_dropout_under_train_is_that_of_the_host(name: str, compiled: bool) -> None:
    """Random in training, with gradients; none in evaluation. All dropout but the attention's is turned off."""
    model, inputs = build(ALL[name]), text() if name == "bert" else {"x": image()}
    for part, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5 if part.endswith(("attention.self.dropout", "attn_drop")) else 0.0
    patch(model, SHORT)
    torch._dynamo.reset()
    called = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model

    def run() -> Tensor:
        result = called(**inputs)
        return result if isinstance(result, Tensor) else result[0]

    kept = run()
    assert torch.equal(run(), kept)
    model.train()
    torch.manual_seed(0)
    one = run()
    assert not torch.allclose(run(), one, atol=1e-3)
    torch.manual_seed(0)
    assert torch.equal(run(), one)
    one.square().sum().backward()
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    assert gradients
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert fallbacks(model) == {}
    model.eval()
    assert torch.equal(run(), kept)


def test_sdpa_that_is_never_called_is_said() -> None:
    model = build(ALL["timm vit"])
    patch(model, SHORT)
    model.blocks[0].attn.fused_attn = False
    with pytest.warns(UserWarning, match="scaled_dot_product_attention was not called"):
        model(image())


# causal models with a cache


@pytest.mark.parametrize("name", list(CAUSAL_MODELS))
def test_generate_follows_the_original(name: str) -> None:
    model = build(CAUSAL_MODELS[name])
    ids = text()["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, :4] = 0  # left padded
    settings = {
        "attention_mask": mask,
        "max_new_tokens": 12,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    before = model.generate(ids, **settings)
    patch(model, replace(EXACT, hidden="random"))
    calls = record(model)
    assert torch.equal(model.generate(ids, **settings), before)
    assert fallbacks(model) == {}
    lengths = {(call["queries"], call["keys"], call["causal"]) for call in calls}
    assert lengths == {(20, 20, True)} | {(1, keys, True) for keys in range(21, 32)}
    patch(model, STATIC)
    assert torch.equal(model.generate(ids, **settings), model.generate(ids, **settings, use_cache=False))


@pytest.mark.parametrize("name", list(CAUSAL_MODELS))
def test_a_prompt_read_in_pieces(name: str) -> None:
    model, ids = build(CAUSAL_MODELS[name]), text()["input_ids"]
    patch(model, replace(EXACT, hidden="random"))
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :8])
        second = model(ids[:, 8:], past_key_values=first.past_key_values).logits
    assert fallbacks(model) == {}
    torch.testing.assert_close(torch.cat([first.logits, second], 1), whole, rtol=1e-4, atol=1e-4)


def test_static_caches_stay_exact() -> None:
    model, ids = build(ALL["llama"]), text()["input_ids"]
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "cache_implementation": "static"}
    settings |= {"disable_compile": True, "eos_token_id": None}
    before = model.generate(ids, **settings)
    patch(model, STATIC)
    with pytest.warns(UserWarning, match="left to the model's own attention"):
        after = model.generate(ids, **settings)
    assert torch.equal(before, after)


def test_grouped_key_heads_are_repeated() -> None:
    model = build(ALL["qwen3"])
    patch(model, STATIC)
    shapes: list[tuple] = []
    cores(model)[0].register_forward_hook(lambda module, args, output: shapes.append([each.shape for each in args]))
    model(**text())
    assert shapes == [[torch.Size([2, 4, 20, 8])] * 3]


@pytest.mark.parametrize("form", ["q_length and q_offset", "cache_position"])
@pytest.mark.parametrize(("first", "count", "keys", "plain"), [(0, 6, 6, None), (2, 4, 6, [1] * 6), (5, 1, 6, None)])
def test_queries_are_told_in_the_words_of_any_version(
    form: str, first: int, count: int, keys: int, plain: list | None
) -> None:
    """transformers 5.0 to 5.3 give the positions of the queries, later ones their number and the first position."""
    both = {
        "q_length and q_offset": {"q_length": count, "q_offset": first, "device": "cpu"},
        "cache_position": {"cache_position": torch.arange(first, first + count)},
    }
    given = {"host": "sdpa", "batch_size": 1, "kv_length": keys, **both[form]}
    mask = attention_mask(**given)
    assert (mask if mask is None else mask.keys.int()[0].tolist()) == plain
    padded = attention_mask(**given, attention_mask=torch.arange(keys)[None] > 0)
    assert padded.causal
    assert padded.keys.tolist() == [[False, *[True] * (keys - 1)]]


# the grid of patches


@pytest.mark.parametrize(
    ("build_model", "size", "settings", "grid"),
    [
        (lambda: build(ALL["vit"]), (32, 32), {}, (4, 4)),
        (lambda: build(ALL["vit"]), (48, 24), {"interpolate_pos_encoding": True}, (6, 3)),
        (lambda: build(ALL["deit"]), (32, 32), {}, (4, 4)),
        (lambda: build(ALL["dinov2 with registers"]), (40, 24), {}, (5, 3)),
        (lambda: build(ALL["dinov3"]), (24, 48), {}, (3, 6)),
        (lambda: build(ALL["clip"]).vision_model, (32, 48), {"interpolate_pos_encoding": True}, (4, 6)),
        (lambda: build(ALL["siglip"]).vision_model, (32, 48), {"interpolate_pos_encoding": True}, (4, 6)),
        (lambda: build(ALL["timm vit"]), (32, 32), {}, (4, 4)),
        (lambda: build(ALL["timm deit"]), (32, 32), {}, (4, 4)),
        (lambda: timm.create_model("vit_tiny_r_s16_p8_224", depth=2, img_size=64), (64, 64), {}, (2, 2)),  # hybrid
        (lambda: timm.create_model("vit_tiny_patch16_224", **TIMM_VIT, dynamic_img_size=True), (24, 48), {}, (3, 6)),
        (lambda: timm.create_model("vit_tiny_patch16_224", **TIMM_VIT | {"img_size": (24, 48)}), (24, 48), {}, (3, 6)),
        (lambda: build(ALL["timm dinov2 with registers"]), (56, 56), {}, (4, 4)),
        (lambda: build(ALL["timm dinov3"]), (32, 64), {}, (2, 4)),
        (lambda: build(ALL["timm siglip"]), (32, 32), {}, (4, 4)),
    ],
)
def test_grid_comes_from_the_model(build_model: object, size: tuple, settings: dict, grid: tuple) -> None:
    model = build_model().eval()
    patch(model, SHORT)
    calls = record(model)
    with torch.no_grad():
        model(image(size), **settings)
    assert [call["grid"] for call in calls] == [grid] * 2


def test_a_mask_over_patches_stays_exact() -> None:
    model = timm.create_model("vit_tiny_patch16_224", **TIMM_VIT).eval()
    size = (TIMM_VIT["img_size"],) * 2
    tokens = model.patch_embed.num_patches + 1
    mask = torch.arange(tokens).expand(2, 1, 1, -1) < tokens - 3
    with torch.no_grad():
        expected = model.forward_features(image(size), attn_mask=mask)
        patch(model, SHORT)
        with pytest.warns(UserWarning, match="a mask over a grid of patches"):
            assert torch.equal(model.forward_features(image(size), attn_mask=mask), expected)


@pytest.mark.parametrize("name", ["bert", "gpt2", "whisper encoder"])
def test_text_and_sound_have_no_grid(name: str) -> None:
    model = build(ALL[name])
    patch(model, STATIC)
    calls = record(model)
    model(**ALL[name].inputs())
    assert [call["grid"] for call in calls] == [None, None]


def test_only_the_vision_tower_has_a_grid() -> None:
    model = build(ALL["siglip"])
    patch(model, SHORT)
    calls = record(model)
    ids = torch.randint(5, 90, (2, 16))  # as many tokens as patches
    model(input_ids=ids, **ALL["vit"].inputs())
    assert sorted(str(call["grid"]) for call in calls) == ["(4, 4)"] * 2 + ["None"] * 2


def test_grid_fits_the_tokens_or_there_is_none() -> None:
    conv = nn.Conv2d(3, 4, 8, stride=8)
    grid = PatchGrid(prefix=1)
    assert grid.of(17) is None  # no image yet
    conv.register_forward_hook(grid.note)
    conv(image((32, 32)))
    assert [grid.of(tokens) for tokens in (16, 17, 18)] == [None, (4, 4), None]


def test_threads_see_their_own_grids() -> None:
    model = timm.create_model("vit_tiny_patch16_224", **TIMM_VIT, dynamic_img_size=True).eval()
    patch(model, SHORT)
    both = Barrier(2)

    def wait(*args: object) -> None:
        both.wait(60)  # until both images are laid out

    model.patch_embed.register_forward_hook(wait)
    seen: dict[int, set] = {}

    def note(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        seen.setdefault(get_ident(), set()).add(kwargs["grid"])

    for core in cores(model):
        core.register_forward_hook(note, with_kwargs=True)

    def run(size: tuple[int, int]) -> set:
        model(image(size))
        return seen[get_ident()]

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, [(24, 48), (48, 24)])) == [{(3, 6)}, {(6, 3)}]


def test_gradient_checkpointing_sees_the_same_grid() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = timm.create_model("vit_tiny_patch16_224", **TIMM_VIT, dynamic_img_size=True)
        build_weights = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=build_weights)
        model.set_grad_checkpointing(checkpointing)
        patch(model.train(), SHORT)
        calls = record(model)
        loss = model(image((24, 48))).square().sum()
        loss.backward()
        assert {call["grid"] for call in calls} == {(3, 6)}
        assert len(calls) == (4 if checkpointing else 2)
        gradients.append(model.blocks[0].attn.qkv.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


# precision, gradients, compilation


@pytest.mark.parametrize("name", ["bert", "gpt2", "timm vit", "vit"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(name: str, dtype: torch.dtype) -> None:
    tiny = ALL[name]
    model = build(tiny).to(dtype)
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in tiny.inputs().items()}
    before = outputs(model, inputs)
    report = patch(model, EXACT)
    assert len(report.patched) == tiny.patched, str(report)
    tolerance = 1e-9 if dtype == torch.float64 else 5e-2
    for one, other in zip(before, outputs(model, inputs), strict=True):
        assert other.dtype == dtype
        assert (one - other).abs().max() <= tolerance * one.abs().max()


@pytest.mark.parametrize("name", ["bert", "timm vit"])
def test_gradients_equal_those_of_the_original(name: str) -> None:
    tiny = ALL[name]
    model, inputs = build(tiny), tiny.inputs()

    def gradients() -> list[Tensor]:
        model.zero_grad()
        result = model(**inputs)
        (result if isinstance(result, Tensor) else result[0][inputs["attention_mask"].bool()]).square().sum().backward()
        return [each.grad.clone() for each in model.parameters() if each.grad is not None]

    before = gradients()
    patch(model, EXACT)
    for one, other in zip(before, gradients(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-4 * float(one.abs().max() + 1e-6))


@pytest.mark.parametrize("name", ["bert", "llama", "timm vit", "vit"])
def test_compiles_in_one_graph(name: str) -> None:
    tiny = ALL[name]
    model, inputs = build(tiny), tiny.inputs()
    # the causal form of the hidden layer looks at its data, so there it is the adapter alone that is compiled
    patch(model, replace(STATIC, near=100_000) if tiny.causal else STATIC)
    before = outputs(model, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for one, other in zip(before, outputs(compiled, inputs), strict=True):
        torch.testing.assert_close(other, one)


@pytest.mark.parametrize("name", ["bert", "timm vit", "vit"])
def test_exports(name: str) -> None:
    tiny = ALL[name]
    model, inputs = build(tiny), tiny.inputs()
    patch(model, STATIC)
    before = outputs(model, inputs)
    with torch.no_grad():
        exported = torch.export.export(model, (), inputs, strict=False).module()
    for one, other in zip(before, outputs(exported, inputs), strict=True):
        torch.testing.assert_close(other, one)


def test_timm_wrapper() -> None:
    config = t.TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=TIMM_VIT)
    model = t.TimmWrapperModel(config).eval()
    before = model(image()).last_hidden_state
    assert len(patch(model, EXACT).patched) == 2
    torch.testing.assert_close(model(image()).last_hidden_state, before)
    patch(model, SHORT)
    assert not torch.allclose(model(image()).last_hidden_state, before)
    unpatch(model)
    assert torch.equal(model(image()).last_hidden_state, before)


@pytest.mark.parametrize("name", ["bert", "timm vit"])
def test_vmap_is_refused_in_words(name: str) -> None:
    model, inputs = build(ALL[name]), next(iter(ALL[name].inputs().values()))
    patch(model, SHORT)
    weights = {key: each.detach() for key, each in model.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        result = torch.func.functional_call(model, weights, (x[None],))
        return (result if isinstance(result, Tensor) else result[0]).square().sum()

    with pytest.raises(RuntimeError, match="vmap does not reach into this astrocyte"):
        torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, inputs)


def test_a_float_mask_of_minus_ten_thousand_is_padding() -> None:
    markup = t.MarkupLMModel(t.MarkupLMConfig(**TEXT, max_position_embeddings=64)).eval()  # makes such a mask itself
    inputs = text()
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        before = markup(**inputs).last_hidden_state
        assert len(patch(markup, AstroConfig(hidden="random", near=64)).patched) == 2
        torch.testing.assert_close(markup(**inputs).last_hidden_state[real], before[real], rtol=1e-4, atol=1e-4)
        patch(markup, STATIC)
        found = markup(**inputs).last_hidden_state[real]
        other = inputs["input_ids"].where(real, inputs["input_ids"] + 1)
        torch.testing.assert_close(markup(**inputs | {"input_ids": other}).last_hidden_state[real], found)
    assert not fallbacks(markup)


@pytest.mark.parametrize("mask", [-10000.0, -9000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_of_a_float_mask_hides_a_key(mask: float, dtype: torch.dtype) -> None:
    said = read_mask(torch.tensor([[[[0.0, mask]]]], dtype=dtype), 1, 2)
    if mask == -9000.0:
        assert said.real is said.refusal is None
        assert said.bias is not None
    else:
        assert said.real is not None
        assert said.real.tolist() == [[True, False]]


def test_values_may_have_more_heads_than_keys() -> None:
    llama = build(ALL["llama"])
    for layer in llama.model.layers:
        layer.self_attn.v_proj = nn.Linear(32, 32)  # four heads; keys have two
    with torch.no_grad():
        before = llama(text()["input_ids"], use_cache=False).logits
        report = patch(llama, AstroConfig(hidden="random", near=64))
        assert len(report.patched) == len(llama.model.layers), str(report)
        after = llama(text()["input_ids"], use_cache=False).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
