"""`benchmarks/ladder.py`: harmonic means of what a comparison's table holds, by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "ladder.py"


def summary(known, auc, utility):
    forget = dict.fromkeys(
        ("extraction_strength", "exact_memorization", "paraphrased_probability", "right_share"), known
    )
    forget |= dict.fromkeys(("auc_loss", "auc_zlib", "auc_min_k", "auc_min_k_plus"), auc)
    scores = {"forget": forget, "all": {"model_utility": utility}}
    return {
        "tofu": {
            name: {
                metric: {"value": value, "reason": None if value is not None else "no holdout"}
                for metric, value in group.items()
            }
            for name, group in scores.items()
        }
    }


def ladder(folder, *, auc, own=None):
    table = {
        "models": {
            "target": {"summary": summary(0.9, 1.0, 0.6)},
            "retrained": {"summary": summary(0.4, 0.5, 0.6)},
        },
        "contestants": [{"name": "MSA", "summary": summary(0.5, auc, 0.3)}],
    }
    if own:
        for one, found in zip([*table["models"].values(), *table["contestants"]], own, strict=True):
            attacks = {name: {"value": found} for name in one["summary"]["tofu"]["forget"] if "auc" in name}
            one["summary"] |= {"rows": {"forget": attacks}}
            none = {"value": None, "reason": "no holdout"}
            one["summary"]["tofu"]["forget"] |= dict.fromkeys(attacks, none)
    (folder / "table.json").write_text(json.dumps(table))
    command = [sys.executable, SCRIPT, folder / "table.json"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_ladder_is_the_harmonic_mean_of_memorisation_privacy_and_utility(tmp_path):
    """MSA: 1 − ½; 1 − |.6 − .5| / .5 = .8; .3 / .6: HM(.5, .8, .5) = 3 / 5.25. Target: privacy 0, so 0."""
    said = ladder(tmp_path, auc=0.6).stdout
    assert "| MSA | 0.500 | 0.800 | 0.500 | 0.571 |" in said
    assert "| retrained | 0.600 | 1.000 | 1.000 | 0.818 |" in said
    assert "| target | 0.100 | 0.000 | 1.000 | 0.000 |" in said
    assert "| SimNPO | 0.733 | 0.722 |" in said.partition("| published |")[2]


def test_ladder_says_which_score_is_missing(tmp_path):
    said = ladder(tmp_path, auc=None)
    assert said.returncode == 1
    assert "forget auc_loss: no holdout" in said.stderr


def test_ladder_takes_privacy_from_own_rows_where_the_benchmark_has_no_holdout(tmp_path):
    said = ladder(tmp_path, auc=0.6, own=[1.0, 0.5, 0.55]).stdout
    assert "| MSA | 0.500 | 0.900 | 0.500 | 0.587 |" in said  # 3 / (2 + 1 / .9 + 2)
