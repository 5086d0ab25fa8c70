"""The verdict follows the stated rules, on both sides, and whatever is read of it agrees with the rest."""

import itertools

import pytest

from example_run import AUDIT, record, score
from palinode.report.reports import Facts, markdown_report, report_content
from palinode.report.run_report import model_card, strength
from palinode.report.verdicts import (
    asked,
    audit_verdict,
    judge_forgetting,
    judge_knowledge,
    run_verdict,
    untested,
    yardstick,
)


def light(found, name):
    claim = next(claim for claim in found.claims if claim.name == name)
    return claim.light, claim.word


def with_probability(model, data_set, value, **others):
    changed = record(**others)
    changed["scores"][model].setdefault(data_set, {})["answer_probability"] = value
    return changed


def audited(**answer):
    return {**AUDIT, "answer": {**AUDIT["answer"], **answer}}


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


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (score(0.80), "Yes"),
        (score(0.14), "No"),  # below the yardstick
        (score(0.18), "No"),  # above it by less than .05, and the intervals overlap
        (score(0.35, spread=0.30), "Unsure"),  # five rows cannot tell
        (score(0.18, spread=0.005), "Yes"),
    ],
)
def test_what_was_known_before_is_told_by_the_intervals(target, expected):
    assert judge_knowledge(target, score(0.15)) == expected


def test_one_row_has_no_interval_and_a_small_difference_is_no_knowledge():
    def alone(value):
        return {"value": value, "n": 1, "low": None, "high": None}

    assert judge_knowledge(alone(0.039), alone(0.011)) == "Unsure"
    assert judge_knowledge(alone(0.9), alone(0.1)) == "Yes"
    assert judge_knowledge(alone(0.1), alone(0.1)) == "Unsure"


def test_what_the_target_never_knew_cannot_be_forgotten_but_can_be_damaged():
    assert judge_forgetting(score(0.16), score(0.15), score(0.15)) == ("grey", "Nothing to forget")
    assert judge_forgetting(score(0.05), score(0.05), score(0.15)) == ("red", "Too much")
    assert judge_forgetting(score(0.163), score(4.3e-05, spread=1e-5), score(0.168)) == ("red", "Too much")


def test_yardstick_is_the_retrained_model_else_an_estimate_else_the_base():
    run = record()
    assert yardstick(run)[0] == "retrained"
    del run["scores"]["retrained"]
    assert yardstick(run) == ("base", run["scores"]["base"]["forget"]["answer_probability"])
    run["scales"]["yardstick"] = {"answer_probability": score(0.14)}
    assert yardstick(run) == ("estimate", score(0.14))
    run["scales"]["yardstick"]["source"] = "base"  # what the base does on the probes is no second opinion
    assert yardstick(run)[0] == "base"
    assert yardstick({}) is None


@pytest.mark.parametrize(
    ("left", "expected"), [(0.90, "green"), (0.70, "amber"), (0.60, "red"), (0.99, "green")]
)
def test_keeping_is_a_share_of_what_the_target_had(left, expected):
    assert light(run_verdict(with_probability("unlearned", "retain", score(left))), "kept")[0] == expected


def test_keeping_is_judged_on_rows_that_no_vector_saw_where_they_are_known():
    run = with_probability("unlearned", "retain_unseen", score(0.4))
    run["scores"]["target"]["retain_unseen"] = {"answer_probability": score(0.8)}
    kept = next(claim for claim in run_verdict(run).claims if claim.name == "kept")
    assert kept.light == "red"
    assert kept.sentence.startswith("Answer probability on the unseen retain rows: 0.800 before, 0.400 now")


def test_neighbours_that_kept_less_than_the_rest_are_told():
    for left, told in ((0.3, True), (0.78, False)):
        run = with_probability("unlearned", "retain_near", score(left))
        run["scores"]["target"]["retain_near"] = {"answer_probability": score(0.8)}
        kept = next(claim for claim in run_verdict(run).claims if claim.name == "kept")
        assert ("nearest to the forget set kept less: 0.800 before, 0.300 now" in kept.sentence) == told


def test_recovered_counts_the_comparisons_that_agree():
    found = next(claim for claim in run_verdict(record()).claims if claim.name == "recovered")
    assert (found.light, found.word) == ("amber", "Partly")
    assert found.sentence == (
        "It agrees with the retrained model in 6 of 8 comparisons. "
        "Apart: answer probability, forget set; answer probability, retain set."
    )
    close = with_probability("unlearned", "retain", score(0.83))  # 0.04 from 0.87: close enough
    close["scores"]["unlearned"]["forget"]["answer_probability"] = score(0.17)  # the intervals overlap
    assert light(run_verdict(close), "recovered") == ("green", "Yes")
    alone = record()
    del alone["scores"]["retrained"]
    assert light(run_verdict(alone), "recovered") == ("grey", "Not tested")


def test_robust_needs_an_audit_and_fails_on_either_side():
    assert light(run_verdict(record()), "robust") == ("grey", "Not tested")
    assert light(run_verdict(record(), AUDIT), "robust") == ("red", "No")
    passed = {"knows_more": [], "passed": True}
    assert light(run_verdict(record(), audited(**passed)), "robust") == ("green", "Yes")
    unsure = audited(**passed, unclear=["sampling.leak"])
    assert light(run_verdict(record(), unsure), "robust") == ("amber", "Partly")
    less = audited(**passed, knows_less=["questions.rouge"])
    assert light(run_verdict(record(), less), "robust") == ("red", "No")


def test_an_audit_by_itself_tells_plain_questions_from_attacks():
    verdict = audit_verdict(AUDIT)
    assert [(claim.name, claim.light) for claim in verdict.claims] == [
        ("plainly", "green"),
        ("withstands", "red"),
        ("not_too_much", "green"),
    ]
    assert (verdict.code, verdict.light, verdict.exit_code) == ("audit failed", "red", 1)


def test_test_that_does_not_judge_a_side_says_nothing_of_it():
    unsure = audited(knows_more=[], passed=True, unclear=["inside.depth", "questions.log_probability"])
    margins = {
        "inside.depth": {"more": 0.3, "less": False},
        "questions.log_probability": {"more": False, "less": 1.0},
    }
    told = {
        claim.name: claim.sentence
        for claim in audit_verdict(
            {**unsure, "policy": {**unsure.get("policy", {}), "margins": margins}}
        ).claims
    }
    assert "log_probability" not in told["plainly"]
    assert told["withstands"] == "Could not tell: inside.depth."
    assert told["not_too_much"] == "Could not tell: questions.log_probability."


def estimated(run, value, source="holdout"):
    """Return the run without its retrained model, held against an estimate."""
    run["scores"].pop("retrained", None)
    run["scales"]["yardstick"] = {"answer_probability": value, "source": source}
    return run


def test_yardsticks_that_disagree_are_both_told_with_what_decided_and_what_would_settle_it():
    # seen on a real request: .154 before, .036 now; .022 by the base, .156 by the holdout rows
    run = with_probability("target", "forget", score(0.154))
    run["scores"]["unlearned"]["forget"]["answer_probability"] = score(0.036, spread=0.01)
    run["scores"]["base"]["forget"]["answer_probability"] = score(0.022, spread=0.01)
    found = run_verdict(estimated(run, score(0.156)))
    (told,) = found.remarks
    assert "0.156 [0.136, 0.176]" in told
    assert "0.022 [0.012, 0.032]" in told
    assert "The first decided, because it counts as well what the target has learned" in told
    assert "would settle it" in told
    assert "holdout rows" in told
    assert light(found, "known") == ("amber", "No")  # one says that there was something to forget
    assert light(found, "forgotten") == ("red", "Too much")
    assert found.sentence.startswith(
        "There was nothing to forget: by the yardstick that decides the target did not know the forget set, "
        "by another it did, and the model now knows far less of it than one that never saw it"
    )
    assert (found.code, found.light, found.exit_code) == ("nothing to forget", "red", 3)


def test_an_estimate_above_the_target_itself_raises_doubts_of_the_holdout_rows():
    run = estimated(with_probability("target", "forget", score(0.567)), score(0.998, spread=0.001))
    run["scores"]["base"]["forget"]["answer_probability"] = score(0.074)
    (told,) = run_verdict(run).remarks
    assert told.endswith("It lies above the target itself: were the holdout rows really unseen?")


def test_a_base_that_knows_more_than_the_target_may_be_the_target():
    run = with_probability("target", "forget", score(0.071))
    run["scores"]["base"]["forget"]["answer_probability"] = score(0.606)
    assert [said for said in run_verdict(run).remarks if "wrong way round" in said] == [
        "The base checkpoint knows the forget set better than the target (answer probability "
        "0.606 [0.586, 0.626], and 0.071 [0.051, 0.091]): were the two given the wrong way round?"
    ]
    run["scores"]["base"]["forget"]["answer_probability"] = score(0.08)
    assert not any("wrong way round" in said for said in run_verdict(run).remarks)


def test_a_yes_that_another_yardstick_contradicts_is_disputed():
    run = with_probability("unlearned", "forget", score(0.5))
    run["scores"]["base"]["forget"]["answer_probability"] = score(0.1)
    found = run_verdict(estimated(run, score(0.5)))
    assert light(found, "forgotten") == ("amber", "Disputed")
    assert found.code == "unsure"
    assert found.sentence.startswith("By one yardstick the model forgot and by another it did not")


def test_the_retrained_model_settles_what_yardsticks_disagree_on():
    run = with_probability("unlearned", "forget", score(0.15))
    run["scores"]["base"]["forget"]["answer_probability"] = score(0.01, spread=0.005)
    found = run_verdict(run)
    assert light(found, "forgotten") == ("green", "Yes")
    (told,) = found.remarks
    assert "it is what the others stand in for" in told
    assert "settle" not in told


def test_the_target_bit_for_bit_is_no_result():
    run = with_probability("unlearned", "forget", score(0.8))
    run["models"]["unlearned"]["fingerprint"] = run["models"]["target"]["fingerprint"]
    found = run_verdict(run)
    assert (found.code, found.light, found.exit_code) == ("nothing subtracted", "red", 3)
    assert found.sentence == (
        "Nothing was subtracted: the model is the target, bit for bit, and it still knows the forget set; "
        "by some measures it is not yet like the retrained model."
    )


def test_no_scales_at_all_are_no_result_however_the_weights_are_rounded():
    run = with_probability("unlearned", "forget", score(0.8))
    run["scales"] = {**run["scales"], "forget": 0.0, "retain": 0.0}
    found = run_verdict(run)
    assert (found.code, found.exit_code) == ("nothing subtracted", 3)
    assert "the model is the target, but for the precision of its weights, and it still" in found.sentence
    run["scales"]["retain"] = 0.5  # something was added
    assert run_verdict(run).code == "not forgotten"


def test_a_run_that_made_no_model_says_so_and_does_not_say_that_nothing_was_measured():
    run = with_probability("target", "forget", score(0.15))
    del run["models"]["unlearned"], run["scores"]["unlearned"]
    found = run_verdict(run)
    assert (found.code, found.light, found.exit_code) == ("nothing to forget", "grey", 3)
    none = "No model was made, as there was nothing to forget."
    assert [claim.sentence for claim in found.claims[1:4]] == [none] * 3
    assert found.untested == (none,)
    assert report_content(Facts("unlearn", run))["headline"] == (
        "The target's answer probability on the forget set: 0.150 (the model retrained without the forget "
        "set: 0.140)."
    )


def test_that_the_target_may_not_have_known_the_forget_set_is_told():
    run = with_probability("target", "forget", score(0.35, spread=0.3))
    run["scores"]["unlearned"]["forget"]["answer_probability"] = score(0.15)
    assert "; whether the target knew the forget set is unsure" in run_verdict(run).sentence
    run = with_probability("unlearned", "forget", score(0.15))
    run["scores"]["base"]["forget"]["answer_probability"] = score(0.9)
    found = run_verdict(estimated(run, score(0.15)))
    assert light(found, "known") == ("amber", "Yes")
    assert "; by another yardstick the target did not know the forget set" in found.sentence


def test_without_a_yardstick_nothing_is_said_to_be_unmeasured_that_was():
    run = record()
    del run["scores"]["retrained"], run["scores"]["base"]
    found = run_verdict(run)
    assert found.sentence.startswith("Whether the model forgot is not known")
    assert found.claims[1].sentence.startswith("There is no yardstick")


@pytest.mark.parametrize("answer", [{"required": ["sampling"]}, {"unclear": ["a.b"]}])
def test_an_audit_that_failed_for_want_of_evidence_has_the_exit_code_of_one(answer):
    found = audit_verdict(audited(knows_more=[], passed=False, **answer))
    assert (found.code, found.exit_code) == ("audit failed", 1)


def test_an_audit_that_passed_though_some_tests_could_not_tell_says_so():
    found = audit_verdict(audited(knows_more=[], passed=True, unclear=["a.b"]))
    assert (found.code, found.light, found.exit_code) == ("audit passed", "amber", 0)
    assert found.sentence == (
        "Within this budget no attack told the model from a model that never saw it, "
        "but some of them could not tell."
    )


FORGET = (0.80, 0.5, 0.4, 0.17, 0.10, 0.02, None)
RETAIN = (0.9, 0.7, 0.3, None)
AUDITS = (None, AUDIT, audited(knows_more=[], passed=True), audited(knows_more=[], unclear=["a.b"]))


def grid():
    for target, forget, retain, retrained, audit, same in itertools.product(
        (0.8, 0.15, 0.1), FORGET, RETAIN, (True, False), AUDITS, (True, False)
    ):
        run = with_probability("target", "forget", score(target))
        for label, value in (("forget", forget), ("retain", retain)):
            if value is None:
                del run["scores"]["unlearned"][label]
            else:
                run["scores"]["unlearned"][label]["answer_probability"] = score(value)
        if not retrained:
            del run["scores"]["retrained"]
        if same:
            run["models"]["unlearned"]["fingerprint"] = run["models"]["target"]["fingerprint"]
        yield run, audit


def test_everything_that_is_read_tells_one_verdict_over_a_grid_of_results():
    codes, sentences = set(), set()
    for run, audit in grid():
        verdict = run_verdict(run, audit)
        lights = {claim.light for claim in verdict.claims}
        worst = next((one for one in ("red", "amber") if one in lights), None)
        assert verdict.light == worst or (worst is None and verdict.light in ("green", "grey"))
        assert verdict.exit_code == (3 if "nothing" in verdict.code else 1 if verdict.light == "red" else 0)
        if verdict.light == "green":
            assert verdict.code == "forgotten"
        if light(verdict, "robust")[0] == "red":
            assert "an audit speaks against it" in verdict.sentence
        content = report_content(Facts("unlearn", run, audit))
        head = f"{verdict.as_json()['symbol']} {verdict.sentence}"
        assert content["outcome"] == verdict.sentence
        assert content["verdict"]["light"] == verdict.light
        assert head in markdown_report(content)
        assert head in model_card(content)
        codes.add(verdict.code)
        sentences.add(verdict.sentence)
    assert codes == {
        "forgotten",
        "partly forgotten",
        "not forgotten",
        "forgotten too much",
        "not measured",
        "nothing subtracted",
        "nothing to forget",
    }
    for sentence in sentences:
        assert sentence.endswith(".")
        assert sentence[0].isupper()
        assert ".." not in sentence


@pytest.mark.parametrize(
    ("forget", "retain", "audit", "sentence"),
    [
        (0.15, 0.9, None, "The model treats the forget set like one that never saw it, and it kept the rest"),
        (
            0.15,
            0.7,
            AUDIT,
            "The model treats the forget set like one that never saw it, but it lost a part of the rest"
            "; but an audit speaks against it",
        ),
        (0.4, 0.9, None, "The model still knows a part of the forget set, and it kept the rest"),
        (0.5, 0.3, None, "The model still knows most of the forget set, and it lost much of the rest"),
        (
            0.02,
            0.9,
            None,
            "The model knows far less of the forget set than one that never saw it, and it kept the rest",
        ),
    ],
)
def test_outcome_is_one_sentence_for_each_combination(forget, retain, audit, sentence):
    run = with_probability("unlearned", "forget", score(forget))
    run["scores"]["unlearned"]["retain"]["answer_probability"] = score(retain)
    del run["scores"]["retrained"]
    run["scores"]["base"]["forget"]["answer_probability"] = score(0.15)
    assert run_verdict(run, audit).sentence == f"{sentence}."


@pytest.mark.parametrize("hole", [{}, {"scores": None}, {"scores": {"target": {"forget": {}}}}])
def test_without_scores_every_light_is_grey(hole):
    verdict = run_verdict(hole)
    assert {claim.light for claim in verdict.claims} == {"grey"}
    assert (verdict.code, verdict.light, verdict.exit_code) == ("not measured", "grey", 0)
    assert verdict.sentence == (
        "Whether the model forgot is not known; what became of the rest was not measured."
    )


def test_every_claim_has_its_rule_and_an_audit_shortens_what_was_not_tested():
    for claim in (*run_verdict(record()).claims, *audit_verdict(AUDIT).claims):
        assert claim.as_json()["rule"] == asked(claim.name)["rule"]
    assert untested(record()) == ["Other wordings of the same facts, membership inference, and relearning."]
    assert untested(record(), AUDIT)[0] == "drawn answers (leak@k), because it was not asked for."


def test_how_far_a_run_went_is_always_told():
    run = record()
    assert strength(run) == "α = 1, β = 0.5"
    run["vectors"] = {"transforms": [{"name": "least_squares", "settings": {"mu": 10.0}}]}
    assert strength(run).endswith("; the forget vector went through least squares (μ = 10) first")
    trained = {"method": {"name": "npo"}, "training": {"forget": {"steps": 40}}}
    assert strength(trained) == "npo trained the model itself, for 40 steps: there is no α and no β"
