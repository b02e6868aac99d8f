"""The sweep: one launched run a combination, measured, resumed, and not ended by a row that fails."""
import math

import pandas as pd
import pytest

import rlhfkit as rk


@pytest.fixture(scope="module")
def config(tiny_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    records = [rk.Record(f"上联：{a}{b}", (rk.Answer(b + a, 1.0),)) for a in "山水云月花" for b in "风雨雪霜"]
    rk.write_records(records, folder / "train.jsonl")
    return rk.SFT(model_path=tiny_path, data_path=str(folder), output_dir=str(folder / "rows"), max_length=32,
                  max_steps=3, samples=0, report_to="none")


@pytest.mark.slow
def test_a_sweep_measures_each_combination_survives_a_failure_and_resumes(config, capsys):
    table = rk.sweep(config, batch_size=[2, 4], model_path=[config.model_path])
    assert list(table) == ["batch_size", "model_path", "tokens_per_second", "seconds_per_step", "memory_gib", "error"]
    assert list(table.batch_size) == [2, 4] and list(table.error) == ["", ""]
    assert (table.tokens_per_second > 0).all() and (table.memory_gib > 0.1).all()
    assert len(capsys.readouterr().out.splitlines()) == 2
    again = rk.sweep(config, batch_size=[2, 4], model_path=[config.model_path, config.data_path])
    assert list(again.tokens_per_second[[0, 2]]) == list(table.tokens_per_second)
    assert "config.json" in again.error[1] and math.isnan(again.tokens_per_second[3])
    written = pd.read_csv(config.output_dir + "/table.csv")
    assert list(written.batch_size) == [2, 2, 4, 4]


def test_a_combination_that_does_not_go_together_is_a_row_with_its_error(config):
    table = rk.sweep(config, offload=["optimizer"], zero_stage=[0])
    assert "offload is 'optimizer' with zero_stage 0" in table.error[0] and math.isnan(table.memory_gib[0])


@pytest.mark.parametrize("lists, words", [
    (dict(batchsize=[1]), "did you mean 'batch_size'"), (dict(batch_size=4), r"write batch_size=\[8\]"),
    (dict(batch_size=[]), "not empty"), (dict(output_dir=["a"]), "the sweep sets it"), (dict(), "nothing to sweep")])
def test_wrong_names_and_lists_are_refused_before_anything_runs(config, lists, words):
    with pytest.raises(ValueError, match=words):
        rk.sweep(config, **lists)


def test_a_value_of_the_wrong_type_is_refused_before_anything_runs(config):
    with pytest.raises(TypeError, match="batch_size is the string '8'"):
        rk.sweep(config, batch_size=[4, "8"])
