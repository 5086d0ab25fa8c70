"""The lights follow the stated rules, in both directions, and stay grey where nothing was measured."""

import pytest
from example_run import AUDIT, record, score

from palinode.report.verdicts import (
    ASKED,
    audit_claims,
    claims,
    judge_forgetting,
    outcome_sentence,
    untested,
    yardstick,
)


def light(found, name):
    claim = next(claim for claim in found if claim.name == name)
    return claim.light, claim.word


def with_probability(model, data_set, value, **others):
    changed = record(**others)
    changed["scores"][model].setdefault(data_set, {})["answer_probability"] = value
    return changed


@pytest.mark.parametrize(
    ("unlearned", "expected"),
    [
        (score(0.17), ("green", "Yes")),
        (score(0.15), ("green", "Yes")),
        (score(0.40), ("amber", "Partly")),  # (0.40 − 0.15) / (0.80 − 0.15) = 0.38
        (score(0.50), ("red", "No")),  # 0.54 of the way
        (score(0.10), ("amber", "A little too much")),
        (score(0.02), ("red", "Too much")),
        (score(0.6, spread=0.44), ("amber", "Unsure")),  # overlaps the yardstick, and much else
        ({"value": 0.15, "n": 1, "low": None, "high": None}, ("green", "Yes")),
    ],
)
def test_forgetting_is_judged_on_both_sides_of_the_yardstick(unlearned, expected):
    assert judge_forgetting(score(0.80), unlearned, score(0.15)) == expected


def test_what_the_target_never_knew_cannot_be_forgotten():
    assert judge_forgetting(score(0.16), score(0.15), score(0.15)) == ("grey", "Nothing to forget")
    assert judge_forgetting(score(0.05), score(0.05), score(0.15)) == ("grey", "Nothing to forget")


def test_yardstick_is_the_retrained_model_else_an_estimate_else_the_base():
    run = record()
    assert yardstick(run)[0] == "retrained"
    del run["scores"]["retrained"]
    assert yardstick(run) == ("base", run["scores"]["base"]["forget"]["answer_probability"])
    run["scales"]["yardstick"] = {"answer_probability": score(0.14)}
    assert yardstick(run) == ("estimate", score(0.14))
    assert yardstick({}) is None


@pytest.mark.parametrize(
    ("left", "expected"), [(0.90, "green"), (0.70, "amber"), (0.60, "red"), (0.99, "green")]
)
def test_keeping_is_a_share_of_what_the_target_had(left, expected):
    assert light(claims(with_probability("unlearned", "retain", score(left))), "kept")[0] == expected


def test_keeping_is_judged_on_rows_that_no_vector_saw_where_they_are_known():
    run = with_probability("unlearned", "retain_unseen", score(0.4))
    run["scores"]["target"]["retain_unseen"] = {"answer_probability": score(0.8)}
    kept = next(claim for claim in claims(run) if claim.name == "kept")
    assert kept.light == "red"
    assert kept.sentence.startswith("Answer probability on the unseen retain rows: 0.800 before, 0.400 now")


def test_recovered_counts_the_comparisons_that_agree():
    found = next(claim for claim in claims(record()) if claim.name == "recovered")
    assert (found.light, found.word) == ("amber", "Partly")
    assert found.sentence == (
        "It agrees with the retrained model in 6 of 8 comparisons. "
        "Apart: answer probability, forget set; answer probability, retain set."
    )
    close = with_probability("unlearned", "retain", score(0.83))  # 0.04 from 0.87: close enough
    close["scores"]["unlearned"]["forget"]["answer_probability"] = score(0.17)  # the intervals overlap
    assert light(claims(close), "recovered") == ("green", "Yes")
    alone = record()
    del alone["scores"]["retrained"]
    assert light(claims(alone), "recovered") == ("grey", "Not tested")


def test_robust_needs_an_audit_and_fails_on_either_side():
    assert light(claims(record()), "robust") == ("grey", "Not tested")
    assert light(claims(record(), AUDIT), "robust") == ("red", "No")
    answer = {**AUDIT["answer"], "knows_more": [], "passed": True}
    assert light(claims(record(), {**AUDIT, "answer": answer}), "robust") == ("green", "Yes")
    unsure = {**answer, "unclear": ["sampling.leak"]}
    assert light(claims(record(), {**AUDIT, "answer": unsure}), "robust") == ("amber", "Partly")
    less = {**answer, "knows_less": ["questions.rouge"]}
    assert light(claims(record(), {**AUDIT, "answer": less}), "robust") == ("red", "No")


def test_an_audit_by_itself_tells_plain_questions_from_attacks():
    assert [(claim.name, claim.light) for claim in audit_claims(AUDIT)] == [
        ("plainly", "green"),
        ("withstands", "red"),
        ("not_too_much", "green"),
    ]


def test_outcome_is_one_sentence_for_each_combination():
    assert outcome_sentence(claims(record())) == (
        "The model still knows a part of the forget set, and it lost a part of the rest."
    )
    good = with_probability("unlearned", "forget", score(0.15))
    assert outcome_sentence(claims(good)) == (
        "The model treats the forget set like one that never saw it, but it lost a part of the rest."
    )
    assert outcome_sentence(claims({})) == (
        "Whether the model forgot was not measured; what became of the rest was not measured."
    )


@pytest.mark.parametrize("hole", [{}, {"scores": None}, {"scores": {"target": {"forget": {}}}}])
def test_without_scores_every_light_is_grey(hole):
    assert {claim.light for claim in claims(hole)} == {"grey"}


def test_every_claim_has_its_rule_and_an_audit_shortens_what_was_not_tested():
    for claim in (*claims(record()), *audit_claims(AUDIT)):
        assert claim.as_json()["rule"] == ASKED[claim.name][2]
    assert untested(record()) == ["Other wordings of the same facts, membership inference, and relearning."]
    assert untested(record(), AUDIT)[0] == "drawn answers (leak@k), because it was not asked for."
