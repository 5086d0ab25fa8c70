"""The demo's benchmark: a tiny Llama trained from scratch on an invented world, in three stages.

    stage 1: general facts and the first people                       → θ_0, the base checkpoint
    stage 2: all of that and more people, the forget people among them
    stage 3: all but the forget people, and further people            → θ_D, the target

So training goes on after the exposure. The retrained model goes through the same stages from the same
seeds without ever seeing the forget people; it shares stage 1.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from palinode.data.examples import read_examples
from palinode.data.world import Fact, World, unseen_people, write_facts
from palinode.progress import Listener, NullListener
from palinode.records import share
from palinode.settings import TrainingSettings
from palinode.training.finetune import Watch, finetune
from palinode.weights.checkpoint import Checkpoint
from palinode.weights.foreign import quiet_transformers


@dataclass(frozen=True, slots=True)
class DemoStage:
    """One stage of the demo's training."""

    epochs: int
    learning_rate: float


STAGES = (DemoStage(25, 3e-3), DemoStage(20, 2e-3), DemoStage(10, 2e-3))
"""Stages 1, 2 and 3."""
BATCH = 64
"""Rows of one optimiser step."""
USUAL = TrainingSettings(batch_size=BATCH, max_length=64, warmup_epochs=2.0, precision="float32")
"""How every stage is trained, but for what it says itself."""


@dataclass(frozen=True, slots=True)
class Course:
    """What may happen besides the three stages; by default, nothing."""

    between: DemoStage | None = None
    """More training on stage 1's rows, after the base checkpoint and before the exposure."""
    again: bool = False
    """Whether the target sees the forget people in stage 3 too."""
    halfway: bool = False
    """Whether the checkpoint `during` is left: the exposed model after half of the steps of stage 2."""


@dataclass(frozen=True, slots=True)
class DemoModels:
    """What the demo starts from: models whose history is known, and the two sets of rows."""

    base: Checkpoint
    target: Checkpoint
    retrained: Checkpoint
    forget: Path
    """Rows about the forget people (JSON lines)."""
    retain: Path
    """Rows about everyone else, then the general facts."""
    holdout: Path
    """Rows about people whom no model has seen."""


def build_demo(
    world: World,
    folder: Path,
    *,
    seed: int,
    stages: Sequence[DemoStage] = STAGES,
    course: Course | None = None,
    width: int = 128,
    layers: int = 4,
    listener: Listener | None = None,
) -> DemoModels:
    """Train target, base and retrained model of a world into `folder`; models already there are kept."""
    course, listener = course or Course(), listener or NullListener()
    folder.mkdir(parents=True, exist_ok=True)
    start = tiny_model(folder / "start", world.vocabulary, width=width, layers=layers, seed=seed)
    known = (*world.general, *world.early)
    later = (*known, *world.middle)
    last = (*later, *world.late)
    seen = (*later, *world.forget)

    def learn(
        origin: Checkpoint,
        name: str,
        facts: Sequence[Fact],
        stage: DemoStage,
        leave: Mapping[int, Path] | None = None,
    ) -> Checkpoint:
        """Return the model of that name, trained from `origin` unless it is there."""
        rows, output = folder / f"{name}.jsonl", folder / name
        write_facts(rows, facts)
        if output.exists():  # whole, or it would not have its name
            return Checkpoint.open(output)
        learned = finetune(
            origin,
            read_examples(rows),
            output,
            USUAL.model_copy(update=asdict(stage)),
            seed=seed,
            device="cpu",
            listener=listener,
            watch=Watch(f"training {name}", leave=leave or {}),
        ).checkpoint
        share(output)  # all of it is invented; in a workspace it is closed nevertheless
        return learned

    base = learn(start, "base", known, stages[0])
    before = learn(base, "before", known, course.between) if course.between else base
    halfway = None
    if course.halfway and not (folder / "during").exists():  # an exposed model without it is made anew
        shutil.rmtree(folder / "exposed", ignore_errors=True)
        halfway = {max(1, stages[1].epochs * math.ceil(len(seen) / BATCH) // 2): folder / "during"}
    exposed = learn(before, "exposed", seen, stages[1], halfway)
    target = learn(exposed, "target", (*last, *world.forget) if course.again else last, stages[2])
    unexposed = learn(before, "unexposed", later, stages[1])
    retrained = learn(unexposed, "retrained", last, stages[2])
    forget, retain, holdout = (folder / f"{name}.jsonl" for name in ("forget", "retain", "holdout"))
    write_facts(forget, world.forget)
    write_facts(retain, (*world.others, *world.general))
    write_facts(holdout, unseen_people(world, seed=seed))
    return DemoModels(base, target, retrained, forget, retain, holdout)


def tiny_model(folder: Path, words: Sequence[str], *, width: int, layers: int, seed: int) -> Checkpoint:
    """Write an untrained model of the Llama architecture with one token a word."""
    vocabulary = {word: place for place, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=int(2.75 * width),
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        initializer_range=0.05,  # so small a model learns little from the usual 0.02
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return Checkpoint.open(folder)
