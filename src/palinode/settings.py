"""Every setting of every job, once: a field's type, range and default, and under it what it does.

Recipes and the options of the command line are made of these (pipeline/recipe.py, cli/options.py), and
the functions of jobs.py take them. Nothing heavy is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from palinode.data.tokenize import PromptStyle
from palinode.errors import RecipeError
from palinode.records import read_toml

MAX_SEED = 2**32 - 1

Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]


class StrictModel(BaseModel):
    """Strict, so that a misspelt key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def read_settings(path: Path, what: str) -> dict[str, Any]:
    """Return the content of a TOML file, a recipe or what it is; raises RecipeError where there is none."""
    try:
        return read_toml(path)
    except FileNotFoundError:
        raise RecipeError(f"there is no {what} {path}") from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path} is not a TOML {what} ({error})") from None


# Fine-tuning; the defaults are the paper's (spec: msa.md §4)


class LoraSettings(StrictModel):
    """Low-rank fine-tuning: the start stays frozen, and beside its linear layers s·B·A is trained."""

    rank: int = Field(ge=1)
    """r, columns of B and rows of A."""
    alpha: float | None = Field(default=None, gt=0)
    """s = alpha / rank; None: 2 · rank, so that s = 2."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of a layer's inputs that its product does not see in a step."""
    targets: list[str] | None = Field(default=None, min_length=1)
    """Ends of the names of the layers, as in ["q_proj", "v_proj"]; None: every linear layer of the blocks."""
    base: Literal["float32", "bfloat16", "4bit"] = "float32"
    """How the frozen start is held while training; the product goes to the stored target in any case."""

    @property
    def scale(self) -> float:
        """Return s."""
        return 2.0 if self.alpha is None else self.alpha / self.rank


class TrainingSettings(StrictModel):
    """How θ_1 and θ_2 are fine-tuned from the base checkpoint; both in the same way."""

    epochs: int = Field(default=10, ge=1)
    """Passes over the data."""
    learning_rate: float = Field(default=1e-5, gt=0)
    """Peak learning rate of AdamW."""
    batch_size: int = Field(default=4, ge=1)
    """Rows in a micro-batch, on each device."""
    accumulation: int = Field(default=1, ge=1)
    """Micro-batches that make one optimiser step."""
    warmup_epochs: float = Field(default=1.0, ge=0)
    """Epochs of linear warm-up; a linear decay to zero follows."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW's decay; not applied to biases and norms."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients longer than this are scaled down to it."""
    max_length: int = Field(default=512, ge=8)
    """Tokens of a row, prompt included; longer answers are cut, documents split."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the forward pass; weights and optimiser are float32 in any case."""
    optimizer: Literal["auto", "device", "8bit", "host"] = "auto"
    """Where AdamW's moments lie: on the device in float32, there in 8 bits (pip install
    'palinode[quantise]'), or in host memory with the weights (docs/scale.md); auto: the first that a GPU has
    room for."""
    tokens_per_pass: int | None = Field(default=None, ge=1)
    """Tokens, padding counted, that go through the model at a time; a larger micro-batch goes through in
    parts, with the gradients of the whole. None: what a GPU has room for; on a CPU all at once."""
    gradient_checkpointing: bool = False
    """Keep the activations of decoder blocks at their borders alone and compute the others twice: less memory
    for about a third more time, the same gradients."""
    compile: bool = False
    """Compile the decoder blocks (torch.compile). The first steps take minutes, and figures differ in their
    last digits."""
    save_minutes: float = Field(default=5.0, gt=0)
    """How often a resumable state is saved while training."""
    lora: LoraSettings | None = None
    """Train low-rank adapters instead of all weights (docs/lora.md)."""

    def key(self) -> dict[str, Any]:
        """Return what decides the result, as plain values for a fingerprint."""
        unset = {name for name in ("lora", "compile") if not getattr(self, name)}
        left_out = {"save_minutes", "tokens_per_pass", "gradient_checkpointing"}
        left_out |= {"optimizer"} if self.optimizer in ("auto", "device") else set()
        return self.model_dump(exclude=left_out | unset)


# Asking and scoring


@dataclass(frozen=True, slots=True)
class Asking:
    """How a model is asked; the defaults follow the TOFU evaluation (spec: metrics.md §1).

    The likelihood of every given answer is always measured. Raises RecipeError for impossible values.
    """

    generate: bool = True
    """Whether the model gives its own greedy answer to each question."""
    max_new_tokens: int = 200
    """Length limit of an answer that the model gives."""
    stop_texts: tuple[str, ...] = ()
    """Texts that end an answer of the model; it is cut before the first of them."""
    standardise: bool = False
    """Whether to standardise the log-probabilities of the right answer over the vocabulary (Min-K++)."""
    gradient_norms: bool = False
    """Whether to measure the norm of the loss's gradient on each right answer (GradNorm)."""
    samples: int = 0
    """Answers drawn at random for each question."""
    temperature: float = 1.0
    """Divides the logits before sampling; greedy answers take no notice of it."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together have this probability."""
    min_new_tokens: int = 0
    """Tokens before which no answer of the model ends."""
    seed: int = 0
    """Seed of the samples; with the prompt and the sample's number it fixes each of them."""
    max_length: int = 512
    """Tokens of a row, prompt included, in likelihoods."""
    batch_rows: int = 32
    """Prompts that are answered at a time."""
    answer_prefix: str = ""
    """Text put at the beginning of the model's own answers, which they then continue."""

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value < least:
                raise RecipeError(f"{name} is {value}; it must be at least {least}")
        if not self.temperature > 0:
            raise RecipeError(f"temperature is {self.temperature}; it must be above 0")
        if not 0 < self.top_p <= 1:
            raise RecipeError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if not all(self.stop_texts):
            raise RecipeError("stop_texts holds an empty text, which would end every answer; leave it out")
        if self.min_new_tokens > self.max_new_tokens:
            raise RecipeError(
                f"min_new_tokens is {self.min_new_tokens} and max_new_tokens {self.max_new_tokens}; "
                "an answer cannot be longer than its limit"
            )


_LEAST = {"max_new_tokens": 1, "samples": 0, "min_new_tokens": 0, "max_length": 2, "batch_rows": 1}


class EvaluationLimits(StrictModel):
    """How many rows are asked and how long they may be; the defaults follow the TOFU evaluation."""

    max_rows: int = Field(default=400, ge=1)
    """Rows of each set that are evaluated; a larger set is sampled with the run's seed."""
    max_new_tokens: int = Field(default=200, ge=1)
    """Length limit of a generated answer."""
    batch_rows: int = Field(default=32, ge=1)
    """Prompts that are answered at a time."""
    max_length: int = Field(default=512, ge=8)
    """Tokens of a row, prompt included, in likelihoods."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """In what models are read: auto is float32, on a GPU each model's own dtype; log-probabilities are
    float32 in any case."""

    def key(self) -> dict[str, Any]:
        """Return what decides the result, as plain values for a fingerprint."""
        plain = {"precision"} if self.precision == "auto" else set()
        return self.model_dump(exclude={"batch_rows"} | plain)

    @property
    def asking(self) -> Asking:
        """How these limits have a set of plain rows asked."""
        return Asking(
            max_new_tokens=self.max_new_tokens, batch_rows=self.batch_rows, max_length=self.max_length
        )

    def over(self, asking: Asking) -> Asking:
        """Return a benchmark's own asking with the limits that somebody has set laid over it."""
        limits = {"max_new_tokens", "batch_rows", "max_length"} & self.model_fields_set
        own = {name: getattr(self, name) for name in limits}
        shortest = min(asking.min_new_tokens, own.get("max_new_tokens", asking.max_new_tokens))
        return replace(asking, **own, min_new_tokens=shortest)


class Questioning(StrictModel):
    """What every job that asks models can be told."""

    columns: Mapping[str, str] | None = None
    """Columns of the rows by what they hold, as in {"question": "q"}."""
    style: PromptStyle | None = None
    """How questions are put; None: as the tokenizer, or the benchmark, has it."""
    allow_pickle: bool = False
    """Read files of torch.save too; none of their code is run."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    seed: Seed = 0
    """Seeds sampling, batch order, rounding and intervals."""


class EvaluationSettings(Questioning, EvaluationLimits):
    """What is wanted of an evaluation; everything has a default.

    On rows of one's own the limits hold as they are, on a benchmark those that somebody has set; the rest
    of it is asked as its authors ask.
    """

    split: str | None = None
    """Part of the benchmark, such as forget01. [default: its first]"""
    options: Mapping[str, str] = {}
    """The benchmark's own options."""
    metrics: tuple[str, ...] = ()
    """Only these metrics; every is all of them. None means all but the expensive ones."""
    against: str | None = None
    """The retrained model to compare with, or an open-unlearning log."""
    judge: str | None = None
    """Judge of the answers: overlap, offline:FOLDER or URL#MODEL."""
    key_variable: str | None = None
    """Environment variable with the key of a judge at a URL. [default: OPENAI_API_KEY for
    https://api.openai.com, none for any other]"""
    general: tuple[str, ...] = ()
    """General ability by lm-eval, as in mmlu,gsm8k (pip install 'palinode[lm-eval]')."""
    general_include: Path | None = None
    """Folder with lm-eval tasks of your own, or the YAML file of one."""
    output: Path | None = None
    """Write what the model did: with a benchmark a folder with scores.json, else one file."""
    open_unlearning: Path | None = None
    """Write a log in open-unlearning's form to this file too."""
    open_unlearning_prompts: bool = False
    """Score all that the chat template writes after an answer, as open-unlearning does, and not only the end
    of the turn."""
    seed: Seed = 0
    """Seeds sampling, intervals and the judge."""

    @property
    def most_questions(self) -> int | None:
        """Questions of each set of a benchmark; a larger set is sampled with the seed. None asks all."""
        return self.max_rows if "max_rows" in self.model_fields_set else None


# The other jobs


class AuditSettings(Questioning):
    """How an audit is done; everything has a default."""

    paraphrases: str | None = None
    """Column of the forget rows, or file with a row for each. [default: paraphrased_question]"""
    lookalikes: str | None = None
    """Rows like the forget set. [default: made of perturbed_answer or paraphrased_answer]"""
    indirect: str | None = None
    """File of rows that need a forget fact, with a column kind: other languages, hops, names."""
    leave_out: str | None = None
    """Rows to leave out of the retain rows, such as those of other requests to erase."""
    attacks: Sequence[str] = ()
    """Only these attacks. [default: all]"""
    budget: str | None = None
    """quick, standard or full. [default: standard]"""
    policy: Path | None = None
    """A TOML policy: margins, budget, what must be run."""


class LocateSettings(Questioning):
    """How rows are located; everything has a default."""

    target_step: int | None = None
    """The target's step, where nothing tells it."""
    steps: Sequence[int] | None = None
    """Steps of the checkpoints, as in 100,200,300, where names lack them."""
    pattern: str | None = None
    """Which folders or revisions are checkpoints, as in step*."""
    tokens_per_step: int | None = Field(default=None, ge=1)
    """Tokens of an optimiser step, for distances in tokens."""
    similarity: float = Field(default=0.7, ge=0.1, le=1)
    """Texts of the corpus so similar count as copies."""
    salt: Path | None = None
    """File whose bytes are the salt of a salted log."""
    measure: str = "mean_logprob"
    """What decides on behaviour: mean_logprob, min_k or extraction_strength."""
    every: bool = False
    """Load every checkpoint, not only as many as halving takes."""
    max_length: int = Field(default=512, ge=8)
    """Tokens of a row, prompt included."""
    seed: Seed = 0
    """Seeds the intervals."""


class ApplySettings(StrictModel):
    """How a sum of models is written; everything has a default."""

    dtype: str | None = None
    """float32, bfloat16 or float16. [default: the target's]"""
    rounding: str = "auto"
    """nearest, stochastic, or auto: stochastic where nearest would lose dose."""
    precision: str = "float32"
    """Of the sums: float32 or float64."""
    rows: str = "refuse"
    """Embeddings of different length: refuse, or sum the rows that are shared."""
    allow_pickle: bool = False
    """Read files of torch.save too; none of their code is run."""
    allow_nonfinite: bool = False
    """Let NaN and infinity in the models through."""
    check: bool = True
    """Read the result back; without it there is no weights.json."""
    seed: int = 0
    """Seed of everything random."""


class InfluenceSettings(Questioning):
    """How the influence of rows is asked for; everything has a default."""

    alpha: float | None = Field(default=None, ge=0)
    """α, how far the vector is taken off. [default: the run's, or chosen by the yardstick]"""
    max_new_tokens: int = Field(default=64, ge=1)
    """Length limit of the target's own answer, where none is given."""
    max_length: int = Field(default=512, ge=8)
    """Tokens of a row, prompt included."""
    top: int = Field(default=0, ge=0)
    """Rows that are ranked highest for each answer; 0 ranks none."""
    engine: Literal["palinode", "bergson"] = "palinode"
    """Whose scores: palinode's, or EK-FAC by bergson (pip install 'palinode[influence]')."""
    measure: Literal["ridge", "cosine", "product"] = "ridge"
    """How gradients of rows and answer are held together."""
    preconditioner: Literal["none", "adam"] = "none"
    """What gradients are divided by: none, or adam, as training does."""
    at: Literal["checkpoint", "target"] = "checkpoint"
    """Where the answer's gradient is taken: beside each row's, or in the target."""
    tokens: bool = False
    """Tell which tokens of the ranked rows carry their scores."""
    width: int = Field(default=4093, ge=1)
    """Numbers that a gradient is projected to: a prime keeps columns of matrices apart."""
    log: Path | None = None
    """Folder of an exposure log: when each row was seen."""
    salt: Path | None = None
    """File whose bytes are the salt of a salted log."""
    order: Path | None = None
    """File that describes the data order: the same, rebuilt."""
    steps: Sequence[int] | None = None
    """Steps of the checkpoints, as in 100,200,300, where names lack them."""
