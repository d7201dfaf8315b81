"""Associative recall: every answer can be found, and nothing but answers is asked for."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from natsjax.data import RecallTask, Vocabulary, iterate, piece_lengths, train_dataset
from natsjax.errors import UserError

FIELDS = {"context_length": 128, "num_pairs": 6, "num_keys": 20, "num_values": 10, "num_fillers": 12}
TASK = RecallTask(**FIELDS)


@st.composite
def tasks(draw):
    context_length = draw(st.integers(16, 64))
    num_pairs = draw(st.integers(1, (context_length // 2 - 1) // 2))
    return RecallTask(
        context_length=context_length,
        num_pairs=num_pairs,
        num_keys=draw(st.integers(num_pairs, 30)),
        num_values=draw(st.integers(1, 10)),
        num_fillers=draw(st.integers(1, 10)),
        num_queries=draw(st.integers(0, num_pairs)),
        seed=draw(st.integers(0, 5)),
    )


@settings(max_examples=100, deadline=None)
@given(task=tasks(), index=st.integers(0, 10**6), split=st.sampled_from(["train", "validation"]))
def test_every_row_is_a_solvable_puzzle(task, index, split):
    row = {name: values[0] for name, values in task.rows(index, 1, split=split).items()}
    tokens, kinds = row["inputs"].tolist(), task.token_kind[row["inputs"]].tolist()
    half = task.context_length // 2
    assert len(tokens) == task.context_length
    assert tokens[0] == task.bos_id
    assert kinds.count("bos") == 1

    key_places = [place for place, kind in enumerate(kinds) if kind == "key"]
    value_places = [place for place, kind in enumerate(kinds) if kind == "value"]
    assert value_places == [place + 1 for place in key_places]
    pairs = {tokens[place]: tokens[place + 1] for place in key_places if place < half}
    assert len(pairs) == task.num_pairs == sum(place < half for place in key_places)
    assert all(place + 1 < half for place in key_places if place < half)

    asked = [place for place in key_places if place >= half]
    assert len({tokens[place] for place in asked}) == len(asked) == (task.num_queries or task.num_pairs)
    assert all(pairs[tokens[place]] == tokens[place + 1] for place in asked)
    assert np.flatnonzero(row["loss_weight"]).tolist() == asked
    assert set(row["loss_weight"].tolist()) == {0.0, 1.0}
    assert row["targets"].tolist() == [*tokens[1:], 0]
    assert row["positions"].tolist() == list(range(task.context_length))
    assert (row["document_end"] == task.context_length).all()
    assert (row["document_id"] == index).all()


def test_dtypes_and_shapes_are_those_of_every_row():
    batch = TASK.rows(5, 3)
    for name, values in batch.items():
        assert values.shape == (3, 128)
        assert values.dtype == (np.float32 if name == "loss_weight" else np.int32)
    assert piece_lengths(batch).tolist() == [128] * 3


def test_a_row_is_the_same_alone_in_a_batch_and_in_another_object():
    batch = TASK.rows(1000, 16)
    for offset in (0, 7, 15):
        for name, values in RecallTask(**FIELDS)[1000 + offset].items():
            np.testing.assert_array_equal(values, batch[name][offset], err_msg=name)


def test_rows_splits_and_seeds_differ():
    def rows(task, split="train"):
        return {tokens.tobytes() for tokens in task.rows(0, 200, split=split)["inputs"]}

    train, validation = rows(TASK), rows(TASK, "validation")
    assert len(train) == len(validation) == 200
    assert not train & validation
    assert not train & rows(RecallTask(**FIELDS, seed=1))
    held_out = {tokens.tobytes() for tokens in TASK.evaluation_contexts(200)["inputs"]}
    assert held_out == validation


def test_places_keys_and_values_are_spread_evenly():
    batch = TASK.rows(0, 4000)
    kinds = TASK.token_kind[batch["inputs"]]
    first_keys = (kinds[:, 1:63] == "key").mean(axis=0)  # 6 pairs over the places 1 … 62
    assert abs(first_keys - 6 / 62).max() < 0.03
    asked = (batch["loss_weight"] > 0).mean(axis=0)[64:127]
    assert abs(asked - 6 / 63).max() < 0.03
    for kind, number in (("key", 20), ("value", 10), ("filler", 12)):
        shares = np.bincount(batch["inputs"][kinds == kind], minlength=TASK.vocab_size)
        shares = shares[TASK.token_kind == kind] / shares.sum()
        assert len(shares) == number
        assert abs(shares * number - 1).max() < 0.15


def test_the_order_of_questions_says_nothing_about_the_order_of_pairs():
    same = 0
    for tokens in TASK.rows(0, 500)["inputs"]:
        keys = [token for token in tokens if TASK.kind_of(token) == "key"]
        same += keys[0] == keys[6]
    assert 0.08 < same / 500 < 0.26  # one in six by chance


def test_vocabulary_for_display():
    assert isinstance(TASK, Vocabulary)
    assert TASK.token_bytes is None
    assert TASK.vocab_size == 1 + 20 + 10 + 12
    assert [TASK.kind_of(token) for token in (0, 1, 20, 21, 30, 31, 42)] == [
        "bos",
        *["key"] * 2,
        *["value"] * 2,
        *["filler"] * 2,
    ]
    assert [TASK.token_text(token) for token in (0, 1, 20, 21, 42)] == ["⟨bos⟩", "k0", "k19", "v0", "f11"]


def test_it_plugs_into_the_training_stream():
    dataset = train_dataset(TASK, batch_size=8, num_steps=5)
    iterator = iterate(dataset, 2)
    batches = list(iterator)
    iterator.close()
    assert len(batches) == 3
    for step, batch in enumerate(batches, start=2):
        np.testing.assert_array_equal(batch["inputs"], TASK.rows(8 * step, 8)["inputs"])


def test_a_batch_takes_milliseconds():
    times = []
    for step in range(10):
        start = time.perf_counter()
        TASK.rows(128 * step, 128)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.015


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"context_length": 15}, "context_length = 15: recall needs at least 16"),
        ({"num_pairs": 0}, "num_pairs = 0: it must be at least 1"),
        ({"num_values": 0}, "num_values = 0"),
        ({"num_fillers": -1}, "num_fillers = -1"),
        ({"num_keys": 5}, "num_keys = 5: fewer than num_pairs = 6"),
        ({"num_queries": 7}, "num_queries = 7: it must be between 0 .all. and num_pairs = 6"),
        ({"num_queries": -1}, "num_queries = -1"),
        ({"num_pairs": 32, "num_keys": 40}, "half of context_length = 128 has space for 31 pairs"),
        ({"seed": -1}, "seed = -1"),
    ],
)
def test_fields_out_of_range(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        RecallTask(**(FIELDS | changes))


def test_the_fullest_context_and_wrong_calls():
    full = RecallTask(**(FIELDS | {"num_pairs": 31, "num_keys": 31}))
    assert (full.rows(0, 50)["loss_weight"].sum(axis=1) == 31).all()
    with pytest.raises(UserError, match="no split 'test'; it has train, validation"):
        TASK.rows(0, 1, split="test")
    with pytest.raises(IndexError, match="row -1"):
        TASK.rows(-1, 1)
