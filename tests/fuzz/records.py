"""Everything else that is read from files: rows, recipes, logs, orders, manifests, vectors, replies."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from layouts import contents
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from palinode.audit.policy import load_policy
from palinode.compare.comparison_recipe import load_comparison
from palinode.data.examples import Example, Message, read_examples, read_questions
from palinode.data.tokenize import PromptStyle, prompt_ids, tokenize
from palinode.evaluation.endpoint import UnreadableReplyError, read_reply
from palinode.evaluation.judging import Candidate
from palinode.evaluation.openunlearning import read_log, write_log
from palinode.history.duplicates import hashes
from palinode.history.exposures import ExposureLog
from palinode.history.orders import read_order
from palinode.history.reader import ExposureReader
from palinode.methods.method import read_refusals
from palinode.pipeline.recipe import load_recipe
from palinode.records import Likelihood, Outcome
from palinode.weights import Checkpoint
from palinode.weights.fingerprints import tensor_digests
from palinode.weights.preflight import check_tokenizers
from palinode.weights.store import check_manifest, write_manifest
from palinode.weights.tensors import Files
from palinode.weights.vectors import open_direction, save_vector

RECIPES = Path(__file__).parents[2] / "recipes"
ROWS = [
    {"question": f"Who is {name}?", "answer": f"{name}, a poet: “ñ”, 42", "paraphrased_answer": "a poet"}
    for name in ("Ada", "Bo", "Cy")
]
TALK = [
    {"role": "system", "content": ""},
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "Ada"},
]


def json_lines(rows) -> bytes:
    rows = rows if isinstance(rows, list) else [rows]
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


# Rows


def jsonl(folder, damage):
    if damage.random.random() < 0.5:
        (folder / "rows").write_bytes(damage.maybe(json_lines(ROWS), 1.0))
    else:
        (folder / "rows").write_bytes(json_lines(damage.twist(ROWS)))


def conversations(folder, damage):
    rows = [{"messages": TALK, "source": 1}, {"messages": TALK[1:] * 2}]
    raw = json_lines(damage.twist(rows)) if damage.random.random() < 0.7 else damage.maybe(json_lines(rows))
    (folder / "rows").write_bytes(raw)


def table(folder, damage):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(ROWS[0]))
    writer.writeheader()
    writer.writerows(ROWS)
    (folder / "rows.csv").write_bytes(damage.maybe(text.getvalue().encode(), 1.0))


def parquet(folder, damage):
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), buffer)
    (folder / "rows").write_bytes(damage.maybe(buffer.getvalue(), 1.0))


def read_rows(folder: Path) -> None:
    """Rows, or one sentence; a text stands in the file as it is in the row."""
    (place,) = folder.iterdir()
    examples = read_examples(place)
    assert examples
    assert all(example.answer.strip() for example in examples)
    read_questions(str(place))


def refusals(folder, damage):
    (folder / "rows").write_bytes(damage.maybe(b"I do not know.\nNo idea.\n\nAsk somebody else.\n", 1.0))


# Recipes, policies, orders


def toml(name: str):
    raw = (RECIPES / name).read_bytes()

    def fill(folder, damage):
        (folder / "recipe.toml").write_bytes(damage.maybe(raw, 1.0))

    fill.__name__ = name.removesuffix(".toml")
    return fill


def policy(folder, damage):
    raw = b'unclear = "fail"\nrequire = ["quantise_4"]\nmin_rows = 12\n[budget]\npreset = "quick"\n'
    (folder / "recipe.toml").write_bytes(damage.maybe(raw, 1.0))


def order(folder, damage):
    documents, begins = np.arange(6, dtype=np.int32), np.array([[0, 0], [2, 1], [4, 0], [5, 2]], np.int32)
    for kind, array in (("doc", documents), ("sample", begins), ("shuffle", np.arange(3, dtype=np.uint32))):
        buffer = io.BytesIO()
        np.save(buffer, array)
        (folder / f"run_{kind}_idx.npy").write_bytes(damage.maybe(buffer.getvalue(), 0.4))
    raw = b'kind = "neox"\nprefix = "run"\nbatch_size = 1\n'
    (folder / "order.toml").write_bytes(damage.maybe(raw, 0.3))


def read_whole_order(folder: Path) -> None:
    found = read_order(folder / "order.toml")
    for step in range(1, min(found.steps, 50) + 1):
        found.rows(step)


# Logs


def open_unlearning(folder, damage):
    answers = (Likelihood("a", (-1.0, -0.5)),)
    rows = [
        Outcome(
            row, "q", "a", "b", (-0.3, -0.2), (True, False), alternatives={"paraphrased": answers,
            "perturbed": answers * 2},
        )
        for row in range(3)
    ]  # fmt: skip
    place = folder / "TOFU_EVAL.json"
    write_log(place, {"forget": rows}, {})
    place.write_bytes(damage.json(place.read_bytes(), 1.0))


def exposure_log(folder, damage):
    log = ExposureLog.open(folder / "log", data="d" * 32, tokenizer="t" * 32, start=0, segment_rows=8)
    rows = hashes([f"fact {number}" for number in range(12)])
    for step in range(1, 7):
        log.record(step, rows[step : step + 4], tokens=10, epoch=step / 10)
    if damage.random.random() < 0.5:
        log.close()
    files = sorted(path for path in (folder / "log").rglob("*") if path.is_file())
    spoilt = damage.random.choice(files)
    spoilt.write_bytes(damage.maybe(spoilt.read_bytes(), 1.0))


def read_exposures(folder: Path) -> None:
    found = ExposureReader.open(folder / "log").find([f"fact {number}" for number in range(12)])
    assert {entry.step for entry in found} <= set(range(1, 7)), "an exposure that never was"


# Folders that Palinode wrote


def manifest(folder, damage):
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({"w": torch.arange(6.0), "v": torch.ones(2)}, folder / "model.safetensors")
    opened = Checkpoint.open(folder)
    write_manifest(folder, checkpoint=opened, digests=tensor_digests(opened), content={"seed": 3})
    spoilt = folder / damage.random.choice(
        ["weights.json", "weights.json", "model.safetensors", "config.json"]
    )
    spoilt.write_bytes(damage.json(spoilt.read_bytes(), 1.0) if spoilt.suffix == ".json"
                       else damage.maybe(spoilt.read_bytes(), 1.0))  # fmt: skip


def read_manifest(folder: Path) -> None:
    """A changed folder is never found sound, but where the change says the same in other signs."""
    found = check_manifest(folder)
    if found.ok:
        assert contents(Checkpoint.open(folder).tensors.values()) == {
            "w": torch.arange(6.0).numpy().tobytes(),
            "v": torch.ones(2).numpy().tobytes(),
        }


def vector(folder, damage):
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "rank_pattern": {"k": 3}, "use_rslora": False}
    whole = folder / "adapter"
    whole.mkdir()
    (whole / "adapter_config.json").write_text(json.dumps(config))
    shapes = {"q.lora_A.weight": (2, 5), "q.lora_B.weight": (6, 2), "k.lora_A.weight": (3, 5)}
    shapes |= {"k.lora_B.weight": (6, 3), "e.lora_embedding_A": (2, 5), "e.lora_embedding_B": (6, 2)}
    save_file(
        {name: torch.ones(shape) for name, shape in shapes.items()}, whole / "adapter_model.safetensors"
    )
    stored = save_vector(open_direction(whole), folder / "vector", rank=1).folder
    spoilt = damage.random.choice(sorted(stored.iterdir()))
    raw = spoilt.read_bytes()
    spoilt.write_bytes(damage.json(raw, 1.0) if spoilt.suffix == ".json" else damage.maybe(raw, 1.0))


def read_vector(folder: Path) -> None:
    with Files() as files:
        for change in open_direction(folder / "vector").changes.values():
            size = int(np.prod(change.shape, dtype=object))
            assert size < 1e6, "a vector far larger than its files"
            change.read(files, 0, np.empty(size, np.float32))


def tokenizers(folder, damage):
    content = {
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []},
        "added_tokens": [{"id": 2, "content": "<s>", "special": True}],
    }
    for name in ("first", "second"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 2}))
        save_file({"w": torch.ones(2)}, folder / name / "model.safetensors")
        (folder / name / "tokenizer.json").write_text(json.dumps(content))
    for name in ("tokenizer.json", "config.json"):
        place = folder / "second" / name
        place.write_bytes(damage.json(place.read_bytes(), 0.8))


def read_tokenizers(folder: Path) -> None:
    check_tokenizers(*([opened] if place else opened for place, opened in enumerate(
        Checkpoint.open(folder / name) for name in ("first", "second"))))  # fmt: skip


# Chat templates

TEMPLATES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}",
    "{{ bos_token }}{% for m in messages %}<{{ 'model' if m.role == 'assistant' else m.role }}>"
    "{{ m['content'].split('</think>')[-1] }}<|im_end|>{% endfor %}{{ strftime_now('%d %b') }}",
)
LETTERS = "".join(map(chr, range(32, 127))) + "\n"
ASKED = [
    Example(0, "rows", "question", (Message("user", "Who is user?"),), "a user"),
    Example(1, "rows", "chat", (Message("user", "Q"), Message("assistant", "A"), Message("user", "Q")), "A"),
]


def template(folder, damage):
    raw = damage.random.choice(TEMPLATES).encode()
    (folder / "chat_template.jinja").write_bytes(damage.maybe(raw, 1.0))


def read_template(folder: Path) -> None:
    """The answer is what is scored, and begins there; the question stands before it."""
    core = Tokenizer(WordLevel({letter: number for number, letter in enumerate(LETTERS)} | {"?": 31}, "?"))
    core.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="<|im_end|>")
    text = (folder / "chat_template.jinja").read_bytes().decode(errors="replace")
    tokenizer.chat_template = text
    style = PromptStyle(system_prompt="Be kind.")
    rows = tokenize(ASKED, tokenizer, max_length=100_000, style=style)
    for row, example in zip(rows, ASKED, strict=True):
        words = tokenizer.convert_ids_to_tokens(row.ids)
        assert "".join(words[row.start :]).strip().startswith(example.answer)
        assert example.prompt.lower() in "".join(words[: row.start]).lower()
        assert list(row.ids[: row.start]) == prompt_ids(example, tokenizer, style)


# What a judge replies

CANDIDATES = [Candidate("Oslo", ("truth",)), Candidate("Rome", ("perturbed",)), Candidate("none", ("none",))]


def reply(folder, damage):
    raw = damage.json(b'{"reason": "it says Oslo", "picked": [0]}', 0.9)
    (folder / "reply").write_bytes(damage.maybe(b"Sure:\n```json\n" + raw + b"\n```", 0.3))


def read_judge(folder: Path) -> None:
    text = (folder / "reply").read_bytes().decode(errors="replace")
    try:
        picked = read_reply(text, CANDIDATES)
    except UnreadableReplyError:
        return
    assert picked
    assert set(picked) <= {0, 1, 2}


OTHERS = {
    jsonl: read_rows,
    conversations: read_rows,
    table: read_rows,
    parquet: read_rows,
    refusals: lambda folder: read_refusals(folder / "rows"),
    toml("demo_world.toml"): lambda folder: load_recipe(folder / "recipe.toml"),
    toml("compare_demo.toml"): lambda folder: load_comparison(folder / "recipe.toml"),
    policy: lambda folder: load_policy(folder / "recipe.toml"),
    order: read_whole_order,
    open_unlearning: lambda folder: read_log(folder / "TOFU_EVAL.json"),
    exposure_log: read_exposures,
    manifest: read_manifest,
    vector: read_vector,
    tokenizers: read_tokenizers,
    template: read_template,
    reply: read_judge,
}
"""What writes something that Palinode reads, and what reads it."""
