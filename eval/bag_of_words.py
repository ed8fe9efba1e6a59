"""What a bag of words reaches on the tasks of `eval.finetune_text`, by which they are to be judged.

TF-IDF of words and pairs of words and a logistic regression, on the same parts: what it reads right needs no attention.

    python -m eval.bag_of_words --json docs/results/bag_of_words.json
"""

from __future__ import annotations

from typing import Any

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from eval.common import JsonOption, data_folder, print_rows, rounded, run_script, write_json
from eval.finetune_text import load_parts

TASKS = {  # data, test, items joined
    "SST-2": ("sst2/stsa.binary.train", "sst2/stsa.binary.dev", 1),
    "AG News digests": ("agnews/first3800.csv", None, 8),
}


def measure(data: str, test: str | None, size: int) -> dict[str, Any]:
    """The share of reported texts that is read right, and how many there were."""
    train, _, reported = load_parts(data, test, size, None)
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10))
    model.fit([text for text, _ in train], [label for _, label in train])
    accuracy = model.score([text for text, _ in reported], [label for _, label in reported])
    return rounded({"train": len(train), "reported": len(reported), "accuracy": accuracy})


def main(json: JsonOption = None) -> None:
    """Read both tasks without attention."""
    folder = data_folder()
    if folder is None:
        raise ValueError("ASTROATTN_DATA is not set")
    rows = []
    for task, (data, test, size) in TASKS.items():
        held = None if test is None else str(folder / test)
        rows.append({"task": task} | measure(str(folder / data), held, size))
    print_rows(rows, title="a bag of words")
    if json:
        write_json(json, rows, seed=0)


if __name__ == "__main__":
    run_script(main, data=True)
