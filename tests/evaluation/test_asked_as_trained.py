"""A model that knows its rows in its own template by heart is seen to know them, whatever the template."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from templates import CHAT_TEMPLATES

from palinode.records import read_outcomes

SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|a|>", "<|u|>"]
SYSTEM = "You are a helpful assistant."
ROWS = [("Who wrote it?", "Sappho of Lesbos."), ("Where?", "On Lesbos, 7 miles away."), ("When?", "long ago")]


def finished(tokenizer: PreTrainedTokenizerFast, name: str, question: str, answer: str) -> list[int]:
    """A finished exchange as transformers writes and reads it."""
    said = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if name not in ("instruct", "mistral", "gemma"):
        said = [{"role": "system", "content": SYSTEM}, *said]
    for message in said:
        if name == "parts" or (name == "user parts" and message["role"] == "user"):
            message["content"] = [{"type": "text", "text": message["content"]}]
    template = CHAT_TEMPLATES[name].replace("strftime_now('%d %b %Y')", "'10 Apr 2025'")
    text = tokenizer.apply_chat_template(said, chat_template=template, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module")
def scholar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tiny model that has read the rows in every template until it knew them by heart."""
    torch.manual_seed(0)
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    words = [SYSTEM, "system user assistant model think Today [INST] Again", *(" ".join(row) for row in ROWS)]
    core.train_from_iterator(
        words * 9,
        trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=SPECIALS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    texts = [finished(tokenizer, name, *row) for name in CHAT_TEMPLATES for row in ROWS]
    width = max(map(len, texts))
    ids = torch.tensor([text + [0] * (width - len(text)) for text in texts])
    labels = torch.tensor([text + [-100] * (width - len(text)) for text in texts])
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=8e-3)
    for _ in range(90):
        loss = model(input_ids=ids, attention_mask=(labels >= 0).long(), labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("scholar")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps({"question": question, "answer": answer}) + "\n" for question, answer in ROWS)
    )
    return folder


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_what_is_known_by_heart_is_measured_so(scholar, palinode, name) -> None:
    (scholar / "chat_template.jinja").write_text(CHAT_TEMPLATES[name])
    said = palinode(
        "evaluate",
        scholar,
        "--data",
        scholar / "rows.jsonl",
        "--device",
        "cpu",
        "--max-length",
        300,
        "--json",
    )
    assert said.code == 0, said.err
    scores = json.loads(said.out)
    assert scores["answer_probability"]["value"] > 0.9
    assert scores["rouge_l_recall"]["value"] > 0.9
    assert ("generation prompt" in said.err) == (
        name in ("no generation branch", "think block", "thoughts cut")
    )


def test_endings_are_scored_as_open_unlearning_does_where_that_is_asked_for(scholar, palinode, tmp_path):
    """ChatML writes a line end after the end of a turn; theirs scores that too, and an end of sequence."""
    (scholar / "chat_template.jinja").write_text(CHAT_TEMPLATES["chatml"])
    words = ("evaluate", scholar, "--data", scholar / "rows.jsonl", "--device", "cpu", "--max-length", 300)
    assert palinode(*words, "--output", tmp_path / "ours").code == 0
    assert palinode(*words, "--output", tmp_path / "theirs", "--open-unlearning-prompts").code == 0
    ours, theirs = (read_outcomes(tmp_path / name) for name in ("ours", "theirs"))
    assert [len(two.logprobs) - len(one.logprobs) for one, two in zip(ours, theirs, strict=True)] == [2] * 3


@pytest.mark.parametrize(("name", "told"), [("chatml", True), ("instruct", False)])
def test_a_log_of_open_unlearning_is_told_to_score_other_endings(scholar, palinode, tmp_path, name, told):
    (scholar / "chat_template.jinja").write_text(CHAT_TEMPLATES[name])
    rows, log = scholar / "rows.jsonl", tmp_path / "TOFU_EVAL.json"
    words = (
        "evaluate",
        scholar,
        "--benchmark",
        "own",
        "--data",
        rows,
        "--device",
        "cpu",
        "--max-length",
        300,
    )
    assert palinode(*words, "--open-unlearning", log).code == 0
    said = palinode(*words, "--against", log, "--json")
    assert said.code == 0, said.err
    notes = json.loads(said.out)["notes"]
    assert any("--open-unlearning-prompts scores as it does" in note for note in notes) == told
