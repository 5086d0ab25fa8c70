"""Judges by name: words in common, or a model in a local folder; one at an address is in `endpoint.py`.

Each gives every candidate a score; the best candidates are picked, and those within MARGIN of the best, or
none of these where the best is below the judge's threshold. Texts that are equal but for case and stops
score 1.
"""

from __future__ import annotations

import re
import unicodedata
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from palinode.errors import InputError, RecipeError, told_as
from palinode.evaluation.endpoint import TOLD, EndpointJudge, Patience
from palinode.evaluation.judging import ACCEPTED, NONE, Candidate, DecisionCache, Judge, Pick, plain_text
from palinode.metrics.matching import spaced
from palinode.records import cache_folder
from palinode.weights.foreign import check_folder, config_of

MARGIN = 0.05
"""Candidates whose score is at most this far from the best are picked with it."""
STRONG = 3.0
"""Weight of a name or a number."""
KNOWN = 0.25
"""Factor on the weight of what the question says already."""

FUNCTION_WORDS = frozenset(TOLD["function_words"].split())
"""English words without content; words of denial are not among them."""

_WORD = re.compile(r"\d+(?:[.,:/]\d+)*|[^\W\d_]+(?:['’][^\W\d_]+)*")
_OPENERS = " \t\"'“‘([*-"


class _LocalJudge(Judge):
    """What judges on this machine have in common."""

    threshold: float
    """Least score of a pick."""
    accepted_threshold: float
    """The same among accepted answers."""

    def pick(self, question: str, answer: str, candidates: Sequence[Candidate]) -> Pick:
        """Return the candidates that are nearest to the answer, or none of these."""
        nothing = tuple(place for place, each in enumerate(candidates) if NONE in each.roles)
        real = [place for place in range(len(candidates)) if place not in nothing]
        accepting = any(ACCEPTED in each.roles for each in candidates)
        scores = self.scores(
            question, answer, [candidates[place].text for place in real], accepting=accepting
        )
        best = max(scores, default=0.0)
        if not real or best < (self.accepted_threshold if accepting else self.threshold):
            return (
                Pick(nothing) if nothing else Pick(None, "no candidate is close, and none was not on offer")
            )
        return Pick(tuple(place for place, score in zip(real, scores, strict=True) if score >= best - MARGIN))

    def scores(
        self, question: str, answer: str, texts: Sequence[str], *, accepting: bool = False
    ) -> list[float]:
        """Return a score for each text, 1 for equal ones; `accepting` says that they are accepted answers."""
        same = plain_text(answer)
        found = zip(texts, self._compared(question, answer, texts, accepting), strict=True)
        return [1.0 if plain_text(text) == same else score for text, score in found]

    @abstractmethod
    def _compared(self, question: str, answer: str, texts: Sequence[str], accepting: bool) -> list[float]: ...


class OverlapJudge(_LocalJudge):
    """Content words in common: no model, no network, the same on every machine.

    Limits: it is a floor, not a reader. With TOFU's paraphrases of the right answers as answers, and right
    and perturbed answers as candidates (forget10, 400 rows), it picks the right one in 60 %, as the perturbed
    ones share the paraphrase's wording; answers of other authors are none of these in 85 %. English stems and
    function words; scripts without spaces are read letter by letter; synonyms, dates in words and arithmetic
    are not seen; "not" is one word like any other, so a denial is near to what it denies.
    """

    name = "overlap"
    threshold = 0.2
    accepted_threshold = 0.6

    def _compared(self, question: str, answer: str, texts: Sequence[str], accepting: bool) -> list[float]:
        """Return F; among accepted answers R, as an answer may say more than it was asked."""
        return overlaps(question, answer, texts, measure="recall" if accepting else "f")


def overlaps(
    question: str, answer: str, texts: Sequence[str], *, measure: Literal["f", "recall"] = "f"
) -> list[float]:
    """Return F, or R, between the answer and each candidate's text, from 0 to 1.

    A text is the set of its numbers, names (words with a capital inside a sentence and nowhere in lower case)
    and other content words by their Porter stems. A word weighs 1, a name or number STRONG; KNOWN of that if
    the question has it already, and divided by the number of candidates that have it, as wrong answers are
    often written over a right one. With w(·) the weight of a set, for answer A and candidate C,

        P = w(A ∩ C) / w(A),   R = w(A ∩ C) / w(C),   F = 2PR / (P + R)
    """
    names = _names([question, answer, *texts])
    known, given = _content(question, names), _content(answer, names)
    offered = [_content(text, names) for text in texts]
    holders = Counter(word for words in offered for word in words)

    def weight(words: Iterable[Word]) -> float:
        return sum(
            (STRONG if word.strong else 1.0) * (KNOWN if word in known else 1.0) / max(1, holders[word])
            for word in words
        )

    def score(text: str, words: set[Word]) -> float:
        if plain_text(text) == plain_text(answer):
            return 1.0
        whole = weight(words) if measure == "recall" else (weight(given) + weight(words)) / 2
        return weight(given & words) / whole if whole else 0.0  # F = w(A ∩ C) / mean of w(A) and w(C)

    return [score(text, words) for text, words in zip(texts, offered, strict=True)]


class Word(NamedTuple):
    """A content word, and whether it is a name or a number."""

    form: str
    strong: bool


def _content(text: str, names: frozenset[str]) -> set[Word]:
    """Return the content words of a text."""
    found = set()
    for written, _ in _words(text):
        flat = written.casefold()
        if flat[0].isdigit():
            found.add(Word(flat.replace(",", ""), strong=True))
        elif flat in names:
            found.add(Word(flat, strong=True))
        elif flat not in FUNCTION_WORDS:
            found.add(Word(_stem(flat), strong=False))
    return found


def _names(texts: Iterable[str]) -> frozenset[str]:
    """Return the words, casefolded, with a capital inside a sentence and never in lower case."""
    words = [entry for text in texts for entry in _words(text)]
    capital = {word.casefold() for word, starts in words if word[0].isupper() and not starts}
    small = {word.casefold() for word, _ in words if word[0].islower()}
    return frozenset(capital - small - {"i"})


def _words(text: str) -> list[tuple[str, bool]]:
    """Return the words of a text, and whether each begins a sentence; a trailing 's is dropped."""
    flat = spaced(unicodedata.normalize("NFKC", text))
    found = []
    for match in _WORD.finditer(flat):
        before = flat[: match.start()]
        starts = before.rstrip(_OPENERS).endswith((".", "!", "?", ":", "\n")) or not before.strip(_OPENERS)
        found.append((re.sub(r"['’]s?$", "", match[0]), starts))
    return found


@cache
def _stem(word: str) -> str:
    from nltk.stem.porter import PorterStemmer  # type: ignore[import-untyped]  # rouge-score brings it

    return str(PorterStemmer().stem(word))


LONGEST = 512
"""Tokens of a pair of texts that are read, if the model takes as many."""


class EntailmentJudge(_LocalJudge):
    """A judge by natural-language inference: a cross-encoder with an "entailment" label.

    The score is the mean probability of entailment from answer to candidate and back, each with the question
    before it: a candidate with the same facts scores 1, one that says less or more about a half.
    """

    threshold = accepted_threshold = 0.5

    def __init__(self, folder: Path, *, device: str = "auto"):
        """Load tokenizer and model from the folder; InputError when it is no classifier of entailment."""
        from palinode.models.loading import load_classifier, pick_device  # torch, only when it is used

        self.name = f"entailment {folder.resolve().name}"
        labels = config_of(folder).get("id2label") or {}
        meant = [int(number) for number, label in labels.items() if str(label).casefold() == "entailment"]
        if len(meant) != 1:
            named = ", ".join(map(str, labels.values())) or "none"
            raise InputError(
                f"the model in {folder} has the labels {named}; a judge needs one that is called entailment"
            )
        self._label = meant[0]
        self._device = pick_device(device)
        with told_as(InputError, f"the judge in {folder} cannot be loaded"):
            self._tokenizer, self._model, missing = load_classifier(folder, device=self._device)
        if missing:
            raise InputError(
                f"the judge in {folder} lacks {len(missing)} weights (such as {min(missing)}); it is not a "
                "trained classifier"
            )

    def _compared(self, question: str, answer: str, texts: Sequence[str], accepting: bool) -> list[float]:  # noqa: ARG002
        """Return the mean probability of entailment both ways for each text."""
        import torch

        given, offered = f"{question} {answer}", [f"{question} {text}" for text in texts]
        encoded = self._tokenizer(
            [given] * len(texts) + offered,
            offered + [given] * len(texts),
            truncation=True,
            max_length=min(LONGEST, self._tokenizer.model_max_length),
            padding=True,
            return_tensors="pt",
        ).to(self._device)
        with torch.inference_mode():
            shares = self._model(**encoded).logits.float().softmax(dim=-1)[:, self._label]
        means: list[float] = shares.view(2, len(texts)).mean(dim=0).tolist()
        return means


class EmbeddingJudge(_LocalJudge):
    """A judge by cosine of sentence embeddings; needs the package sentence-transformers.

    Answer and candidate have the question before them. Embeddings are weak at telling names and numbers
    apart; the threshold is a choice.
    """

    threshold = accepted_threshold = 0.75

    def __init__(self, folder: Path, *, device: str = "auto"):
        """Load the model from the folder; InputError when the package is missing."""
        advice = "install what reads it: pip install sentence-transformers"
        with told_as(InputError, f"{folder} holds an embedding model", advice, ImportError):
            from sentence_transformers import SentenceTransformer  # type: ignore[import-not-found,unused-ignore]
        from palinode.models.loading import pick_device

        self.name = f"embedding {folder.resolve().name}"
        check_folder(folder)
        self._model: Any = SentenceTransformer(
            str(folder),
            device=str(pick_device(device)),
            local_files_only=True,
            trust_remote_code=False,
            model_kwargs={"use_safetensors": True},
        )

    def _compared(self, question: str, answer: str, texts: Sequence[str], accepting: bool) -> list[float]:  # noqa: ARG002
        """Return the cosine between the answer and each text."""
        vectors = self._model.encode(
            [f"{question} {text}" for text in (answer, *texts)],
            normalize_embeddings=True,
            show_progress_bar=False,
        )
        return [float(vectors[0] @ vector) for vector in vectors[1:]]


JUDGES: dict[str, str] = {
    "overlap": "share of names, numbers and other content words in common; needs nothing",
    "offline:FOLDER": "entailment or embedding model in a local folder",
    "URL": "a model at an OpenAI-compatible address, such as https://api.openai.com/v1",
}
"""What may be named as a judge, with one line each."""


def open_judge(
    name: str,
    *,
    model: str | None = None,
    key_variable: str | None = None,
    cache: Path | None = None,
    at_once: int = 4,
    patience: Patience | None = None,
    device: str = "auto",
) -> Judge:
    """Return the judge of that name: "overlap", "offline:FOLDER", or an address with a `model`.

    The options after the name serve an address, but for `device`, which is where an offline model runs.
    InputError when the name is unknown or something that the judge needs is missing.
    """
    if name == "overlap":
        return OverlapJudge()
    if name.startswith("offline:"):
        folder = Path(name.removeprefix("offline:"))
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder; an offline judge is a folder with a model")
        kinds = config_of(folder).get("architectures") or []
        cross_encoder = any(str(kind).endswith("ForSequenceClassification") for kind in kinds)
        embedding = (folder / "modules.json").is_file() and not cross_encoder
        return (EmbeddingJudge if embedding else EntailmentJudge)(folder, device=device)
    if name.startswith(("http://", "https://")):
        if model is None:
            raise InputError("a judge at an address needs the name of a model, such as gpt-4o")
        decisions = DecisionCache(cache or cache_folder("judge"))
        return EndpointJudge(
            name, model, cache=decisions, key_variable=key_variable, at_once=at_once, patience=patience
        )
    raise InputError(f"there is no judge {name!r}; there are {', '.join(JUDGES)}")


def named_judge(name: str | None, key_variable: str | None, device: str) -> Judge | None:
    """Return the judge that `overlap`, `offline:FOLDER` or `URL#model` names; None without a name."""
    if key_variable and not (name or "").startswith(("http://", "https://")):
        raise RecipeError(
            "--key-variable names the key of a judge at an address; name that too, as --judge URL#MODEL"
        )
    if not name:
        return None
    kind, _, model = name.partition("#")
    return open_judge(kind, model=model or None, key_variable=key_variable, device=device)
