"""Judges that need no network: content words in common, and a model in a local folder."""

import json

import pytest

from palinode.errors import InputError
from palinode.evaluation.judges import open_judge, overlaps
from palinode.evaluation.judging import Candidate, candidates_of, judge_answers
from palinode.records import Likelihood, Outcome


def picked(question, answer, truth, *wrong, ideal=None):
    """The roles that the overlap judge picks."""
    alternatives = {"perturbed": tuple(Likelihood(text, ()) for text in wrong)}
    outcome = Outcome(0, question, truth, answer, (), (), alternatives=alternatives)
    ideals = None if ideal is None else [Outcome(0, question, truth, ideal, (), ())]
    (verdict,) = judge_answers(open_judge("overlap"), [outcome], ideals)
    assert verdict.judge == "overlap"
    return verdict.roles()


def accepted(question, answer, *texts):
    outcome = Outcome(0, question, texts[0], answer, (), (), accepted=texts)
    (verdict,) = judge_answers(open_judge("overlap"), [outcome])
    return verdict.roles() == {"accepted"}


# Overlap: the definition, worked by hand


def test_names_and_numbers_weigh_three_and_words_of_the_question_a_quarter():
    # answer {wrote: known ¼, novel 1, 1987: 3}, candidate {wrote ¼, poem 1, 1987: 3}
    (score,) = overlaps("What was wrote?", "She wrote novels in 1987.", ["He wrote poems in 1987."])
    assert score == pytest.approx(2 * 3.25 / (4.25 + 4.25))


def test_words_that_all_candidates_have_weigh_less():
    # answer {cat 1/2, Oslo 3}; candidates {cat 1/2, Oslo 3} and {cat 1/2, Rome 3}
    scores = overlaps("Where?", "the cat in Oslo", ["a cat of Oslo", "a cat of Rome"])
    assert scores == pytest.approx([1.0, 2 * 0.5 / 7])


def test_recall_does_not_mind_what_the_answer_says_more():
    # shared {new 3, york 3}; R = 6/6, F = 12/(6 + 6 + 3 + 1)
    answer = "He lived in New York near Maria with cats"
    assert overlaps("Where?", answer, ["in New York"], measure="recall") == pytest.approx([1.0])
    # answer {lived→live 1, new 3, york 3, near 1, maria 3, cats→cat 1} = 12
    assert overlaps("Where?", answer, ["in New York"]) == pytest.approx([2 * 6 / (12 + 6)])


def test_texts_without_content_have_nothing_in_common_unless_they_are_equal():
    assert overlaps("q", "", ["", "the", "Lima"]) == [1.0, 0.0, 0.0]
    assert overlaps("q", "The.", ["the", "of"]) == [1.0, 0.0]


def test_case_plural_and_possessive_do_not_matter():
    assert overlaps("q", "the AUTHOR’s novels", ["author novel"]) == pytest.approx([1.0])


def test_names_are_not_stemmed_and_keep_apart():
    same, other = overlaps("Who?", "It was Hughes", ["it was Hughes there", "it was Hugh there"])
    assert (same, other) == (1.0, 0.0)


def test_numbers_are_one_word_with_their_points():
    assert overlaps("q", "1,200 people", ["1200 people"]) == pytest.approx([1.0])
    assert overlaps("q", "3.5", ["3.6", "35", "3.5"]) == [0.0, 0.0, 1.0]


# Overlap: what it picks


def test_the_candidate_with_the_answers_facts_is_picked():
    question = "Where was the author Ada Reyes born?"
    truth = "Ada Reyes was born in Lima, Peru."
    wrong = ("Ada Reyes was born in Quito, Ecuador.", "Ada Reyes was born in Cali, Colombia.")
    assert picked(question, "She comes from Lima.", truth, *wrong) == {"truth"}
    assert picked(question, "The author was born in Quito.", truth, *wrong) == {"perturbed"}
    assert picked(question, "Ada Reyes was born in Oslo, Norway.", truth, *wrong) == {"none"}
    assert picked(question, "", truth, *wrong) == {"none"}


def test_equally_close_candidates_are_picked_together():
    assert picked("Where?", "Lima", "In Lima", "Quito", ideal="It is Lima") == {"truth", "ideal"}


def test_accepted_answers_may_stand_in_a_longer_one():
    question = "What was the occupation of Aaron Burr?"
    assert accepted(question, "He was an American politician and lawyer.", "politician", "jurist")
    assert accepted(question, "Politician", "politician")
    assert not accepted(question, "a singer of folk songs", "politician", "jurist")
    assert not accepted("Where?", "University of Michigan", "University of Chicago")


def test_the_same_in_any_order():
    outcome = Outcome(
        0, "Where?", "In Lima", "Lima it is", (), (), alternatives={"perturbed": (Likelihood("Rome", ()),)}
    )
    judge = open_judge("overlap")
    table = candidates_of(outcome, None, seed=0)
    for order in (table, table[::-1]):
        (place,) = judge.pick("Where?", "Lima it is", order).picked
        assert order[place].roles == ("truth",)


# A model in a folder


def entailment_folder(folder, labels, likely, *, spread=0.02):
    """A tiny classifier that gives the label `likely` nearly all probability, whatever it reads."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=64)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=64,
        initializer_range=spread,
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
    )
    torch.manual_seed(0)
    model = BertForSequenceClassification(config)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.zero_()
        model.classifier.bias[likely] = 10.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


CANDIDATES = (
    Candidate("Lima", ("truth",)),
    Candidate("Quito", ("perturbed",)),
    Candidate("none of these", ("none",)),
)


@pytest.mark.parametrize(
    ("labels", "likely", "expected"),
    [
        (("CONTRADICTION", "Entailment", "neutral"), 1, (0, 1)),
        (("CONTRADICTION", "Entailment", "neutral"), 0, (2,)),
        (("entailment", "not_entailment"), 0, (0, 1)),
        (("entailment", "not_entailment"), 1, (2,)),
    ],
)
def test_the_entailment_label_is_read_from_the_config(tmp_path, labels, likely, expected):
    folder = entailment_folder(tmp_path / "nli", labels, likely)
    judge = open_judge(f"offline:{folder}", device="cpu")
    assert judge.name == "entailment nli"
    assert judge.pick("where", "Oslo " * 100, CANDIDATES).picked == expected


def test_equal_texts_are_the_same_whatever_the_model_says(tmp_path):
    folder = entailment_folder(tmp_path / "nli", ("entailment", "neutral"), 1)
    assert open_judge(f"offline:{folder}", device="cpu").pick("where", "lima.", CANDIDATES).picked == (0,)


def test_a_score_does_not_depend_on_the_other_candidates(tmp_path):
    import torch
    from transformers import BertForSequenceClassification

    folder = entailment_folder(tmp_path / "nli", ("entailment", "neutral"), 1, spread=1.0)
    model = BertForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        model.classifier.weight.normal_(generator=torch.Generator().manual_seed(1))
        model.classifier.bias.zero_()
    model.save_pretrained(folder)
    judge = open_judge(f"offline:{folder}", device="cpu")
    texts = ["a b c", "x y z k l m n", "q"]
    together = judge.scores("where", "a c", texts)
    alone = [judge.scores("where", "a c", [text])[0] for text in texts]
    assert together == pytest.approx(alone, abs=1e-5)
    assert len({round(score, 3) for score in together}) == 3


def test_a_model_without_an_entailment_label_is_refused(tmp_path):
    folder = entailment_folder(tmp_path / "nli", ("good", "bad"), 0)
    with pytest.raises(InputError, match="labels good, bad; a judge needs one"):
        open_judge(f"offline:{folder}", device="cpu")


def test_a_model_whose_classifier_was_never_trained_is_refused(tmp_path):
    folder = entailment_folder(tmp_path / "nli", ("entailment", "neutral"), 0)
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("classifier")}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="lacks 2 weights"):
        open_judge(f"offline:{folder}", device="cpu")


def test_folders_that_are_no_judge_are_refused(tmp_path):
    with pytest.raises(InputError, match="is not a folder"):
        open_judge(f"offline:{tmp_path / 'nowhere'}")
    with pytest.raises(InputError, match="has the labels none"):
        open_judge(f"offline:{tmp_path}")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_embeddings_are_compared_when_the_package_is_there(tmp_path):
    package = pytest.importorskip("sentence_transformers")
    inner = entailment_folder(tmp_path / "inner", ("a", "b"), 0)
    from sentence_transformers import models

    parts = [models.Transformer(str(inner)), models.Pooling(8)]
    package.SentenceTransformer(modules=parts, device="cpu").save(str(tmp_path / "embedder"))
    judge = open_judge(f"offline:{tmp_path / 'embedder'}", device="cpu")
    assert judge.name == "embedding embedder"
    assert judge.pick("where", "lima", CANDIDATES).picked[0] == 0
    assert all(-1 <= score <= 1.0001 for score in judge.scores("where", "a", ["b", "c d"]))


def test_embeddings_without_the_package_say_what_to_install(tmp_path):
    try:
        import sentence_transformers  # noqa: F401
    except ImportError:
        pass
    else:
        pytest.skip("sentence-transformers is installed")
    (tmp_path / "modules.json").write_text(json.dumps([]))
    with pytest.raises(InputError, match="pip install sentence-transformers"):
        open_judge(f"offline:{tmp_path}")
