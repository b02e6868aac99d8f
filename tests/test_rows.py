"""From records to rows and batches: what carries a loss, what is packed with what, what is set aside and why."""
import os

import pytest
import torch
import torch.nn.functional as F

import rlhfkit as rk
from rlhfkit.rows import IGNORE, collate, collate_answers, data_hash, pack, pad


def record(first, *answers, source="couplets"):
    """A couplet with its answers, best first."""
    return rk.Record("上联：" + first, tuple(rk.Answer(a, -i) for i, a in enumerate(answers)), prefix="下联：", source=source)


COUPLETS = [record("晚风吹桥", "明月照寺", "明月照峰", "白云"), record("红楼送秋月", "明窗迎春风", "明窗"), record("悠悠白云", "点点红日", "红日")]


@pytest.fixture(scope="module")
def tokenizer(tiny_path):
    return rk.load_tokenizer(tiny_path)


@pytest.fixture(scope="module")
def model(tiny_path):
    return rk.load_model(tiny_path)


@pytest.fixture
def make(tiny_path, tokenizer):
    """build, records, further arguments -> (rows, set aside)"""
    return lambda build, records, *args, **kwargs: build(records, rk.family_of(tiny_path), tokenizer, *args, **kwargs)


def row(*ids, labels=None):
    return dict(input_ids=list(ids), labels=list(labels or ids))


@pytest.mark.parametrize("max_length", [24, 64, 200])
def test_packing_loses_no_token_and_never_predicts_across_documents(make, max_length):
    records = [r for r in rk.build("couplets")[:60]]
    single, _ = make(rk.sft_rows, records, 200)
    packed, aside = make(rk.sft_rows, records, max_length, packing=True)
    assert not aside and max(len(r["input_ids"]) for r in packed) <= max_length
    found = []
    for r in packed:
        starts = [i for i, position in enumerate(r["position_ids"]) if position == 0]
        for start, end in zip(starts, starts[1:] + [len(r["position_ids"])]):
            found.append((r["input_ids"][start:end], r["labels"][start:end]))
            assert r["position_ids"][start:end] == list(range(end - start)) and r["labels"][start] == IGNORE
    assert sorted(found) == sorted((r["input_ids"], r["labels"]) for r in single)       # a prompt comes first, with no loss


def test_a_document_longer_than_a_row_is_cut_into_pieces_and_no_token_is_lost(make, tiny_path, tokenizer):
    records = [rk.Record("春风" * 50), rk.Record("秋月")]
    rows, aside = make(rk.text_rows, records, 16)
    family = rk.family_of(tiny_path)
    whole = [t for r in records for t in family.encode_text(tokenizer, r.prompt)[1]]
    assert [t for r in rows for t in r["input_ids"] if t != tokenizer.bos_token_id] == whole and not aside
    assert max(len(r["input_ids"]) for r in rows) == 16


def test_a_max_length_below_the_template_of_a_document_is_named(make):
    """A room below zero gave no piece at all, and the document was lost without a word."""
    with pytest.raises(ValueError, match="max_length is 1; a document takes 1 tokens beside its text: set it to 2 or more"):
        make(rk.text_rows, [rk.Record("春风")], 1)


def loss_sums(model, batch):
    """(sum of the losses over the labels, their number)"""
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits
    losses = F.cross_entropy(logits[:, :-1].double().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE,
                             reduction="sum")
    return float(losses), int((labels[:, 1:] != IGNORE).sum())


@pytest.mark.parametrize("build", [rk.sft_rows, rk.text_rows])
def test_the_loss_of_packed_rows_is_the_mean_of_the_losses_of_single_ones(build, make, model, tokenizer):
    records = rk.build("couplets")[:20]
    if build is rk.sft_rows:
        single, packed = make(build, records, 64)[0], make(build, records, 64, packing=True)[0]
    else:
        single, packed = [make(build, [r], 64)[0][0] for r in records], make(build, records, 64)[0]
    assert len(packed) < len(single) == 20
    alone = [loss_sums(model, collate([r], tokenizer.pad_token_id)) for r in single]
    together = loss_sums(model, collate(packed, tokenizer.pad_token_id))
    assert together[1] == sum(count for _, count in alone)
    assert together[0] / together[1] == pytest.approx(sum(total for total, _ in alone) / together[1], abs=1e-6)


def test_only_the_answer_and_its_end_token_carry_a_loss_and_show_makes_it_visible(make, tokenizer):
    """The 2023 kit trained on the prompt and on padding."""
    rows, _ = make(rk.sft_rows, COUPLETS[:1], 64)
    assert rk.show(rows[0], tokenizer) == "上联：晚风吹桥<sep>下联：⟦明月照寺<eot>⟧"
    labels = [label for label in rows[0]["labels"] if label != IGNORE]
    assert labels == rows[0]["input_ids"][-len(labels):] and labels[-1] == tokenizer.eos_token_id
    assert (rows[0]["id"], rows[0]["source"]) == (0, "couplets")


def test_show_marks_each_document_of_a_packed_row(make, tokenizer):
    rows, _ = make(rk.sft_rows, COUPLETS[::2], 64, packing=True)
    assert rk.show(rows[0], tokenizer) == "上联：晚风吹桥<sep>下联：⟦明月照寺<eot>⟧上联：悠悠白云<sep>下联：⟦点点红日<eot>⟧"


def test_show_writes_every_kind_of_row(make, tokenizer):
    assert rk.show(make(rk.text_rows, COUPLETS[:1], 64)[0][0], tokenizer) == "⟦上联：晚风吹桥下联：明月照寺<eot>⟧"
    assert rk.show(make(rk.prompt_rows, COUPLETS[:1], 64)[0][0], tokenizer) == "上联：晚风吹桥<sep>下联："
    answers = rk.show(make(rk.reward_rows, COUPLETS[1:2], 64)[0][0], tokenizer)
    assert answers == "上联：红楼送秋月<sep>下联：明窗迎春风<eot>\n上联：红楼送秋月<sep>下联：明窗<eot>"
    pair = rk.show(make(rk.pair_rows, COUPLETS[1:2], 64)[0][0], tokenizer)
    assert "明窗迎春风<eot>" in pair and pair.count("明窗") == 2


def test_a_reward_row_holds_every_answer_of_a_prompt_with_its_score(make, tokenizer):
    rows, _ = make(rk.reward_rows, COUPLETS, 64)
    assert [r["scores"] for r in rows] == [[0, -1, -2], [0, -1], [0, -1]]
    assert [tokenizer.decode(ids) for ids in rows[0]["answers"]] == [
        f"上联：晚风吹桥<sep>下联：{answer}<eot>" for answer in ("明月照寺", "明月照峰", "白云")]


def test_all_answers_of_a_reward_row_follow_the_same_prompt_also_a_shortened_one(make, tokenizer):
    """Where the long answer alone shortened its prompt, the prompt would tell which answer is which."""
    rows, _ = make(rk.reward_rows, [record("晚风吹桥" * 5, "明月照寺" * 4, "白云")], 30)
    texts = [tokenizer.decode(ids) for ids in rows[0]["answers"]]
    assert max(len(ids) for ids in rows[0]["answers"]) <= 30
    assert len({text.split("<sep>")[0] for text in texts}) == 1


@pytest.mark.parametrize("max_length", [20, 64])
def test_both_answers_of_a_pair_follow_one_prompt(make, tokenizer, max_length):
    long = record("晚风吹桥" * 3, "明月照寺" * 2, "白云")
    rows, _ = make(rk.pair_rows, [long], max_length)
    prompt, chosen, rejected = (rows[0][k] for k in ("prompt_ids", "chosen_ids", "rejected_ids"))
    assert len(prompt) + max(len(chosen), len(rejected)) <= max_length
    assert tokenizer.decode(chosen) == "明月照寺明月照寺<eot>" and tokenizer.decode(rejected) == "白云<eot>"
    assert tokenizer.decode(prompt).endswith("<sep>下联：") and tokenizer.decode(prompt).startswith("上联：晚风吹桥")


def test_pairs_are_drawn_by_seed_without_repetition_and_never_from_ties(make, tokenizer):
    many = [rk.Record(f"春{i}", tuple(rk.Answer(a, s) for a, s in zip("春秋山水", (3, 2, 2, 1)))) for i in range(12)]
    rows, _ = make(rk.pair_rows, many, 64, pairs_per_prompt=9, seed=0)
    assert len(rows) == 12 * 5                                           # 4 answers with one tie have 5 ordered pairs
    found = {(tokenizer.decode(r["chosen_ids"][:-1]), tokenizer.decode(r["rejected_ids"][:-1])) for r in rows}
    assert found == {("春", "秋"), ("春", "山"), ("春", "水"), ("秋", "水"), ("山", "水")}
    one = [make(rk.pair_rows, many, 64, seed=seed)[0] for seed in (1, 1, 2)]
    assert one[0] == one[1] != one[2] and len(one[0]) == 12
    last = make(rk.pair_rows, many[-1:], 64, seed=1)[0][0]               # rows made in chunks are those made at once
    assert last == one[0][-1] | {"id": 0}


@pytest.mark.parametrize("build, bad, reason", [
    (rk.sft_rows, record("晚风吹桥", "明月照寺" * 40),
     r"an answer of \d+ tokens and its template do not fit into max_length 64 .*set max_length to \d+ or more"),
    (rk.reward_rows, record("晚风吹桥", "明月照寺" * 40, "白云"), "do not fit into max_length 64"),
    (rk.pair_rows, record("晚风吹桥", "明月照寺" * 40, "白云"), "do not fit into max_length 64"),
    (rk.prompt_rows, rk.Record("上联：晚风吹桥", prefix="下联：" * 60), "do not fit into max_length 64"),
    (rk.sft_rows, rk.Record("上联：晚风吹桥"), "no answer"),
    (rk.reward_rows, record("晚风吹桥", "明月照寺"), "no answer is better than another"),
    (rk.pair_rows, rk.Record("问", (rk.Answer("甲", 1), rk.Answer("乙", 1))), "no answer is better than another")])
def test_a_record_that_cannot_be_used_is_set_aside_with_its_reason_and_the_others_stay(make, build, bad, reason):
    rows, aside = make(build, [COUPLETS[0], bad, COUPLETS[2]], 64)
    assert [r["id"] for r in rows] == [0, 2] and len(aside) == 1
    assert aside[0]["id"] == 1 and aside[0]["text"] == bad.prompt
    with pytest.raises(ValueError, match="none of 1 records can be used; the first: .*" + reason):
        make(build, [bad], 64)


def test_only_the_prompt_of_a_long_record_is_shortened(make, tokenizer):
    rows, aside = make(rk.sft_rows, [record("晚风吹桥" * 60, "明月照寺")], 64)
    assert not aside and len(rows[0]["input_ids"]) == 64
    text = rk.show(rows[0], tokenizer)
    assert text.startswith("上联：晚风吹桥晚风吹桥") and text.endswith("<sep>下联：⟦明月照寺<eot>⟧")


def test_padding_by_hand():
    assert pad([[1, 2], [3]], 0).tolist() == [[1, 2], [3, 0]]
    assert pad([[1, 2], [3]], 9, 3, "left").tolist() == [[9, 1, 2], [9, 9, 3]]


def test_a_batch_by_hand():
    batch = collate([row(1, 2, 3), row(4, 5)], pad_id=6)
    assert {k: v.tolist() for k, v in batch.items()} == {
        "input_ids": [[1, 2, 3], [4, 5, 6]], "labels": [[1, 2, 3], [4, 5, IGNORE]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]]}


def test_the_padding_of_packed_rows_is_a_document_more_without_a_loss():
    batch = collate(pack([row(1, 2, 3), row(4, 5), row(6, 7)], 5), pad_id=9)
    assert {k: v.tolist() for k, v in batch.items()} == {
        "input_ids": [[1, 2, 3, 4, 5], [6, 7, 9, 9, 9]],
        "labels": [[IGNORE, 2, 3, IGNORE, 5], [IGNORE, 7, IGNORE, IGNORE, IGNORE]],
        "position_ids": [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]}


def test_a_batch_of_answers_by_hand():
    batch = collate_answers([dict(answers=[[1, 2], [1]], scores=[1, 0]), dict(answers=[[3, 4, 5]], scores=[2])],
                            pad_id=9)
    assert {k: v.tolist() for k, v in batch.items()} == {
        "input_ids": [[1, 2, 9], [1, 9, 9], [3, 4, 5]], "attention_mask": [[1, 1, 0], [1, 0, 0], [1, 1, 1]],
        "scores": [1.0, 0.0, 2.0], "prompt": [0, 0, 1]}


def test_data_is_a_file_or_a_folder_with_train_and_dev(tmp_path):
    rk.write_records(COUPLETS, tmp_path / "train.jsonl")
    assert rk.read_data(tmp_path / "train.jsonl") == (COUPLETS, [], []) == rk.read_data(tmp_path)
    rk.write_records(COUPLETS[:1], tmp_path / "dev.jsonl")
    assert rk.read_data(str(tmp_path)) == (COUPLETS, COUPLETS[:1], [])


def test_bad_rows_of_both_files_are_set_aside_with_file_and_line(tmp_path):
    for name in ("train", "dev"):
        rk.write_records(COUPLETS[:1], tmp_path / f"{name}.jsonl")
        with open(tmp_path / f"{name}.jsonl", "ab") as file:
            file.write(b'{"prompt": 1}\n\xff\xfe\n')
    train, dev, aside = rk.read_data(tmp_path)
    assert train == dev == COUPLETS[:1]
    assert sorted((r["file"].rsplit("/", 1)[1], r["line"]) for r in aside) == [
        ("dev.jsonl", 2), ("dev.jsonl", 3), ("train.jsonl", 2), ("train.jsonl", 3)]


def test_missing_and_empty_data_say_what_is_expected(tmp_path):
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(FileNotFoundError,
                           match="has no training rows; expected a JSON-lines file, or a folder with train.jsonl"):
            rk.read_data(path)
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(ValueError, match="train.jsonl is empty"):
        rk.read_data(tmp_path)


def test_the_hash_of_the_data_sees_every_byte_that_is_read_and_nothing_else(tmp_path):
    rk.write_records(COUPLETS, tmp_path / "train.jsonl")
    first = data_hash(tmp_path)
    (tmp_path / "notes.txt").write_text("…")
    assert data_hash(tmp_path) == first and len(first) == 16
    rk.write_records(COUPLETS, tmp_path / "dev.jsonl")
    second = data_hash(tmp_path)
    rk.write_records(COUPLETS[:2], tmp_path / "dev.jsonl")
    assert len({first, second, data_hash(tmp_path)}) == 3


def test_files_of_known_size_and_time_are_not_read_again_for_their_hash(tmp_path):
    path = tmp_path / "train.jsonl"
    rk.write_records(COUPLETS, path)
    os.utime(path, (1, 1))
    first, text = data_hash(tmp_path), path.read_bytes()
    path.write_bytes(text.replace("晚风".encode(), "春风".encode()))
    changed = data_hash(tmp_path)
    os.utime(path, (1, 1))
    assert data_hash(path) == data_hash(tmp_path) == first != changed       # never mind the bytes
    os.utime(path, (1, 2))
    assert data_hash(tmp_path) == changed


def test_of_many_answers_the_best_the_worst_and_some_between_are_compared(make):
    many = rk.Record("上联：春", tuple(rk.Answer(f"第{i}个", -i) for i in range(101)))
    rows, _ = make(rk.reward_rows, [many], 64, max_answers=5)
    assert rows[0]["scores"] == [0, -25, -50, -75, -100]
    assert len(make(rk.reward_rows, [many], 64)[0][0]["scores"]) == 101


def test_the_rule_of_neighbours_gives_each_answer_one_pair_at_most(make, tokenizer):
    record = rk.Record("问", tuple(rk.Answer(a, s) for a, s in zip("春秋山水", (3, 2, 2, 1))))
    rows, _ = make(rk.pair_rows, [record], 64, pairs_per_prompt=9, pair_rule="neighbours")
    found = {tokenizer.decode([r["chosen_ids"][-2], r["rejected_ids"][-2]]) for r in rows}
    assert found == {"春秋", "春山", "山水"} and len(rows) == 3                # worked by hand from the 2023 loop
