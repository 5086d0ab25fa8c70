"""GPT-NeoX's order, from small index files, against a slow construction of its own."""

from __future__ import annotations

import numpy as np
import pytest

from palinode.errors import DataError
from palinode.history.orders import NeoxOrder, read_order

LENGTH, BATCH, SAMPLES, SEED = 7, 4, 40, 11
SIZES = np.random.default_rng(2).integers(1, 25, 17)


def slowly(sizes=SIZES, samples=SAMPLES):
    """Document, sample and shuffle index one token at a time, as the format describes them."""
    epochs = 1
    while (epochs * int(sizes.sum()) - 1) // LENGTH < samples:
        epochs += 1
    random = np.random.RandomState(SEED)
    documents = np.array(list(range(len(sizes))) * epochs, np.int32)
    random.shuffle(documents)
    strung = [(place, token) for place, one in enumerate(documents) for token in range(sizes[one])]
    count = (len(strung) - 1) // LENGTH
    begins = np.array([strung[number * LENGTH] for number in range(count + 1)], np.int32)
    shuffled = np.arange(count, dtype=np.uint32)
    random.shuffle(shuffled)
    return documents, begins, shuffled


def write(folder, name="data_train_indexmap_40ns_7sl_11s_packedpi_ac"):
    for kind, array in zip(("doc", "sample", "shuffle"), slowly(), strict=True):
        np.save(folder / f"{name}_{kind}_idx.npy", array)
    return folder / name


def documents_of(step):
    """The documents of a step, by counting tokens: a sample has one more than LENGTH, to be predicted."""
    documents, _, shuffled = slowly()
    strung = [one for one in documents for _ in range(SIZES[one])]
    places = [place for place, one in enumerate(documents) for _ in range(SIZES[one])]
    found = []
    for sample in shuffled[(step - 1) * BATCH : step * BATCH]:
        span = range(int(sample) * LENGTH, int(sample) * LENGTH + LENGTH + 1)
        found += [int(strung[at]) for at in span if at == span[0] or places[at] != places[at - 1]]
    return found


def test_order_is_that_of_a_slow_construction(tmp_path):
    order = NeoxOrder.open(write(tmp_path), batch_size=BATCH)
    assert order.steps == (len(slowly()[2]) - 1) // BATCH
    assert [order.rows(step) for step in range(1, order.steps + 1)] == [
        documents_of(step) for step in range(1, order.steps + 1)
    ]


def test_a_run_that_went_on_with_another_batch_size_goes_on_in_the_samples(tmp_path):
    prefix = write(tmp_path)
    whole = NeoxOrder.open(prefix, batch_size=BATCH)
    later = NeoxOrder.open(prefix, batch_size=2 * BATCH, resumed_from=2, first_sample=2 * BATCH)
    assert later.rows(3) == whole.rows(3) + whole.rows(4)
    with pytest.raises(DataError, match="there is no step 2 in this order; it has the steps 3 to"):
        later.rows(2)


def test_indices_that_do_not_belong_together_are_refused(tmp_path):
    documents, begins, shuffled = slowly()
    with pytest.raises(DataError, match="are they given in this order"):
        NeoxOrder(begins, documents, shuffled, BATCH)
    with pytest.raises(DataError, match="are they of the same data set and settings"):
        NeoxOrder(documents, begins, shuffled[:-1], BATCH)
    with pytest.raises(DataError, match="of a document index of 3"):
        NeoxOrder(documents[:3], begins, shuffled, BATCH)
    with pytest.raises(DataError, match=r"nothing_doc_idx\.npy cannot be read"):
        NeoxOrder.open(tmp_path / "nothing", batch_size=BATCH)


def test_pickled_index_files_are_refused(tmp_path):
    prefix = write(tmp_path)
    np.save(f"{prefix}_doc_idx.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(DataError, match="cannot be read"):
        NeoxOrder.open(prefix, batch_size=BATCH)


def test_order_is_read_from_a_file(tmp_path):
    prefix = write(tmp_path)
    path = tmp_path / "order.toml"
    path.write_text(f'kind = "neox"\nprefix = "{prefix.name}"\nbatch_size = {BATCH}\n')
    assert read_order(path).rows(1) == documents_of(1)
