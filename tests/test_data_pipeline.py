"""The stream: equal to a brute-force oracle, pure in (seed, step), and never predicting across a document."""

import itertools
import pickle
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from natsjax.data import PackedSource, evaluation_contexts, iterate, piece_lengths, train_dataset
from natsjax.data.packing import context_order, epoch_order
from natsjax.data.pipeline import LRUCache
from natsjax.errors import UserError

BOS, EOS = 900, 901
FIELDS = dict.fromkeys(("inputs", "targets", "loss_weight", "positions", "document_end", "document_id"), np.int32)
FIELDS["loss_weight"] = np.float32


class FakeDocuments:
    """Documents of given lengths whose tokens tell where they come from."""

    def __init__(self, lengths):
        self.lengths = np.array(lengths, np.int64)

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        return (np.arange(self.lengths[index]) + 10 * index).astype(np.int32) % 900


def _source(lengths, context_length, seed=0, shuffle="contexts"):
    documents = FakeDocuments(lengths)
    return PackedSource(documents, context_length=context_length, bos_id=BOS, eos_id=EOS, seed=seed, shuffle=shuffle)


def _oracle_stream(documents, orders):
    """(token, document, occurrence) one by one, exactly as the stream is defined."""
    occurrence = 0
    for order in orders:
        for index in order:
            for token in [BOS, *documents[index].tolist(), EOS]:
                yield token, int(index), occurrence
            occurrence += 1


def _oracle_context(stream, number, length):
    """One context from the whole stream, token by token."""
    context = stream[number * length : (number + 1) * length]
    row = {name: [] for name in FIELDS}
    for place in range(length):
        if place >= len(context):
            for name, value in zip(FIELDS, (0, 0, 0, 0, 0, -1), strict=True):
                row[name].append(value)
            continue
        token, document, occurrence = context[place]
        behind = stream[number * length + place + 1 :][:1]
        mine = [at for at, entry in enumerate(context) if entry[2] == occurrence]
        row["inputs"].append(token)
        row["targets"].append(behind[0][0] if behind else 0)
        row["loss_weight"].append(float(bool(behind) and behind[0][2] == occurrence))
        row["positions"].append(place - mine[0])
        row["document_end"].append(mine[-1] + 1)
        row["document_id"].append(document)
    return {name: np.array(values, FIELDS[name]) for name, values in row.items()}


def _assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == FIELDS[name]
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


lengths_strategy = st.lists(st.integers(0, 12), min_size=1, max_size=6)


@settings(max_examples=80, deadline=None)
@given(lengths=lengths_strategy, context_length=st.integers(1, 40), seed=st.integers(0, 3))
def test_contexts_equal_the_brute_force_oracle(lengths, context_length, seed):
    source = _source(lengths, context_length, seed, "documents")
    num_contexts = 6
    num_epochs = num_contexts * context_length // source.epoch_tokens + 2
    orders = [epoch_order(len(lengths), seed=seed, epoch=epoch) for epoch in range(num_epochs)]
    stream = list(_oracle_stream(FakeDocuments(lengths), orders))
    for number in reversed(range(num_contexts)):
        _assert_equal(source[number], _oracle_context(stream, number, context_length))


@settings(max_examples=80, deadline=None)
@given(lengths=lengths_strategy, context_length=st.integers(1, 40), seed=st.integers(0, 3))
def test_shuffled_contexts_are_those_of_each_epoch_once_in_another_order(lengths, context_length, seed):
    """An epoch's contexts are the cuts that begin in it: longer contexts than an epoch leave some epochs with none."""
    plain, shuffled = (_source(lengths, context_length, seed, shuffle) for shuffle in ("documents", "contexts"))
    first = 0
    for epoch in range(4):
        end = -(-(epoch + 1) * plain.epoch_tokens // context_length)
        expected = sorted(_key(plain[number]) for number in range(first, end))
        assert sorted(_key(shuffled[number]) for number in range(first, end)) == expected
        first = end


def _key(row):
    return b"".join(row[name].tobytes() for name in FIELDS)


def test_the_rows_of_a_batch_come_from_many_documents():
    """40 documents of 3,000 tokens, context 128, batch 16: 1.2 of them in a batch as they are cut."""
    lengths, steps = [3000] * 40, 58  # an epoch has 938 contexts

    def documents_in_a_batch(shuffle):
        dataset = train_dataset(_source(lengths, 128, shuffle=shuffle), batch_size=16, num_steps=steps)
        return np.mean([len(np.unique(dataset[step]["document_id"])) for step in range(steps)])

    assert documents_in_a_batch("documents") == pytest.approx(1.7, abs=0.2)
    # 16 rows and the 0.7 of them that lie across a border, drawn from 40 documents: 40 (1 - (39/40)^16.7) = 13.8
    assert documents_in_a_batch("contexts") == pytest.approx(13.8, abs=0.4)


def test_the_order_of_contexts_is_uniform_enough():
    """Where a context comes says nothing of what comes before it, and every context comes first equally often."""
    orders = np.array([list(context_order(20, seed=seed, epoch=1)) for seed in range(200)])
    assert (np.sort(orders) == np.arange(20)).all()
    pairs = np.stack([orders[:, 1:].ravel(), orders[:, :-1].ravel()])
    assert np.corrcoef(pairs)[0, 1] == pytest.approx(-1 / 19, abs=0.06)  # 3,800 pairs: 0.016 is a standard deviation
    counts = np.bincount(orders[:, 0], minlength=20)
    assert ((counts - 10) ** 2 / 10).sum() < 43.8  # chi-square of 19 degrees of freedom, 99.9 %


@settings(max_examples=60, deadline=None)
@given(lengths=lengths_strategy, context_length=st.integers(1, 40), max_contexts=st.integers(1, 30))
def test_evaluation_contexts_equal_the_oracle(lengths, context_length, max_contexts):
    lengths = [*lengths, 1]  # one token to predict at least
    stream = list(_oracle_stream(FakeDocuments(lengths), [range(len(lengths))]))
    total = -(-len(stream) // context_length)
    everything = [_oracle_context(stream, number, context_length) for number in range(total)]
    if not any(row["loss_weight"].any() for row in everything):
        return
    corpus = _corpus(lengths)
    whole = evaluation_contexts(corpus, "validation", context_length=context_length, max_contexts=total + 5)
    _assert_equal(whole, {name: np.stack([row[name] for row in everything]) for name in FIELDS})

    count = min(total, max_contexts)
    places = (2 * np.arange(count) + 1) * total // (2 * count)
    assert np.ptp(np.diff(places, prepend=places[0] - total // count)) <= 1  # evenly spaced, each once
    if not whole["loss_weight"][places].any():
        return  # contexts so short that only ends of documents were taken
    part = evaluation_contexts(corpus, "validation", context_length=context_length, max_contexts=max_contexts)
    _assert_equal(part, {name: whole[name][places] for name in FIELDS})


def _corpus(lengths):
    """What `evaluation_contexts` needs of a corpus."""
    tokenizer = SimpleNamespace(bos_id=BOS, eos_id=EOS)
    return SimpleNamespace(folder="fake", documents=lambda split: FakeDocuments(lengths), tokenizer=tokenizer)


def test_a_split_without_text_is_refused():
    with pytest.raises(UserError, match="the split 'validation' of fake has no text to evaluate on"):
        evaluation_contexts(_corpus([]), "validation", context_length=8, max_contexts=4)


@settings(max_examples=40, deadline=None)
@given(lengths=lengths_strategy, context_length=st.integers(2, 40))
def test_no_prediction_crosses_a_document_and_positions_restart(lengths, context_length):
    batch = _source(lengths, context_length).rows(0, 8)
    weight, inputs, targets = batch["loss_weight"], batch["inputs"], batch["targets"]
    assert set(np.unique(weight)) <= {0.0, 1.0}
    assert (weight[inputs == EOS] == 0).all()
    assert (weight[targets == BOS] == 0).all()
    assert (weight[inputs != EOS] == 1).all()  # also BOS to the first token, and the last token to EOS
    assert (batch["positions"][inputs == BOS] == 0).all()
    assert (batch["positions"][:, 0] == 0).all()
    inside = batch["positions"][:, 1:] > 0
    assert (batch["positions"][:, 1:][inside] == batch["positions"][:, :-1][inside] + 1).all()
    assert (batch["document_end"][:, 1:][inside] == batch["document_end"][:, :-1][inside]).all()
    assert (batch["document_end"] > np.arange(context_length)).all()
    assert (batch["document_end"] <= context_length).all()
    assert piece_lengths(batch).sum() == batch["inputs"].size


def test_piece_lengths_leave_out_padding():
    corpus = _corpus([3, 5])  # framed: 5 and 7 tokens
    contexts = evaluation_contexts(corpus, "validation", context_length=8, max_contexts=9)
    assert piece_lengths(contexts).tolist() == [5, 3, 4]
    assert piece_lengths({name: values[0] for name, values in contexts.items()}).tolist() == [5, 3]
    assert contexts["document_id"][1].tolist() == [1, 1, 1, 1, -1, -1, -1, -1]


def test_every_epoch_holds_every_document_once_in_another_order():
    num_documents = 50
    source = _source([3] * num_documents, context_length=5 * num_documents)  # a context is an epoch
    orders = [source[epoch]["document_id"][::5].tolist() for epoch in range(4)]
    assert all(sorted(order) == list(range(num_documents)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    other = _source([3] * num_documents, context_length=5 * num_documents, seed=1)
    assert other[0]["document_id"][::5].tolist() != orders[0]


def test_order_is_pinned_for_old_runs():
    """A change of these numbers would give every resumed run other data."""
    assert epoch_order(8, seed=0, epoch=0).tolist() == [0, 3, 7, 5, 1, 2, 6, 4]
    assert epoch_order(8, seed=7, epoch=3).tolist() == [7, 1, 6, 0, 4, 2, 3, 5]
    assert [context_order(8, seed=0, epoch=0)[at] for at in range(8)] == [3, 0, 6, 2, 7, 4, 1, 5]
    assert [context_order(10**9, seed=7, epoch=3)[at] for at in range(3)] == [771596719, 701535850, 615498280]


LENGTHS = [1, 30, 7, 100, 3, 18]


def test_a_step_is_the_same_by_index_by_iteration_and_after_resuming():
    dataset = train_dataset(_source(LENGTHS, 16), batch_size=4, num_steps=20)
    assert len(dataset) == 20
    indexed = [dataset[step] for step in reversed(range(20))][::-1]
    for step, batch in enumerate(indexed):
        _assert_equal(batch, _source(LENGTHS, 16).rows(4 * step, 4))
    for start in (0, 7, 20):
        iterator = iterate(dataset, start)
        rest = list(iterator)
        iterator.close()
        assert len(rest) == 20 - start
        for found, expected in zip(rest, indexed[start:], strict=True):
            _assert_equal(found, expected)


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 12])
def test_global_batches_do_not_depend_on_how_many_share_them(processes):
    """Each process reads its rows, on from any step: put together they are the batch of one process, bit for bit."""
    size, start = 12, 5
    whole = train_dataset(_source(LENGTHS, 16, seed=2), batch_size=size, num_steps=9)
    share = size // processes
    parts = []
    for rank in range(processes):
        rows = slice(rank * share, (rank + 1) * share)
        own = train_dataset(_source(LENGTHS, 16, seed=2), batch_size=size, num_steps=9, rows=rows)
        parts.append(iterate(own, start))
    for step in range(start, 9):
        shares = [next(part) for part in parts]
        together = {name: np.concatenate([rows[name] for rows in shares]) for name in FIELDS}
        _assert_equal(together, whole[step])
    for part in parts:
        part.close()


def test_an_endless_dataset_reaches_far_and_needs_no_threads():
    dataset = train_dataset(_source(LENGTHS, 16), batch_size=4)
    far = 10**12
    iterator = iterate(dataset, far, num_threads=0)
    batches = list(itertools.islice(iterator, 2))
    iterator.close()
    _assert_equal(batches[0], _source(LENGTHS, 16).rows(4 * far, 4))
    _assert_equal(batches[1], dataset[far + 1])


def test_threads_share_a_source_and_pickling_keeps_it():
    source = _source(LENGTHS, 16, seed=3)
    expected = [_source(LENGTHS, 16, seed=3)[number] for number in range(200)]
    found = {}

    def read(numbers):
        for number in numbers:
            found[number] = source[number]

    threads = [threading.Thread(target=read, args=(range(start, 200, 4),)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    copy = pickle.loads(pickle.dumps(source))
    for number in range(200):
        _assert_equal(found[number], expected[number])
        _assert_equal(copy[number], expected[number])


def test_changing_a_row_does_not_change_the_next_reading():
    source = _source(LENGTHS, 16)
    before = source[3]
    inputs = before["inputs"].copy()
    before["targets"][:] = -5
    assert before["inputs"].tolist() == inputs.tolist()
    assert source[3]["inputs"].tolist() == inputs.tolist()


def test_cache_keeps_to_its_size_and_forgets_the_oldest():
    made = []

    def make(key):
        made.append(key)
        return "x" * key

    cache = LRUCache(make, max_size=10, size=len)
    assert [cache[4], cache[5], cache[4]] == ["xxxx", "xxxxx", "xxxx"]
    assert made == [4, 5]
    cache[3]  # 12 > 10: 5 goes, for 4 was used after it
    cache[4]
    assert made == [4, 5, 3]
    cache[5]
    assert made == [4, 5, 3, 5]
    cache[50]  # larger than the whole cache, and still kept as the newest
    cache[50]
    assert made == [4, 5, 3, 5, 50]


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: _source(LENGTHS, 0), "context_length = 0: it must be at least 1"),
        (lambda: _source(LENGTHS, 8, seed=-1), "seed = -1: it must not be negative"),
        (lambda: _source(LENGTHS, 8, shuffle="rows"), "shuffle = 'rows': one of 'contexts', 'documents'"),
        (lambda: _source([], 8), "has no documents"),
        (lambda: train_dataset(_source(LENGTHS, 8), batch_size=0), "batch_size = 0"),
        (lambda: train_dataset(_source(LENGTHS, 8), batch_size=1, num_steps=0), "num_steps = 0"),
        (lambda: iterate(train_dataset(_source(LENGTHS, 8), batch_size=1, num_steps=5), 6), "start_step = 6: the run"),
        (lambda: evaluation_contexts(_corpus(LENGTHS), "x", context_length=8, max_contexts=0), "max_contexts = 0"),
    ],
)
def test_arguments_out_of_range(call, sentence):
    with pytest.raises(UserError, match=sentence):
        call()
    with pytest.raises(IndexError):
        _source(LENGTHS, 8)[-1]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.integers(1, 20))
def test_piece_lengths_of_the_source_are_those_of_its_first_epoch(lengths, context_length):
    source = _source(lengths, context_length, shuffle="documents")
    whole = -(-source.epoch_tokens // context_length)
    rows = source.rows(0, whole)
    places = np.arange(whole * context_length).reshape(whole, context_length)
    # The last row may hold the beginning of the next epoch.
    rows["document_end"] = np.where(places < source.epoch_tokens, rows["document_end"], 0)
    assert source.piece_lengths().sum() == source.epoch_tokens
    np.testing.assert_array_equal(source.piece_lengths(), piece_lengths(rows))
