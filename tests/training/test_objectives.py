"""Rows by role, values that are kept of the frozen model, and terms that add up."""

from __future__ import annotations

import pytest
import torch

from palinode import TrainingSettings, finetune, read_examples
from palinode.data.batches import pad_right
from palinode.data.tokenize import PromptStyle, TokenRow
from palinode.models import load_model, load_tokenizer
from palinode.models.reading import answer_logits, labelled_states
from palinode.training.loop import train
from palinode.training.losses import row_sums, token_nll
from palinode.training.objectives import (
    PLAIN_OBJECTIVE,
    Distributions,
    Joined,
    Keeper,
    Material,
    Objective,
    answer_term,
    draw,
    join,
    keep,
    kl_term,
    likelihoods,
    states_of,
)

CPU = torch.device("cpu")
SETTINGS = TrainingSettings(epochs=3, learning_rate=1e-3, batch_size=2, max_length=64, precision="float32")
ROWS = [
    TokenRow((5, 6, 7, 8), 2, 0),
    TokenRow((9, 10, 11, 12, 13, 1), 4, 1),
    TokenRow((4, 4, 5), 1, 2),
    TokenRow((20, 21, 22, 23, 24, 25, 26), 3, 3),
]
STYLE = PromptStyle()


@pytest.fixture
def fresh(tiny):
    return lambda: load_model(tiny.base, device=CPU)


# Which rows go together


def test_draws_are_the_anchors_own_and_follow_seed_epoch_and_role():
    candidates = [[0, 1], [2], [3, 4, 5]] * 20
    found = draw(candidates, "refusal", epochs=3, seed=1)
    assert found == draw(candidates, "refusal", epochs=3, seed=1)
    assert found != draw(candidates, "refusal", epochs=3, seed=2)
    assert found != draw(candidates, "retain", epochs=3, seed=1)
    assert found[0] != found[1]
    for epoch in found:
        assert all(len(group) == 1 and group[0] in own for own, group in zip(candidates, epoch, strict=True))
    assert {place for epoch in found for group in epoch for place in group} == {0, 1, 2, 3, 4, 5}


def test_draws_of_an_epoch_do_not_depend_on_how_many_there_are():
    candidates = [range(10)] * 5
    assert draw(candidates, "retain", epochs=5, seed=0)[:2] == draw(candidates, "retain", epochs=2, seed=0)


def test_rows_are_joined_by_role_and_refusals_to_their_own_question(tiny):
    forget, retain = read_examples(tiny.forget)[:4], read_examples(tiny.retain)[:6]
    from dataclasses import replace

    refusals = [replace(one, answer=word) for one in forget for word in ("the of", "home is", "the is")]
    own = [range(3 * place, 3 * place + 3) for place in range(4)]
    material = Material("forget", {"forget": forget, "retain": retain, "refusal": refusals}, {"refusal": own})
    cast = join(material, load_tokenizer(tiny.base), epochs=4, seed=0, max_length=64, style=STYLE)
    for epoch in range(4):
        for anchor in range(4):
            (place,) = cast.members("refusal", epoch, [anchor])
            row = cast.rows["refusal"][place]
            begin = cast.anchors[anchor].start
            assert row.ids[:begin] == cast.anchors[anchor].ids[:begin]
            assert row.example // 3 == anchor
    assert len(cast.rows["refusal"]) == len(set(cast.used("refusal")))
    assert cast.members("forget", 2, [3, 1]) == [3, 1]
    assert len(cast.members("retain", 0, [0, 1, 2])) == 3


def test_tokens_count_each_role_that_is_read():
    cast = Joined("forget", {"forget": ROWS, "retain": ROWS}, {"retain": [[(3,), (3, 0), (), (1,)]]})
    assert cast.tokens(0, [0, 1], ("forget",)) == 4 + 6
    assert cast.tokens(0, [0, 1, 2], ("forget", "retain")) == 4 + 6 + 3 + 7 + 7 + 4
    assert cast.used("retain") == [0, 1, 3]


# What is kept of the frozen model


def members(count=4):
    return {("forget", place): row for place, row in enumerate(ROWS[:count])}


def test_kept_likelihoods_are_the_summed_nll_of_each_row(fresh):
    model = fresh()
    kept = keep(Keeper(likelihoods), model, members(), pad_id=0, autocast=False)
    for place, row in enumerate(ROWS):
        logits, labels, rows = answer_logits(model, pad_right([row], pad_id=0))
        expected = row_sums(token_nll(logits, labels), rows, 1)
        torch.testing.assert_close(kept.of([("forget", place)], CPU), expected.detach())
    assert kept.of([("forget", 2), ("forget", 0)], CPU).shape == (2,)


@pytest.mark.parametrize("plain_head", [True, False])
def test_kept_distributions_are_the_logits_of_then_after_the_model_has_changed(
    fresh, plain_head, monkeypatch
):
    from palinode.training import objectives

    if not plain_head:
        monkeypatch.setattr(objectives, "has_plain_head", lambda model, ids: False)
    model = fresh()
    kept = keep(Distributions(), model, members(), pad_id=0, autocast=False)
    expected = torch.cat([answer_logits(model, pad_right([ROWS[at]], pad_id=0))[0] for at in (3, 1)]).detach()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    found = kept.of([("forget", 3), ("forget", 1)], CPU)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not found.requires_grad


def test_kept_states_are_those_of_the_block_at_scored_tokens(fresh):
    model = fresh()
    kept = keep(states_of(0), model, members(), pad_id=0, autocast=False)
    expected = torch.cat([labelled_states(model, pad_right([ROWS[at]], pad_id=0), 0)[0] for at in (1, 2)])
    torch.testing.assert_close(kept.of([("forget", 1), ("forget", 2)], CPU), expected.detach())


def test_keeping_leaves_the_model_training_if_it_was(fresh):
    model = fresh()
    for training in (True, False):
        model.train(training)
        keep(Keeper(likelihoods), model, members(2), pad_id=0, autocast=False)
        assert model.training == training


# Terms


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def test_objective_of_one_answer_term_is_plain_fine_tuning_bit_for_bit(fresh):
    plain, by_term = fresh(), fresh()
    curve = train(plain, ROWS, PLAIN_OBJECTIVE, SETTINGS, seed=0, pad_id=0)
    cast = Joined("forget", {"forget": ROWS})
    same = train(by_term, cast, Objective((answer_term("forget", "forget"),)), SETTINGS, seed=0, pad_id=0)
    assert [point.loss for point in same] == [point.loss for point in curve]
    for name, value in weights(plain).items():
        assert torch.equal(weights(by_term)[name], value)
    assert curve[0].terms == {}
    assert same[0].terms == {"forget": same[0].loss}


def test_two_roles_of_one_term_are_one_mean_over_all_their_tokens(fresh):
    """Two roles with the same rows: the mean is that of one role, and so are the gradients."""
    once, twice = fresh(), fresh()
    cast = Joined("a", {"a": ROWS, "b": ROWS}, {"b": [[(place,) for place in range(4)]] * 3})
    large = SETTINGS.model_copy(update={"batch_size": 4})
    first = train(once, cast, Objective((answer_term("x", "a"),), anchor="a"), large, seed=0, pad_id=0)
    other = train(twice, cast, Objective((answer_term("x", "a", "b"),), anchor="a"), large, seed=0, pad_id=0)
    assert [point.loss for point in first] == pytest.approx([point.loss for point in other], rel=1e-5)


def test_coefficients_weigh_terms_and_may_follow_the_curve(fresh):
    cast = Joined("a", {"a": ROWS, "b": ROWS}, {"b": [[(place,) for place in range(4)]] * 3})
    asked = []

    def coefficient(curve, per_epoch):
        asked.append((len(curve), per_epoch))
        return 0.5

    terms = (answer_term("x", "a", coefficient=2.0), answer_term("y", "b", coefficient=coefficient))
    curve = train(fresh(), cast, Objective(terms, anchor="a"), SETTINGS, seed=0, pad_id=0)
    for point in curve:
        assert point.loss == pytest.approx(2 * point.terms["x"] + 0.5 * point.terms["y"])
    assert asked == [(step, 2) for step in range(6)]


def test_kl_to_the_start_is_nothing_at_the_start_and_grows_as_the_model_moves(fresh):
    cast = Joined("forget", {"forget": ROWS})
    terms = (answer_term("forget", "forget"), kl_term("kl", "forget", coefficient=0.0))
    large = SETTINGS.model_copy(update={"batch_size": 4, "learning_rate": 1e-2})
    curve = train(fresh(), cast, Objective(terms), large, seed=0, pad_id=0)
    assert curve[0].terms["kl"] == pytest.approx(0.0, abs=1e-6)
    assert curve[-1].terms["kl"] > 1e-3


def test_kl_under_autocast_is_nothing_at_the_start_too(fresh):
    cast = Joined("forget", {"forget": ROWS})
    half = SETTINGS.model_copy(update={"batch_size": 4, "precision": "bfloat16"})
    curve = train(fresh(), cast, Objective((kl_term("kl", "forget"),)), half, seed=0, pad_id=0)
    assert curve[0].terms["kl"] == pytest.approx(0.0, abs=1e-5)


def test_curve_of_terms_is_written_and_read_back(tiny, tmp_path):
    import json

    examples = read_examples(tiny.forget)[:4]
    objective = Objective((answer_term("forget", "forget"),))
    finetune(
        tiny.base,
        Material("forget", {"forget": examples}),
        tmp_path / "out",
        SETTINGS,
        device="cpu",
        loss=objective,
    )
    points = json.loads((tmp_path / "out" / "training.json").read_text())
    assert all(point["terms"]["forget"] == point["loss"] for point in points)
