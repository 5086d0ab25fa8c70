"""Whose rows influence ranks first for questions about authors of TOFU, on a small real model.

    palinode run recipes/smollm2_tofu.toml                       # makes the target
    python benchmarks/influence_tofu.py --base FOLDER --target FOLDER --data FOLDER --output DIR
        [--only base-none] [--seed 0] [--json]

The rows are those that the recipe trains the target on: the 40 of forget01 (two authors, 20 rows each) and
200 of retain99. Asked are 20 of the 40 facts, ten of each author, question and answer both in a paraphrase
that no model was trained on. Told is the share of the author's own rows among the first 20, and how often
the row of the asked fact is the first, and among the first 5. `words` needs no model: the cosine of the words
that a row and a question share, the rarer the more. `middle` is halfway from base to target. Figures in
docs/influence.md.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from palinode import Checkpoint, Example, Point, PromptStyle, read_examples
from palinode.data.examples import at_most
from palinode.data.tokenize import tokenize
from palinode.influence.ranking import adam_scales, projected, relate
from palinode.models import load_model, load_tokenizer
from palinode.models.inplace import put
from palinode.models.loading import pad_token
from palinode.models.reading import Projection

AUTHOR, LENGTH = 20, 512
"""Rows of an author, tokens of a row."""
WIDTHS = (4093, 65537)
"""Numbers that a gradient is projected to: the default, and many more."""


class Projections(Projection):
    """Projections of several widths, one behind the other."""

    def __init__(self, model: PreTrainedModel, *, seed: int) -> None:
        self.parts, self.width = [Projection(model, seed=seed, width=one) for one in WIDTHS], sum(WIDTHS)

    def of(self, number: int, gradient: torch.Tensor) -> torch.Tensor:
        return torch.cat([one.of(number, gradient) for one in self.parts])


def gradients(
    target: Checkpoint, at: Point, rows: Sequence[Example], asked: Sequence[Example], *, adam: bool, seed: int
) -> list[np.ndarray]:
    """Return the projected gradients of rows and questions where θ is at this point."""
    live, tokenizer = load_model(target, device=torch.device("cpu")), load_tokenizer(target)
    put(at, live)
    pad_id, projection = pad_token(tokenizer), Projections(live, seed=seed)
    sets = [tokenize(one, tokenizer, max_length=LENGTH, style=PromptStyle()) for one in (rows, asked)]
    scales = adam_scales(live, sets[0], pad_id=pad_id) if adam else None
    found = [np.empty((len(own), projection.width), np.float32) for own in sets]
    for own, kept in zip(sets, found, strict=True):
        groups = [[row] for row in own]
        projected(live, groups, projection, kept.__setitem__, pad_id=pad_id, scales=scales)
    return found


def shared_words(rows: Sequence[Example], asked: Sequence[Example]) -> np.ndarray:
    """Return how many words each row shares with each question, the rarer the more, as a cosine."""
    texts = [Counter(re.findall(r"\w+", f"{one.prompt} {one.answer}".lower())) for one in (*rows, *asked)]
    in_rows = Counter(word for text in texts[: len(rows)] for word in text)
    rare = {word: np.log(len(rows) / (1 + in_rows[word])) for text in texts for word in text}
    words = sorted(rare)
    table = np.array([[(word in text) * rare[word] for word in words] for text in texts])
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    return table[: len(rows)] @ table[len(rows) :].T


def figures(scores: np.ndarray, asked: Sequence[int]) -> dict[str, float]:
    """Return the mean share of the author's rows among the first 20, and recall of the fact's own row."""
    order = np.argsort(-scores, axis=0, kind="stable")
    own = [set(range(fact // AUTHOR * AUTHOR, fact // AUTHOR * AUTHOR + AUTHOR)) for fact in asked]
    shares = [len(own[q] & {*order[:AUTHOR, q].tolist()}) / AUTHOR for q in range(len(asked))]
    places = [order[:, q].tolist().index(fact) for q, fact in enumerate(asked)]
    return {
        "own among 20": float(np.mean(shares)),
        "error": float(np.std(shares) / len(shares) ** 0.5),
        "fact first": float(np.mean([place == 0 for place in places])),
        "fact among 5": float(np.mean([place < 5 for place in places])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder of TOFU's JSON lines")
    parser.add_argument("--output", type=Path, required=True, help="folder for the gradients")
    parser.add_argument("--only", help="a checkpoint and a preconditioner, as base-none")
    parser.add_argument("--seed", type=int, default=0, help="the recipe's, which says what 200 rows")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    retain = read_examples(args.data / "retain99.jsonl")
    rows = [*read_examples(args.data / "forget01.jsonl"), *at_most(retain, 200, seed=args.seed)]
    columns = {"question": "paraphrased_question", "answer": "paraphrased_answer"}
    facts = [*range(0, 2 * AUTHOR, 2)]
    told = read_examples(args.data / "forget01_perturbed.jsonl", columns=columns)
    asked = [told[fact] for fact in facts]
    results = {"words": figures(shared_words(rows, asked), facts)}
    base, target = Checkpoint.open(args.base), Checkpoint.open(args.target)
    points = {"base": base, "middle": base + 0.5 * (target - base), "target": target}
    for at, point in points.items():
        for preconditioner in ("none", "adam"):
            kept = args.output / f"{at}-{preconditioner}.npz"
            if not kept.exists() and args.only in (None, kept.stem):
                started, adam = time.monotonic(), preconditioner == "adam"
                found = gradients(target, point, rows, asked, adam=adam, seed=0)
                np.savez(kept, rows=found[0], asked=found[1], seconds=time.monotonic() - started)
            if not kept.exists():
                continue
            stored = np.load(kept)
            for width, start in zip(WIDTHS, (0, *WIDTHS), strict=False):
                pair = [stored[name][:, start : start + width] for name in ("rows", "asked")]
                for measure in ("ridge", "cosine", "product"):
                    one = figures(relate(pair[0], pair[1], measure), facts)
                    told = f"{measure}, {preconditioner}, {at}, width {width}"
                    results[told] = {**one, "seconds": float(stored["seconds"])}
    for name, one in results.items():
        share = f"{one['own among 20']:.2f} ± {one['error']:.2f}"
        first = f"{one['fact first']:.2f} / {one['fact among 5']:.2f}"
        print(f"| {name} | {share} | {first} | {one.get('seconds', 0):.0f} |")
    if args.json:
        print(json.dumps({"seed": args.seed, "results": results}))


if __name__ == "__main__":
    main()
