"""Promises of --packing documents, on examples small enough to write out by hand."""

import numpy as np
import pytest
from support.packing import EOS, letters, pack

from modules.lm_ops import IGNORED_TARGET
from tasks.packing import num_targets, targets_within_segments


def test_documents_end_with_eos_and_positions_restart_at_every_document() -> None:
    (sequence,) = pack("abc", "d", "ef", seq_length=9, num=1)
    assert sequence.token_ids.tolist() == [1, 2, 3, EOS, 4, EOS, 5, 6, EOS]
    assert sequence.positions.tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 2]
    assert (sequence.token_ids.dtype, sequence.positions.dtype, sequence.task) == (np.int32, np.int32, 7)


def test_a_document_that_does_not_fit_goes_on_in_the_next_sequence_from_position_0() -> None:
    first, second, third = pack("ab", "cdefghij", "kl", seq_length=5, num=3)
    assert first.token_ids.tolist() == [1, 2, EOS, 3, 4]
    assert first.positions.tolist() == [0, 1, 2, 0, 1]
    assert second.token_ids.tolist() == [5, 6, 7, 8, 9]
    assert second.positions.tolist() == [0, 1, 2, 3, 4]
    assert third.token_ids.tolist() == [10, EOS, 11, 12, EOS]
    assert third.positions.tolist() == [0, 1, 0, 1, 2]


def test_a_document_may_end_with_its_sequence() -> None:
    first, second = pack("abcd", "efg", "h", seq_length=5, num=2)
    assert first.token_ids.tolist() == [1, 2, 3, 4, EOS]
    assert second.token_ids.tolist() == [5, 6, 7, EOS, 8]
    assert second.positions.tolist() == [0, 1, 2, 3, 0]


def test_an_eos_alone_in_the_next_sequence_is_a_segment_of_its_own() -> None:
    """Four ids and the EOS, cut between the two: the EOS has nothing before it in its sequence, so it is no target."""
    first, second = pack("abcd", "efg", seq_length=4, num=2)
    assert first.token_ids.tolist() == [1, 2, 3, 4]
    assert second.token_ids.tolist() == [EOS, 5, 6, 7]
    assert second.positions.tolist() == [0, 0, 1, 2]
    assert second.targets.tolist() == [IGNORED_TARGET, 6, 7, IGNORED_TARGET]
    assert num_targets(second.targets) == 2


def test_an_empty_text_is_an_eos_alone() -> None:
    (sequence,) = pack("", "ab", seq_length=4, num=1)
    assert sequence.token_ids.tolist() == [EOS, 1, 2, EOS]
    assert sequence.positions.tolist() == [0, 0, 1, 2]


def test_the_stream_loses_no_id_and_adds_none() -> None:
    """Sequences laid end to end are the documents laid end to end, for every length of sequence."""
    texts = ["abcde", "f", "ghijklmnopq", "rs"]
    stream = [number for text in texts for number in [*letters(text), EOS]]
    for seq_length in range(1, len(stream) + 1):
        sequences = pack(*texts, seq_length=seq_length, num=len(stream) // seq_length)
        ids = np.concatenate([sequence.token_ids for sequence in sequences]).tolist()
        assert ids == stream[: len(ids)]


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ([0, 1, 2, 3], 3),
        ([0, 1, 0, 1], 2),
        ([0, 0, 0, 0], 0),
        ([0], 0),
        ([[0, 1, 2], [0, 0, 1]], 3),
        ([[[0, 1, 0], [0, 1, 2]], [[0, 0, 0], [0, 0, 1]]], 4),
    ],
)
def test_targets_are_the_ids_that_follow_another_of_their_segment(positions: list, expected: int) -> None:
    ids = np.arange(np.size(positions), dtype=np.int32).reshape(np.shape(positions))
    targets = targets_within_segments(ids, np.array(positions, dtype=np.int32))
    assert num_targets(targets) == expected
    assert np.all((targets == IGNORED_TARGET) | (targets == ids + 1))
