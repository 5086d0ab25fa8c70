"""What is refused before any byte is written, what is let through with a note, and what is counted."""

import json
import shutil

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE, Unigram, WordLevel

from palinode.errors import CheckpointError, InputError, MismatchError
from palinode.weights import Checkpoint
from palinode.weights.preflight import (
    Fit,
    check_fit,
    check_tokenizers,
    complain_of_nonfinite,
    count_nonfinite,
)
from palinode.weights.tensors import BLOCK

# Names, shapes, tying


def grown(models, name, rows=12, **changes):
    """A model whose vocabulary has so many rows, in embedding, head and the head's bias."""
    tensors = {
        "model.embed_tokens.weight": models.noise(1, rows, 8),
        "model.norm.weight": models.noise(2, 8),
        "lm_head.weight": models.noise(3, rows, 8),
        "lm_head.bias": models.noise(4, rows),
        **changes,
    }
    return models.make(name, {key: tensor for key, tensor in tensors.items() if tensor is not None})


def test_states_of_one_model_fit(four):
    for rows in ("refuse", "shared"):
        assert check_fit(four[0], four[1:], rows=rows) == Fit({}, ())
    assert check_fit(four[0], []) == Fit({}, ())


@pytest.mark.parametrize("rows", ["refuse", "shared"])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.norm.weight": torch.ones(9)}, r"1 of 4 tensors \(model\.norm\.weight: 8 against 9\)"),
        ({"model.norm.weight": torch.tensor(1.0)}, "8 against scalar"),
        ({"model.norm.weight": torch.ones(8, dtype=torch.int32)}, "F32 against I32"),
        ({"model.norm.weight": None}, r"model\.norm\.weight is missing in .*/other"),
        ({"extra": torch.ones(0)}, r"extra is missing in .*/target"),
        ({"lm_head.weight": torch.ones(12, 9)}, "12x8 against 12x9"),
        ({"lm_head.weight": torch.ones(14, 9)}, "12x8 against 14x9"),
        ({"lm_head.weight": torch.ones(96)}, "12x8 against 96"),
        ({"lm_head.weight": torch.tensor(1.0)}, "12x8 against scalar"),
    ],
)
def test_what_does_not_fit_is_refused_whatever_the_rows(models, rows, changes, words):
    target, other = grown(models, "target"), grown(models, "other", **changes)
    with pytest.raises(MismatchError, match=words) as error:
        check_fit(target, [grown(models, "same"), other], rows=rows)
    assert "--rows" not in str(error.value)
    assert "are they states of one model" in str(error.value)


def test_other_rows_elsewhere_are_never_shared(models):
    target, other = (models.make(f"{n}", {"model.layers.0.w": torch.ones(n, 4)}) for n in (3, 5))
    with pytest.raises(MismatchError, match="3x4 against 5x4"):
        check_fit(target, [other], rows="shared")


@pytest.mark.parametrize(
    "key", ["model_type", "num_attention_heads", "num_key_value_heads", "head_dim", "n_head"]
)
def test_another_architecture_is_refused(models, key):
    target, other = (models.make(name, {"w": torch.ones(2)}, **{key: name}) for name in ("4", "8"))
    silent = models.make("silent", {"w": torch.ones(2)}, **{key: None})
    assert check_fit(target, [silent]) == Fit({}, ())
    with pytest.raises(MismatchError, match=f"{key} is 4 in the one and 8 in the other"):
        check_fit(target, [other])


def test_tying_must_agree(models):
    tensors = {"model.embed_tokens.weight": models.noise(1, 6, 4)}
    tied = models.make("tied", tensors, tie_word_embeddings=True)
    twice = models.make(
        "twice", {**tensors, "lm_head.weight": models.noise(1, 6, 4)}, tie_word_embeddings=True
    )
    untied = models.make("untied", {**tensors, "lm_head.weight": models.noise(2, 6, 4)})
    assert check_fit(tied, [twice]) == check_fit(twice, [tied]) == Fit({}, ())
    for pair in ((tied, untied), (untied, tied)):
        with pytest.raises(
            MismatchError, match=r"head is tied to the embedding in .*/tied and is not in .*/untied"
        ):
            check_fit(pair[0], [pair[1]], rows="shared")


def test_an_unknown_policy_says_which_there_are(four):
    with pytest.raises(InputError, match="no policy 'keep' for rows; choose one of refuse, shared"):
        check_fit(four[0], four[1:], rows="keep")


def test_models_without_tensors_fit(models):
    assert check_fit(models.make("a", {}), [models.make("b", {})]) == Fit({}, ())


# Rows of the vocabulary


def test_another_number_of_rows_is_refused_with_the_way_out(models):
    target, other = grown(models, "target", 12), grown(models, "other", 10)
    with pytest.raises(
        MismatchError, match=r"lm_head\.bias: 12 against 10\); .* padded vocabulary.* --rows shared"
    ) as error:
        check_fit(target, [other])
    assert "disagree on 3 of 4 tensors" in str(error.value)


def test_other_problems_come_before_rows(models):
    target = grown(models, "target", 12)
    other = grown(models, "other", 10, **{"model.norm.weight": torch.ones(9)})
    with pytest.raises(MismatchError, match=r"disagree on 1 of 4 tensors \(model\.norm\.weight"):
        check_fit(target, [other], rows="shared")
    with pytest.raises(MismatchError, match="are they states of one model"):
        check_fit(target, [other])


def test_shared_rows_are_those_that_all_have(models):
    target, less, least, more = (grown(models, f"m{rows}", rows) for rows in (12, 11, 9, 20))
    vocabulary = ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias")
    fit = check_fit(target, [less, least, target, more], rows="shared")
    assert fit.shared_rows == dict.fromkeys(vocabulary, 9)
    assert fit.notes == tuple(
        f"{name}: 9 of 12 rows are in all; the other 3 stay the target's; "
        "further rows are left out: 2 of m11, 11 of m20"
        for name in sorted(vocabulary, key=list(target.tensors).index)
    )


def test_a_target_with_fewer_rows_than_all_keeps_all_of_them(models):
    fit = check_fit(grown(models, "target", 9), [grown(models, "more", 12)], rows="shared")
    assert set(fit.shared_rows.values()) == {9}
    assert "lm_head.bias: all 9 rows are in all; further rows are left out: 3 of more" in fit.notes


def test_the_note_counts_as_promised(models):
    target = models.make("target", {"model.embed_tokens.weight": torch.empty(49280, 1)})
    other = models.make("other", {"model.embed_tokens.weight": torch.empty(49152, 1)})
    assert check_fit(target, [other], rows="shared") == Fit(
        {"model.embed_tokens.weight": 49152},
        ("model.embed_tokens.weight: 49152 of 49280 rows are in all; the other 128 stay the target's",),
    )


def test_only_what_differs_is_listed(models):
    target = grown(models, "target", 12)
    other = grown(models, "other", 12, **{"model.embed_tokens.weight": models.noise(1, 10, 8)})
    assert check_fit(target, [other], rows="shared").shared_rows == {"model.embed_tokens.weight": 10}


def test_tied_models_of_other_sizes_share_both_names(models):
    short = {"model.embed_tokens.weight": models.noise(1, 10, 4)}
    tall = {"model.embed_tokens.weight": models.noise(1, 12, 4), "lm_head.weight": models.noise(1, 12, 4)}
    once, twice = (models.make(f"{len(t)}", t, tie_word_embeddings=True) for t in (short, tall))
    assert check_fit(twice, [once], rows="shared").shared_rows == dict.fromkeys(tall, 10)
    assert check_fit(once, [twice], rows="shared").shared_rows == dict.fromkeys(short, 10)


# Tokens

WORDS = [f"w{i}" for i in range(20)]


@pytest.fixture
def speaking(models):
    """A function that makes a model folder with a tokenizer in it."""

    def make(name, model, added=(), **files):
        folder = models.write(name, {"w": torch.ones(2)})
        if model is not None:
            tokenizer = Tokenizer(model)
            tokenizer.add_special_tokens([token for token in added if token.startswith("<")])
            tokenizer.add_tokens([token for token in added if not token.startswith("<")])
            tokenizer.save(str(folder / "tokenizer.json"))
        for file, content in files.items():
            (folder / f"{file}.json").write_text(json.dumps(content))
        return Checkpoint.open(folder)

    return make


def word_level(words):
    return WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0])


def unigram(words):
    return Unigram([(word, -1.0) for word in words], unk_id=0)


def bpe(words):
    return BPE({word: number for number, word in enumerate(words)}, [])


KINDS = pytest.mark.parametrize("kind", [word_level, unigram, bpe])


@KINDS
def test_the_same_tokenizer_needs_no_word(speaking, kind):
    first, second = (speaking(name, kind(WORDS), ["<s>", "more"]) for name in "ab")
    assert check_tokenizers(first, [second, first]) == ()


def test_tokenizers_of_two_kinds_with_the_same_tokens_fit(speaking):
    first, second, third = (speaking(k.__name__, k(WORDS)) for k in (word_level, unigram, bpe))
    assert check_tokenizers(first, [second, third]) == ()


@KINDS
def test_tokens_with_other_numbers_are_refused_by_name(speaking, kind):
    swapped = [WORDS[0], WORDS[2], WORDS[1], *WORDS[3:]]
    first, second = speaking("a", kind(WORDS)), speaking("b", kind(swapped))
    with pytest.raises(
        MismatchError, match=r"numbers to 2 tokens \('w1' is 1 and 2, 'w2' is 2 and 1\); the rows"
    ):
        check_tokenizers(first, [second])
    with pytest.raises(MismatchError, match=r"to 20 tokens \('w0' is 0 and 19, .*, …\)"):
        check_tokenizers(first, [first, speaking("c", kind(WORDS[::-1]))])


@KINDS
def test_added_tokens_count_as_tokens(speaking, kind):
    first = speaking("a", kind(WORDS), ["<s>", "<e>"])
    second = speaking("b", kind(WORDS), ["<e>", "<s>"])
    with pytest.raises(MismatchError, match="'<s>' is 20 and 21"):
        check_tokenizers(first, [second])


@KINDS
def test_tokens_on_one_side_are_noted(speaking, kind):
    first = speaking("a", kind(WORDS), ["<s>"])
    second = speaking("b", kind(WORDS[:-6]))
    note = "7 tokens are only in a ('w14', 'w15', 'w16', …)"
    assert check_tokenizers(first, [second]) == (note,)
    assert check_tokenizers(second, [first]) == (note,)
    third = speaking("c", kind([*WORDS, "x"]))
    assert check_tokenizers(first, [third]) == (
        "1 tokens are only in a ('<s>')",
        "1 tokens are only in c ('x')",
    )


def test_folders_without_a_tokenizer_fit_every_other(speaking):
    first, mute = speaking("a", word_level(WORDS)), speaking("mute", None)
    assert check_tokenizers(first, [mute]) == check_tokenizers(mute, [first, mute]) == ()


def test_files_of_the_same_bytes_are_not_even_parsed(speaking):
    first, second = (speaking(name, None) for name in "ab")
    for checkpoint in (first, second):
        (checkpoint.folder / "tokenizer.json").write_bytes(b"no JSON \xff")
    assert check_tokenizers(first, [second]) == ()
    (second.folder / "tokenizer.json").write_bytes(b"other")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        check_tokenizers(first, [second])


@pytest.mark.parametrize(
    "content",
    [
        [],
        None,
        {},
        {"model": None},
        {"model": {"vocab": None}},
        {"model": {"vocab": {"a": "0"}}},
        {"model": {"vocab": {"a": True}}},
        {"model": {"vocab": [["a"]]}},
        {"model": {"vocab": [[["a"], 0.0]]}},
        {"model": {"vocab": [1, 2]}},
        {"model": {"vocab": {}}, "added_tokens": [{"id": 3}]},
        {"model": {"vocab": {}}, "added_tokens": [{"id": 3, "content": ["x"]}]},
        {"model": {"vocab": {}}, "added_tokens": {"a": 3}},
    ],
)
def test_a_damaged_tokenizer_says_so(speaking, content):
    first = speaking("a", word_level(WORDS))
    second = speaking("b", None, tokenizer=content)
    with pytest.raises(CheckpointError, match=r"b/tokenizer\.json does not"):
        check_tokenizers(first, [second])


def test_vocabularies_in_other_formats_are_compared_by_bytes(speaking):
    first, second = (speaking(name, None, vocab={name: 0}) for name in "ab")
    assert check_tokenizers(first, [second]) == (
        "vocab.json is not the same in a and b; its tokens were not compared",
    )
    shutil.copy(first.folder / "vocab.json", second.folder)
    assert check_tokenizers(first, [second]) == ()


def test_special_tokens_that_differ_are_noted_once(speaking, models):
    first = speaking(
        "a",
        None,
        generation_config={"eos_token_id": 2, "pad_token_id": 0},
        tokenizer_config={"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}},
    )
    second = speaking(
        "b",
        None,
        generation_config={"eos_token_id": [2, 5], "pad_token_id": None},
        tokenizer_config={"bos_token": {"content": "<s>"}, "eos_token": "<end>", "pad_token": "<pad>"},
    )
    assert check_tokenizers(first, [second, second]) == (
        "eos_token_id of generation_config.json is 2 in a and [2, 5] in b",
        "eos_token of tokenizer_config.json is '</s>' in a and '<end>' in b",
    )
    for name, number in (("c", 7), ("d", 8)):
        models.write(name, {"w": torch.ones(2)}, bos_token_id=number)
    assert check_tokenizers(
        *(Checkpoint.open(models.place / "c"), [Checkpoint.open(models.place / "d")])
    ) == ("bos_token_id of config.json is 7 in c and 8 in d",)


# Values


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_nan_and_infinity_are_counted_as_torch_counts_them(models, dtype):
    inf, nan = float("inf"), float("nan")
    largest = torch.finfo(dtype).max
    odd = torch.tensor([inf, -inf, -inf, nan, -nan, largest, -largest, 0.0, -0.0, 1e-8], dtype=torch.float64)
    long = torch.zeros(2 * BLOCK // dtype.itemsize + 7, dtype=dtype)
    long[::1000], long[-1] = inf, nan
    tensors = {"odd": odd.to(dtype), "fine": torch.ones(5, dtype=dtype), "long": long}
    expected = {
        name: (int(tensor.isnan().sum()), int(tensor.isinf().sum()))
        for name, tensor in tensors.items()
        if not tensor.isfinite().all()
    }
    assert expected["odd"] == (2, 3)
    told = []
    checkpoint = models.make("model", tensors)
    assert count_nonfinite(checkpoint, on_progress=told.append) == expected
    assert sum(told) == checkpoint.nbytes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_value_is_told_right(models, dtype):
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    found = count_nonfinite(models.make("model", {"w": values}))
    assert found == {"w": (int(values.isnan().sum()), int(values.isinf().sum()))}


def test_only_floating_tensors_have_such_values(models):
    ones = torch.full((4,), -1, dtype=torch.int64)
    tensors = {"n": ones, "u": ones.to(torch.uint8), "none": torch.empty(0), "scalar": torch.tensor(1.0)}
    assert count_nonfinite(models.make("model", tensors)) == {}
    assert count_nonfinite(models.make("empty", {})) == {}
    assert count_nonfinite(models.make("nan", {"scalar": torch.tensor(float("nan"))})) == {"scalar": (1, 0)}


def test_the_complaint_counts_and_names(models):
    inf, nan = float("inf"), float("nan")
    fine = models.make("fine", {"a": torch.ones(3), "b": torch.ones(3)})
    bad = models.make(
        "bad", {"a": torch.ones(3), "b": torch.tensor([nan, nan, 1]), "c": torch.tensor([nan, -inf])}
    )
    worse = models.make("worse", {"a": torch.tensor([inf])})
    with pytest.raises(CheckpointError) as error:
        complain_of_nonfinite([fine, bad, worse])
    assert str(error.value) == (
        f"{bad.folder} holds 3 NaN and 1 infinite values in 2 tensors (first: b); "
        f"{worse.folder} holds 0 NaN and 1 infinite values in 1 tensors (first: a); "
        "they would spoil what they are added to, so fetch the model again, or say --allow-nonfinite to go "
        "on anyway"
    )
    complain_of_nonfinite([fine])
