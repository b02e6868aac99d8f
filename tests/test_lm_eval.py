"""Item by item beside others on real rows: C-Eval, MMLU and CMMLU beside lm-eval's own code, the other tasks beside ten lines."""
from itertools import chain

import pytest
import torch

import rlhfkit as rk
from rlhfkit.evaluation.scorers import TokenModel
from rlhfkit.tasks import TASKS


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """A tiny Llama with room for five shots of many small tokens; it has no chat template, nor have lm-eval's prompts."""
    path = rk.tiny(tmp_path_factory.mktemp("tiny") / "llama", family="llama", hidden_size=32, num_layers=2)
    model = rk.load_model(path)
    model.config.max_position_embeddings = 1 << 15
    return TokenModel(model, rk.load_tokenizer(path))


def rendered(task, folder, shots, count):
    """Records and choices of rows spread over a file, each with the first dev rows of its subject."""
    examples = [e for e in task.load(folder, task.split) if e["gold"] is not None]
    pool = task.load(folder, task.shot_splits[0]) if shots else []
    asked = []
    for example in examples[::len(examples) // count][:count]:
        shown = [e for e in pool if e["subject"] == example["subject"]][:shots]
        assert len(shown) == shots
        asked.append(task.render(example, shown)[:2])
    return [record for record, _ in asked], [choices for _, choices in asked]


@pytest.mark.parametrize("shots", [0, 5])
@pytest.mark.parametrize("name", ["ceval", "mmlu", "cmmlu"])
def test_exams_equal_lm_eval_item_by_item(name, shots, reader, shared):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed (pip install lm_eval==0.4.13 in an environment of its own)")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    records, choices = rendered(TASKS[name], shared / "data/eval" / name, shots, 5)
    harness = HFLM(pretrained=reader.model, tokenizer=reader.tokenizer, batch_size=3, device="cpu")
    requests = [Instance("loglikelihood", {}, (record.prompt + record.prefix, text), 0)
                for record, texts in zip(records, choices) for text in texts]
    theirs = [score for score, _ in harness.loglikelihood(requests, disable_tqdm=True)]
    ours = list(chain(*reader.rank(records, choices)[0]))
    assert len(ours) == 20 and reader.cut == 0
    assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.scoring == "choices"])
def test_the_other_tasks_equal_a_reference_of_ten_lines(name, reader, shared):
    records, choices = rendered(TASKS[name], shared / "data/eval" / name, 0, 3)
    choices = [texts[:8] for texts in choices]                                          # IFLYTEK has 119
    for record, texts, scores in zip(records, choices, reader.rank(records, choices)[0]):
        for text, score in zip(texts, scores):
            prompt, answer = reader.family.encode(reader.tokenizer, record, text)
            ids = torch.tensor([prompt + answer[:-1]])                                  # without the end token
            with torch.no_grad():
                logps = reader.model(ids).logits[0, :-1].log_softmax(-1)
            taken = logps.gather(1, ids[0, 1:, None])[len(prompt) - 1:]
            assert score == pytest.approx(float(taken.double().sum()), abs=1e-4)
