"""OLMo-core's order, from small token files, against a slow construction of its own."""

from __future__ import annotations

import numpy as np
import pytest

from palinode.errors import DataError
from palinode.history.orders import OlmoCoreOrder, read_order

EOS, BOS, LENGTH, BATCH = 0, 1, 8, 3


@pytest.fixture
def files(tmp_path):
    """Three token files of documents of 2 to 20 tokens; the second ends without an end token."""
    random = np.random.default_rng(5)
    paths = []
    for number, documents in enumerate((14, 9, 11)):
        tokens = []
        for _ in range(documents):
            tokens += [*random.integers(2, 50, random.integers(1, 20)), EOS]
        path = tmp_path / f"part-{number}.npy"
        np.array(tokens[: -1 if number == 1 else None], np.uint16).tofile(path)
        paths.append(path)
    return tuple(paths)


def slowly(files, *, epochs, seed, chunk=1, longest=LENGTH, bos=None):
    """The documents of each batch, token by token: a list of lists."""
    instances, document = [], -1
    for path in files:
        tokens = np.fromfile(path, np.uint16).tolist()
        owner, fresh = [], True
        for place, token in enumerate(tokens):
            if fresh:
                document += 1
            owner.append(document)
            following = tokens[place + 1] if place + 1 < len(tokens) else bos
            fresh = token == EOS and (bos is None or following == bos)
        whole = len(tokens) // longest * longest
        instances += [sorted(set(owner[at : at + LENGTH])) for at in range(0, whole, LENGTH)]
    batches = []
    for epoch in range(1, epochs + 1):
        chunks = list(range(len(instances) // chunk))
        if seed is not None:
            order = np.arange(len(chunks), dtype=np.uint32)
            np.random.Generator(np.random.PCG64(seed + epoch)).shuffle(order)
            chunks = order.tolist()
        order = [first * chunk + more for first in chunks for more in range(chunk)]
        for at in range(0, len(order) // BATCH * BATCH, BATCH):
            batches.append([row for one in order[at : at + BATCH] for row in instances[one]])
    return batches


def settings(files, **changes):
    return {
        "files": files,
        "sequence_length": LENGTH,
        "global_batch_size": LENGTH * BATCH,
        "eos_id": EOS,
        "epochs": 2,
        "seed": 3,
        **changes,
    }


def rebuilt(order):
    return [order.rows(step) for step in range(order.resumed_from + 1, order.steps + 1)]


@pytest.mark.parametrize("seed", [3, None])
def test_order_is_that_of_a_slow_construction(files, seed):
    order = OlmoCoreOrder(**settings(files, seed=seed))
    assert order.steps > 20
    assert rebuilt(order) == slowly(files, epochs=2, seed=seed)


def test_chunks_stay_together_and_files_are_cut_for_the_longest_length(files):
    order = OlmoCoreOrder(**settings(files, chunk_size=2, max_target_sequence_length=2 * LENGTH))
    assert rebuilt(order) == slowly(files, epochs=2, seed=3, chunk=2, longest=2 * LENGTH)


def test_with_a_bos_token_an_end_token_alone_ends_no_document(tmp_path):
    path = tmp_path / "tokens.npy"
    tokens = [BOS, 5, EOS, 6, EOS, BOS, 7, EOS, BOS, 8, 9, 9, 9, 9, 9, EOS, BOS, 4, 4, 4, 4, 4, 4, 4]
    np.array(tokens, np.uint16).tofile(path)
    order = OlmoCoreOrder(**settings((path,), bos_id=BOS, global_batch_size=LENGTH, seed=None, epochs=1))
    assert [order.rows(step) for step in (1, 2, 3)] == [[0, 1], [2], [3]]


def test_the_loaders_own_index_files_are_followed(files, tmp_path):
    count = OlmoCoreOrder(**settings(files)).instance_count
    order = np.random.default_rng(9).permutation(count).astype(np.uint32)
    path = tmp_path / f"global_indices_dataset_size{count}_epoch1_seed3_v1.npy"
    order.tofile(path)
    found = OlmoCoreOrder(**settings(files, indices=(path,), epochs=1))
    assert found.rows(2) == [row for one in order[BATCH : 2 * BATCH] for row in found.documents_in(int(one))]


def test_a_run_that_went_on_with_another_batch_size_goes_on_in_the_data(files):
    whole = OlmoCoreOrder(**settings(files))
    double = LENGTH * BATCH * 2
    later = OlmoCoreOrder(**settings(files, global_batch_size=double, resumed_from=4, first_batch=2))
    assert later.rows(5) == whole.rows(5) + whole.rows(6)


def test_damaged_or_foreign_files_are_refused(files, tmp_path):
    path = tmp_path / "indices.npy"
    np.array([0, 1], np.uint32).tofile(path)
    order = OlmoCoreOrder(**settings(files, indices=(path,), epochs=1))
    with pytest.raises(DataError, match="orders 2 instances where the token files hold"):
        order.rows(1)
    np.save(tmp_path / "saved.npy", np.arange(100, dtype=np.uint16))
    with pytest.raises(DataError, match=r"is a file of numpy\.save"):
        OlmoCoreOrder(**settings((tmp_path / "saved.npy",)))
    (tmp_path / "odd.npy").write_bytes(b"123")
    with pytest.raises(DataError, match="3 bytes, which are no whole number of uint16"):
        OlmoCoreOrder(**settings((tmp_path / "odd.npy",)))
    with pytest.raises(DataError, match="cannot be read"):
        OlmoCoreOrder(**settings((tmp_path / "missing.npy",)))
    with pytest.raises(DataError, match="less than one batch"):
        OlmoCoreOrder(**settings(files, global_batch_size=LENGTH * 1000))
    with pytest.raises(DataError, match="must be a multiple of the sequence length"):
        OlmoCoreOrder(**settings(files, global_batch_size=LENGTH + 1))


def test_order_is_read_from_a_file(files, tmp_path):
    path = tmp_path / "order.toml"
    names = [file.name for file in files]
    path.write_text(
        f'kind = "olmo_core"\nfiles = {names}\nsequence_length = {LENGTH}\n'
        f"global_batch_size = {LENGTH * BATCH}\neos_id = {EOS}\nepochs = 2\nseed = 3\n"
    )
    assert rebuilt(read_order(path)) == rebuilt(OlmoCoreOrder(**settings(files)))
