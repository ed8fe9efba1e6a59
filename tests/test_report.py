"""The page of a comparison, its verdict, one row per item, and what differs between runs."""

from __future__ import annotations

import base64
import copy
import io
import json
import math
import os
import re
import shutil
import subprocess
import threading
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from timm.models.vision_transformer import VisionTransformer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertModel, PreTrainedTokenizerFast

from astroattn import AstroConfig, choices
from astroattn.cli import main
from astroattn.fidelity import Fidelity, Row, Value, compare, comparison, items, load_items, load_result, verdict
from astroattn.fidelity.report import decibels, ranges
from astroattn.fidelity.runs import load_runs
from astroattn.fidelity.subject import share_weights
from astroattn.patching import patch
from astroattn.recipes import parse_layers

ROUGH = AstroConfig(num_hidden=2, near=2, exact_keys=2, tiles="position", tile=4)
COUNT = 10
HOSTILE = "<script>alert('a text')</script> & more"
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}


class Photo:
    """A named photo, as `astroattn.data` has them."""

    def __init__(self, name: str, shade: int) -> None:
        self.name, self.shade = name, shade

    def open(self) -> Any:
        return Image.new("RGB", (300, 200), (self.shade, 100, 50))


def make_vit() -> VisionTransformer:
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=48, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=10).eval()
    with torch.no_grad():  # sharper attention than a new model has
        for block in vit.blocks:
            block.attn.qkv.weight *= 20
        nn.init.normal_(vit.head.weight)
    return vit


def measure(config: AstroConfig, count: int = COUNT, **options: Any) -> Fidelity:
    pixels = torch.randn(count, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    photos = [Photo(f"{number}_{HOSTILE}.jpg", 20 * number) for number in range(count)]
    options = {"controls": False, "diagnose": 1} | options
    return compare(
        make_vit(), pixels.split(4), config, labels=[number % 10 for number in range(count)], items=photos,
        class_names={number: f"class <{number}>" for number in range(9)}, progress=False, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def photos() -> Fidelity:
    return measure(ROUGH, controls=True)


@pytest.fixture(scope="module")
def better() -> Fidelity:
    return measure(AstroConfig(num_hidden=4, near=24, exact_keys=8, tiles="position", tile=4))


@pytest.fixture(scope="module")
def texts() -> Fidelity:
    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=99, max_position_embeddings=64, **SMALL)).eval()
    batch = {"input_ids": torch.randint(1, 99, (4, 20)), "attention_mask": torch.ones(4, 20).long()}
    return compare(model, [batch], ROUGH, items=[HOSTILE, "b", "c " * 900, "d"], controls=False, progress=False)


def numbers(result: Fidelity, name: str) -> np.ndarray:
    return np.array(result.per_item[name], dtype=float)


def test_the_rows_of_items_are_those_of_the_models(photos: Fidelity) -> None:
    vit = make_vit()
    patched = share_weights(vit)
    patch(patched, ROUGH)
    pixels = torch.randn(COUNT, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        before, after = vit(pixels).double(), patched(pixels).double()
    row = photos.per_item
    title = {number: f"class <{number}>" for number in range(9)} | {9: "9"}  # a class without a name
    assert row["original"] == [title[int(choice)] for choice in before.argmax(1)]
    assert row["patched"] == [title[int(choice)] for choice in after.argmax(1)]
    assert row["label"] == [title[number] for number in range(COUNT)]
    assert row["patched_correct"] == [int(choice) == number for number, choice in enumerate(after.argmax(1))]
    best = after.sort(descending=True).values
    assert row["patched_margin"] == pytest.approx((best[:, 0] - best[:, 1]).tolist(), rel=1e-3, abs=1e-4)
    error = (after - before).norm(dim=1) / before.norm(dim=1)
    assert row["logit_error"] == pytest.approx(error.tolist(), rel=1e-3)
    assert 0 < np.mean(row["top1"]) < 1  # or nothing below is about a change
    assert set(map(len, row.values())) == {COUNT}


def test_the_rows_of_items_add_up_to_the_figures(photos: Fidelity) -> None:
    pairs = {"top1_agreement": "top1", "kl": "kl", "embedding_cosine": "cosine", "same_neighbour": "neighbour"}
    for figure, column in pairs.items():
        assert numbers(photos, column).mean() == pytest.approx(photos.value(figure), rel=1e-4)
    error, norm = numbers(photos, "logit_error"), numbers(photos, "logit_norm")
    total = math.sqrt(((error * norm) ** 2).sum() / (norm**2).sum())
    assert total == pytest.approx(photos.value("logit_error"), rel=1e-4)


def test_a_model_that_predicts_tokens_has_the_means_of_its_items() -> None:
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(vocab_size=99, max_position_embeddings=64, initializer_range=0.5, **SMALL))
    model.eval()
    mask = (torch.arange(20) < torch.tensor([20, 9])[:, None]).long()
    batch = {"input_ids": torch.randint(1, 99, (2, 20)), "attention_mask": mask}
    result = compare(model, [batch], ROUGH, controls=False, diagnose=0, progress=False)
    patched = share_weights(model)
    patch(patched, ROUGH)
    with torch.inference_mode():
        before, after = (each(**batch).logits.argmax(-1) for each in (model, patched))
    same = [(before[row] == after[row])[mask[row].bool()].float().mean().item() for row in (0, 1)]
    assert result.per_item["top1"] == pytest.approx(same, abs=1e-5)
    assert "original" not in result.per_item
    verdict = result.verdict("top1")
    assert (verdict.items, verdict.value.value) == (2, pytest.approx(np.mean(same), abs=1e-5))


def test_only_so_many_items_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (items, comparison):
        monkeypatch.setattr(module, "MOST_ITEMS", 3)
    result = measure(ROUGH, 5, diagnose=0)
    assert set(map(len, result.per_item.values())) == {3}
    assert "per_item holds the first 3 items" in result.notes
    assert result.items == 5


def test_items_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="items: 1, but the batches hold 2"):
        compare(make_vit(), [torch.randn(2, 3, 48, 48)], ROUGH, items=["a"], controls=False, progress=False)


def test_what_is_saved_is_read_again(photos: Fidelity, tmp_path: Path) -> None:
    photos.save_json(tmp_path / "a.json")
    photos.save_items(tmp_path / "a.parquet")
    read = load_result(tmp_path / "a.json")
    assert read.to_dict() == photos.to_dict() == json.loads((tmp_path / "a.json").read_text())
    assert load_items(tmp_path / "a.parquet") == photos.per_item
    lost = replace(photos, rows={**photos.rows, "patched": Row(None, {"kl": Value(math.nan)})})
    lost.save_json(tmp_path / "lost.json")
    assert math.isnan(load_result(tmp_path / "lost.json").value("kl"))
    (tmp_path / "bad.json").write_text("[1]")
    for name, read_it in {"bad.json": load_result, "none.json": load_result, "bad.parquet": load_items}.items():
        with pytest.raises(ValueError, match=name):
            read_it(tmp_path / name)


@pytest.mark.parametrize(
    ("metric", "tolerance", "kept"),
    [("top1", 0.89, True), ("top1", 0.91, False), ("kl", 0.21, True), ("kl", 0.19, False), ("auto", 0.89, True)],
)
def test_the_interval_decides(photos: Fidelity, metric: str, tolerance: float, kept: bool) -> None:
    values = {"top1_agreement": Value(0.95, 0.9, 0.99), "kl": Value(0.15, 0.1, 0.2)}
    result = replace(photos, rows={**photos.rows, "patched": Row(None, values)})
    verdict = result.verdict(metric, tolerance)
    assert verdict.kept is kept
    assert verdict.margin == pytest.approx(0.01 if kept else -0.01)
    assert ("not shown" in str(verdict)) is not kept
    assert result.verdict(metric).kept is None
    nothing = replace(photos, rows={**photos.rows, "patched": Row(None, {"nonfinite": Value(3)})})
    assert nothing.verdict(metric, tolerance).kept is False
    assert "NaN or infinity for 3 of 10 items" in str(nothing.verdict(metric, tolerance))


@pytest.mark.parametrize(
    ("metric", "tolerance", "error"),
    [
        ("acc", 0.9, "metric: must be one of auto, top1"),
        ("word_error", 0.1, "metric: 'word_error' was not measured; there are top1, kl, cosine, neighbour"),
        ("top1", 1.0, "tolerance: must be above 0 and below 1, got 1"),
        ("kl", -1.0, "tolerance: must be above 0, got -1"),
        ("auto", math.nan, "tolerance"),
    ],
)
def test_a_tolerance_that_cannot_be(photos: Fidelity, metric: str, tolerance: float, error: str) -> None:
    with pytest.raises(ValueError, match=re.escape(error)):
        photos.verdict(metric, tolerance)


class Reader(HTMLParser):
    """What a page is made of: tags with attributes, and the cells of each table by its caption."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[tuple[str, list[list[str]]]] = []
        self.open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)
        if tag == "table":
            self.tables.append(("", []))
        if tag == "tr":
            self.tables[-1][1].append([])
        if tag in ("td", "th"):
            self.tables[-1][1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "caption" in self.open:
            caption, rows = self.tables[-1]
            self.tables[-1] = (caption + data, rows)
        elif {"td", "th"} & set(self.open):
            self.tables[-1][1][-1][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def table(self, caption: str) -> list[list[str]]:
        return next(rows for title, rows in self.tables if title.startswith(caption))


@pytest.fixture(scope="module")
def page(photos: Fidelity, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    photos.report(path, "top1", 0.99)
    return path


def test_the_page_stands_alone_and_is_in_order(page: Path) -> None:
    read = Reader(page)
    sections = [each["id"] for each in read.all("section")]
    assert sections == ["verdict", "cost", "layers", "exact", "items", "controls", "notes", "environment"]
    assert page.stat().st_size < 2e6
    outside = [value for _, each in read.tags for name, value in each.items() if name in ("src", "href", "xlink:href")]
    assert all(value and value.startswith(("data:", "#")) for value in outside)
    assert not re.search(r"@import|url\((?!#)|fetch\(", page.read_text(encoding="utf-8"))
    assert not read.all("link")
    ids = [each["id"] for _, each in read.tags if each.get("id")]
    assert len(ids) == len(set(ids))


def test_the_page_can_be_read_by_all(page: Path) -> None:
    read = Reader(page)
    assert all(each.get("alt") for each in read.all("img"))
    assert all(each.get("scope") in ("col", "row") for each in read.all("th"))
    assert all(caption for caption, _ in read.tables)
    charts = [each for _, each in read.tags if each.get("role") == "img"]
    assert len(charts) == len(read.all("figure")) > 0
    assert all(each.get("aria-label") for each in charts)
    text = page.read_text(encoding="utf-8")
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#\w+)", part)) for part in re.findall(r":root \{(.*?)\}", text, re.DOTALL)
    )
    for colours in (light, dark):
        pairs = [(front, back) for front in ("text", "muted") for back in ("page", "soft")]
        pairs += [
            ("link", "page"),
            ("good", "good-soft"),
            ("bad", "bad-soft"),
            ("text", "good-soft"),
            ("text", "bad-soft"),
        ]
        assert min(contrast(colours[front], colours[back]) for front, back in pairs) >= 4.5


def contrast(front: str, back: str) -> float:
    """By WCAG 2: the ratio of the relative luminances of two colours of three or six digits."""

    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
        parts = [int(digits[start : start + 2], 16) / 255 for start in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    high, low = sorted((luminance(front), luminance(back)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_the_numbers_of_the_page_are_those_of_the_json(photos: Fidelity, page: Path, tmp_path: Path) -> None:
    photos.save_json(tmp_path / "a.json")
    saved = json.loads((tmp_path / "a.json").read_text())
    read, text = Reader(page), page.read_text(encoding="utf-8")
    values = saved["rows"]["patched"]["values"]
    agreement = values["top1_agreement"]
    assert f"{agreement['value']:.4f} on {saved['items']} items" in text
    assert f"interval {agreement['low']:.4f} to {agreement['high']:.4f}" in text
    assert f"misses by {0.99 - agreement['low']:.4f}" in text
    heads = [
        [
            layer["name"],
            str(head),
            f"{error:.4f}",
            f"{-20 * math.log10(error):.1f}",
            f"{layer['isolated_cosine'][head]:.4f}",
        ]
        for layer in saved["layers"]
        for head, error in enumerate(layer["isolated_error"])
    ]
    assert [row[:5] for row in read.table("Every head")[1:]] == heads
    assert len(read.table("Every layer")) == 1 + len(saved["layers"])
    costs = {row[0]: row for row in read.table("Cost")}
    assert costs.keys() - {"model"} == saved["rows"].keys()
    for name, row in saved["rows"].items():
        ratio = row["values"]["seconds"]["value"] / saved["rows"]["original"]["values"]["seconds"]["value"]
        assert costs[name][-1] == f"{ratio:.2f}"
        assert costs[name][3] == f"{row['values']['cost']['value']:.1%}"
    controls = {row[0]: row for row in read.table("Fidelity")}
    names = list(saved["rows"])
    assert (
        controls["logit error"][1 + names.index("random")]
        == f"{saved['rows']['random']['values']['logit_error']['value']:.4f}"
    )


def test_the_worst_items_are_shown_and_nothing_in_them_is_run(page: Path, photos: Fidelity) -> None:
    read, text = Reader(page), page.read_text(encoding="utf-8")
    images = read.all("img")
    assert len(images) == COUNT
    source = images[0]["src"] or ""
    opened = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
    assert (opened.format, opened.size) == ("JPEG", (176, 117))
    changed = [number for number in range(COUNT) if photos.per_item["top1"][number] == 0]
    assert f"{len(changed)} of {COUNT} items changed" in text
    first = max(changed, key=lambda number: photos.per_item["kl"][number])
    assert (images[0]["alt"] or "").startswith(f"The photo {first}_")
    before_and_after = read.table(f"{photos.per_item['name'][first]}, before and after")
    assert before_and_after[1] == [
        "first choice",
        photos.per_item["original"][first],
        photos.per_item["patched"][first],
    ]
    assert len(read.all("script")) == 1
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert" in text


def test_texts_are_shown_in_words_and_stay_text(texts: Fidelity, tmp_path: Path) -> None:
    path = tmp_path / "texts.html"
    texts.report(path)
    text = path.read_text(encoding="utf-8")
    assert len(Reader(path).all("blockquote")) == 4
    assert len(Reader(path).all("script")) == 1
    assert "&lt;script&gt;alert(&#39;a text&#39;)&lt;/script&gt; &amp; more" in text
    assert "c c c" in text
    assert "c " * 400 not in text  # long texts are cut
    assert len(texts.per_item["name"][2]) == items.MOST_LETTERS
    assert "no tolerance was asked for" in text
    with pytest.raises(ValueError, match=r"report: must end in \.html"):
        texts.report(tmp_path / "texts.pdf")


def test_a_page_of_what_is_not_finite_or_was_not_measured(photos: Fidelity, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    first, *rest = photos.layers
    lost = replace(first, isolated_error=[math.nan, math.inf, 0.5])
    values = {name: value for name, value in photos.rows["patched"].values.items() if name in ("seconds", "cost")}
    rows = {**photos.rows, "patched": Row(None, values | {"nonfinite": Value(2)})}
    replace(photos, rows=rows, layers=(lost, *rest)).report(path, tolerance=0.5)
    text = path.read_text(encoding="utf-8")
    assert "NaN or infinity for 2 of 10 items" in text
    assert "<td>not finite</td>" in text
    replace(photos, layers=(), per_item={}, environment={}, notes=()).report(path)
    text = path.read_text(encoding="utf-8")
    assert "Not measured" in text
    assert "Worst items" not in text


def test_the_lines_to_paste_leave_the_worst_layers_exact(photos: Fidelity, page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    worst = sorted(photos.layers, key=lambda layer: -np.mean(layer.isolated_error))
    where = [json.loads(found) for found in re.findall(r"where=(\[[\d, ]+\])\)", text)]
    recipe = re.findall(r"--layers ([\d,-]+)", text)
    assert len(where) == 2  # three layers, of which one at least stays patched
    for count, (indices, layers) in enumerate(zip(where, recipe, strict=True), 1):
        assert parse_layers(layers) == indices
        model = copy.deepcopy(make_vit())
        report = patch(model, ROUGH, where=indices)
        assert {row.name for row in report.exact} == {layer.name for layer in worst[:count]}


def test_decibels_and_ranges() -> None:
    assert [decibels(error) for error in (1, 0.1, 0.01, 0.0, math.nan)] == ["-0.0", "20.0", "40.0", "∞", "not finite"]
    assert [ranges(each) for each in ([0], [0, 1, 2, 5], [1, 3])] == ["0", "0-2,5", "1,3"]


def find_browser() -> str:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome", "headless_shell")
    found = os.environ.get("ASTROATTN_BROWSER") or next(filter(None, map(shutil.which, names)), None)
    if not found:
        pytest.skip("no Chromium is installed, and ASTROATTN_BROWSER names none")
    return found


class Browser:
    """A page of 375 x 800 pixels in a browser of its own, spoken to in the words of its developer tools."""

    def __init__(self, page: Path, profile: Path) -> None:
        theirs, self.sent = os.pipe()
        self.received, ours = os.pipe()
        # it reads what it is asked from file 3 and answers on file 4
        command = ["bash", "-c", f'exec "$0" "$@" 3<&{theirs} 4>&{ours}', find_browser(), "--headless", "--no-sandbox"]
        options = ["--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen([*command, *options], pass_fds=(theirs, ours), stderr=subprocess.DEVNULL)
        os.close(theirs)
        os.close(ours)
        self.timer = threading.Timer(30, self.process.kill)
        self.timer.start()
        self.left, self.number = b"", 0
        target = self.ask("Target.createTarget", url=page.as_uri(), width=375, height=800)["targetId"]
        self.session = {"sessionId": self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}

    def ask(self, method: str, session: dict[str, str] | None = None, **options: Any) -> Any:
        self.number += 1
        message = {"id": self.number, "method": method, "params": options} | (session or {})
        os.write(self.sent, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.left:
                self.left += os.read(self.received, 1 << 16) or pytest.fail("the browser has ended")
            first, _, self.left = self.left.partition(b"\0")
            if (answer := json.loads(first)).get("id") == self.number:
                return answer["result"]

    def run(self, script: str) -> Any:
        """The value of a script's last expression, once the page is there."""
        ready = 'location.protocol === "file:" && document.readyState === "complete"'
        for code in (ready, script):
            while True:
                value = self.ask(
                    "Runtime.evaluate", self.session, expression=code, returnByValue=True, awaitPromise=True
                )["result"]
                if code == script or value.get("value"):
                    break
                time.sleep(0.05)
        return value["value"]

    def close(self) -> None:
        self.timer.cancel()
        self.process.kill()
        self.process.wait()
        os.close(self.sent)
        os.close(self.received)


def test_a_browser_shows_the_page_and_sorts_its_tables(page: Path, tmp_path: Path) -> None:
    script = """
    const table = [...document.querySelectorAll("table.sortable")].at(-1);
    const header = number => table.tHead.rows[0].cells[number];
    const click = number => {
      header(number).querySelector("button").click();
      return [...table.tBodies[0].rows].map(row => row.cells[number].textContent);
    };
    ({down: click(2), up: click(2), words: click(0), sort: header(0).ariaSort,
      overflow: document.documentElement.scrollWidth - innerWidth,
      images: [...document.images].map(image => image.naturalWidth)})"""
    browser = Browser(page, tmp_path / "profile")
    try:
        found = browser.run(script)
    finally:
        browser.close()
    assert found["down"] == sorted(found["down"], key=float, reverse=True)
    assert found["up"] == sorted(found["down"], key=float)
    assert (found["words"], found["sort"]) == (sorted(found["words"]), "ascending")
    assert found["overflow"] <= 0
    assert set(found["images"]) == {176}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", ["one run", "two runs"])
def test_axe_finds_nothing_to_mend(kind: str, scheme: str, page: Path, saved: tuple[str, str], tmp_path: Path) -> None:
    axe = os.environ.get("ASTROATTN_AXE")
    if axe is None:
        pytest.skip("ASTROATTN_AXE does not name the axe.min.js of npm's axe-core")
    if kind == "two runs":
        page = tmp_path / "page.html"
        load_runs(saved).write_page(page)
    browser = Browser(page, tmp_path / "profile")
    try:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.ask("Emulation.setEmulatedMedia", browser.session, features=features)
        browser.run(Path(axe).read_text(encoding="utf-8") + "\n;1")
        found = browser.run("axe.run().then(found => [found.passes.length, found.violations])")
    finally:
        browser.close()
    passes, violations = found
    assert passes > 10
    assert not [(each["id"], [node["html"] for node in each["nodes"]]) for each in violations]


@pytest.fixture
def saved(photos: Fidelity, better: Fidelity, tmp_path: Path) -> tuple[str, str]:
    paths = str(tmp_path / "rough.json"), str(tmp_path / "better.json")
    for result, path in zip((photos, better), paths, strict=True):
        result.save_json(path)
    return paths


def test_runs_on_the_same_items_are_held_against_one_another(
    saved: tuple[str, str], photos: Fidelity, better: Fidelity
) -> None:
    (rows,) = load_runs(saved).differences().values()
    found = {row.title: row for row in rows}
    agreement = found["first choice kept"]
    pairs = list(zip(photos.per_item["top1"], better.per_item["top1"], strict=True))
    lost, gained = pairs.count((1.0, 0.0)), pairs.count((0.0, 1.0))
    assert (agreement.lost, agreement.gained) == (lost, gained)
    assert gained > 0
    assert agreement.p == pytest.approx(stats.binomtest(lost, lost + gained).pvalue)
    for title, figure in {
        "logit error": "logit_error",
        "embedding cosine": "embedding_cosine",
        "KL, nats": "kl",
    }.items():
        assert found[title].first == pytest.approx(photos.value(figure), rel=1e-4)
        assert found[title].other == pytest.approx(better.value(figure), rel=1e-4)
    error = found["logit error"]
    assert error.low is not None
    assert error.high is not None
    assert error.low < error.other - error.first < error.high < 0  # larger budgets err less, and not by chance
    assert found["KL, nats"].p is None
    assert found["accuracy, top-1"].p is not None
    one, other = (numbers(run, "cosine") for run in (photos, better))
    change = np.mean(other - one)
    spread = 1.96 * np.std(other - one) / math.sqrt(COUNT)
    cosine = found["embedding cosine"]
    assert (cosine.low, cosine.high) == (
        pytest.approx(change - spread, abs=spread),
        pytest.approx(change + spread, abs=spread),
    )


def test_the_same_run_twice_differs_in_nothing(photos: Fidelity, tmp_path: Path) -> None:
    paths = [tmp_path / "a.json", tmp_path / "b<b>$x^$.json"]
    for path in paths:
        photos.save_json(path)
    runs = load_runs(paths)
    (rows,) = runs.differences().values()
    assert all((row.low, row.high, row.first) == (0, 0, row.other) for row in rows)
    assert {row.p for row in rows if row.p is not None} == {1.0}
    runs.write_page(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<b>" not in text
    assert text.count("b&lt;b&gt;$x^$") >= 4  # titles, tables and the chart, with no formula made of it


def run(*arguments: str) -> int:
    """The exit code of the command."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_report_prints_a_table_and_writes_a_page(
    saved: tuple[str, str], better: Fidelity, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("report", *saved, "--format", "markdown") == 0
    lines = capsys.readouterr().out.splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len({line.count("|") for line in table[:4]}) == 1
    assert f"{better.value('cost'):.1%}" in next(line for line in table if line.startswith("| better"))
    assert run("report", *saved) == 0
    assert "better against rough" in capsys.readouterr().out
    path = tmp_path / "runs.html"
    assert run("report", *saved, "--out", str(path)) == 0
    read = Reader(path)
    assert [caption for caption, _ in read.tables] == ["Runs, with 95 % intervals", "better against rough"]
    assert len(read.all("figure")) == 1
    assert run("report", *saved, "--out", str(path)) == 2
    assert "is there already; --force writes over it" in capsys.readouterr().err
    assert run("report", *saved, "--format", "json") == 0
    assert set(json.loads(capsys.readouterr().out)) == {"better"}


def test_runs_on_other_items_are_refused(
    photos: Fidelity, saved: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = photos.per_item["name"]
    others = {
        "name": replace(photos, per_item={**photos.per_item, "name": [*names[:2], "else.jpg", *names[3:]]}),
        "count": replace(photos, items=9),
        "bare": replace(photos, per_item={}),
    }
    for kind, result in others.items():
        result.save_json(tmp_path / f"{kind}.json")
        assert run("report", saved[0], str(tmp_path / f"{kind}.json")) == 2
    errors = capsys.readouterr().err.splitlines()
    assert "'name' is of other items than 'rough': item 2 is 'else.jpg', not " in errors[0]
    assert "9, not 10" in errors[1]
    assert "'bare' has no per_item" in errors[2]
    assert run("report", saved[0]) == 2
    assert "two or more" in capsys.readouterr().err


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a BERT that reads letters, and twelve texts."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=28, max_position_embeddings=64, **SMALL)).save_pretrained(folder)
    words = {word: index for index, word in enumerate(["[UNK]", "[PAD]", *"abcdefghijklmnopqrstuvwxyz"])}
    core = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    core.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)
    letters = np.random.default_rng(0).choice(list("abcdefghij"), (12, 20))
    (folder / "texts.txt").write_text("\n".join(" ".join(line) for line in letters))
    return folder


def test_compare_ends_with_the_verdict(bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    budget = ["--near", "4", "--exact-keys", "2", "--tile", "2", "--num-hidden", "2", "--diagnose", "0", "--limit", "8"]
    command = ["compare", str(bert), "--data", str(bert / "texts.txt"), *budget]
    paths = {name: str(tmp_path / f"out.{name}") for name in ("json", "html", "parquet")}
    written = ["--json", paths["json"], "--report", paths["html"], "--items", paths["parquet"]]
    assert run(*command, *written, "--tolerance", "0.01") == 0
    assert "\nstands in for the original: the mean cosine" in capsys.readouterr().out
    rows = load_items(paths["parquet"])
    assert rows == load_result(paths["json"]).per_item
    assert rows["name"][0] == (bert / "texts.txt").read_text().splitlines()[0]
    assert "Yes: it stands in" in Path(paths["html"]).read_text(encoding="utf-8")
    # chunks of token ids are words again
    chunks = str(tmp_path / "chunks.json")
    failed = run(*command, "--tokens", "8", "--tolerance", "0.999", "--metric", "neighbour", "--json", chunks)
    assert failed == 1
    assert "not shown to stand in for the original" in capsys.readouterr().out
    assert set(load_result(chunks).per_item["name"][0]) <= set("abcdefghij ")
    assert run("report", paths["json"], chunks) == 2
    assert "is of other items" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--report", "page.pdf"], "report: must end in .html"),
        (["--report", "no/such/page.html"], "report: there is no folder"),
        (["--items", "no/such/items.parquet"], "items: there is no folder"),
        (["--tolerance", "2", "--metric", "top1"], "tolerance: must be above 0 and below 1"),
        (["--tolerance", "0.9", "--metric", "best"], "metric: must be one of"),
    ],
)
def test_bad_options_are_refused_before_anything_is_loaded(
    options: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("compare", "no/such/model", "--data", "x", *options) == 2
    assert error in capsys.readouterr().err


def test_the_command_line_lists_what_a_tolerance_can_be_of() -> None:
    assert tuple(verdict.MEASURED) == choices.TOLERANCES
