"""No step of training has the host wait for the device: counted by the profiler, on a processor."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from palinode.data.tokenize import TokenRow
from palinode.errors import DivergenceError
from palinode.methods import METHODS
from palinode.models import reading
from palinode.settings import TrainingSettings
from palinode.training import loop
from palinode.training.losses import scored_tokens, summed_nll
from palinode.training.objectives import PLAIN_OBJECTIVE, Joined, Objective, Term, draw
from waiting import waits_of

SETTINGS = TrainingSettings(epochs=4, learning_rate=1e-2, batch_size=2, precision="float32")
COUNT = 6
PER_EPOCH = 3

EACH_STEP = {"ce_u": Counter({"aten::nonzero": 3, "aten::bincount": 1})}
"""Losses that choose tokens on the device: what they wait for in a step."""


@pytest.fixture
def like_a_gpu(monkeypatch):
    """Figures are fetched after many steps, and padding needs no mask."""
    monkeypatch.setitem(loop.FETCHED, "cpu", 100)
    monkeypatch.setattr(loop, "PATIENCE", 1e9)
    monkeypatch.setattr(reading, "MASKED", set())


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=200,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


def rows_of(role: str) -> list[TokenRow]:
    random = torch.Generator().manual_seed(sum(role.encode()))
    lengths = [(2 + place % 3, 1 + place % 4) for place in range(COUNT)]
    return [
        TokenRow(tuple(torch.randint(3, 150, (prompt + answer,), generator=random).tolist()), prompt, place)
        for place, (prompt, answer) in enumerate(lengths)
    ]


def trained(objective: Objective = PLAIN_OBJECTIVE, **others):
    """The model after training, with its curve."""
    live, anchor = model(), objective.anchor
    rows = {role: rows_of(role) for role in {anchor, *objective.roles}}
    drawn = {
        role: draw([range(COUNT)] * COUNT, role, epochs=SETTINGS.epochs, seed=0)
        for role in objective.roles - {anchor}
    }
    return live, loop.train(
        live, Joined(anchor, rows, drawn), objective, SETTINGS, seed=0, pad_id=0, **others
    )


def waits_of_a_step(objective: Objective) -> Counter[str]:
    short, long = (waits_of(lambda last=last: trained(objective, max_steps=last)) for last in (3, 9))
    long.subtract(short)
    return Counter({name: count // 6 for name, count in long.items() if count})


TRAINED = [
    name for name, method in METHODS.items() if method.minimises and name != "whp"
]  # which needs words


@pytest.mark.usefixtures("like_a_gpu")
def test_step_of_plain_training_waits_for_nothing():
    assert waits_of_a_step(PLAIN_OBJECTIVE) == Counter()


@pytest.mark.usefixtures("like_a_gpu")
@pytest.mark.parametrize("name", TRAINED)
def test_step_of_a_method_waits_for_nothing_unless_its_loss_chooses_tokens(name):
    objective = METHODS[name].objective(METHODS[name].settings(), 0)
    if objective.limit:
        objective = Objective(
            objective.terms, objective.anchor
        )  # nothing was learned that could be forgotten
    assert waits_of_a_step(objective) == EACH_STEP.get(name, Counter())


@pytest.mark.parametrize("together", [1, 5, 100])
def test_figures_fetched_together_are_those_fetched_one_by_one(monkeypatch, together):
    first, curve = trained()
    monkeypatch.setitem(loop.FETCHED, "cpu", together)
    heard: list[int] = []
    second, again = trained(on_step=lambda point, _: heard.append(point.step))
    assert again == curve
    assert heard == list(range(4 * PER_EPOCH))
    for before, after in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(before, after)


def test_step_that_is_asked_for_is_heard_of_before_the_next_is_begun(monkeypatch):
    monkeypatch.setitem(loop.FETCHED, "cpu", 100)
    monkeypatch.setattr(loop, "PATIENCE", 1e9)
    steps: list[tuple[str, int]] = []
    trained(
        on_progress=lambda _tokens: steps.append(("taken", len(steps))),
        on_step=lambda point, _: steps.append(("heard", point.step + 1)),
        exactly_at={5},
    )
    assert [kind for kind, _ in steps[:11]] == 4 * ["taken"] + 5 * ["heard"] + 2 * ["taken"]


@pytest.mark.parametrize("together", [1, 4, 100])
def test_step_that_is_not_finite_changes_nothing_however_late_it_is_found_out(
    monkeypatch, tmp_path, together
):
    monkeypatch.setitem(loop.FETCHED, "cpu", together)
    monkeypatch.setattr(loop, "PATIENCE", 1e9)
    calls, live = [], model()

    def total(own, batch, _frozen):
        calls.append(batch)
        value = summed_nll(own, batch)
        return value * float("nan") if len(calls) == 6 else value

    poisoned = Objective((Term("answer", ("rows",), total, scored_tokens),), anchor="rows")
    with pytest.raises(DivergenceError, match="at step 6 of 12"):
        loop.train(live, rows_of("rows"), poisoned, SETTINGS, seed=0, pad_id=0, state=tmp_path / "state")
    whole, wanted = model(), model()
    curve = loop.train(whole, rows_of("rows"), PLAIN_OBJECTIVE, SETTINGS, seed=0, pad_id=0)

    def stop(_tokens, left=[5]):  # noqa: B006 - counts down
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.train(wanted, rows_of("rows"), PLAIN_OBJECTIVE, SETTINGS, seed=0, pad_id=0, on_progress=stop)
    for before, after in zip(wanted.parameters(), live.parameters(), strict=True):
        assert torch.equal(before, after)
    again = model()
    state = tmp_path / "state"
    assert (
        loop.train(again, rows_of("rows"), PLAIN_OBJECTIVE, SETTINGS, seed=0, pad_id=0, state=state) == curve
    )
    for before, after in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("together", [1, 3, 100])
def test_run_ends_before_the_step_that_passes_its_limit_however_late_it_is_found_out(monkeypatch, together):
    def run():
        live = model()
        loop.train(live, rows_of("forget"), PLAIN_OBJECTIVE, SETTINGS, seed=0, pad_id=0)
        ascent = METHODS["grad_ascent"]
        objective = ascent.objective(ascent.settings(), 0)
        settings = SETTINGS.model_copy(update={"learning_rate": 0.1})
        return live, loop.train(
            live, Joined("forget", {"forget": rows_of("forget")}), objective, settings, seed=0, pad_id=0
        )

    first, curve = run()
    monkeypatch.setitem(loop.FETCHED, "cpu", together)
    monkeypatch.setattr(loop, "PATIENCE", 1e9)
    second, again = run()
    assert 0 < len(curve) < 12
    assert again == curve
    for before, after in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(before, after)
