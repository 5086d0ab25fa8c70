"""What every method promises, walked for each of them on the tiny world."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import math
from dataclasses import replace

import pytest
import torch
from contract_cases import OWN_SETTINGS, SAVED, TRAINED
from pydantic import ValidationError
from safetensors.numpy import load_file as load_numpy

from palinode import Checkpoint, TrainingSettings, finetune, read_examples
from palinode.data.examples import Question
from palinode.data.tokenize import PromptStyle
from palinode.errors import DivergenceError, RecipeError
from palinode.evaluation.ask import ask
from palinode.methods import METHODS, MethodSettings
from palinode.methods.method import StartSettings
from palinode.models import CombinedLogits, load_model, load_tokenizer
from palinode.pipeline.recipe import build_recipe
from palinode.pipeline.run import dry_run, unlearn
from palinode.settings import EvaluationLimits
from palinode.training.loop import train
from palinode.training.objectives import Keeper, choices, join, keep

CPU = torch.device("cpu")
SETTINGS = TrainingSettings(
    epochs=3, learning_rate=1e-3, batch_size=4, max_length=64, precision="float32", warmup_epochs=0
)


def bytes_of(folder) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def probability(record, model, rows="forget") -> float:
    return record["scores"][model][rows]["answer_probability"]["value"]


def cast_of(start, material, chosen=SETTINGS):
    tokenizer = load_tokenizer(start)
    return join(
        material, tokenizer, epochs=chosen.epochs, seed=0, max_length=chosen.max_length, style=PromptStyle()
    )


def frozen_of(name, cast, tiny):
    """For Who's Harry Potter, labels from two models; of other methods the loop asks the model itself."""
    if name != "whp":
        return {}
    both = CombinedLogits(*(load_model(entry, device=CPU) for entry in (tiny.target, tiny.retrained)), 1.0)
    rows = {("forget", place): row for place, row in enumerate(cast.rows["forget"])}
    return {"forget": keep(Keeper(choices), both, rows, pad_id=0, autocast=False)}


def trained(name, job, tiny, chosen=SETTINGS, **others):
    """A model trained by a method, and its curve."""
    start, objective, material = job(name)
    cast = cast_of(start, material, chosen)
    model = load_model(start, device=CPU)
    cast = replace(cast, frozen=frozen_of(name, cast, tiny))
    curve = train(model, cast, objective, chosen, seed=0, pad_id=0, **others)
    return model, curve


def train_from(start, objective, material):
    """A model trained from a checkpoint, and its curve."""
    model = load_model(start, device=CPU)
    return model, train(model, cast_of(start, material), objective, SETTINGS, seed=0, pad_id=0)


# The table


@pytest.mark.parametrize("name", METHODS)
def test_table_says_what_a_method_is(name):
    method = METHODS[name]
    assert method.name == name
    assert method.summary
    assert method.formula
    assert issubclass(method.settings, MethodSettings)
    assert (method.kind == "arithmetic") == method.has_scales
    method.check_settings(OWN_SETTINGS.get(name, {}))


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_is_explained(name):
    """A sentence under each, where a reader looks for it."""
    for kind in METHODS[name].settings.__mro__:
        if kind.__module__.startswith("palinode.methods") and kind is not MethodSettings:
            body = ast.parse(inspect.getsource(kind)).body[0].body
            fields = [place for place, node in enumerate(body) if isinstance(node, ast.AnnAssign)]
            for place in fields:
                after = body[place + 1] if place + 1 < len(body) else None
                assert isinstance(after, ast.Expr), f"{kind.__name__}.{body[place].target.id} has no sentence"


@pytest.mark.parametrize("name", TRAINED)
def test_objective_reads_what_the_method_says_it_needs(name, job):
    _, objective, _ = job(name)
    needs = METHODS[name].needs
    optional = {"undial"}  # its retain loss is off by default
    assert ("retain" in objective.roles) == ("retain" in needs and name not in optional)
    assert ("refusal" in objective.roles) == ("refusals" in needs)
    assert ("alternate" in objective.roles) == ("alternates" in needs)
    assert ("frozen_target" in needs) == (any(term.keeper for term in objective.terms) or name == "whp")


# What a run does


@pytest.mark.parametrize("name", SAVED)
def test_target_stays_as_it_is_on_disk_and_the_forget_loss_rises(name, made, tiny):
    before = bytes_of(tiny.target.folder)
    record = made(name).record
    assert bytes_of(tiny.target.folder) == before
    assert probability(record, "unlearned") < probability(record, "target")
    assert record["method"]["name"] == name


@pytest.mark.parametrize("name", SAVED)
def test_result_survives_saving_and_loading(name, made, recipe_of):
    done = made(name)
    recipe = recipe_of(done.output)
    again = Checkpoint.open(done.output)
    model = load_model(again, device=CPU)
    rows = {outcome.row: outcome for outcome in done.outcomes["unlearned"]["forget"]}
    examples = [example for example in read_examples(recipe.data.forget) if example.row in rows]
    found = ask(
        model,
        load_tokenizer(again),
        [*map(Question, examples)],
        EvaluationLimits(max_new_tokens=3, max_length=64).asking,
    )
    for outcome in found:
        assert outcome.logprobs == pytest.approx(rows[outcome.row].logprobs, abs=1e-5)
    assert set(again.tensors) == set(Checkpoint.open(recipe.models.target).tensors)


@pytest.mark.parametrize("name", SAVED)
def test_same_seed_gives_the_same_model_and_the_finished_run_is_found_again(
    name, made, recipe_of, sections, tmp_path
):
    first = made(name)
    again = unlearn(recipe_of(tmp_path / "out", **sections(name)))
    assert (
        again.record["models"]["unlearned"]["fingerprint"]
        == (first.record["models"]["unlearned"]["fingerprint"])
    )
    assert again.record["scores"] == first.record["scores"]
    assert unlearn(recipe_of(first.output, **sections(name))).finished_before


@pytest.mark.parametrize("name", TRAINED)
def test_another_seed_gives_another_model(name, job, tiny):
    first, other = (trained(name, job, tiny)[0].state_dict(), _with_seed(name, job, tiny, 1).state_dict())
    assert any(not torch.equal(first[key], other[key]) for key in first)


def _with_seed(name, job, tiny, seed):
    start, objective, material = job(name)
    chosen = SETTINGS
    cast = join(
        material,
        load_tokenizer(start),
        epochs=chosen.epochs,
        seed=seed,
        max_length=chosen.max_length,
        style=PromptStyle(),
    )
    model = load_model(start, device=CPU)
    cast = replace(cast, frozen=frozen_of(name, cast, tiny))
    train(model, cast, objective, chosen, seed=seed, pad_id=0)
    return model


@pytest.mark.parametrize("name", TRAINED)
def test_accumulated_micro_batches_give_the_result_of_one_large_batch(name, job, tiny):
    large = SETTINGS.model_copy(update={"batch_size": 8})
    whole, curve = trained(name, job, tiny, large)
    cut, parts = trained(name, job, tiny, large.model_copy(update={"batch_size": 3, "accumulation": 3}))
    assert len(curve) == len(parts)
    for one, other in zip(curve, parts, strict=True):
        assert other.loss == pytest.approx(one.loss, rel=1e-4, abs=1e-6)
        assert other.terms == pytest.approx(dict(one.terms), rel=1e-4, abs=1e-6)
    for key, value in whole.state_dict().items():  # AdamW makes a step of the noise in a gradient of zero
        assert float((cut.state_dict()[key] - value).norm()) <= 1e-4 * float(value.norm())


@pytest.mark.parametrize("name", TRAINED)
def test_interrupted_training_goes_on_to_the_same_weights(name, job, tiny, tmp_path):
    whole, curve = trained(name, job, tiny)

    def stop(point, _rows):
        if point.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(name, job, tiny, state=tmp_path / "state", on_step=stop)
    resumed, again = trained(name, job, tiny, state=tmp_path / "state")
    assert again == curve
    for key, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value)


@pytest.mark.parametrize("name", TRAINED)
def test_long_and_fast_training_neither_runs_away_nor_ends_in_no_number(name, job, tiny):
    """Many steps at ten times the rate: bounded losses stay so, and ascent ends at its limit."""
    hard = SETTINGS.model_copy(update={"epochs": 60, "learning_rate": 1e-2, "batch_size": 8})
    try:
        model, curve = trained(name, job, tiny, hard)
    except DivergenceError:
        return  # said in one sentence, and no model is written
    assert all(math.isfinite(point.loss) for point in curve)
    assert all(bool(torch.isfinite(value).all()) for value in model.state_dict().values())
    if name in ("grad_ascent", "grad_diff", "kl_min"):
        most = math.log(model.config.vocab_size)
        assert len(curve) < 60
        assert all(-point.terms["forget"] <= most for point in curve)


@pytest.mark.parametrize("name", ["grad_ascent", "grad_diff", "kl_min"])
def test_ascent_ends_at_the_limit_that_is_set_and_refuses_one_that_is_passed_already(name, job, tiny):
    start, objective, material = job(name, forget_limit=2.0)
    cast, model = cast_of(start, material), load_model(start, device=CPU)
    curve = train(model, cast, objective, SETTINGS, seed=0, pad_id=0)
    assert all(-point.terms["forget"] <= 2.0 for point in curve)
    _, strict, _ = job(name, forget_limit=1e-6)
    with pytest.raises(RecipeError, match=r"before the first step, above the limit of 0\.00"):
        train(load_model(start, device=CPU), cast, strict, SETTINGS, seed=0, pad_id=0)


def test_run_that_ends_early_says_so(made):
    record = made("grad_ascent").record
    run = record["training"]["grad_ascent"]
    assert 0 < run["steps"] < run["planned_steps"]
    (note,) = [note for note in record["notes"] if "Training ended" in note]
    assert f"after {run['steps']} of {run['planned_steps']} steps" in note


# What a method lacks

OPTIONS = {"base": "models.base", "retain": "data.retain", "refusals": "data.refusals"}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("need", OPTIONS)
def test_method_refuses_in_one_sentence_what_it_lacks(name, need, recipe_of, sections, tmp_path):
    if need not in METHODS[name].needs or (name == "undial" and need == "retain"):
        pytest.skip("it does without")
    content = sections(name)
    section, key = OPTIONS[need].split(".")
    content[section][key] = None
    with pytest.raises(RecipeError, match=f"^.*the method {name} needs .*; name {OPTIONS[need]}"):
        recipe_of(tmp_path / "out", **content)


# Started from the base

AT_BASE = {
    "npo": {"start": "base"},
    "grad_diff": {"start": "base", "forget_limit": 50.0},
    "simnpo": {"start": "base"},
}
"""The limit: the base's forget loss is that of ignorance already."""


@pytest.fixture(scope="session")
def at_base(recipe_of, sections, tiny, tmp_path_factory):
    """A function that runs a method with start = "base" on the tiny world, once for each label."""
    runs = {}

    def run(name: str, label: str = "first"):
        if (name, label) not in runs:
            folder = tmp_path_factory.mktemp(name) / "out"
            content = sections(name)
            content["models"] = {"base": str(tiny.base.folder)}
            content["method_settings"] = AT_BASE[name]
            runs[name, label] = unlearn(recipe_of(folder, **content))
        return runs[name, label]

    return run


def weights(folder) -> dict[str, torch.Tensor]:
    return {
        name: torch.from_numpy(values).double()
        for name, values in load_numpy(folder / "model.safetensors").items()
    }


def test_methods_with_a_forget_loss_start_from_either_checkpoint_and_the_others_do_not():
    found = {name for name in TRAINED if issubclass(METHODS[name].settings, StartSettings)}
    assert set(TRAINED) - found == {"retain_finetune", "rewind", "ties", "whp"}
    for name in found - {"altpo"}:
        assert METHODS[name].check_settings({"start": "base"}).from_base
    with pytest.raises(ValidationError):  # its other answers are the target's own
        METHODS["altpo"].check_settings({"start": "base"})


@pytest.mark.parametrize("name", AT_BASE)
def test_change_made_at_the_base_is_given_to_the_target(name, at_base, made, tiny):
    """θ_u = θ_D + (θ_trained − θ_0), by hand; the target's files stay as they are."""
    before = bytes_of(tiny.target.folder)
    done = at_base(name)
    assert bytes_of(tiny.target.folder) == before
    (place,) = done.output.with_name("out.workspace").glob(f"finetune-{name}-*/model")
    unlearned, target, base, trained_there = map(
        weights, (done.output, tiny.target.folder, tiny.base.folder, place)
    )
    for key, value in unlearned.items():
        assert torch.allclose(value, target[key] + (trained_there[key] - base[key]), rtol=1e-6, atol=1e-7)
    usual = weights(made(name).output)
    assert any(not torch.equal(unlearned[key], usual[key]) for key in unlearned)
    assert done.record["method"]["settings"]["start"] == "base"


@pytest.mark.parametrize("name", AT_BASE)
def test_same_seed_gives_the_same_model_from_the_base(name, at_base):
    prints = [
        at_base(name, label).record["models"]["unlearned"]["fingerprint"] for label in ("first", "again")
    ]
    assert prints[0] == prints[1]


def test_retain_kl_is_held_to_the_base_where_training_starts_there(tiny, job):
    """At its own start the KL is 0, and so is no more than rounding in the first step."""
    start, objective, material = job("kl_min", start="base", gamma=0.0, forget_limit=20.0)
    assert start == tiny.base
    _, curve = train_from(start, objective, material)
    assert abs(curve[0].terms["retain"]) < 1e-5


@pytest.mark.parametrize("name", AT_BASE)
def test_start_at_the_base_refuses_to_go_without_one(name, palinode, unlearn_words, tmp_path):
    words = unlearn_words(tmp_path / "out", method=name, base=None)
    said = palinode(*words, "--set", "method_settings.start=base")
    assert said.refusal.endswith(
        f'the method {name} with method_settings.start = "base" needs an earlier checkpoint of the target; '
        "name models.base (--base)"
    )


def test_start_at_the_base_refuses_the_target_as_its_base(palinode, unlearn_words, tiny, tmp_path):
    words = unlearn_words(tmp_path / "out", method="npo", base=tiny.target.folder)
    said = palinode(*words, "--set", "method_settings.start=base")
    assert "target and base are the same folder" in said.refusal


def test_retain_rows_are_not_asked_for_where_they_have_no_weight(recipe_of, sections, tmp_path):
    content = sections("npo")
    content["data"]["retain"] = None
    content["method_settings"] = {"alpha": 0.0}
    assert dry_run(recipe_of(tmp_path / "out", **content)).tokens > 0


def test_unknown_and_impossible_settings_are_named(recipe_of, sections, tmp_path):
    for given, said in {
        (
            "bta",
            1.0,
        ): "the method npo has no setting 'bta'; it has start, gamma, alpha, retain_loss, retain_rows, beta",
        ("beta", -1.0): "method_settings.beta of npo is -1.0: Input should be greater than 0",
    }.items():
        content = {**sections("npo"), "method_settings": dict([given])}
        with pytest.raises(RecipeError, match=said):
            recipe_of(tmp_path / "out", **content)


def test_scales_have_no_meaning_where_no_vectors_are_added(recipe_of, sections, tmp_path):
    with pytest.raises(RecipeError, match="the method npo adds no vectors, so it has no scales"):
        recipe_of(tmp_path / "out", **sections("npo"), scales={"forget": 1.0})


def test_training_settings_of_a_methods_source_give_way_to_those_of_the_recipe(tiny):
    content = {
        "method": "undial",
        "models": {"target": str(tiny.target.folder)},
        "data": {"forget": str(tiny.forget), "retain": str(tiny.retain)},
        "output": {"folder": "out"},
    }
    assert build_recipe(content).training.learning_rate == 1e-4
    assert build_recipe(content | {"method": "wga"}).training.epochs == 5
    given = content | {"training": {"learning_rate": 2e-5}}
    assert build_recipe(given).training.learning_rate == 2e-5
    assert build_recipe(content | {"method": "npo"}).training == TrainingSettings()


def test_method_is_run_from_the_command_line(palinode, unlearn_words, tmp_path):
    words = unlearn_words(tmp_path / "out", method="npo", base=None)
    said = palinode(*words, "--set", "method_settings.beta=0.5", "--json", "--quiet")
    record = json.loads(said.out)
    assert said.code == record["verdict"]["exit_code"], said.err
    assert record["method"]["settings"]["beta"] == 0.5
    assert "base" not in record["models"]
    assert "## Method" in (tmp_path / "out" / "report.md").read_text()


def test_finetune_counts_the_tokens_of_all_rows_that_were_read(job, tmp_path):
    start, objective, material = job("npo")
    done = finetune(start, material, tmp_path / "out", SETTINGS, device="cpu", loss=objective)
    cast = cast_of(start, material)
    every = [cast.tokens(epoch, range(8), ("forget", "retain")) for epoch in range(3)]
    assert done.tokens == sum(every)
    assert done.planned_steps == len(done.curve)
    assert not done.stopped
    assert done.seen["retain"] == {cast.rows["retain"][place].example for place in cast.used("retain")}
