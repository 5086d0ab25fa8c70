"""Scores of single rows: against gradients taken by hand, and in a world whose causes are known."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import palinode
from palinode import read_examples
from palinode.data.tokenize import PromptStyle, tokenize
from palinode.history.duplicates import row_hash
from palinode.history.orders import LoggedStage, rebuild
from palinode.influence.ranking import (
    adam_scales,
    exposure_weights,
    index_rows,
    projected,
    relate,
    seen_in_log,
    seen_in_order,
)
from palinode.models import load_model, load_tokenizer
from palinode.models.reading import Projection
from palinode.pipeline.workspace import Workspace
from palinode.settings import InfluenceSettings

CPU = torch.device("cpu")
G = np.array([[3.0, 0.0, 0.0], [3.0, 0.0, 0.0], [0.0, 1.0, 0.0]], np.float32)
Q = np.array([[2.0, 0.0, 0.0], [0.0, 0.0, 5.0]], np.float32)


@pytest.fixture(scope="module")
def live(tiny):
    """The base, and the tokens of some rows."""
    tokens = tokenize(
        read_examples(tiny.retain)[:6], load_tokenizer(tiny.base), max_length=64, style=PromptStyle()
    )
    return load_model(tiny.base, device=CPU), [[row] for row in tokens]


def test_product_is_the_change_of_a_linear_loss_to_a_step_of_each_row():
    """For L_q = ⟨g_q, θ⟩ a step −g_i lowers it by exactly ⟨g_q, g_i⟩."""
    assert relate(G, Q, "product").scores().tolist() == [[6.0, 0.0], [6.0, 0.0], [0.0, 0.0]]
    assert np.allclose(relate(G, 2 * Q, "product").scores(), 2 * relate(G, Q, "product").scores())
    assert np.allclose(relate(Q, G, "product").scores(), relate(G, Q, "product").scores().T)


def test_cosine_knows_no_size():
    found = relate(G, Q, "cosine").scores()
    assert found.tolist() == [[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]
    assert np.allclose(relate(5 * G, 7 * Q, "cosine").scores(), found)
    assert np.allclose(relate(0 * G, Q, "cosine").scores(), 0)


def test_ridge_shares_out_what_rows_have_in_common():
    """λ = (9 + 9 + 1)/3; of twins each has √λ·3 / (18 + λ), and one alone would have √λ·3 / (9 + λ)."""
    ridge = 19 / 3
    score = ridge**0.5 * 3 / (18 + ridge)
    assert relate(G, Q, "ridge").scores()[:, 0] == pytest.approx([score, score, 0])
    assert relate(5 * G, 7 * Q, "ridge").scores() == pytest.approx(relate(G, Q, "ridge").scores())
    wide = np.concatenate([G, np.zeros((3, 4), np.float32)], axis=1)
    many = np.concatenate([wide, wide, wide])  # more rows than numbers: solved the other way round
    asked = np.concatenate([Q, np.zeros((2, 4), np.float32)], axis=1)
    score = ridge**0.5 * 3 / (54 + ridge)
    assert relate(many, asked, "ridge").scores()[:3, 0] == pytest.approx([score, score, 0])


@pytest.mark.parametrize("measure", ["ridge", "cosine", "product"])
def test_spread_is_how_a_score_moves_with_the_weight_of_each_number(measure):
    """By differences: number b counted 1 + ε times, with the ridge as it is."""
    rows, asked = (
        np.random.default_rng(0).normal(size=shape).astype(np.float32) for shape in ((5, 7), (2, 7))
    )
    found = relate(rows, asked, measure).spread([3, 1], 1)
    ridge = float((rows.astype(float) ** 2).sum() / 5)

    def scores(weights):
        g, q = rows * np.sqrt(weights), asked[1] * np.sqrt(weights)
        if measure == "product":
            return g @ q
        q = q / np.linalg.norm(q)
        if measure == "cosine":
            return g @ q / np.linalg.norm(g, axis=1)
        return ridge**0.5 * g @ np.linalg.solve(g.T @ g + ridge * np.eye(7), q)

    for number in range(7):
        moved = 1e-5 * np.eye(7)[number]
        slope = (scores(1 + moved) - scores(1 - moved)) / 2e-5
        assert found[:, number] == pytest.approx(slope[[3, 1]], abs=1e-6)


@pytest.mark.parametrize("measure", ["ridge", "cosine", "product"])
def test_intervals_hold_the_score_without_a_projection(measure):
    """Over 40 draws of the signs, for rows that have something in common, in 389 numbers of 9,725."""
    random = np.random.default_rng(1)
    size, common = np.exp(-3 * random.random(9725)), random.normal(size=9725)
    rows = (random.normal(size=(30, 9725)) + 0.5 * common) * size
    asked = rows[:1] + random.normal(size=(1, 9725)) * size
    exact = relate(rows, asked, measure).scores()[:, 0]
    held = []
    for _ in range(40):
        signs = random.choice([-1, 1], size=9725)
        few, one = ((part * signs).reshape(len(part), -1, 389).sum(1) for part in (rows, asked))
        rung = relate(few.astype(np.float32), one.astype(np.float32), measure)
        errors = rung.spread(range(30), 0).std(axis=1) * 389**0.5
        held.append(abs(rung.scores()[:, 0] - exact) < 1.96 * errors)
    assert 0.92 < np.mean(held) < 0.99


def test_projection_keeps_inner_products_on_average(live):
    model, _ = live
    shapes = [parameter.shape for parameter in model.parameters()]
    random = torch.Generator().manual_seed(0)
    one, other = ([torch.randn(shape, generator=random) for shape in shapes] for _ in range(2))
    other = [a + b for a, b in zip(one, other, strict=True)]
    exact = sum(float((a * b).sum()) for a, b in zip(one, other, strict=True))
    found = []
    for seed in range(20):
        made = Projection(model, seed=seed, width=509)
        sides = [sum(made.of(number, part) for number, part in enumerate(side)) for side in (one, other)]
        found.append(float(sides[0] @ sides[1]))
    assert np.mean(found) == pytest.approx(exact, rel=0.05)
    assert np.std(found) < 2 * exact * (3 / 509) ** 0.5


def gradients(live, width=257, **options):
    model, groups = live
    found = np.empty((len(groups), width), np.float32)
    projected(model, groups, Projection(model, seed=1, width=width), found.__setitem__, pad_id=0, **options)
    return found


def test_a_row_has_the_same_gradient_alone_and_in_any_company(live):
    model, groups = live
    whole = gradients(live)
    for place in (0, 3):
        assert np.array_equal(gradients((model, groups[place : place + 1]))[0], whole[place])
    assert np.array_equal(gradients((model, groups[::-1]))[::-1], whole)
    both = gradients((model, [[*groups[0], *groups[1]]]))[0]  # a document of two pieces
    assert both == pytest.approx(whole[0] + whole[1], abs=1e-5)


def test_gradients_of_tokens_add_up_to_that_of_the_row(live):
    model, groups = live
    found, pair = [], [*groups[0], *groups[1]]
    projected(
        model,
        [pair],
        Projection(model, seed=1, width=257),
        lambda _, g: found.append(g),
        pad_id=0,
        by_token=True,
    )
    assert found[0].shape == (sum(row.scored for row in pair), 257)
    assert found[0].sum(0) == pytest.approx(gradients(live)[0] + gradients(live)[1], abs=1e-4)


def test_projected_gradient_is_that_of_autograd(live):
    model, groups = live
    (row,) = groups[0]
    ids, labels = torch.tensor([row.ids]), torch.tensor([row.ids])
    labels[:, : row.start] = -100
    loss = model(input_ids=ids, labels=labels).loss * row.scored
    plain = torch.autograd.grad(loss, list(model.parameters()))
    made = Projection(model, seed=1, width=257)
    expected = sum(made.of(number, gradient) for number, gradient in enumerate(plain))
    assert gradients(live)[0] == pytest.approx(expected.numpy(), rel=1e-3, abs=1e-4)


def test_adam_divides_by_the_size_that_gradients_have(live):
    model, groups = live
    scales = adam_scales(model, [row for (row,) in groups], pad_id=0)
    embedding = scales[0]
    unused = set(range(len(embedding))) - {token for (row,) in groups for token in row.ids}
    assert all(bool(scale.isfinite().all()) for scale in scales)
    assert not np.array_equal(gradients(live, scales=scales), gradients(live))
    assert len(unused) > 0


def test_an_index_goes_on_where_it_was_interrupted_and_ends_in_the_same_bytes(live, tmp_path):
    model, groups = live
    many, seen = groups * 30, []

    def fill(stop):
        def work(take, first):
            def kept(place, gradient):
                if place == stop:
                    raise KeyboardInterrupt
                seen.append(place)
                take(place, gradient)

            made = Projection(model, seed=1, width=31)
            projected(model, many, made, kept, pad_id=0, first=first)

        return work

    step, whole = (Workspace(tmp_path / name).step("gradients", of="x") for name in ("a", "b"))
    with pytest.raises(KeyboardInterrupt):
        index_rows(step, len(many), 31, fill(100), lambda _: None)
    done = len(seen)
    found = index_rows(step, len(many), 31, fill(None), lambda _: None)
    assert seen[done] == 64  # what was on disk is not computed again
    assert np.array_equal(found, index_rows(whole, len(many), 31, fill(None), lambda _: None))
    assert np.array_equal(found, index_rows(step, len(many), 31, fill(0), lambda _: None))  # found


def test_steps_weigh_on_the_checkpoints_that_they_lie_between():
    weights = exposure_weights([0, 10], [(0, 1, 1.0), (1, 6, 1.0), (2, 11, 2.0)], 4)
    assert weights == pytest.approx(np.array([[1, 0], [0.5, 0.5], [0, 2], [0, 0]]))
    assert exposure_weights([5], [(0, 1, 1.0)], 1).tolist() == [[1.0]]


@pytest.fixture(scope="module")
def traced(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("traced")

    def ask(questions, *, checkpoints=f"{tiny.base.folder},{tiny.target.folder}", **settings):
        return palinode.influence(
            questions,
            rows=[*read_examples(tiny.forget), *read_examples(tiny.retain)],
            checkpoints=checkpoints,
            workspace=folder / "work",
            settings=InfluenceSettings(top=5, width=1021, device="cpu", **settings),
        )

    return ask


@pytest.fixture(scope="module")
def ladder(tiny, tmp_path_factory):
    """Base and target as two checkpoints of one training."""
    folder = tmp_path_factory.mktemp("ladder")
    for step, model in ((10, tiny.base), (50, tiny.target)):
        (folder / f"step{step}").symlink_to(model.folder)
    return str(folder)


def tops(found):
    return found.record["ranking"]["top"]


@pytest.mark.parametrize("measure", ["ridge", "cosine", "product"])
def test_rows_that_say_the_asked_fact_come_first(traced, ladder, tiny, measure):
    facts = read_examples(tiny.forget)[:9:3]  # one of three wordings each
    found = traced(facts, checkpoints=ladder, measure=measure)
    for place, (fact, top) in enumerate(zip(facts, tops(found), strict=True)):
        assert [one["score"] for one in top] == sorted((one["score"] for one in top), reverse=True)
        assert 3 * place in {one["row"] for one in top if one["answer"] == fact.answer}
    assert found.answers == []


@pytest.mark.parametrize("measure", ["ridge", "cosine", "product"])
def test_tokens_of_a_row_add_up_to_its_score_inside_its_interval(traced, ladder, tiny, measure):
    facts = read_examples(tiny.forget)[:2]
    for one in (
        one for top in tops(traced(facts, checkpoints=ladder, measure=measure, tokens=True)) for one in top
    ):
        assert sum(part for _, part in one["tokens"]) == pytest.approx(one["score"], rel=1e-4, abs=1e-6)
        assert one["tokens"][0][0] == one["answer"]
        low, high = one["interval"]
        assert low <= one["score"] <= high
        assert (low + high) / 2 == pytest.approx(one["score"])


def test_an_answer_can_be_asked_in_the_target_and_its_rows_in_the_base(tiny, learned, tmp_path):
    """There its loss is known by heart, so its gradient is a smaller one."""
    found = [
        palinode.influence(
            [learned],
            target=tiny.target.folder,
            base=tiny.base.folder,
            rows=tiny.forget,
            workspace=tmp_path,
            settings=InfluenceSettings(top=2, width=509, device="cpu", measure="product", at=at),
        ).record["ranking"]
        for at in ("checkpoint", "target")
    ]
    assert [one["at"] for one in found] == ["checkpoint", "target"]
    assert 0 < found[1]["top"][0][0]["score"] < found[0]["top"][0][0]["score"]
    assert {one["checkpoints"][0]["fingerprint"] for one in found} == {tiny.base.fingerprint()}


def test_the_gradients_of_rows_are_computed_once(traced, ladder, tiny):
    facts = read_examples(tiny.forget)
    first = traced(facts[:1], checkpoints=ladder)
    again = traced(facts[:2], checkpoints=ladder)
    assert [one["row"] for one in tops(again)[0]] == [one["row"] for one in tops(first)[0]]
    scores = [[one["score"] for one in tops(found)[0]] for found in (first, again)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-9)


def test_a_finished_run_ranks_its_own_rows_at_its_base(recipe_of, tiny, tmp_path, palinode):
    recipe = recipe_of(tmp_path / "out", scales={"forget": 0.5, "retain": 0.0})
    from palinode.pipeline.run import unlearn

    unlearn(recipe)
    fact = read_examples(tiny.forget)[0]
    words = ("--ask", fact.prompt, "--answer", fact.answer, "--top", "3", "--width", "509")
    said = palinode("influence", tmp_path / "out", *words, "--json")
    assert said.code == 0, said.err
    record = json.loads(said.out)
    assert len(record["set"]["answers"]) == 1
    assert record["ranking"]["checkpoints"][0]["fingerprint"] == tiny.base.fingerprint()
    assert record["ranking"]["top"][0][0]["answer"] == fact.answer
    shown = palinode("influence", tmp_path / "out", *words)
    assert "those behind" in shown.out


def test_a_row_without_tokens_is_one_sentence(traced, ladder, tiny):
    with pytest.raises(palinode.PalinodeError, match="row 1 of rows: the tokenizer makes no token"):
        palinode.influence(
            read_examples(tiny.forget)[:1],
            rows=[palinode.Example(0, "rows", "document", (), " ")],
            checkpoints=ladder,
            workspace=tiny.target.folder.parent.parent / "unused",
            settings=InfluenceSettings(top=1, device="cpu"),
        )


def test_log_and_order_tell_the_same_exposures(tiny, tmp_path):
    """Two stages; every row's steps, each at the rate of its step over the rows that were in it."""
    data = read_examples(tiny.retain)[:5]
    training = palinode.TrainingSettings(epochs=2, batch_size=2, max_length=64, learning_rate=0.5)
    stages = [
        LoggedStage(numbers=(0, 1, 2), training=training, seed=1),
        LoggedStage(numbers=(3, 4), training=training, seed=2),
    ]
    order = rebuild(stages, data, load_tokenizer(tiny.base))
    assert list(order.rates) == pytest.approx([0.25, 0.5, 0.5, 0.25, 0.5, 0.5])  # warmed up over an epoch
    log = palinode.ExposureLog.open(tmp_path / "log", data="rows", tokenizer="words")
    for step in range(1, order.steps + 1):
        log.record(step, [row_hash(data[row]) for row in order.rows(step)])
    log.close()

    def rate(step):
        return order.rates[step - 1]

    asked = [data[4], data[0]]
    ordered = seen_in_order(order, data, asked, rate)
    logged = seen_in_log(palinode.ExposureReader.open(tmp_path / "log"), asked, rate)
    assert sorted(ordered) == sorted(logged)
    assert {(0, 5, 0.25), (0, 6, 0.25)} < set(ordered)
    assert sum(row == 1 for row, _, _ in ordered) == 2


def test_a_salted_log_is_read_with_its_salt_alone(tiny, tmp_path):
    data, salt = read_examples(tiny.retain)[:2], b"secret"
    log = palinode.ExposureLog.open(tmp_path / "log", data="rows", tokenizer="words", salt=salt)
    log.record(1, [row_hash(row, salt=salt) for row in data])
    log.close()
    reader = palinode.ExposureReader.open(tmp_path / "log")
    assert seen_in_log(reader, data[1:], lambda _: 0.5, salt=salt) == [(0, 1, 0.25)]
    with pytest.raises(palinode.PalinodeError, match="salted and none was given"):
        seen_in_log(reader, data, lambda _: 0.5)
