"""Best-fit packing: which rows go together, that none is lost, and that a packed row trains as its documents do alone."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import rlhfkit as rk
from rlhfkit.packing import IGNORE, Packed, _best_fit, best_fit
from rlhfkit.rows import collate


def row(*ids, labels=None):
    return dict(input_ids=list(ids), labels=list(labels or ids))


def bins(lengths, max_length):
    order, starts = best_fit(lengths, max_length)
    return [order[a:b].tolist() for a, b in zip(starts, starts[1:])]


def test_long_rows_go_first_the_longest_first_and_then_each_where_it_leaves_least_room():
    # 5 and 4 are longer than half: a bin each; then in order 2 fills 4's bin, 3 has one of its own, 1 fills 5's, 3 goes to 3
    assert bins([2, 5, 3, 4, 1, 3], 6) == [[0, 3], [1, 4], [2, 5]]
    assert bins([4, 3, 2, 1, 1], 6) == [[0, 2], [1, 3, 4]]


def test_short_rows_stay_in_their_order_so_that_rows_of_one_length_are_not_put_together():
    assert bins([2, 3, 2, 3, 2, 3], 9) == [[0, 1, 2, 4], [3, 5]]               # 7 of 9, where a 2 fits and no 3


def test_rows_of_one_length_fill_row_after_row():
    assert bins([2] * 5, 5) == [[0, 1], [2, 3], [4]]
    assert bins([5, 5], 5) == [[0], [1]] and bins([], 5) == []


@pytest.mark.parametrize("length, max_length, advice", [(9, 8, "set max_length to 9 or more"), (0, 8, "takes rows of 1 to 8")])
def test_a_row_that_fits_into_none_or_is_empty_is_named(length, max_length, advice):
    with pytest.raises(ValueError, match=f"row 1 has {length} tokens.*{advice}"):
        best_fit([3, length], max_length)


@pytest.mark.parametrize("max_length", [1, 7, 64, 511])
def test_no_row_is_lost_none_is_twice_and_no_bin_is_too_long(max_length):
    lengths = np.random.default_rng(max_length).integers(1, max_length + 1, 3000)
    order, starts = best_fit(lengths, max_length)
    assert sorted(order) == list(range(3000)) and starts[0] == 0 and starts[-1] == 3000
    sums = np.add.reduceat(lengths[order], starts[:-1])
    assert sums.max() <= max_length
    assert np.sum(sums * 2 <= max_length) <= 1                      # two half-empty bins would have been one
    firsts = order[starts[:-1]]
    assert list(firsts) == sorted(firsts)


def test_machine_code_and_python_pack_alike():
    lengths = np.random.default_rng(0).integers(1, 33, 400)
    order = np.random.default_rng(1).permutation(400)
    assert np.array_equal(_best_fit(lengths, order, 32), getattr(_best_fit, "py_func", _best_fit)(lengths, order, 32))


def test_a_packed_row_by_hand():
    made = Packed([row(1, 2, 3), row(4, 5, labels=(IGNORE, 5)), row(6, 7, 8, 9), row(10)], 5)
    assert [r["input_ids"] for r in made] == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
    assert [r["labels"] for r in made] == [[IGNORE, 2, 3, IGNORE, 5], [IGNORE, 7, 8, 9, IGNORE]]
    assert [r["position_ids"] for r in made] == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    assert [r["id"] for r in made] == [0, 1]


def test_packed_rows_are_a_sequence_with_their_lengths_and_the_share_that_is_filled():
    made = Packed([row(1, 2, 3), row(4, 5, 6, 7)], 5)
    assert len(made) == 2 and made.lengths.tolist() == [3, 4] and made.fill_rate == 0.7
    assert made[-1] == made[1] == made[1:][0] and made[:9] == list(made) and made[2:] == []
    with pytest.raises(IndexError):
        made[2]
    nothing = Packed([], 5)
    assert not nothing and nothing.lengths.tolist() == [] and nothing.fill_rate == 0


def test_packing_does_not_change_the_rows_it_is_given():
    rows = [row(1, 2, 3), row(4, 5)]
    list(Packed(rows, 8))
    assert rows == [row(1, 2, 3), row(4, 5)]


def gradients(model, batches):
    """Gradient of the mean loss over all labels of the batches, by parameter."""
    model.zero_grad()
    count = sum(int((batch["labels"][:, 1:] != IGNORE).sum()) for batch in batches)
    for batch in batches:
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch, use_cache=False).logits[:, :-1]
        (F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum") / count).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["pangu", "glm"])
def test_gradients_of_packed_rows_are_those_of_the_documents_alone(family, tmp_path):
    """Invariant I4; GLM's two-dimensional positions and blanks included."""
    path = rk.tiny(tmp_path / family, family, num_layers=2)
    model, tokenizer = rk.load_model(path), rk.load_tokenizer(path)
    model.double()
    records = rk.build("couplets")[:12]
    for build in (rk.text_rows, rk.sft_rows):
        single = build(records, rk.family_of(path), tokenizer, 96, packing=False)[0]
        packed = Packed(single, 96)
        assert len(packed) < len(single) / 2
        alone = gradients(model, [collate([r], tokenizer.pad_token_id) for r in single])
        together = gradients(model, [collate(packed[:], tokenizer.pad_token_id)])
        assert alone.keys() == together.keys() and max(float(g.abs().max()) for g in alone.values()) > 1e-3
        for name in alone:
            torch.testing.assert_close(together[name], alone[name], atol=1e-6, rtol=0)
