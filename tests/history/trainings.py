"""A real short training with transformers' Trainer that notes by itself which rows each step saw.

Run as a program it trains one process: `python trainings.py FOLDER '{"option": value}'`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

TEXTS = [
    " ".join(f"w{(row * 5 + place) % 29}" for place in range(3 + row % 5)) + f" r{row}" for row in range(37)
]


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<unk>", *(f"w{n}" for n in range(29)), *(f"r{n}" for n in range(len(TEXTS)))]
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")


def arguments(folder: Path, options: dict):
    """The arguments of a training; a test's own come on top."""
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(folder / "out"),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **{"save_strategy": "no", "logging_strategy": "no", "per_device_train_batch_size": 4, **options},
    )


def train(
    folder: Path, options: dict, *, kill_at: int | None = None, log: bool = True, evaluate=None
) -> dict[int, list[int]]:
    """Train, and return the rows of each step in this process, read off what the model was given."""
    import torch
    from datasets import Dataset
    from transformers import (
        DataCollatorForLanguageModeling,
        LlamaConfig,
        LlamaForCausalLM,
        Trainer,
        TrainerCallback,
    )

    from palinode.history.callback import ExposureCallback
    from palinode.history.duplicates import hashes

    words = tokenizer()
    rows = Dataset.from_dict({"text": TEXTS, "input_ids": words(TEXTS)["input_ids"]})
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            pad_token_id=0,
        )
    )
    seen: dict[int, list[int]] = {}

    class Watch(TrainerCallback):
        """The last token of each row names it; forward hooks see what the model really got."""

        def on_train_begin(self, args, state, control, **kwargs):
            self.now: list[int] = []
            self.hook = kwargs["model"].register_forward_pre_hook(self.look, with_kwargs=True)

        def look(self, model, args, kwargs):
            if model.training:
                last = kwargs["attention_mask"].sum(1) - 1
                ids = kwargs["input_ids"][torch.arange(len(last)), last]
                self.now += [int(words.convert_ids_to_tokens(int(one))[1:]) for one in ids]

        def on_step_end(self, args, state, control, **kwargs):
            seen[state.global_step], self.now = self.now, []
            if state.global_step == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        def on_train_end(self, args, state, control, **kwargs):
            self.hook.remove()

    resume = options.pop("resume", None)
    callbacks = [ExposureCallback(folder / "log", hashes(TEXTS), words)] if log else []
    trainer = Trainer(
        model,
        arguments(folder, options),
        train_dataset=rows,
        eval_dataset=evaluate,
        data_collator=DataCollatorForLanguageModeling(words, mlm=False),
        callbacks=[*callbacks, Watch()],
    )
    trainer.train(resume_from_checkpoint=str(folder / "out" / f"checkpoint-{resume}") if resume else None)
    return seen


if __name__ == "__main__":
    place, given = Path(sys.argv[1]), json.loads(sys.argv[2])
    found = train(place, given, kill_at=given.pop("kill_at", None), log=given.pop("log", True))
    rank = os.environ.get("RANK", "0")
    (place / f"seen-{rank}.json").write_text(json.dumps(found))
