"""What is particular to single methods, worked by hand where it can be."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from palinode import read_examples
from palinode.data.batches import pad_right
from palinode.data.examples import Example, Message, Question
from palinode.data.tokenize import PromptStyle, TokenRow
from palinode.errors import DataError, MismatchError, OutputError, RecipeError
from palinode.evaluation.ask import ask
from palinode.methods import METHODS
from palinode.methods.method import Given, gather, read_refusals
from palinode.methods.minimised import control_vector, npo, place_in_row, price
from palinode.methods.preference import NPO, AltPOSettings, draw_alternates, request
from palinode.methods.weighted import PDUSettings
from palinode.models import CombinedLogits, load_model, load_tokenizer, score_rows
from palinode.models.inplace import combined_logits
from palinode.models.reading import labelled_logits, labelled_states, pick_layer
from palinode.pipeline.run import unlearn
from palinode.settings import EvaluationLimits, TrainingSettings
from palinode.training.losses import row_sums
from palinode.training.objectives import CurvePoint, Seen

CPU = torch.device("cpu")
ROWS = (TokenRow((5, 6, 7, 8), 2, 0), TokenRow((9, 10, 11, 12, 13, 1), 4, 1))
BATCH = pad_right(ROWS, pad_id=0)


@pytest.fixture
def target(tiny):
    return load_model(tiny.target, device=CPU)


def term_value(name, model, frozen=None, *, term="forget", **settings) -> float:
    method = METHODS[name]
    objective = method.objective(method.check_settings(settings), 0)
    (part,) = [part for part in objective.terms if part.name == term]
    with torch.no_grad():
        return float(part.total(model, BATCH, frozen)) / part.weight(BATCH)


@torch.no_grad()
def nll_by_hand(model) -> list[torch.Tensor]:
    """−log p of each scored token, row by row."""
    found = []
    for row in ROWS:
        logprobs = model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
        places = range(row.start, len(row.ids))
        found.append(torch.stack([-logprobs[place - 1, row.ids[place]] for place in places]))
    return found


# Terms on a live model


def test_npo_sums_over_a_row_and_simnpo_takes_its_mean(target):
    rows = nll_by_hand(target)
    before = torch.tensor([1.0, 2.0])
    sums = torch.stack([row.sum() for row in rows])
    expected = (20 * torch.nn.functional.softplus(-0.1 * (sums - before))).mean().item()
    assert term_value("npo", target, before) == pytest.approx(expected, rel=1e-5)
    means = torch.stack([row.mean() for row in rows])
    expected = ((2 / 4.5) * torch.nn.functional.softplus(-4.5 * means)).mean().item()
    assert term_value("simnpo", target) == pytest.approx(expected, rel=1e-4)


def test_dpo_takes_the_first_half_of_its_rows_as_the_winners(target):
    sums = torch.stack([row.sum() for row in nll_by_hand(target)])
    before = torch.tensor([3.0, 1.0])
    margin = (before[0] - sums[0]) - (before[1] - sums[1])
    plain = torch.nn.functional.softplus(-0.1 * margin).item()
    assert term_value("dpo", target, before, scaled=False) == pytest.approx(plain, rel=1e-5)
    assert term_value("dpo", target, before) == pytest.approx(20 * plain, rel=1e-5)


def test_rmu_reads_the_block_at_answer_tokens_unshifted(target):
    whole = target(**_inputs(), output_hidden_states=True).hidden_states[1]  # after block 0
    states, rows = labelled_states(target, BATCH, 0)
    expected = [
        whole[row, place] for row, entry in enumerate(ROWS) for place in range(entry.start, len(entry.ids))
    ]
    torch.testing.assert_close(states, torch.stack(expected))
    assert rows.tolist() == [0, 0, 1, 1]
    u = control_vector(32, 2.0, 0)
    by_hand = [((states[rows == row] - u) ** 2).mean().item() for row in (0, 1)]
    assert term_value("rmu", target, layer=0) == pytest.approx(sum(by_hand) / 2, rel=1e-5)


def test_rmu_control_vector_is_nowhere_negative_has_its_length_and_follows_the_seed():
    u = control_vector(64, 2.5, 3)
    assert float(u.norm()) == pytest.approx(2.5)
    assert float(u.min()) >= 0
    assert torch.equal(u, control_vector(64, 2.5, 3))
    assert not torch.equal(u, control_vector(64, 2.5, 4))


def test_rmu_takes_block_7_or_the_middle_and_refuses_one_that_is_not_there(target):
    assert pick_layer(target, None, 7) == 1
    assert pick_layer(target, None, 1) == 1
    assert pick_layer(target, 0, 7) == 0
    with pytest.raises(RecipeError, match="layer is 2 and the model has 2, counted from 0"):
        pick_layer(target, 2, 7)


def test_rmu_trains_only_what_matches_its_pattern(job, tiny):
    from palinode.training.loop import train
    from palinode.training.objectives import join

    start, objective, material = job("rmu", layer=1, trainable=r"model\.layers\.0\.mlp\.down_proj\.weight")
    settings = TrainingSettings(epochs=1, learning_rate=1e-2, max_length=64, precision="float32")
    cast = join(material, load_tokenizer(start), epochs=1, seed=0, max_length=64, style=PromptStyle())
    model = load_model(start, device=CPU)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, cast, objective, settings, seed=0, pad_id=0)
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert moved == ["model.layers.0.mlp.down_proj.weight"]
    assert all(value.requires_grad for value in model.parameters())
    _, wrong, _ = job("rmu", trainable="down_proj")
    with pytest.raises(RecipeError, match="no parameter's whole name matches 'down_proj'; one of them is"):
        train(model, cast, wrong, settings, seed=0, pad_id=0)


def test_pdu_reads_the_logits_at_answer_tokens_and_not_those_before_them(target):
    whole = target(**_inputs()).logits
    expected = [
        whole[row, place] for row, entry in enumerate(ROWS) for place in range(entry.start, len(entry.ids))
    ]
    torch.testing.assert_close(labelled_logits(target, BATCH), torch.stack(expected))
    flat = torch.stack([(z.max() - z.mean()) ** 2 for z in expected]).mean().item()
    assert term_value("pdu", target) == pytest.approx(flat, rel=1e-5)


def test_pdu_price_rises_while_the_constraint_is_broken_and_never_below_zero():
    def curve(*losses):
        return [CurvePoint(step, 0.0, 0.0, 0.0, {"retain": loss}) for step, loss in enumerate(losses)]

    settings = PDUSettings(price=1.0, price_rate=2.0, warmup_epochs=1, epsilon=0.5)
    assert price(settings, [], 2) == 1.0
    assert price(settings, curve(9.0, 9.0), 2) == 1.0  # an epoch of warm-up
    assert price(settings, curve(9.0, 9.0, 0.75), 2) == 1.5
    assert price(settings, curve(9.0, 9.0, 0.75, 0.0, 0.0), 2) == 0.0
    own = PDUSettings(warmup_epochs=0)
    assert price(own, curve(1.0, 2.0), 2) == pytest.approx(1 + (1.0 - 1.1) + (2.0 - 1.1))


def test_ce_u_leaves_out_the_first_answer_tokens():
    seen = Seen(torch.zeros(5, 3), torch.zeros(5, dtype=torch.long), torch.tensor([0, 0, 0, 2, 2]), 3, None)
    assert place_in_row(seen).tolist() == [0, 1, 2, 0, 1]
    method = METHODS["ce_u"]
    for ignored, weight in {0: 4.0, 1: 2.0, 2: 0.0, 9: 0.0}.items():
        (term,) = method.objective(method.check_settings({"ignore_first": ignored}), 0).terms
        assert term.weight(BATCH) == weight


def test_undial_as_open_unlearning_has_it_counts_prompts_and_a_far_token(target):
    with torch.no_grad():
        logits = target(**_inputs()).logits
    frozen = torch.cat([logits[row, : len(entry.ids) - 1] for row, entry in enumerate(ROWS)])
    total = 0.0
    for row, entry in enumerate(ROWS):
        for place in range(1, len(entry.ids)):
            z = logits[row, place - 1]
            label = entry.ids[place] if place >= entry.start else len(z) - 100
            wanted = z.clone()
            wanted[label] -= 10.0
            total -= float((wanted.softmax(-1) * z.log_softmax(-1)).sum())
    found = term_value("undial", target, frozen, compat="ou")
    assert found == pytest.approx(total / 8, rel=1e-5)  # 3 + 5 predicted tokens


def _inputs():
    return {"input_ids": torch.tensor(BATCH.ids), "attention_mask": torch.tensor(BATCH.mask)}


# Refusals


def test_refusals_are_read_as_lines_or_json_strings(tmp_path):
    path = tmp_path / "idk.jsonl"
    path.write_text('I do not know.\n\n"Not \\"sure\\"."\n"open\nI do not know.\n', encoding="utf-8")
    assert read_refusals(path) == ["I do not know.", 'Not "sure".', '"open']


def test_refusals_that_are_not_there_or_empty_are_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_refusals(tmp_path / "none.txt")
    (tmp_path / "blank.txt").write_text("\n \n")
    with pytest.raises(DataError, match="holds no refusals; write one a line"):
        read_refusals(tmp_path / "blank.txt")


def test_every_refusal_may_go_with_every_question(tiny):
    forget = read_examples(tiny.forget)[:3]
    method = METHODS["idk_nll"]
    objective = method.objective(method.check_settings({}), 0)
    found = gather(objective, forget=forget, retain=forget, refusals=["no", "never"])
    answers = [[found.examples["refusal"][at].answer for at in own] for own in found.candidates["refusal"]]
    prompts = [[found.examples["refusal"][at].prompt for at in own] for own in found.candidates["refusal"]]
    assert answers == [["no", "never"]] * 3
    assert prompts == [[example.prompt] * 2 for example in forget]
    with pytest.raises(DataError, match="there are no refusal rows"):
        gather(objective, forget=forget, retain=forget)


# AltPO


def test_alternates_are_drawn_from_the_target_the_same_for_a_seed_and_never_the_true_answer(tiny, target):
    examples = read_examples(tiny.forget)
    settings = AltPOSettings(samples=3, temperature=3.0, max_new_tokens=2)

    def draw(seed):
        return draw_alternates(
            target,
            load_tokenizer(tiny.target),
            examples=examples,
            settings=settings,
            seed=seed,
            max_length=64,
            style=PromptStyle(),
        )

    found = draw(0)
    assert found == draw(0) != draw(1)
    assert all(text and text != examples[place].answer for place, text in found)
    assert len(set(found)) == len(found)


def test_target_that_knows_only_the_true_answers_is_named(tiny, target):
    examples = [
        Example(0, "x", "completion", (Message("prompt", outcome.prompt),), outcome.generated)
        for outcome in ask(
            target,
            load_tokenizer(tiny.target),
            [*map(Question, read_examples(tiny.retain)[:2])],
            EvaluationLimits(max_new_tokens=3, max_length=64).asking,
        )
    ]
    cold = AltPOSettings(samples=1, temperature=1e-3, max_new_tokens=3)
    with pytest.raises(DataError, match="nothing but the true answers in 1 tries a question; raise"):
        draw_alternates(
            target,
            load_tokenizer(tiny.target),
            examples=examples,
            settings=cold,
            seed=0,
            max_length=64,
            style=PromptStyle(),
        )


def test_question_becomes_a_request_that_shows_its_answer_and_a_completion_stays_as_it_is():
    asked = Example(0, "x", "question", (Message("user", "Who wrote it?"),), "Ada")
    shown = request(asked).prompt
    assert "Who wrote it?" in shown
    assert "Ada" in shown
    raw = Example(0, "x", "completion", (Message("prompt", "It was"),), "Ada")
    assert request(raw) == raw


def test_alternates_are_kept_in_the_workspace_and_not_drawn_again(made):
    output = made("altpo").output
    steps = [path.name for path in output.with_name(f"{output.name}.workspace").iterdir()]
    assert len([name for name in steps if re.match(r"alternates-\w{12}$", name)]) == 1


def test_document_has_no_other_answer(recipe_of, sections, tmp_path):
    text = tmp_path / "book.txt"
    text.write_text("the home of the home of the home of")
    content = sections("dpo")
    content["data"]["forget"] = str(text)
    with pytest.raises(DataError, match="is a document, and this method needs another answer to a question"):
        unlearn(recipe_of(tmp_path / "out", **content))


# Who's Harry Potter


def test_combined_logits_take_off_what_reinforcement_raises():
    own, risen = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 2.0, 1.0])
    assert combined_logits(own, risen, 1.5).tolist() == [-0.5, 2.0, 3.0]


@pytest.fixture
def combined(tiny):
    return CombinedLogits(load_model(tiny.base, device=CPU), load_model(tiny.target, device=CPU), 1.0)


def test_combined_model_is_measured_and_answers_like_any_other(combined, tiny):
    examples = read_examples(tiny.forget)[:4]
    found = ask(
        combined,
        load_tokenizer(tiny.target),
        [*map(Question, examples)],
        EvaluationLimits(max_new_tokens=3, max_length=64).asking,
    )
    for outcome, example in zip(found, examples, strict=True):
        prompt = load_tokenizer(tiny.target)(example.prompt)["input_ids"]
        ids = list(prompt)
        said = []
        for _ in range(3):
            own, risen = (
                model(input_ids=torch.tensor([ids])).logits[0, -1]
                for model in (combined.target, combined.reinforced)
            )
            ids.append(int(combined_logits(own, risen, 1.0).argmax()))
            if ids[-1] == 1:
                break
            said.append(ids[-1])
        assert outcome.generated == load_tokenizer(tiny.target).decode(said)


def test_combined_model_of_one_model_twice_is_that_model(tiny):
    twice = CombinedLogits(*(load_model(tiny.target, device=CPU) for _ in range(2)), 5.0)
    once = score_rows(load_model(tiny.target, device=CPU), ROWS, pad_id=0)
    for one, other in zip(once, score_rows(twice, ROWS, pad_id=0), strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)


def test_combined_model_cannot_be_saved_and_says_what_can(combined, tmp_path):
    with pytest.raises(OutputError, match=r"it has no weights of its own.*use the method whp"):
        combined.save_pretrained(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_models_with_two_vocabularies_cannot_be_combined(tiny):
    target, other = (load_model(tiny.target, device=CPU) for _ in range(2))
    other.config.vocab_size += 1
    with pytest.raises(MismatchError, match="logits can only be put together of models with one vocabulary"):
        CombinedLogits(target, other, 1.0)


def test_method_that_makes_no_model_is_refused_in_a_run(recipe_of, sections, tmp_path):
    with pytest.raises(RecipeError, match=r"whp_logits reads two models together and makes none .*; use the"):
        unlearn(recipe_of(tmp_path / "out", **sections("whp_logits")))


# MSA in its forms


def test_task_vector_is_msa_from_the_target_itself(made, recipe_of, tiny, tmp_path):
    """The base is only read for the rule that chooses the scales, so they are given here."""
    scales = {"forget": 0.5, "retain": 0.0}
    plain = unlearn(recipe_of(tmp_path / "plain", method="task_vector", scales=scales))
    fingerprint = plain.record["models"]["unlearned"]["fingerprint"]
    copy = {"target": str(tiny.target.folder), "base": str(_copy(tiny.target.folder, tmp_path / "copy"))}
    same = unlearn(recipe_of(tmp_path / "same", method="msa", models=copy, scales=scales))
    assert same.record["models"]["unlearned"]["fingerprint"] == fingerprint


def _copy(folder, place):
    import shutil

    return shutil.copytree(folder, place)


def test_msa_goes_without_a_retain_set_and_with_a_retain_vector(recipe_of, tmp_path):
    only = unlearn(
        recipe_of(tmp_path / "only", data={"retain": None}, scales={"forget": 0.5, "retain": None})
    )
    both = unlearn(recipe_of(tmp_path / "both", scales={"forget": 0.5, "retain": 0.5}))
    assert "retain" not in only.record["training"]
    assert both.record["training"]["retain"]["steps"] > 0
    assert not math.isclose(
        only.record["dose"]["relative_error"] + only.record["vectors"]["forget"]["norm"], 0.0
    )


def test_row_sums_and_means_of_rows_without_tokens_are_zero():
    values, rows = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 0, 2])
    assert row_sums(values, rows, 4).tolist() == [3.0, 0.0, 4.0, 0.0]


def test_what_a_method_minimises_may_stand_in_its_own_file():
    given, settings = ([Example(0, "x", "question", (Message("user", "a?"),), "b")], NPO.check_settings({}))

    def own(settings, seed):
        return npo(settings, seed)

    by_name, by_itself = (
        method.runs(settings, Given(forget=given, retain=given, seed=3))
        for method in (NPO, replace(NPO, minimises=own))
    )
    assert [run.decides for run in by_itself] == [run.decides for run in by_name]
    assert [run.objective.reads for run in by_itself] == [("forget", "retain")]
    assert replace(NPO, minimises=own).kind == "training"
