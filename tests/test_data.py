"""Photos and texts from every kind of source, and what is said about sources that are of no use."""

from __future__ import annotations

import io
import os
import shutil
import sysconfig
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from astroattn.data import Data, load_data
from astroattn.data.photos import Photo

CLASSES = "index\twnid\tname\n0\tn01\ttench\n1\tn02\tcrane\n2\tn03\tcrane\n"


def save_photo(path: Path, colour: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((6, 8, 3), colour, np.uint8)).save(path)


def make_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def photo_bytes(colour: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((6, 8, 3), colour, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Every letter a token, with a token at both ends, as BERT has them."""
    vocabulary = {letter: index for index, letter in enumerate("abcdefghijklmnopqrstuvwxyz")}
    vocabulary |= {"[UNK]": 26, "[CLS]": 27, "[SEP]": 28, "[PAD]": 29}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 27), ("[SEP]", 28)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]")


def names(data: Data) -> list[str]:
    return [item.name for item in data.items if isinstance(item, Photo)]


def colours(data: Data) -> list[int]:
    return [item.open().getpixel((0, 0))[0] for item in data.items if isinstance(item, Photo)]


def test_a_flat_folder_gives_its_photos_in_order_of_name(tmp_path: Path) -> None:
    for name, colour in (("b.png", 20), ("a.png", 10)):
        save_photo(tmp_path / name, colour)
    (tmp_path / "notes.txt").write_text("no photo")
    data = load_data(str(tmp_path), "image")
    assert names(data) == ["a.png", "b.png"]
    assert colours(data) == [10, 20]
    assert data.labels is None


def test_folders_are_classes_by_name_or_by_order(tmp_path: Path) -> None:
    for folder in ("cat", "dog", "ant"):
        save_photo(tmp_path / folder / "1.png")
    by_order = load_data(str(tmp_path), "image", num_classes=3)
    assert by_order.labels == [0, 1, 2]
    by_name = load_data(str(tmp_path), "image", class_names={"dog": 7, "cat": 5, "ant": 2}, num_classes=10)
    assert by_name.labels == [2, 5, 7]
    unknown = load_data(str(tmp_path), "image", num_classes=10)
    assert unknown.labels is None
    assert "'ant'" in unknown.notes[0]
    # the order is that of all folders, not only of those within the limit
    assert load_data(str(tmp_path), "image", num_classes=3, half="odd").labels == [1]


def test_a_tar_is_read_in_place_and_labelled_by_the_list_beside_it(tmp_path: Path) -> None:
    (tmp_path / "classes.tsv").write_text(CLASSES)
    path = make_tar(
        tmp_path / "photos.tar",
        {"0002_n03.png": photo_bytes(30), "0000_n01.png": photo_bytes(10), "README": b"words", "._0000_n01.png": b"x"},
    )
    data = load_data(str(path), "image")
    assert data.labels == [0, 2]
    assert colours(data) == [10, 30]
    assert sorted(os.listdir(tmp_path)) == ["classes.tsv", "photos.tar"]


def test_folders_may_be_called_by_index_and_wnid(tmp_path: Path) -> None:
    (tmp_path / "classes.tsv").write_text(CLASSES)
    for folder in ("0000_n01", "0002_n03", "n02"):
        save_photo(tmp_path / folder / "1.png")
    assert load_data(str(tmp_path), "image").labels == [0, 2, 1]
    (tmp_path / "n02").rename(tmp_path / "0000_n02")  # index and wnid of two classes
    unknown = load_data(str(tmp_path), "image")
    assert unknown.labels is None


def test_a_class_list_knows_indices_only_with_their_wnid(tmp_path: Path) -> None:
    classes = tmp_path / "list.tsv"
    classes.write_text(CLASSES)
    path = make_tar(tmp_path / "photos.tar", {"0001_n03.png": photo_bytes()})
    with pytest.raises(ValueError, match=r"classes: .* has no class '0001_n03'"):
        load_data(str(path), "image", classes=classes)
    save_photo(tmp_path / "folder" / "crane" / "1.png")
    save_photo(tmp_path / "folder" / "tench" / "1.png")
    with pytest.raises(ValueError, match="has no class 'crane'"):  # two classes have this name
        load_data(str(tmp_path / "folder"), "image", classes=classes)
    classes.write_text("wrong\theader\n1\t2\n")
    with pytest.raises(ValueError, match="columns index, wnid and name"):
        load_data(str(path), "image", classes=classes)


def test_links_in_a_tar_are_not_followed(tmp_path: Path) -> None:
    save_photo(tmp_path / "outside.png")
    with tarfile.open(tmp_path / "photos.tar", "w") as archive:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "outside.png"
        archive.addfile(link)
    with pytest.raises(ValueError, match="no images"):
        load_data(str(tmp_path / "photos.tar"), "image")


@pytest.mark.parametrize("kind", ["folder", "tar", "not a tar", "missing"])
def test_a_source_without_photos_is_refused(tmp_path: Path, kind: str) -> None:
    source = tmp_path / "source"
    if kind == "folder":
        source.mkdir()
        (source / "notes.txt").write_text("words")
    elif kind == "tar":
        make_tar(source, {"notes.txt": b"words"})
    elif kind == "not a tar":
        source.write_bytes(b"words" * 1000)
    expected = {
        "folder": "no images",
        "tar": "no images",
        "not a tar": "uncompressed tar",
        "missing": "no file or folder",
    }
    with pytest.raises(ValueError, match=expected[kind]):
        load_data(str(source), "image")


def test_a_broken_photo_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"not a jpeg")
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "b.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:2000])
    data = load_data(str(tmp_path), "image")
    for item in data.items:
        with pytest.raises(ValueError, match=r"'[ab]\.(jpg|png)' cannot be read as an image"):
            item.open()


def test_halves_do_not_overlap_and_the_limit_comes_after(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join("abcde"))
    assert load_data(str(path), "text", half="even").items == ["a", "c", "e"]
    assert load_data(str(path), "text", half="odd").items == ["b", "d"]
    assert load_data(str(path), "text", half="even", limit=2).items == ["a", "c"]
    for options, name in (({"half": "left"}, "half"), ({"limit": 0}, "limit")):
        with pytest.raises(ValueError, match=name):
            load_data(str(path), "text", **options)


@pytest.mark.parametrize(
    ("name", "content", "items", "labels", "scores"),
    [
        ("a.txt", "one\n\n two \n", ["one", "two"], None, None),
        ("a.txt", "1 one\n0 two", ["one", "two"], [1, 0], None),
        ("a.txt", "1 one\ntwo", ["1 one", "two"], None, None),
        ("a.csv", '"a, b",c,5.0\nd,e,0.5\n', ["a, b", "c", "d", "e"], None, [5.0, 0.5]),
        ("a.csv", "3,title,body\n1,x,y\n", ["title. body", "x. y"], [3, 1], None),
        ("a.csv", "good,1\nbad,0\n", ["good", "bad"], [1, 0], None),
        ("a.csv", "label,text\n1,good\n0,bad\n", ["good", "bad"], [1, 0], None),
        ("a.tsv", "sentence1\tsentence2\tscore\na\tb\t2\n", ["a", "b"], None, [2.0]),
        ("a.csv", "text,label\ngood,POS\nbad,neg\n", ["good", "bad"], [1, 0], None),
    ],
)
def test_texts(
    tmp_path: Path, name: str, content: str, items: list[str], labels: list[int] | None, scores: list[float] | None
) -> None:
    (tmp_path / name).write_text(content)
    data = load_data(str(tmp_path / name), "text", class_names={"pos": 1, "neg": 0})
    assert data.items == items
    assert data.labels == labels
    assert data.scores == scores


def test_labels_of_unknown_names_are_left_out_and_said_so(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\ngood,fine\n")
    data = load_data(str(tmp_path / "a.csv"), "text")
    assert data.labels is None
    assert "labels are not used" in data.notes[-1]


def test_latin_1_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("na\xefve".encode("latin-1"))
    assert load_data(str(tmp_path / "a.txt"), "text").items == ["na\xefve"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "has no text"),
        ("a.csv", b"", "has no rows"),
        ("a.csv", b"text,label\n", "no rows"),
        ("a.csv", b"a,b,c\nd,e,f\n", "not understood"),
        ("a.csv", b"a,b\nc\n", "do not all have 2 columns"),
        ("a.csv", b"sentence1,sentence2\na,b\n", "no score"),
        ("a.csv", b"sentence1,sentence2,score\na,b,much\n", "not complete"),
        ("a.txt", b"a\0b", "not a text file"),
    ],
)
def test_texts_of_no_use_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_data(str(tmp_path / name), "text")


def test_chunks_are_full_and_taken_from_the_documents_in_turn(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    (tmp_path / "1.txt").write_text("a" * 20)
    (tmp_path / "2.txt").write_text("b" * 9)
    (tmp_path / "3.txt").write_text("c" * 3)
    data = load_data(str(tmp_path), "text", tokenizer=tokenizer, tokens=8, max_tokens=16)
    assert data.items == [[27, *[letter] * 6, 28] for letter in (0, 1, 0, 0)]
    for tokens in (32, 4):
        with pytest.raises(ValueError, match="8 to 16"):
            load_data(str(tmp_path), "text", tokenizer=tokenizer, tokens=tokens, max_tokens=16)
    (tmp_path / "table.csv").write_text("aaa,1\nbbb,0\nccc,1\n")  # of a table only the texts are cut
    table = load_data(str(tmp_path / "table.csv"), "text", tokenizer=tokenizer, tokens=8, max_tokens=16)
    assert table.items == [[27, 0, 0, 0, 26, 1, 1, 28]]
    with pytest.raises(ValueError, match=r"no text of .* has 16 tokens"):
        load_data(str(tmp_path / "3.txt"), "text", tokenizer=tokenizer, tokens=16, max_tokens=16)


def test_python_docs_are_long_varied_and_the_same_every_time(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("argparse", "doctest", "inspect", "shutil", "statistics", "threading", "turtle", "typing"):
        shutil.copy(Path(sysconfig.get_path("stdlib")) / f"{name}.py", tmp_path)  # all of it takes seconds to read
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": tmp_path}.__getitem__)
    first = load_data("python-docs", "text", tokenizer=tokenizer, tokens=512, limit=64)
    assert [len(item) for item in first.items] == [512] * 64
    assert len({tuple(item) for item in first.items}) == 64
    assert first.items == load_data("python-docs", "text", tokenizer=tokenizer, tokens=512, limit=64).items
    with pytest.raises(ValueError, match="tokens"):
        load_data("python-docs", "text")


@pytest.mark.parametrize("kind", ["csv", "parquet", "folder"])
def test_datasets_from_local_files(tmp_path: Path, kind: str) -> None:
    datasets = pytest.importorskip("datasets")
    path = tmp_path / ("data.parquet" if kind == "parquet" else "data.csv")
    if kind == "parquet":
        datasets.Dataset.from_dict({"text": ["good", "bad"], "label": [1, 0]}).to_parquet(path)
    else:
        path.write_text("text,label\ngood,1\nbad,0\n")
    source = tmp_path if kind == "folder" else path
    data = load_data(f"datasets:{source}:train", "text")
    assert data.items == ["good", "bad"]
    assert data.labels == [1, 0]
    assert load_data(f"datasets:{source}", "text", limit=1).items == ["good"]
    with pytest.raises(ValueError, match="no split 'nope'"):
        load_data(f"datasets:{source}:nope", "text")


def test_datasets_with_photos(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])})
    photos = [Image.fromarray(np.full((6, 8, 3), colour, np.uint8)) for colour in (10, 20)]
    rows = datasets.Dataset.from_dict({"image": photos, "label": [1, 0]}, features=features)
    rows.to_parquet(tmp_path / "data.parquet")
    data = load_data(f"datasets:{tmp_path / 'data.parquet'}", "image", class_names={"ant": 4, "bee": 5})
    assert colours(data) == [10, 20]
    assert data.labels == [5, 4]
    with pytest.raises(ValueError, match="the model reads text"):
        load_data(f"datasets:{tmp_path / 'data.parquet'}", "text")


def test_batches_are_made_when_asked_for_and_hold_every_item_once() -> None:
    made: list[list[str]] = []

    def encode(items: list[str]) -> int:
        made.append(items)
        return len(items)

    batches = Data("letters", list("abcde")).batches(encode, 2)
    assert len(batches) == 3
    assert not made
    assert list(batches) == [2, 2, 1]
    assert made == [["a", "b"], ["c", "d"], ["e"]]
    with pytest.raises(ValueError, match="batch_size"):
        Data("letters", ["a"]).batches(encode, 0)


def test_the_packed_photos_are_labelled(data_dir: Path) -> None:
    data = load_data(str(data_dir / "imagenet_photos" / "photos.tar"), "image")
    assert data.labels == list(range(0, 1000, 2))
    assert data.items[0].open().size == (224, 224)
