"""What a row gets is what it gets alone, on architectures in which neighbours could enter."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import transformers
from transformers import GenerationConfig

from palinode.data.tokenize import TokenRow
from palinode.errors import RecipeError
from palinode.methods import METHODS
from palinode.models import generate, score_rows
from palinode.models.generation import slots_for
from palinode.models.likelihoods import (
    COARSE_TOLERANCE,
    TOLERANCE,
    must_be_apart,
    same_alone,
    tolerance,
    unlike,
)
from palinode.models.reading import decoder_blocks, gradient_norms
from palinode.settings import TrainingSettings
from palinode.training.loop import train
from palinode.training.moments import basis_of, input_moments
from palinode.training.objectives import PLAIN_OBJECTIVE, Joined, Keeper, keep, likelihoods, states_of

TOKENS = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
SMALL = TOKENS | {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}
ROPE = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LONG = ROPE | {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
HALF_LINEAR = ["linear_attention", "full_attention"]
LINEAR = {f"linear_{name}": 2 for name in ("num_key_heads", "num_value_heads")} | {
    f"linear_{name}": 8 for name in ("key_head_dim", "value_head_dim")
}

BUILT = {
    "phi3 longrope": ("Phi3", SMALL | {"rope_parameters": LONG, "original_max_position_embeddings": 32}),
    "llama longrope": ("Llama", SMALL | {"rope_parameters": LONG}),
    "llama dynamic": ("Llama", SMALL | {"rope_parameters": ROPE | {"rope_type": "dynamic"}}),
    "llama yarn": ("Llama", SMALL | {"rope_parameters": ROPE | {"rope_type": "yarn"}}),
    "rwkv": (
        "Rwkv",
        TOKENS
        | {"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2, "context_length": 128},
    ),
    "mamba": ("Mamba", TOKENS | {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
    "recurrent gemma": (
        "RecurrentGemma",
        SMALL | {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 16},
    ),
    "minimax": (
        "MiniMax",
        SMALL | {"head_dim": 16, "num_local_experts": 2, "block_size": 8, "layer_types": HALF_LINEAR},
    ),
    "qwen3 next": (
        "Qwen3Next",
        SMALL
        | LINEAR
        | {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "layer_types": HALF_LINEAR}
        | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    ),
    "mixtral": ("Mixtral", SMALL | {"num_local_experts": 4}),
    "gemma3": (
        "Gemma3",
        SMALL | {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "bloom": ("Bloom", TOKENS | {"hidden_size": 32, "n_layer": 2, "n_head": 2}),
}
EVERY = pytest.mark.parametrize("name", BUILT)
ANSWERS_DIFFER = {"phi3 longrope", "llama longrope", "rwkv", "recurrent gemma", "minimax"}
"""Those whose answers padding or neighbours would change."""
FIGURES_DIFFER = {"phi3 longrope", "llama longrope"}


def built(name: str):
    torch.manual_seed(0)
    kind, settings = BUILT[name]
    config = getattr(transformers, "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config")(**settings)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():  # so that answers are no repetitions of one token
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def ids_of(*lengths: int) -> list[tuple[int, ...]]:
    random = torch.Generator().manual_seed(1)
    return [tuple(torch.randint(3, 60, (length,), generator=random).tolist()) for length in lengths]


PROMPTS = ids_of(3, 28, 9, 45, 5, 36)
COMMON = (7, 8, 9, 10, 11, 12)
ROWS = [
    *(TokenRow((*COMMON, *ids), 6, place) for place, ids in enumerate(ids_of(3, 5, 40, 2))),
    *(TokenRow(ids, len(ids) - 3, 9) for ids in ids_of(9, 50, 20, 5)),
]


@torch.no_grad()
def scored_alone(model, row: TokenRow) -> list[float]:
    logprobs = model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
    return [logprobs[place - 1, row.ids[place]].item() for place in range(row.start, len(row.ids))]


def answered_alone(model, prompt, count: int) -> list[int]:
    """Return what transformers itself makes of one prompt."""
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=count, pad_token_id=0, eos_token_id=None, bos_token_id=None
    )
    ids = torch.tensor([prompt])
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids))[0, len(prompt) :].tolist()


def answers(model, prompts=PROMPTS, count: int = 6, **others) -> list[list[int]]:
    return generate(model, prompts, pad_id=0, stop_ids=[], max_new_tokens=count, **others)


# Likelihoods and answers


@EVERY
def test_log_probabilities_in_batches_are_those_of_the_row_alone(name):
    model, said = built(name), []
    found = score_rows(model, ROWS, pad_id=0, say=said.append)
    for row, scores in zip(ROWS, found, strict=True):
        assert scores.logprobs == pytest.approx(scored_alone(model, row), abs=TOLERANCE)
    assert [line.split(" go one by one")[0] for line in said] == ["likelihoods"] * (name in FIGURES_DIFFER)


@EVERY
def test_answers_in_batches_are_those_of_the_prompt_alone(name):
    model, said = built(name), []
    found = answers(model, say=said.append)
    assert found == [answered_alone(model, prompt, 6) for prompt in PROMPTS]
    assert len(set(map(tuple, found))) >= 4  # not all say the same
    assert [line.split(" go one by one")[0] for line in said] == ["answers"] * (name in ANSWERS_DIFFER)


def test_short_rows_of_a_longrope_model_share_their_batches():
    """All within the original context, or all beyond it: no row can change another."""
    model, said = built("phi3 longrope"), []
    for rows in (ROWS[:2], [row for row in ROWS if len(row.ids) > 33]):
        score_rows(model, rows, pad_id=0, say=said.append)
    answers(model, ids_of(3, 9, 20), say=said.append)
    assert said == []


def test_answers_that_grow_beyond_the_original_context_change_no_other():
    """No prompt is beyond 32 tokens, and only the longest answer gets there."""
    model, prompts = built("llama longrope"), ids_of(3, 20, 5)
    assert slots_for(model, prompts, 4, 45, 0) is None
    assert slots_for(model, prompts, 4, 33, 0) is not None
    assert answers(model, prompts, 25) == [answered_alone(model, prompt, 25) for prompt in prompts]


def test_what_all_prompts_begin_with_is_not_read_by_itself_where_length_counts():
    """All prompts are beyond the original context; their common beginning is not."""
    model = built("llama longrope")
    prompts = [(*COMMON, *ids) for ids in ids_of(30, 40, 33)]
    assert answers(model, prompts) == [answered_alone(model, prompt, 6) for prompt in prompts]


def test_answers_one_by_one_take_nothing_from_rows_read_whole():
    """Tokens begun come from the row with its answer behind, which may have been read in another way."""
    model = built("llama longrope")
    wrong = [[5, 6, 7]] * len(PROMPTS)
    assert answers(model, begun=wrong) == answers(model)


class Crowded(transformers.LlamaForCausalLM):
    """A model in which tokens share something: the mean of the batch, as a capacity or a norm would."""

    def forward(self, input_ids=None, **others):
        output = super().forward(input_ids=input_ids, **others)
        output.logits = output.logits * (1 + output.logits.mean(dim=(0, 1), keepdim=True).abs())
        return output


def test_rows_that_share_a_statistic_of_the_batch_go_one_by_one():
    torch.manual_seed(0)
    model, said = Crowded(transformers.LlamaConfig(**SMALL)).eval(), []
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    rows = [TokenRow(ids, 3, 0) for ids in ids_of(8, 8, 8)]  # of one length: nothing is padded
    found = score_rows(model, rows, pad_id=0, say=said.append)
    for row, scores in zip(rows, found, strict=True):
        (alone,) = score_rows(model, [row], pad_id=0)
        assert scores.logprobs == pytest.approx(alone.logprobs, abs=1e-6)
    assert len(said) == 1


def test_note_says_what_happens_once_for_each_model():
    model, said = built("phi3 longrope"), []
    for _ in range(3):
        score_rows(model, ROWS, pad_id=0, say=said.append)
    assert said == [
        "likelihoods go one by one, which takes longer: beside other rows this model (phi3) gives a row "
        "log-probabilities that are more than 0.0001 off those of the row alone"
    ]


# Training, and what is read for it


def rows_beside(*lengths: int) -> list[TokenRow]:
    return [TokenRow(ids, len(ids) // 2, place) for place, ids in enumerate(ids_of(*lengths))]


MIXED = rows_beside(5, 50, 12, 40)


@EVERY
@pytest.mark.filterwarnings("ignore:.*deprecat")
def test_step_over_padded_rows_is_the_step_over_each_alone(name):
    points = []
    for batch, accumulation in ((4, 1), (1, 4)):
        settings = TrainingSettings(
            epochs=1, batch_size=batch, accumulation=accumulation, precision="float32", max_grad_norm=1e9
        )
        points += train(built(name), MIXED, PLAIN_OBJECTIVE, settings, seed=0, pad_id=0)
    assert points[0].loss == pytest.approx(points[1].loss, rel=1e-5)
    assert points[0].grad_norm == pytest.approx(points[1].grad_norm, rel=1e-4)


def test_training_says_that_its_rows_go_one_by_one():
    said: list[str] = []
    settings = TrainingSettings(epochs=1, precision="float32")
    train(built("phi3 longrope"), MIXED, PLAIN_OBJECTIVE, settings, seed=0, pad_id=0, say=said.append)
    assert [line.split(" go one by one")[0] for line in said] == ["training rows"]


def test_methods_that_compare_pairs_refuse_rows_that_change_each_other():
    objective = METHODS["dpo"].objective(METHODS["dpo"].settings(), 0)
    roles = {"forget": MIXED, "refusal": rows_beside(4, 6, 4, 6), "retain": MIXED}
    draws = {role: [[(place,) for place in range(4)]] for role in ("refusal", "retain")}
    settings = TrainingSettings(epochs=1, precision="float32")
    with pytest.raises(RecipeError, match="compares pairs of rows read together"):
        train(built("phi3 longrope"), Joined("forget", roles, draws), objective, settings, seed=0, pad_id=0)


@EVERY
def test_gradient_norm_of_a_row_does_not_depend_on_the_others(name):
    model = built(name)
    together = gradient_norms(model, MIXED, pad_id=0)
    for row, norm in zip(MIXED, together, strict=True):
        assert gradient_norms(model, [row], pad_id=0) == pytest.approx([norm], rel=1e-4)


@pytest.mark.parametrize("name", ["phi3 longrope", "rwkv", "minimax", "mixtral"])
@pytest.mark.parametrize("keeper", [functools.partial(Keeper, likelihoods), functools.partial(states_of, 1)])
def test_values_kept_of_the_frozen_model_are_those_of_rows_alone(name, keeper):
    model = built(name)
    rows = {("forget", place): row for place, row in enumerate(MIXED)}
    kept = keep(keeper(), model, rows, pad_id=0, autocast=False)
    for place, row in rows.items():
        alone = keep(keeper(), model, {place: row}, pad_id=0, autocast=False)
        torch.testing.assert_close(kept.values[place], alone.values[place], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["phi3 longrope", "rwkv", "qwen3 next", "bloom"])
def test_inputs_of_layers_are_summed_over_the_tokens_of_rows_read_alone(name):
    """E[x xᵀ] is that of the inputs that single rows make, and so are its axes: no padding is counted."""
    model = built(name)
    rows = rows_beside(3, 40, 4)
    heard: dict[str, list[torch.Tensor]] = {}

    def hear(layer):
        return lambda _module, inputs: heard.setdefault(layer, []).append(inputs[0].flatten(0, -2))

    moments = {
        parameter.removesuffix(".weight"): group.values[keys[0]]
        for group in input_moments(model, rows, pad_id=0)
        for parameter, [(keys, _), *_] in group.places.items()
        if parameter.endswith(".weight") and group.values[keys[0]].dim() == 2 and keys != ["head"]
    }
    inside = [module for module in decoder_blocks(model).modules() if isinstance(module, torch.nn.Linear)]
    assert {id(module) for module in inside} <= {id(model.get_submodule(layer)) for layer in moments}
    handles = [model.get_submodule(layer).register_forward_pre_hook(hear(layer)) for layer in moments]
    with torch.no_grad():
        for row in rows:
            model.base_model(input_ids=torch.tensor([row.ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    for layer, moment in moments.items():
        inputs = torch.cat(heard[layer]).double()
        assert len(inputs) == sum(len(row.ids) for row in rows)
        torch.testing.assert_close(moment.double(), inputs.T @ inputs / len(inputs), rtol=1e-3, atol=1e-4)
        wanted = basis_of((inputs.T @ inputs).numpy(), energy=0.9)
        basis = basis_of(moment.numpy(), energy=0.9)
        assert basis @ basis.T == pytest.approx(wanted @ wanted.T, abs=1e-3)


# The trial


def test_rows_that_are_tried_span_all_lengths():
    assert unlike([5, 1, 9, 3, 7, 8, 2], 3) == [2, 0, 1]  # 9, the middle, 1
    assert unlike([4, 4]) == [0, 1]
    assert unlike([]) == []


@pytest.mark.parametrize(
    ("dtype", "most"),
    [(torch.float32, TOLERANCE), (torch.bfloat16, COARSE_TOLERANCE), (torch.float16, COARSE_TOLERANCE)],
)
def test_tolerance_is_that_of_the_weights(dtype, most):
    model = built("bloom").to(dtype)
    assert tolerance(model) == most
    for number, (off, alike) in enumerate([(0.9, True), (1.1, False), (math.nan, False)]):
        found = same_alone(
            model, str(number), [3], lambda off=off: [torch.tensor([off * most])], lambda _: torch.zeros(1)
        )
        assert found is alike


@pytest.mark.parametrize("name", [*sorted(FIGURES_DIFFER), "llama yarn", "bloom"])
def test_neighbours_are_told_from_roundings_in_bfloat16(name):
    assert must_be_apart(built(name).bfloat16(), ROWS, pad_id=0) is (name in FIGURES_DIFFER)


def test_roundings_of_a_deep_model_do_not_part_its_rows():
    """They move log-probabilities by more than the tolerance; a leak between rows does more."""
    model = deep().bfloat16()
    alone = [scored_alone(model, row) for row in ROWS]
    assert not must_be_apart(model, ROWS, pad_id=0)
    assert slots_for(model, PROMPTS, 4, 60, 0) is not None
    found = score_rows(model, ROWS, pad_id=0)
    far = [abs(one - other) for row, plain in zip(found, alone, strict=True)
           for one, other in zip(row.logprobs, plain, strict=True)]  # fmt: skip
    assert max(far) > COARSE_TOLERANCE

    def leak(_block, _inputs, output):  # what all rows have in common
        return output + 0.05 * output.mean(dim=(0, 1))

    leaking = deep().bfloat16()
    leaking.model.layers[1].register_forward_hook(leak)
    assert must_be_apart(leaking, ROWS, pad_id=0)


def deep():
    torch.manual_seed(0)
    settings = SMALL | {"num_hidden_layers": 24}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


def test_trial_is_held_once_for_a_way_and_its_lengths():
    model, heard = built("bloom"), []

    def together():
        heard.append(1)
        return [torch.zeros(1)]

    for lengths in ([3], [3], [4]):
        assert same_alone(model, "a way", lengths, together, lambda _: torch.zeros(1))
    assert len(heard) == 2
    assert not same_alone(model, "no way", [3], lambda: [][0], lambda _: torch.zeros(1))
