"""Real trainings, logged: with accumulation, workers, a kill and a resume, several processes; own loops."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from palinode.errors import DataError
from palinode.history.callback import CARRIED, LoggedLoader, RowTable
from palinode.history.duplicates import hashes
from palinode.history.exposures import ExposureLog
from palinode.history.reader import ExposureReader

sys.path.insert(0, str(Path(__file__).parent))
import trainings
from trainings import TEXTS

OF = {"data": "d" * 32, "tokenizer": "t" * 32}
PROGRAM = Path(__file__).with_name("trainings.py")


def logged(folder) -> Counter:
    reader = ExposureReader.open(folder)
    return Counter({(entry.row, entry.step): entry.times for entry in reader.find(TEXTS)})


def counted(*seen) -> Counter:
    return Counter((row, int(step)) for part in seen for step, rows in part.items() for row in rows)


# The Trainer


@pytest.mark.parametrize(
    "options",
    [
        {"num_train_epochs": 2},
        {"num_train_epochs": 2, "gradient_accumulation_steps": 3},
        {"max_steps": 12, "dataloader_num_workers": 2, "gradient_accumulation_steps": 2},
        {
            "num_train_epochs": 1,
            "remove_unused_columns": True,
            "accelerator_config": {"dispatch_batches": True},
        },
    ],
    ids=["plain", "accumulation", "workers", "dispatch"],
)
def test_log_of_a_real_training_is_what_the_model_was_given(tmp_path, options):
    seen = trainings.train(tmp_path, dict(options))
    assert logged(tmp_path / "log") == counted(seen)
    reader = ExposureReader.open(tmp_path / "log")
    assert reader.notes == ()
    assert reader.steps.step.tolist() == list(range(1, max(seen) + 1))
    ids = trainings.tokenizer()(TEXTS)["input_ids"]
    assert reader.tokens_at(max(seen)) == sum(len(ids[row]) for rows in seen.values() for row in rows)


def test_evaluation_while_training_is_no_exposure(tmp_path):
    from datasets import Dataset

    rows = Dataset.from_dict({"input_ids": trainings.tokenizer()(TEXTS)["input_ids"]})
    options = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2}
    seen = trainings.train(tmp_path, options, evaluate=rows)
    assert logged(tmp_path / "log") == counted(seen)
    assert sum(logged(tmp_path / "log").values()) == 16


def test_a_killed_and_resumed_training_is_one_log(tmp_path):
    options = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 4}
    killed = run(tmp_path, {**options, "kill_at": 7})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert max(ExposureReader.open(tmp_path / "log").steps.step) == 7
    resumed = trainings.train(tmp_path, {**options, "resume": 4})
    assert min(resumed) == 5
    whole = trainings.train(tmp_path / "whole", {"num_train_epochs": 2}, log=False)
    assert logged(tmp_path / "log") == counted(whole)
    (note,) = ExposureReader.open(tmp_path / "log").notes
    assert "back to step 4 after session 1: its steps 5 to 7" in note


def test_two_processes_write_one_log(tmp_path):
    options = {"num_train_epochs": 1, "gradient_accumulation_steps": 2}
    parts = run_two(tmp_path, options)
    assert logged(tmp_path / "log") == counted(*parts)
    reader = ExposureReader.open(tmp_path / "log")
    assert (reader.notes, reader.sessions[0].world_size) == ((), 2)


def test_hashes_must_fit_the_data_set(tmp_path):
    rows = [{"input_ids": [1, 2]}, {"input_ids": [3]}]
    with pytest.raises(DataError, match="3 hashes for 2 rows"):
        RowTable(rows, hashes(["a", "b", "c"]))
    with pytest.raises(DataError, match="rows have text but no input_ids"):
        RowTable([{"text": "a"}], hashes(["a"]))
    with pytest.raises(DataError, match="rows 1 and 3 have the same token ids but other texts"):
        RowTable([*rows, {"input_ids": [1, 2]}], hashes(["a", "b", "a longer"]))
    table = RowTable([*rows, {"input_ids": [1, 2]}], hashes(["a", "b", "a"]))
    with pytest.raises(DataError, match="1 of 1 rows of a batch are not in the data set"):
        table.find(np.array([[1, 2]]))


# Loops of one's own


def loader(**options) -> DataLoader:
    rows = [{"input_ids": [row + 1] * (1 + row % 3), "row": row} for row in range(10)]
    return DataLoader(rows, batch_size=4, collate_fn=pad, **options)


def pad(items):
    length = max(len(item["input_ids"]) for item in items)
    ids = [item["input_ids"] + [0] * (length - len(item["input_ids"])) for item in items]
    return {"input_ids": torch.tensor(ids), "row": torch.tensor([item["row"] for item in items])}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_is_logged_by_token_ids(tmp_path, workers):
    plain = loader(num_workers=workers)
    texts = [f"row {row}" for row in range(10)]
    truth = Counter()
    log = ExposureLog.open(tmp_path, **OF)
    with LoggedLoader(plain, log, RowTable(plain.dataset, hashes(texts))) as batches:
        for step, batch in enumerate(batches, start=1):
            assert CARRIED not in batch
            truth.update((row, step) for row in batch["row"].tolist())
            batches.step()
    found = ExposureReader.open(tmp_path).find(texts)
    assert Counter({(entry.row, entry.step): entry.times for entry in found}) == truth
    assert plain.collate_fn is pad


def test_a_loader_is_logged_by_row_numbers_and_counts_its_accumulation(tmp_path):
    texts = [f"row {row}" for row in range(10)]
    log = ExposureLog.open(tmp_path, **OF)
    numbers = {"rows": lambda batch: batch["row"].tolist(), "accumulation": 2}
    with LoggedLoader(loader(), log, hashes(texts), **numbers) as batches:
        for _ in range(2):
            assert len(list(batches)) == 3
    found = {(entry.row, entry.step) for entry in ExposureReader.open(tmp_path).find(texts)}
    assert found == {
        (row, step + 2 * epoch) for epoch in range(2) for row in range(10) for step in [1 + row // 8]
    }


def test_a_loader_of_accelerate_is_logged(tmp_path):
    from accelerate import Accelerator

    texts = [f"row {row}" for row in range(10)]
    prepared = Accelerator(cpu=True).prepare(loader(shuffle=True))
    log = ExposureLog.open(tmp_path, **OF)
    truth = Counter()
    with LoggedLoader(prepared, log, RowTable(prepared.dataset, hashes(texts))) as batches:
        for step, batch in enumerate(batches, start=1):
            truth.update((row, step) for row in batch["row"].tolist())
            batches.step()
    found = ExposureReader.open(tmp_path).find(texts)
    assert Counter({(entry.row, entry.step): entry.times for entry in found}) == truth


def test_a_loader_needs_to_know_how_rows_are_known(tmp_path):
    log = ExposureLog.open(tmp_path, **OF)
    with pytest.raises(DataError, match="give a RowTable, or the hashes of all rows together with rows="):
        LoggedLoader(loader(), log, hashes(["a"]))


# Helpers


def run(folder, options, **environment):
    words = [sys.executable, PROGRAM, folder, json.dumps(options)]
    return subprocess.run(words, env={**os.environ, **environment}, capture_output=True, check=False)


def run_two(folder, options):
    """Train in two processes and return what each saw."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank in range(2):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        environment = {**os.environ, **place, "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
        words = [sys.executable, PROGRAM, folder, json.dumps(options)]
        started.append(subprocess.Popen(words, env=environment, stderr=subprocess.PIPE))
    said = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], said[0].decode()[-2000:]
    return [json.loads((folder / f"seen-{rank}.json").read_text()) for rank in range(2)]
