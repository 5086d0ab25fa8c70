"""Time of the whole TOFU forget01 evaluation, beside that of the plain way the field does it.

    python benchmarks/evaluation.py [--model DIR] [--data DIR] [--rows N] [--repeats 3] [--json]

Both ways work out, of one live model in float32: on the forget set the probability of the answer, of its
paraphrase and of five wrong answers, extraction strength, exact memorisation, the membership attacks LOSS,
ZLib, Min-K and Min-K++ (these also on a holdout set, if --data has one) and the model's own answers; on
the retain set, real authors and world facts probabilities, wrong answers (three in the last two) and the
model's own answers.

- palinode: `ask`, question set after question set; every figure from one pass over the answers;
- plain: a pass for each metric and data set, rows in file order, batches of 32 padded on the right, a full
  log-softmax where the field takes one (Min-K++) and logits of all positions everywhere; answers from
  `model.generate`, batches of 32 padded on the left, 200 new tokens at most.

They are run in turn; the speed-up is the median of the ratios within a round. That the scores agree is
checked: the largest difference of any log-probability or standardised one, and the share of equal answers.
Without --model a small random Llama is made up, without --data rows of TOFU's shape and lengths. --rows
limits the rows of each set, evenly spaced. Peaks of memory are read from /proc (Linux), each above the
process before its turn, where the kernel lets us reset them; on a GPU from torch.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import tempfile
import time
import zlib
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

BATCH, NEW_TOKENS, MAX_LENGTH = 32, 200, 512
SETS = {
    "forget": ("forget01_perturbed", 40, 5),
    "retain": ("retain_perturbed", 400, 5),
    "authors": ("real_authors_perturbed", 100, 3),
    "facts": ("world_facts_perturbed", 117, 3),
}
"""File, rows and wrong answers of each question set."""
PARTS = ("likelihoods", "answers")

Row = dict[str, object]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a model folder with a tokenizer")
    parser.add_argument("--data", type=Path, help="a folder with TOFU's files, named as on the hub, .jsonl")
    parser.add_argument("--rows", type=int, help="rows of each set, at most")
    parser.add_argument("--repeats", type=int, default=3, help="rounds in which both ways are run")
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS, help="limit of an answer")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(args.model or invent_model(Path(folder)), args)
    report(figures)
    if args.json:
        print(json.dumps(figures))


def measure(model_folder: Path, args: argparse.Namespace) -> dict[str, object]:
    """Run both ways in turn and return times, ratios, differences and peaks."""
    from palinode.models import load_model, load_tokenizer, pick_device
    from palinode.weights.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(model_folder)
    model, tokenizer = load_model(checkpoint, device=pick_device(args.device)), load_tokenizer(checkpoint)
    data = read_sets(args.data, args.rows) if args.data else invent_sets(args.rows)
    ways = {"palinode": ask_way, "plain": plain_way}
    runs: dict[str, list[Run]] = {name: [] for name in ways}
    for repeat in range(args.repeats):
        for name in sorted(ways, reverse=bool(repeat % 2)):
            run = Run()
            run.start()
            ways[name](model, tokenizer, data, args.new_tokens, run)
            run.stop()
            runs[name].append(run)
    last = {name: found[-1] for name, found in runs.items()}
    pairs = list(zip(runs["plain"], runs["palinode"], strict=True))
    ratios = [plain.total / ours.total for plain, ours in pairs]
    ours, plain = last["palinode"], last["plain"]
    return {
        "speedup": median(ratios),
        "speedup_spread": [min(ratios), max(ratios)],
        "speedup_cpu": median(plain.cpu_s / ours.cpu_s for plain, ours in pairs),
        **{f"speedup_{part}": median(p.seconds[part] / o.seconds[part] for p, o in pairs) for part in PARTS},
        **{f"{name}_s": median(run.total for run in found) for name, found in runs.items()},
        **{
            f"{name}_{part}_s": median(run.seconds[part] for run in found)
            for name, found in runs.items()
            for part in PARTS
        },
        **{f"{name}_cpu_s": median(run.cpu_s for run in found) for name, found in runs.items()},
        **{f"{name}_peak_mb": max(run.peak_mb for run in found) for name, found in runs.items()},
        **differences(ours, plain),
        "mean_answer_tokens": plain.answer_tokens / max(1, len(plain.answers)),
        "rows": {name: len(rows) for name, rows in data.items()},
        "rounds": args.repeats,
        "parameters": checkpoint.parameters,
        "device": str(model.device),
    }


@dataclass
class Run:
    """What one way took and found in one round."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    logprobs: dict[tuple[object, ...], list[float]] = field(default_factory=dict)
    """Log-probabilities by (set, row, kind, number)."""
    standardised: dict[tuple[object, ...], list[float]] = field(default_factory=dict)
    answers: dict[tuple[str, int], str] = field(default_factory=dict)
    scores: dict[str, list[float]] = field(default_factory=dict)
    """Extraction strength, exact memorisation and attack scores on the forget set."""
    answer_tokens: int = 0
    cpu_s: float = 0.0
    """Seconds of processor time, checks and book-keeping included; a busy machine changes them less."""
    peak_mb: float = 0.0
    before_mb: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def timed(self, part: str, work: Callable[..., object], *given: object) -> object:
        import torch

        began = time.perf_counter()
        result = work(*given)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[part] += time.perf_counter() - began
        return result

    def start(self) -> None:
        """Forget earlier peaks of memory, and read the clock."""
        import torch

        self.cpu_s = -time.process_time()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self.before_mb = torch.cuda.memory_allocated() / 2**20
            return
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self.before_mb = status_mb("VmRSS")

    def stop(self) -> None:
        """Note the peak of memory and the processor time."""
        import torch

        self.cpu_s += time.process_time()
        top = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else status_mb("VmHWM")
        self.peak_mb = top - self.before_mb


def status_mb(name: str) -> float:
    return int(re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def differences(ours: Run, plain: Run) -> dict[str, object]:
    """Return how far the two ways differ."""

    def largest(first: dict, second: dict) -> float:
        assert first.keys() == second.keys(), "the two ways have measured different things"
        pairs = ((a, b) for key in first for a, b in zip(first[key], second[key], strict=True))
        return max(abs(a - b) for a, b in pairs)

    equal = sum(ours.answers[key] == plain.answers[key] for key in plain.answers)
    return {
        "largest_logprob_difference": largest(ours.logprobs, plain.logprobs),
        "largest_standardised_difference": largest(ours.standardised, plain.standardised),
        "largest_score_difference": largest(ours.scores, plain.scores),
        "equal_answers": equal / len(plain.answers),
    }


def report(figures: dict[str, Any]) -> None:
    rows = ", ".join(f"{count} {name}" for name, count in figures["rows"].items())
    low, high = figures["speedup_spread"]
    print(
        f"{figures['parameters'] / 1e9:.2f} B parameters on {figures['device']}; {rows}; "
        f"answers of {figures['mean_answer_tokens']:.0f} tokens\n"
        f"Seconds, medians of {figures['rounds']} rounds\n"
    )
    print("| way | all | likelihoods | answers | processor | peak, MB |\n|---|---|---|---|---|---|")
    for name in ("palinode", "plain"):
        times = [figures[f"{name}{part}_s"] for part in ("", "_likelihoods", "_answers", "_cpu")]
        print(f"| {name} | {' | '.join(f'{t:.2f}' for t in times)} | {figures[f'{name}_peak_mb']:+,.0f} |")
    parts = " | ".join(f"{figures[f'speedup_{part}']:.2f} x" for part in PARTS)
    whole = f"{figures['speedup']:.2f} x ({low:.2f} to {high:.2f})"
    print(f"| speed-up | {whole} | {parts} | {figures['speedup_cpu']:.2f} x | |")
    print(
        f"\nLargest difference of a log-probability {figures['largest_logprob_difference']:.1e}, of a "
        f"standardised one {figures['largest_standardised_difference']:.1e}, of a score "
        f"{figures['largest_score_difference']:.1e}; {figures['equal_answers']:.1%} of the answers are equal"
    )


# Palinode's way


def ask_way(model, tokenizer, data: dict[str, list[Row]], new_tokens: int, run: Run) -> None:
    """Ask the questions of each set, and take every figure from the outcomes."""
    from palinode.data.examples import Example, Message, Question
    from palinode.evaluation.ask import ask
    from palinode.settings import Asking

    for name, rows in data.items():
        member = name in ("forget", "holdout")
        questions = [
            Question(
                Example(place, name, "question", (Message("user", row["question"]),), row["answer"]),
                alternatives={kind: tuple(texts) for kind, texts in others(row).items()},
            )
            for place, row in enumerate(rows)
        ]
        asking = Asking(
            generate=name != "holdout", max_new_tokens=new_tokens, max_length=MAX_LENGTH, standardise=member
        )
        clock = PartClock(run)
        outcomes = ask(model, tokenizer, questions, asking, listener=clock)
        clock.close()
        for outcome in outcomes:
            key = (name, outcome.row)
            run.logprobs[*key, "answer", 0] = list(outcome.logprobs)
            for kind, likelihoods in outcome.alternatives.items():
                for number, likelihood in enumerate(likelihoods):
                    run.logprobs[*key, kind, number] = list(likelihood.logprobs)
            if member:
                run.standardised[key] = list(outcome.standardised)
                run.timed("likelihoods", add_scores, run, name, outcome)
            if outcome.generated is not None:
                run.answers[key] = outcome.generated


class PartClock:
    """A listener that gives the time of every task to its part; what lies between goes to the part before."""

    def __init__(self, run: Run):
        self.run, self.part, self.began = run, "likelihoods", time.perf_counter()

    def say(self, text: str) -> None:
        pass

    def task(self, label: str, total: int, unit: str):  # noqa: ARG002
        self.close()
        self.part = "answers" if label.endswith("answers") else "likelihoods"
        return nullcontext(lambda _amount: None)

    def close(self) -> None:
        now = time.perf_counter()
        self.run.seconds[self.part] += now - self.began
        self.began = now


def add_scores(run: Run, name: str, outcome) -> None:
    """Add what the plain way has a pass each for."""
    scores = figures_of(outcome.logprobs, outcome.hits, outcome.standardised, outcome.expected)
    for kind, value in scores.items():
        if name == "forget" or kind in ATTACKS:
            run.scores.setdefault(f"{name} {kind}", []).append(value)


def figures_of(logprobs, hits, standardised, text: str) -> dict[str, float]:
    """Return extraction strength, exact memorisation and the attack scores of one answer (end token last)."""
    count = len(hits) - 1
    wrong = next((place for place in range(count - 1, -1, -1) if not hits[place]), -1)
    loss = -math.fsum(logprobs) / len(logprobs)
    return {
        "extraction strength": 1 - min(wrong + 1, count - 1) / count,
        "exact memorisation": sum(hits[:-1]) / count,
        "loss": loss,
        "zlib": loss / len(zlib.compress(text.encode())),
        "min-k": smallest(logprobs[:-1]),
        "min-k++": smallest(standardised[:-1]) if len(standardised) else 0.0,
    }


ATTACKS = ("loss", "zlib", "min-k", "min-k++")


def smallest(values, share: float = 0.4) -> float:
    count = max(1, int(len(values) * share))
    return -math.fsum(sorted(values)[:count]) / count


# The plain way


def plain_way(model, tokenizer, data: dict[str, list[Row]], new_tokens: int, run: Run) -> None:
    """Make a pass for each metric and data set, and generate separately."""
    for name, rows in data.items():
        kinds = {"answer": 1, **{kind: len(texts) for kind, texts in others(rows[0]).items()}}
        for kind, count in kinds.items() if name != "holdout" else ():
            for number in range(count):
                texts = [row["answer"] if kind == "answer" else others(row)[kind][number] for row in rows]
                passed = run.timed("likelihoods", probability_pass, model, tokenizer, rows, texts)
                for place, logprobs in enumerate(passed):
                    run.logprobs[name, place, kind, number] = logprobs
        if name in ("forget", "holdout"):
            metrics = [*(("extraction strength", "exact memorisation") if name == "forget" else ()), *ATTACKS]
            for metric in metrics:
                run.timed("likelihoods", metric_pass, model, tokenizer, rows, name, metric, run)
        if name != "holdout":
            run.timed("answers", answer_pass, model, tokenizer, rows, name, new_tokens, run)


def encoded(tokenizer, rows: list[Row], texts: list[str]):
    """Return rows as token ids with the place where the answer begins."""
    from palinode.data.examples import Example, Message
    from palinode.data.tokenize import PromptStyle, tokenize

    examples = [
        Example(place, "", "question", (Message("user", row["question"]),), text)
        for place, (row, text) in enumerate(zip(rows, texts, strict=True))
    ]
    return tokenize(examples, tokenizer, max_length=MAX_LENGTH, style=PromptStyle())


def batches(model, tokenizer, rows: list[Row], texts: list[str]):
    """Yield (logits [B, T, V], token rows) of batches of 32 in file order."""
    import torch

    from palinode.data.batches import pad_right
    from palinode.models import pad_token

    tokens = encoded(tokenizer, rows, texts)
    for begin in range(0, len(tokens), BATCH):
        members = tokens[begin : begin + BATCH]
        batch = pad_right(members, pad_id=pad_token(tokenizer))
        with torch.no_grad():
            ids, mask = (torch.from_numpy(part).to(model.device) for part in (batch.ids, batch.mask))
            yield model(input_ids=ids, attention_mask=mask).logits, members


def probability_pass(model, tokenizer, rows: list[Row], texts: list[str]) -> list[list[float]]:
    """Return the log-probabilities of each answer's tokens: the cross entropy of all shifted logits."""
    import torch
    from torch.nn.functional import cross_entropy

    found = []
    for logits, members in batches(model, tokenizer, rows, texts):
        labels = torch.full(logits.shape[:2], -100, device=logits.device)
        for place, row in enumerate(members):
            labels[place, row.start : len(row.ids)] = torch.tensor(row.ids[row.start :])
        shifted, wanted = logits[:, :-1].flatten(0, 1), labels[:, 1:]
        losses = cross_entropy(shifted, wanted.flatten(), reduction="none").view(wanted.shape)
        found += [(-losses[place, row.start - 1 : len(row.ids) - 1]).tolist()
                  for place, row in enumerate(members)]  # fmt: skip
    return found


def metric_pass(model, tokenizer, rows: list[Row], name: str, metric: str, run: Run) -> None:
    """Add one metric of the answers of a set, from a pass of its own."""
    import torch

    texts, place = [str(row["answer"]) for row in rows], 0
    for logits, members in batches(model, tokenizer, rows, texts):
        everything = torch.log_softmax(logits, dim=-1) if metric.startswith("min-k") else None
        for position, row in enumerate(members):
            scored = torch.tensor(row.ids[row.start :], device=logits.device)
            own = logits[position, row.start - 1 : len(row.ids) - 1]
            hits = (own.argmax(dim=-1) == scored).tolist()
            full = everything[position, row.start - 1 : len(row.ids) - 1] if everything is not None else None
            full = torch.log_softmax(own, dim=-1) if full is None else full
            logprobs = full.gather(-1, scored[:, None])[:, 0]
            standardised: list[float] = []
            if metric == "min-k++":
                probabilities = full.exp()
                mean = (probabilities * full).sum(dim=-1)
                variance = ((probabilities * full.square()).sum(dim=-1) - mean.square()).clamp(min=1e-6)
                standardised = ((logprobs - mean) / variance.sqrt()).tolist()
                run.standardised[name, place] = standardised
            value = figures_of(logprobs.tolist(), hits, standardised, texts[place])[metric]
            run.scores.setdefault(f"{name} {metric}", []).append(value)
            if name == "holdout":
                run.logprobs[name, place, "answer", 0] = logprobs.tolist()
            place += 1


def answer_pass(model, tokenizer, rows: list[Row], name: str, new_tokens: int, run: Run) -> None:
    """Add the model's own answers, from `model.generate`."""
    import torch
    from transformers import GenerationConfig

    from palinode.data.batches import pad_left
    from palinode.data.tokenize import PromptStyle, end_id
    from palinode.models import pad_token

    tokens = encoded(tokenizer, rows, [str(row["answer"]) for row in rows])
    stops = sorted({end_id("question", tokenizer, PromptStyle()), tokenizer.eos_token_id})
    config = GenerationConfig(
        do_sample=False, max_new_tokens=new_tokens, pad_token_id=pad_token(tokenizer), eos_token_id=stops
    )
    for begin in range(0, len(tokens), BATCH):
        prompts = [row.ids[: row.start] for row in tokens[begin : begin + BATCH]]
        ids, mask = (torch.from_numpy(part).to(model.device) for part in pad_left(prompts, pad_id=stops[0]))
        with torch.no_grad():
            output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        for place, answer in enumerate(output[:, ids.shape[1] :].tolist(), start=begin):
            length = next((n for n, token in enumerate(answer) if token in stops), len(answer))
            run.answers[name, place] = tokenizer.decode(answer[:length], skip_special_tokens=True).strip()
            run.answer_tokens += length


# Rows and models


def others(row: Row) -> dict[str, list[str]]:
    """Return the other answers of a row by kind."""
    found = {"paraphrased": [row["paraphrased_answer"]]} if row.get("paraphrased_answer") else {}
    return {**found, "perturbed": list(row["perturbed_answer"])} if row.get("perturbed_answer") else found


def read_sets(folder: Path, limit: int | None) -> dict[str, list[Row]]:
    """Return TOFU's question sets; the holdout too, if there is one."""
    files = {name: folder / f"{file}.jsonl" for name, (file, _, _) in SETS.items()}
    holdout = folder / "holdout01.jsonl"
    files |= {"holdout": holdout} if holdout.exists() else {}
    return {
        name: spaced([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()], limit)
        for name, path in files.items()
    }


def spaced(rows: list[Row], limit: int | None) -> list[Row]:
    """Return at most so many rows, evenly spaced."""
    if limit is None or limit >= len(rows):
        return rows
    return [rows[place * len(rows) // limit] for place in range(limit)]


def invent_sets(limit: int | None) -> dict[str, list[Row]]:
    """Return rows of TOFU's shape: as many, with as many answers, of like lengths."""
    chosen = random.Random(0)

    def words(low: int, high: int) -> list[str]:
        return [chosen.choice(WORDS) for _ in range(chosen.randint(low, high))]

    found: dict[str, list[Row]] = {}
    for name, (_, count, wrong) in SETS.items():
        long = wrong == 5
        found[name] = []
        for _ in range(count if limit is None else min(count, limit)):
            answer = words(18, 50) if long else words(2, 5)
            row: Row = {"question": f"{' '.join(words(8, 22))}?", "answer": " ".join(answer)}
            same = answer[: len(answer) // 4]
            row["perturbed_answer"] = [" ".join([*same, *words(1, 2), *answer[len(same) + 1 :]])
                                       for _ in range(wrong)]  # fmt: skip
            if long:
                row["paraphrased_answer"] = " ".join([*words(1, 3), *answer[3:]])
            found[name].append(row)
    return found


WORDS = [
    a + b
    for a in ("ba", "de", "fi", "go", "lu", "mar", "nen", "pi", "ro", "sel")
    for b in ("", "ka", "to", "rin", "s")
]


def invent_model(folder: Path) -> Path:
    """Write a random Llama of 8 M parameters with a tokenizer of made-up words; return its folder."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = ["<unk>", "<end>", "Question", "Answer", ":", "?", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=256, intermediate_size=704, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=2048,
        bos_token_id=None, eos_token_id=1, pad_token_id=1, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
