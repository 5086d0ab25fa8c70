"""Moments of what layers read, against plain torch: one row at a time, without padding, in whole passes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from palinode.data.examples import read_examples
from palinode.data.tokenize import PromptStyle, TokenRow, tokenize
from palinode.errors import DataError
from palinode.models import load_model, load_tokenizer
from palinode.training import moments
from palinode.training.moments import basis_of, input_moments
from waiting import waits_of

TOKENS = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
SMALL = TOKENS | {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
}
HEADS = {"head_dim": 8, "num_attention_heads": 4, "num_key_value_heads": 2}
SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
BUILT = {
    "llama": ("Llama", SMALL),
    "llama, tied": ("Llama", SMALL | {"tie_word_embeddings": True}),
    "llama, wide": ("Llama", SMALL | {"intermediate_size": 2 * moments.STRIP + 3}),
    "gpt2": ("GPT2", TOKENS | {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}),
    "mixtral": ("Mixtral", SMALL | {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "qwen2": ("Qwen2", SMALL),
    "qwen3": ("Qwen3", SMALL | HEADS),
    "gemma3": ("Gemma3", SMALL | HEADS | SLIDING),
    "cohere": ("Cohere", SMALL),
    "mpt": ("Mpt", TOKENS | {"d_model": 16, "n_heads": 4, "n_layers": 2, "max_seq_len": 32}),
    "opt": ("OPT", SMALL | {"ffn_dim": 24, "word_embed_proj_dim": 16}),
    "rwkv": (
        "Rwkv",
        TOKENS
        | {"hidden_size": 16, "attention_hidden_size": 16, "num_hidden_layers": 2, "context_length": 64},
    ),
}
EVERY = pytest.mark.parametrize("name", BUILT)


def built(name, **changes):
    torch.manual_seed(0)
    kind, settings = BUILT[name][0], {**BUILT[name][1], **changes}
    config = getattr(transformers, "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config")(**settings)
    model = getattr(transformers, "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(config)
    with torch.no_grad():  # so that norms scale, and biases are not zero
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def rows_of(*lengths):
    """Rows without the padding token, of which the second half is the answer."""
    random = torch.Generator().manual_seed(1)
    ids = [tuple(torch.randint(3, 40, (length,), generator=random).tolist()) for length in lengths]
    return [TokenRow(own, len(own) // 2, place) for place, own in enumerate(ids)]


ROWS = rows_of(9, 2, 4, 7, 3)


@pytest.fixture(scope="module")
def live(tiny):
    model = load_model(tiny.base, device=torch.device("cpu"))
    rows = tokenize(
        read_examples(tiny.retain)[:5], load_tokenizer(tiny.base), max_length=64, style=PromptStyle()
    )
    return model, rows


def gpt2():
    """Layers that store their weights as (in, out)."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=4, n_layer=1, n_head=2, vocab_size=30, n_positions=16, bos_token_id=1, eos_token_id=1
        )
    ).eval()


@torch.no_grad()
def inputs_alone(model, rows, names):
    """What modules read, rows one at a time without padding, [tokens, D] in float64."""
    caught: dict[str, list[torch.Tensor]] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _module, inputs, name=name: caught.setdefault(name, []).append(inputs[0].flatten(0, -2))
        )
        for name in names
    ]
    for row in rows:
        model(input_ids=torch.tensor([row.ids]))
    for handle in handles:
        handle.remove()
    return {name: torch.cat(states).double().numpy() for name, states in caught.items()}


def measured(model, rows, **settings):
    """All moments and places of a model."""
    values, places = {}, {}
    for group in input_moments(model, rows, pad_id=0, **settings):
        assert not values.keys() & group.values.keys() - {"ones"}
        assert not places.keys() & group.places.keys()
        values |= group.values
        places |= group.places
    return values, places


def of_layer(found, layer):
    """The moment of a linear layer and the axis along which its weight reads."""
    values, places = found
    ((keys, axis),) = places[f"{layer}.weight"]
    (key,) = keys
    return values[key].double().numpy(), axis


def test_space_of_a_layer_is_that_of_the_inputs_it_was_given(live):
    model, rows = live
    name = "model.layers.1.mlp.down_proj"
    inputs = inputs_alone(model, rows, [name])[name]
    moment, axis = of_layer(measured(model, rows), name)
    assert axis == 1
    basis = basis_of(moment, energy=0.9)
    kept = np.linalg.norm(inputs @ basis) ** 2 / np.linalg.norm(inputs) ** 2
    _, values, _ = np.linalg.svd(inputs, full_matrices=False)
    shares = np.cumsum(values**2) / np.sum(values**2)
    assert basis.shape[1] == 1 + int(np.searchsorted(shares, 0.9))
    assert kept == pytest.approx(shares[basis.shape[1] - 1], abs=1e-6)
    assert basis.T @ basis == pytest.approx(np.eye(basis.shape[1]), abs=1e-8)


def test_all_linear_layers_of_the_blocks_have_a_place(live):
    _, places = measured(*live)
    layers = [name for name in places if name.startswith("model.layers.") and "norm" not in name]
    assert len(layers) == 14


def test_a_pass_for_each_block_finds_what_one_pass_finds(live, monkeypatch):
    model, rows = live
    whole = measured(model, rows)
    monkeypatch.setattr(moments._Walk, "can_go_by_block", lambda _walk: False)
    values, places = measured(model, rows)
    assert places == whole[1]
    assert values.keys() == whole[0].keys()
    for key, value in values.items():
        torch.testing.assert_close(value, whole[0][key], rtol=1e-6, atol=1e-9)


def test_space_of_a_transposed_layer_is_that_of_its_inputs_too():
    """One token is one input x, whose only axis is x/|x|; its length is the number of inputs, not outputs."""
    model, rows = gpt2(), [TokenRow((7,), 1, 0)]
    layers = [name for name, module in model.named_modules() if isinstance(module, Conv1D)]
    alone, found = inputs_alone(model, rows, layers), measured(model, rows)
    widths = {}
    for name in layers:
        moment, axis = of_layer(found, name)
        assert axis == 0
        basis = basis_of(moment, energy=0.999)
        widths[name.partition("h.0.")[2]] = len(basis)
        (own,) = alone[name]
        assert basis @ basis.T == pytest.approx(np.outer(own, own) / (own @ own), abs=1e-6)
    assert widths == {"attn.c_attn": 4, "attn.c_proj": 4, "mlp.c_fc": 4, "mlp.c_proj": 16}


def test_padding_is_no_input():
    """Beside a row of nine tokens one of two would have seven of padding."""
    model = gpt2()
    rows = [TokenRow(tuple(range(5, 14)), 4, 0), TokenRow((20, 21), 1, 1)]
    layers = [name for name, module in model.named_modules() if isinstance(module, Conv1D)]
    alone, found = inputs_alone(model, rows, layers), measured(model, rows)
    for name in layers:
        own, (moment, _) = alone[name], of_layer(found, name)
        assert moment == pytest.approx(own.T @ own / 11, rel=1e-4, abs=1e-6)
        basis, expected = basis_of(moment, energy=0.9), basis_of(own.T @ own, energy=0.9)
        assert basis @ basis.T == pytest.approx(expected @ expected.T, abs=1e-5)


def test_there_must_be_rows(live):
    with pytest.raises(DataError, match="no rows"):
        next(input_moments(live[0], [], pad_id=0))


# Every kind of tensor, on many architectures


@torch.no_grad()
def expected(model, rows, counted):
    """Moments by the name of a parameter, from rows read one at a time: one or one an expert, for each place.

    `counted` tells which places of a row count.
    """
    found: dict[str, list[list[torch.Tensor]]] = {}
    tokens = sum(len(counted(row)) for row in rows)
    shifted = 1.0 if "gemma" in type(model).__name__.lower() else 0.0  # its norms scale by 1 + weight
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    which: list[int] = []

    def add(parameter, parts, *, place=0):
        places = found.setdefault(names[id(parameter)], [])
        if len(places) == place:
            places.append([torch.zeros_like(part, dtype=torch.float64) for part in parts])
        for total, part in zip(places[place], parts, strict=True):
            total += part.double() / tokens

    def ones(module):
        if getattr(module, "bias", None) is not None:
            found[names[id(module.bias)]] = [[torch.ones(1, dtype=torch.float64)]]

    def squares(states):
        wide = states.flatten(0, -2).double()
        return wide.T @ wide

    def hear(module, inputs, output):
        kind = type(module).__name__.lower()
        if isinstance(module, torch.nn.Embedding):
            ids = inputs[0].flatten()[which]
            add(module.weight, [torch.bincount(ids, minlength=len(module.weight))])
        elif hasattr(module, "gate_up_proj"):
            states, chosen = inputs[0][which], inputs[1][which]
            own = [states[(chosen == expert).any(-1)] for expert in range(len(module.down_proj))]
            add(module.gate_up_proj, [squares(part) for part in own])
            inner = []
            for part, weight in zip(own, module.gate_up_proj, strict=True):
                gate, up = (part @ half.T for half in weight.chunk(2))
                inner.append(squares(module.act_fn(gate) * up))
            add(module.down_proj, inner)
        elif isinstance(module, torch.nn.Linear | Conv1D) or "router" in kind:
            add(module.weight, [squares(inputs[0].reshape(-1, inputs[0].shape[-1])[which])])
            ones(module)
        elif "norm" in kind:
            # what is scaled, from what comes out: (y − b) / w
            bias = 0.0 if getattr(module, "bias", None) is None else module.bias
            scaled = (output - bias) / (module.weight + shifted)
            if scaled.dim() == 4:
                scaled = scaled.transpose(1, 2) if shifted else scaled  # Gemma's heads come before tokens
                scaled = scaled[0][which].flatten(0, 1)
                add(module.weight, [scaled.double().square().mean(0) * len(which)])
            else:
                states = scaled.flatten(0, -2)[which]
                add(module.weight, [states.double().square().sum(0)])
            ones(module)

    head = model.get_output_embeddings()
    handles = [
        module.register_forward_hook(hear)
        for module in model.modules()
        if module is not head and (hasattr(module, "gate_up_proj") or isinstance(
            getattr(module, "weight", None), torch.nn.Parameter
        )) and not isinstance(module, torch.nn.Conv1d) and "PositionalEmbedding" not in type(module).__name__
    ]  # fmt: skip
    for row in rows:
        which = counted(row)
        states = model.base_model(input_ids=torch.tensor([row.ids]), use_cache=False).last_hidden_state[0]
        add(head.weight, [squares(states[which])], place=1 if tied else 0)
        ones(head)
    for handle in handles:
        handle.remove()
    return found


def check(model, rows, wanted, **settings):
    """Compare all that is measured with what is wanted, and return the places."""
    values, places = measured(model, rows, **settings)
    assert places.keys() == wanted.keys()
    parameters = dict(model.named_parameters())
    for name, own in places.items():
        assert len(own) == len(wanted[name])
        for (keys, axis), parts in zip(own, wanted[name], strict=True):
            assert len(keys) == len(parts)
            for key, part in zip(keys, parts, strict=True):
                assert values[key].shape[-1] in (1, parameters[name].shape[axis])
                size = float(part.abs().max())
                torch.testing.assert_close(
                    values[key].double(),
                    part,
                    rtol=2e-3,
                    atol=1e-4 * size,
                    msg=lambda text, name=name: f"{name}: {text}",
                )
    return places


def everywhere(row):
    return list(range(len(row.ids)))


def answers(row):
    """Places whose next token is one of the answer."""
    return list(range(row.start - 1, len(row.ids) - 1))


@EVERY
@pytest.mark.filterwarnings("ignore:.*deprecat")
def test_moments_are_those_of_rows_read_alone(name):
    model = built(name)
    check(model, ROWS, expected(model, ROWS, everywhere))


@EVERY
@pytest.mark.filterwarnings("ignore:.*deprecat")
def test_moments_of_answers_are_those_of_the_places_that_predict_them(name):
    model = built(name)
    check(model, ROWS, expected(model, ROWS, answers), positions="answers")


@pytest.mark.parametrize("name", [name for name in BUILT if name not in ("rwkv", "mpt")])
def test_whole_passes_find_what_the_walk_by_block_finds(name, monkeypatch):
    model = built(name)
    wanted = measured(model, ROWS)
    walked: list[str] = []
    for way in ("by_block", "by_passes"):
        real = getattr(moments._Walk, way)
        monkeypatch.setattr(
            moments._Walk, way, lambda walk, way=way, real=real: walked.append(way) or real(walk)
        )
    measured(model, ROWS)
    monkeypatch.setattr(moments._Walk, "can_go_by_block", lambda _walk: False)
    values, places = measured(model, ROWS)
    assert walked == ["by_block", "by_passes"]
    assert places == wanted[1]
    for key, value in wanted[0].items():
        torch.testing.assert_close(values[key], value, rtol=1e-4, atol=1e-6)


def test_a_model_whose_blocks_hand_on_more_than_hidden_states_is_read_in_whole_passes():
    """RWKV's blocks hand on a state as well; that its moments are right is said above."""
    model = built("rwkv")
    heard: list[int] = []
    assert len(list(input_moments(model, ROWS, pad_id=0, on_progress=heard.append))) == 3
    assert sum(heard) == 3 * len(ROWS)  # what lies outside the blocks, and each block


def test_progress_is_told_once_for_what_lies_before_the_blocks_and_once_a_block():
    heard: list[int] = []
    assert len(list(input_moments(built("llama"), ROWS, pad_id=0, on_progress=heard.append))) == 3
    assert sum(heard) == 3 * len(ROWS)


@pytest.mark.parametrize("name", [name for name in BUILT if "tied" not in name])
@pytest.mark.parametrize("positions", ["all", "answers"])
def test_padding_is_never_counted(name, positions):
    """Were it, an embedding of padding a hundred times as large as the others would show everywhere."""
    model, said = built(name, tie_word_embeddings=False), []
    before, places = measured(model, ROWS, positions=positions, say=said.append)
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = 100.0
    assert model.get_output_embeddings().weight[0].abs().max() < 10
    after, _ = measured(model, ROWS, positions=positions, say=said.append)
    assert said == []  # rows are read together, so that there is padding
    assert before.keys() == after.keys()
    for key, value in before.items():
        torch.testing.assert_close(after[key], value, rtol=1e-5, atol=1e-7)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    ((keys, axis),) = places[names[id(model.get_input_embeddings().weight)]]
    assert axis == 0
    assert before[keys[0]][0] == 0
    assert float(before[keys[0]].sum()) == pytest.approx(1)


@pytest.mark.parametrize("name", ["gemma3", "qwen3"])
def test_norms_of_heads_are_told_apart_where_a_row_has_as_many_tokens_as_a_layer_has_heads(name):
    """A batch of 4 places and a layer of 4 heads (2 for keys): which axis is which is not in the shape."""
    model = built(name)
    for rows in (rows_of(4, 2, 3), rows_of(2, 2)):
        check(model, rows, expected(model, rows, everywhere))


def test_layers_that_read_the_same_inputs_share_one_moment():
    values, places = measured(built("llama"), ROWS)
    keys = {name.removeprefix("model.layers.0."): own[0][0] for name, own in places.items()}
    attention = [keys[f"self_attn.{part}_proj.weight"] for part in "qkv"]
    assert attention[0] == attention[1] == attention[2]
    assert keys["mlp.gate_proj.weight"] == keys["mlp.up_proj.weight"]
    squares = [key for key, value in values.items() if value.dim() == 2]
    assert len(squares) == 2 * 4 + 1  # before and after attention, before and inside the MLP; the head


def test_a_tied_embedding_is_read_by_tokens_and_by_the_head():
    _, places = measured(built("llama, tied"), ROWS)
    assert places["model.embed_tokens.weight"] == [(["model.embed_tokens"], 0), (["head"], 1)]


def test_moments_of_experts_say_how_often_each_is_asked():
    """Divided by all tokens: two experts a token, so that their traces add up to twice that of all inputs."""
    values, places = measured(built("mixtral"), ROWS)
    layer = "model.layers.1.mlp"
    ((keys, axis),) = places[f"{layer}.experts.gate_up_proj"]
    (((router,), _),) = places[f"{layer}.gate.weight"]
    assert len(keys) == 5
    assert axis == 2
    traces = [float(values[key].trace()) for key in keys]
    assert sum(traces) == pytest.approx(2 * float(values[router].trace()), rel=1e-4)
    assert min(traces) < max(traces)


def test_an_expert_that_no_token_is_sent_to_has_a_moment_of_zero():
    values, places = measured(built("mixtral"), [TokenRow((7,), 1, 0)])
    ((keys, _),) = places["model.layers.0.mlp.experts.down_proj"]
    assert sum(bool(values[key].any()) for key in keys) == 2


def test_moments_do_not_depend_on_how_rows_are_put_together(monkeypatch):
    model = built("mixtral")
    wanted, _ = measured(model, ROWS)
    monkeypatch.setattr(moments, "BATCH_TOKENS", 1)  # one row at a time
    found, _ = measured(model, ROWS[::-1])
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6)


def test_rows_without_answers_have_no_places_that_predict_them():
    with pytest.raises(DataError, match="no row has an answer"):
        next(input_moments(built("llama"), [TokenRow((5, 6), 2, 0)], pad_id=0, positions="answers"))


def test_the_model_is_as_it_was_before():
    model = built("llama")
    before = {name: value.clone() for name, value in model.named_parameters()}
    walk = input_moments(model, ROWS, pad_id=0)
    next(walk)
    walk.close()  # whoever stops in the middle leaves no hooks behind
    assert not any(module._forward_pre_hooks or "forward" in vars(module) for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_layer_that_is_read_waits_for_nothing(tiny):
    """Which tokens count is found out once for a batch and a block, whatever layers that has."""
    model = load_model(tiny.target, device=torch.device("cpu"))
    rows = [TokenRow((5, 6, 7, 8), 2, 0), TokenRow((9, 10, 11), 1, 1)]
    found = waits_of(lambda: list(input_moments(model, rows, pad_id=0)))
    passes = len(model.model.layers) + 2  # before the blocks and after them
    assert found["aten::nonzero"] <= passes + 1  # and one for the tokens of the embedding
