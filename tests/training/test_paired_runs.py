"""Both runs of a paired vector: what they have in common, what differs, and the limits they reach."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from palinode import TrainingSettings, finetune, read_examples
from palinode.data.examples import Message
from palinode.data.tokenize import PromptStyle
from palinode.errors import DataError
from palinode.methods.method import Given
from palinode.methods.minimised import paired as paired_objectives
from palinode.methods.msa import PAIRED, PairedSettings
from palinode.models import load_model, load_tokenizer
from palinode.models.inplace import put
from palinode.training.loop import train
from palinode.training.objectives import PLAIN_OBJECTIVE, Material, Objective, answer_term, draw, join, plain

CPU = torch.device("cpu")
SETTINGS = TrainingSettings(
    epochs=2, learning_rate=1e-3, batch_size=4, max_length=64, precision="float32", warmup_epochs=0
)


@pytest.fixture
def rows(tiny):
    return read_examples(tiny.forget)[:8], read_examples(tiny.retain)[:20]


CONTROL = paired_objectives(1.0)[1]


def exposed_objective(weight):
    return paired_objectives(weight)[0]


def pair_runs(forget, replay, **settings):
    return PAIRED.runs(PairedSettings(**settings), Given(forget, sample=replay))


def pair_material(forget, replay, *, replay_ratio):
    return pair_runs(forget, replay, replay_ratio=replay_ratio)[0].material


def finetune_pair(tiny, runs, folder, seed):
    """Return both runs of a pair, done."""
    return [
        finetune(
            tiny.base, run.material, folder / run.name, SETTINGS, seed=seed, device="cpu", loss=run.objective
        )
        for run in runs
    ]


def cast_of(tiny, material, seed=0):
    return join(material, load_tokenizer(tiny.base), epochs=2, seed=seed, max_length=64, style=PromptStyle())


def trained(tiny, cast, objective, settings=SETTINGS, seed=0, *, dropout=False):
    model = load_model(tiny.base, device=CPU)
    if dropout:
        for block in model.model.layers:
            block.self_attn.attention_dropout = 0.5
    curve = train(model, cast, objective, settings, seed=seed, pad_id=0)
    return model.state_dict(), curve


def same(first, second) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def test_several_rows_go_with_each_anchor_and_the_first_are_the_same_however_many():
    free = [range(50)] * 12
    one = draw(free, "retain", epochs=3, seed=4)
    three = draw(free, "retain", epochs=3, seed=4, together=3)
    assert all(len(group) == 3 for epoch in three for group in epoch)
    assert [[group[:1] for group in epoch] for epoch in three] == one
    assert len({place for epoch in three for group in epoch for place in group}) > 35


def test_both_runs_read_the_same_replay_rows_at_each_step(tiny, rows, monkeypatch):
    """What reaches the model is written down: the control's batches are the other's, less the forget rows."""
    from palinode.training import loop

    cast, seen = cast_of(tiny, pair_material(*rows, replay_ratio=3)), {}

    def watch(name, objective):
        batches = seen[name] = []
        monkeypatch.setattr(
            loop, "pad_right", lambda part, **how: batches.append(part) or pad_right(part, **how)
        )
        trained(tiny, cast, objective)

    pad_right = loop.pad_right
    watch("exposed", exposed_objective(1.0))
    watch("control", CONTROL)
    assert len(seen["control"]) == 4  # two epochs of eight forget rows, four at a time
    assert all(len(batch) == 12 for batch in seen["control"])
    assert seen["exposed"][0::2] == seen["control"]
    forget = {row.ids for row in cast.rows["forget"]}
    assert all({row.ids for row in batch} <= forget for batch in seen["exposed"][1::2])


def test_both_runs_have_the_same_steps_and_schedule(tiny, rows):
    cast = cast_of(tiny, pair_material(*rows, replay_ratio=2))
    _, exposed = trained(tiny, cast, exposed_objective(1.0))
    _, control = trained(tiny, cast, CONTROL)
    assert [point.learning_rate for point in exposed] == [point.learning_rate for point in control]
    assert exposed[0].terms["retain"] == control[0].terms["retain"]  # before the weights part
    assert exposed[0].loss == pytest.approx(sum(exposed[0].terms.values()))


def test_without_weight_on_the_forget_rows_the_vector_is_zero(tiny, rows):
    cast = cast_of(tiny, pair_material(*rows, replay_ratio=3))
    exposed, _ = trained(tiny, cast, exposed_objective(0.0))
    control, _ = trained(tiny, cast, CONTROL)
    assert same(exposed, control)
    assert not same(exposed, trained(tiny, cast, exposed_objective(1.0))[0])


def test_dropout_falls_on_the_same_places_in_both_runs(tiny, rows):
    cast = cast_of(tiny, pair_material(*rows, replay_ratio=3))
    exposed, _ = trained(tiny, cast, exposed_objective(0.0), dropout=True)
    control, _ = trained(tiny, cast, CONTROL, dropout=True)
    assert same(exposed, control)
    assert not same(control, trained(tiny, cast, CONTROL)[0])  # there is dropout


def test_without_replay_the_exposed_run_is_plain_fine_tuning(tiny, rows):
    """θ_1 of MSA from θ_0, and of the task vector from θ_D, to the last bit."""
    forget, _ = rows
    alone = Objective((answer_term("forget", "forget"),))
    cast = cast_of(tiny, Material("forget", {"forget": forget}))
    ours, _ = trained(tiny, cast, alone)
    theirs, _ = trained(tiny, plain(cast.rows["forget"]), PLAIN_OBJECTIVE)
    assert same(ours, theirs)


def test_control_does_not_depend_on_what_the_forget_rows_say(tiny, rows):
    """Only their number, and the order that their lengths give."""
    forget, replay = rows
    other = [*forget[1:], forget[0]]
    settings = SETTINGS.model_copy(update={"batch_size": 8})
    first, _ = trained(tiny, cast_of(tiny, pair_material(forget, replay, replay_ratio=3)), CONTROL, settings)
    second, _ = trained(tiny, cast_of(tiny, pair_material(other, replay, replay_ratio=3)), CONTROL, settings)
    for name, value in first.items():  # the same rows in another order
        assert torch.allclose(second[name], value, atol=1e-5)


def test_accumulated_micro_batches_give_the_pair_of_one_large_batch(tiny, rows):
    cast = cast_of(tiny, pair_material(*rows, replay_ratio=3))
    large = SETTINGS.model_copy(update={"batch_size": 8})
    small = SETTINGS.model_copy(update={"batch_size": 3, "accumulation": 3})
    for objective in (exposed_objective(1.0), CONTROL):
        (whole, curve), (cut, parts) = (trained(tiny, cast, objective, chosen) for chosen in (large, small))
        assert [point.loss for point in parts] == pytest.approx([point.loss for point in curve], rel=1e-4)
        for name, value in whole.items():
            assert float((cut[name] - value).norm()) <= 1e-4 * float(value.norm())


def test_the_runs_of_a_pair_give_the_vector_between_them(tiny, rows, tmp_path):
    forget, replay = rows
    runs = pair_runs(forget, replay, replay_ratio=2)
    assert [run.name for run in runs] == ["exposed", "control"]
    assert runs[0].material is runs[1].material
    first, second = finetune_pair(tiny, runs, tmp_path, 1)
    exposed, control = (load_model(run.checkpoint, device=CPU) for run in (first, second))
    by_hand, _ = trained(
        tiny, cast_of(tiny, pair_material(forget, replay, replay_ratio=2), 1), exposed_objective(0.5), seed=1
    )
    assert same(exposed.state_dict(), by_hand)
    vector = first.checkpoint - second.checkpoint
    assert vector.terms == {first.checkpoint: 1.0, second.checkpoint: -1.0}
    assert not same(exposed.state_dict(), control.state_dict())
    assert second.tokens < first.tokens
    assert first.seen["retain"] == second.seen["retain"]
    plain_run = finetune(tiny.base, forget, tmp_path / "plain", SETTINGS, seed=1, device="cpu")
    assert len(plain_run.curve) == len(second.curve)


def blanked(example):
    """A row of as many words, none of which the world has."""

    def blank(text):
        return " ".join("_" for _ in text.split())

    turns = tuple(Message(turn.role, blank(turn.content)) for turn in example.turns)
    return replace(example, turns=turns, answer=blank(example.answer))


def test_pair_of_the_whole_training_is_the_difference_to_retraining(tiny, rows, tmp_path):
    """One stage from s, all its other rows as replay, its own schedule and seed: α = 1 is exact.

    The retrained model is made without the forget rows' words: as many others stand in their places.
    """
    forget, others = rows

    def whole(name, first, objective):
        material = pair_material(first, others, replay_ratio=3)
        run = finetune(tiny.base, material, tmp_path / name, SETTINGS, seed=2, device="cpu", loss=objective)
        return run.checkpoint

    target = whole("target", forget, exposed_objective(1 / 3))
    without = whole("retrained", [blanked(row) for row in forget], CONTROL)
    retrained = load_model(without, device=CPU)
    first, second = finetune_pair(tiny, pair_runs(forget, others), tmp_path, 2)
    live, wanted = load_model(target, device=CPU), retrained.state_dict()
    assert not same(live.state_dict(), wanted)
    point = target - 1.0 * (first.checkpoint - second.checkpoint)
    put(point, live, precision="float64")
    assert same(live.state_dict(), wanted)
    put(point, live)  # summed in float32: to rounding
    assert all(torch.allclose(live.state_dict()[name], wanted[name], rtol=0, atol=1e-8) for name in wanted)


def test_pair_without_rows_is_refused(rows):
    forget, replay = rows
    with pytest.raises(DataError, match="there are no retain rows"):
        pair_material(forget, [], replay_ratio=3)
    with pytest.raises(DataError, match="there are no forget rows"):
        pair_material([], replay, replay_ratio=3)
