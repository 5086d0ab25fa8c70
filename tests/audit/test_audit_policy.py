"""Policies: strict TOML, sensible defaults, errors that name the nearest key."""

from __future__ import annotations

import pytest

from palinode.audit.attack import BUDGETS
from palinode.audit.attacks import ATTACKS
from palinode.audit.attacks import tests_by_key as keyed_tests
from palinode.audit.policy import build_policy, load_policy
from palinode.errors import RecipeError


def test_built_in_policy_has_margins_for_every_test():
    policy = build_policy({})
    assert set(policy.margins) == set(keyed_tests())
    assert policy.budget == BUDGETS["standard"]
    assert policy.unclear == "pass"


def test_every_test_judges_over_forgetting_or_knowledge_left():
    tests = {key: test for key, (_, test) in keyed_tests().items()}
    unjudged = {key for key, test in tests.items() if test.more is None and test.less is None}
    told = {"traces.model", "pair.extraction", "pair.memorised"}  # of what the target beside it gives away
    assert unjudged == told
    floors = {key for key, test in tests.items() if test.less is None} - unjudged
    assert floors == {"inside.depth", "inside.lens"}  # 0 is the reference model: there is nothing below


def test_file_is_laid_over_the_defaults(tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text(
        """
        unclear = "fail"
        require = ["membership"]
        [budget]
        preset = "quick"
        samples = 16
        [margins.questions.probability]
        more = 0.02
        [margins.membership.loss]
        more = 0
        less = false
        """
    )
    policy = load_policy(path)
    assert policy.unclear == "fail"
    assert policy.require == ["membership"]
    assert policy.preset == "quick"
    assert (policy.budget.samples, policy.budget.max_rows) == (16, BUDGETS["quick"].max_rows)
    assert policy.margins["questions.probability"].above == 0.02
    assert policy.margins["questions.probability"].below == 0.1
    assert policy.margins["membership.loss"].above == 0
    assert policy.margins["membership.loss"].below is None


def test_preset_of_the_command_goes_under_the_file():
    policy = build_policy({"budget": {"preset": "full", "samples": 20}}, preset="quick")
    assert (policy.preset, policy.budget.samples) == ("quick", 20)
    assert policy.budget.relearn_steps == BUDGETS["quick"].relearn_steps


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"unclaer": "fail"}, "unknown key 'unclaer'; did you mean 'unclear'"),
        ({"budget": {"sampels": 3}}, "unknown key 'budget.sampels'; did you mean 'budget.samples'"),
        (
            {"margins": {"question": {"probability": {"more": 0.1}}}},
            "unknown key 'margins.question'; did you mean 'margins.questions'",
        ),
        (
            {"margins": {"questions": {"probability": {"mor": 0.1}}}},
            "did you mean 'margins.questions.probability.more'",
        ),
        ({"margins": {"questions": 0.1}}, r"margins.questions is 0.1 in the policy; it must be a section"),
        ({"budget": {"preset": "huge"}}, "no budget 'huge'; choose one of quick, standard, full"),
        ({"budget": {"samples": 2, "leak_k": 4}}, "leak_k is 4 and samples 2"),
        ({"budget": {"relearn_steps": [1, 2]}}, "must begin with 0 and rise"),
        ({"budget": {"relearn_steps": [0, 4, 4]}}, "must begin with 0 and rise"),
        ({"budget": {"max_rows": "many"}}, r"budget.max_rows cannot be used: .* \('many' was given\)"),
        ({"margins": {"questions": {"probability": {"more": -1}}}}, "margins.questions.probability.more"),
        ({"margins": {"questions": {"probability": {"more": True}}}}, "margins.questions.probability.more"),
        ({"unclear": "maybe"}, "unclear cannot be used"),
        ({"require": ["member"]}, "require names 'member'; the attacks are questions"),
        ({"require": "membership"}, "require cannot be used"),
        ({"min_rows": 0}, "min_rows cannot be used"),
    ],
)
def test_wrong_policy_is_refused_in_one_sentence(content, says):
    with pytest.raises(RecipeError, match=says) as caught:
        build_policy(content)
    assert "\n" not in str(caught.value)


def test_missing_file_and_broken_toml_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="there is no policy"):
        load_policy(tmp_path / "none.toml")
    (tmp_path / "broken.toml").write_text("unclear = [")
    with pytest.raises(RecipeError, match="not a TOML policy"):
        load_policy(tmp_path / "broken.toml")


def test_presets_grow():
    quick, standard, full = BUDGETS.values()
    for name in ("max_rows", "samples", "max_new_tokens"):
        assert getattr(quick, name) < getattr(standard, name) < getattr(full, name)
    assert quick.relearn_steps[-1] < standard.relearn_steps[-1] < full.relearn_steps[-1]


def test_attacks_are_keyed_by_their_names_and_described():
    assert all(attack.name == name and attack.description for name, attack in ATTACKS.items())


def test_beside_a_base_nobody_is_blamed_for_what_the_base_had_not_learned():
    usual, beside = build_policy({}).margins, build_policy({}, kind="base").margins
    changed = {key for key in usual if usual[key] != beside[key]}
    wider = [key for key in usual if key.startswith(("membership.", "inside."))]
    assert changed == {"questions.log_probability", "traces.rows", *wider}
    assert all(beside[key].below is None for key in changed)
    assert beside["membership.loss"].above == 0.2
    own = build_policy({"margins": {"membership": {"loss": {"less": 0.3}}}}, kind="base").margins
    assert (own["membership.loss"].below, own["membership.loss"].above) == (0.3, 0.2)
