"""Judges that are a model in a local folder: natural-language inference, or sentence embeddings.

Entailment (a transformers cross-encoder with an "entailment" label): the score of a candidate is the mean
probability of entailment from answer to candidate and back, each with the question before it, so that a
candidate with the same facts scores 1 and one that says less or more about a half.

Embeddings (a sentence-transformers folder): the score is the cosine between answer and candidate, each with
the question before it. Embeddings are weak at telling names and numbers apart; its threshold is a choice.

The best candidates are picked as in overlap.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from palinode.errors import InputError
from palinode.evaluation.judges.overlap import pick_best
from palinode.evaluation.judging import Candidate, Pick, plain_text
from palinode.weights.foreign import bounded, check_folder, from_pretrained, read_config

ENTAILMENT_THRESHOLD = 0.5
"""Least mean probability of entailment of a pick."""
COSINE_THRESHOLD = 0.75
"""Least cosine of a pick."""
MARGIN = 0.05
"""Candidates whose score is at most this far from the best are picked with it."""
MOST_TENSORS = 5000
"""A judge with more tensors is none."""
LONGEST = 512
"""Tokens of a pair of texts that are read, if the model takes as many."""


def model_judge(folder: Path, *, device: str = "auto") -> EntailmentJudge | EmbeddingJudge:
    """Return the judge in a folder: embeddings if it is of sentence-transformers, else entailment."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; an offline judge is a folder with a model")
    if _is_cross_encoder(folder) or not (folder / "modules.json").is_file():
        return EntailmentJudge(folder, device=device)
    return EmbeddingJudge(folder, device=device)


class EntailmentJudge:
    """A judge by natural-language inference."""

    at_once = 1

    def __init__(self, folder: Path, *, device: str = "auto"):
        """Load tokenizer and model from the folder; InputError when it is no classifier of entailment."""
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        from palinode.models.loading import pick_device  # torch, only when it is used

        self.name = f"entailment {folder.resolve().name}"
        self._label = entailment_label(folder)
        self._device = pick_device(device)
        try:
            self._tokenizer: Any = from_pretrained(AutoTokenizer, folder)
            nbytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
            with bounded(folder / "config.json", tensors=min(MOST_TENSORS, nbytes), numbers=nbytes):
                model, report = from_pretrained(
                    AutoModelForSequenceClassification,
                    folder,
                    use_safetensors=True,
                    attn_implementation="eager",
                    output_loading_info=True,
                )
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"the judge in {folder} cannot be loaded: {_first_line(error)}") from None
        if report["missing_keys"]:
            raise InputError(
                f"the judge in {folder} lacks {len(report['missing_keys'])} weights (such as "
                f"{min(report['missing_keys'])}); it is not a trained classifier"
            )
        self._model: Any = model.to(self._device).eval()

    def pick(self, question: str, answer: str, candidates: Sequence[Candidate]) -> Pick:
        """Return the candidates that entail the answer and are entailed by it most, or none of these."""
        texts = [each.text for each in candidates]
        return pick_best(
            candidates,
            self.scores(question, answer, texts),
            margin=MARGIN,
            threshold=ENTAILMENT_THRESHOLD,
        )

    def stop(self) -> None:
        """Do nothing: nobody waits for this judge."""

    def scores(self, question: str, answer: str, texts: Sequence[str]) -> list[float]:
        """Return the mean probability of entailment both ways for each text; 1 for equal texts."""
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
        means = shares.view(2, len(texts)).mean(dim=0).tolist()
        same = plain_text(answer)
        return [1.0 if plain_text(text) == same else mean for text, mean in zip(texts, means, strict=True)]


class EmbeddingJudge:
    """A judge by cosine of sentence embeddings; needs the package sentence-transformers."""

    at_once = 1

    def __init__(self, folder: Path, *, device: str = "auto"):
        """Load the model from the folder; InputError when the package is missing."""
        try:
            from sentence_transformers import (  # type: ignore[import-not-found,unused-ignore]
                SentenceTransformer,
            )
        except ImportError:
            raise InputError(
                f"{folder} holds an embedding model; install what reads it: pip install sentence-transformers"
            ) from None
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

    def pick(self, question: str, answer: str, candidates: Sequence[Candidate]) -> Pick:
        """Return the candidates nearest to the answer, or none of these."""
        texts = [each.text for each in candidates]
        return pick_best(
            candidates, self.scores(question, answer, texts), margin=MARGIN, threshold=COSINE_THRESHOLD
        )

    def stop(self) -> None:
        """Do nothing: nobody waits for this judge."""

    def scores(self, question: str, answer: str, texts: Sequence[str]) -> list[float]:
        """Return the cosine between the answer and each text; 1 for equal texts."""
        vectors = self._model.encode(
            [f"{question} {text}" for text in (answer, *texts)],
            normalize_embeddings=True,
            show_progress_bar=False,
        )
        same = plain_text(answer)
        return [
            1.0 if plain_text(text) == same else float(vectors[0] @ vector)
            for text, vector in zip(texts, vectors[1:], strict=True)
        ]


def entailment_label(folder: Path) -> int:
    """Return the number of the "entailment" label in a model's config; InputError when there is not one."""
    labels = _config(folder).get("id2label") or {}
    found = [int(number) for number, label in labels.items() if str(label).casefold() == "entailment"]
    if len(found) == 1:
        return found[0]
    named = ", ".join(map(str, labels.values())) or "none"
    raise InputError(
        f"the model in {folder} has the labels {named}; a judge needs one that is called entailment"
    )


def _is_cross_encoder(folder: Path) -> bool:
    kinds = _config(folder).get("architectures") or []
    return any(str(kind).endswith("ForSequenceClassification") for kind in kinds)


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    content = read_config(file) if file.exists() else {}
    return content if isinstance(content, dict) else {}


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
