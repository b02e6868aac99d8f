"""The run folder: whose it is, that a save is whole or not at all, checkpoints, RNG, fingerprints."""
import dataclasses
import errno
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import rlhfkit as rk
from rlhfkit.engine import Engine
from rlhfkit.saving import (fingerprint, load_checkpoint, newest_checkpoint, open_run, rng_state, save_checkpoint,
                            save_folder,
                            set_rng_state)

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def config(tiny_path, tmp_path):
    rk.write_records([rk.Record("上联：晚风吹桥", (rk.Answer("明月照寺", 1),), prefix="下联：")], tmp_path / "data" / "train.jsonl")
    return rk.SFT(tiny_path, str(tmp_path / "data"), str(tmp_path / "out"))


def finish(config, loss=0.5):
    return rk.Result(config.stage, config.to_dict(), {"loss": loss}, config.output_dir).save()


def whole(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


def test_a_new_folder_is_claimed_with_config_data_model_and_versions(config):
    assert open_run(config) is None
    run = json.loads((Path(config.output_dir) / "run.json").read_text("utf-8"))
    assert run["config"] == config.to_dict() and len(run["data"]) == 16 and run["num_processes"] == 0
    assert fingerprint(config.model_path) in str(run["models"]["model_path"])
    assert run["versions"] == rk.versions() and "torch 2" in run["versions"]


def test_the_same_run_goes_on_and_once_finished_is_returned(config):
    assert open_run(config) is None and open_run(config) is None
    finish(config)
    assert open_run(config).metrics == {"loss": 0.5}
    for fields in (dict(save_steps=5), dict(resume=False), dict(save_total_limit=1), dict(report_to="none")):
        assert open_run(dataclasses.replace(config, **fields)).metrics == {"loss": 0.5}


def test_a_folder_that_was_moved_is_still_its_run(config):
    open_run(config)
    finish(config)
    moved = Path(config.output_dir).rename(Path(config.output_dir).with_name("moved"))
    assert open_run(dataclasses.replace(config, output_dir=str(moved))).output_dir == str(moved)


@pytest.mark.parametrize("fields, named", [
    (dict(seed=1), "seed: 0 there, 1 here"), (dict(learning_rate=2e-5), "learning_rate: 1e-05 there, 2e-05 here"),
    (dict(dtype="mixed", packing=True), "dtype: 'float32' there, 'mixed' here; packing: False there, True here")])
def test_another_run_in_the_folder_is_an_error_that_names_the_fields(config, fields, named):
    open_run(config)
    finish(config)
    before = whole(config.output_dir)
    with pytest.raises(FileExistsError) as error:
        open_run(dataclasses.replace(config, **fields))
    assert f"already holds another run ({named}); choose another folder or delete it" in str(error.value)
    assert whole(config.output_dir) == before


def test_other_data_another_stage_and_another_number_of_processes_are_another_run(config):
    open_run(config)
    with pytest.raises(FileExistsError, match="num_processes: 0 there, 2 here"):
        open_run(config, num_processes=2)
    common = {f.name: getattr(config, f.name) for f in dataclasses.fields(rk.Pretrain)}
    with pytest.raises(FileExistsError, match="stage: 'sft' there, 'pretrain' here"):
        open_run(rk.Pretrain(**common))
    rk.write_records([rk.Record("春风", (rk.Answer("秋月", 1),))], Path(config.data_path) / "train.jsonl")
    with pytest.raises(FileExistsError, match="data: [0-9a-f]{16} there, [0-9a-f]{16} here"):
        open_run(config)


def change(weights):
    tensors = load_file(weights)
    tensors["transformer.wte.weight"][7, 7] += 1
    save_file(tensors, weights, metadata={"format": "pt"})


def test_a_fingerprint_sees_changed_weights_and_not_the_name_of_the_folder(tiny_path, tmp_path):
    copies = [Path(shutil.copytree(tiny_path, tmp_path / name)) for name in ("a", "b")]
    assert fingerprint(copies[0]) == fingerprint(copies[1]) == fingerprint(tiny_path)
    change(copies[1] / "model.safetensors")
    assert fingerprint(copies[1]) != fingerprint(tiny_path)


def test_changed_weights_of_the_model_are_another_run(config, tmp_path):
    model = shutil.copytree(config.model_path, tmp_path / "model")
    config = dataclasses.replace(config, model_path=str(model))
    open_run(config)
    change(model / "model.safetensors")
    with pytest.raises(FileExistsError, match="model_path has other weights"):
        open_run(config)


@pytest.mark.parametrize("changed", ["first", "second"])
def test_changed_weights_of_any_of_several_reward_models_are_another_run(config, tmp_path, changed):
    for name in ("first", "second"):
        shutil.copytree(config.model_path, tmp_path / name)
    ppo = rk.PPO(config.model_path, config.data_path, config.output_dir,
                 reward_path=f"{tmp_path / 'first'},{tmp_path / 'second'}")
    open_run(ppo)
    change(tmp_path / changed / "model.safetensors")
    with pytest.raises(FileExistsError, match="reward_path.* has other weights"):
        open_run(ppo)


def test_a_folder_with_other_files_is_not_taken(config):
    Path(config.output_dir).mkdir()
    (Path(config.output_dir) / "thesis.docx").write_text("…")
    with pytest.raises(FileExistsError, match=r"already holds other files \(thesis.docx, …\); choose another folder"):
        open_run(config)
    assert list(whole(config.output_dir)) == ["thesis.docx"]


def test_an_empty_folder_is_taken(config):
    Path(config.output_dir).mkdir()
    assert open_run(config) is None


@pytest.mark.parametrize("name", ["model_path", "data_path"])
def test_a_missing_folder_is_noticed_before_the_output_folder_is_claimed(config, name):
    """Otherwise the run with the right path meets "another run" in its folder, which never began."""
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_run(dataclasses.replace(config, **{name: str(Path(config.data_path) / "nowhere")}))
    assert not Path(config.output_dir).exists()


def test_a_disk_full_while_the_folder_is_claimed_does_not_lock_the_run_out(config, monkeypatch):
    written = Path.write_text

    def half(path, text, *args, **kwargs):
        written(path, text[:len(text) // 2], *args, **kwargs)
        raise FULL
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", half)
        with pytest.raises(OSError, match="No space left"):
            open_run(config)
    assert open_run(config) is None


def test_versions_are_told_where_there_is_no_git(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert rk.versions().startswith("python 3.") and "commit" not in rk.versions()


def test_a_disk_full_half_way_through_a_save_keeps_the_previous_result(tiny_path, tmp_path):
    model, folder = rk.load_model(tiny_path), tmp_path / "out"
    save_folder(folder, model.save_pretrained)
    before = whole(folder)

    def write(path):
        (Path(path) / "config.json").write_text("{}")
        (Path(path) / "model.safetensors").write_bytes(b"half")
        raise FULL
    with pytest.raises(OSError, match="No space left"):
        save_folder(folder, write)
    assert whole(folder) == before and fingerprint(folder) == fingerprint(tiny_path)


def test_a_save_replaces_what_it_writes_and_leaves_the_other_files(tmp_path):
    for name, text in (("run.json", "run"), ("config.json", "old")):
        (tmp_path / name).write_text(text)
    (tmp_path / ".partial").mkdir()                                                      # left by a kill
    (tmp_path / ".partial" / "rest").write_text("half")
    save_folder(tmp_path, lambda path: (Path(path) / "config.json").write_text("new"))
    assert whole(tmp_path) == {"run.json": b"run", "config.json": b"new"}


def test_the_newest_whole_checkpoint_is_taken_and_half_written_ones_are_passed_over(tmp_path):
    assert newest_checkpoint(tmp_path, "state.pt") is None
    for name, file in (("checkpoint-9", "state.pt"), ("checkpoint-10", "state.pt"),
                       ("checkpoint-20", "model.safetensors"),
                       (".checkpoint-30", "state.pt"), ("checkpoint-final", "state.pt"), ("checkpoint-", "state.pt")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("…")
    assert newest_checkpoint(tmp_path, "state.pt").name == "checkpoint-10"


def drawn():
    return torch.rand(3).tolist(), random.random(), random.gauss(0, 1), np.random.normal(size=3).tolist()


def test_rng_states_come_back_through_a_file_to_the_last_draw(tmp_path):
    random.gauss(0, 1), np.random.normal()                                               # both keep half a draw in hand
    torch.save(rng_state(), tmp_path / "rng.pt")
    first = drawn()
    assert drawn() != first
    set_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert drawn() == first


def engine(config):
    torch.manual_seed(0)
    return Engine(torch.nn.Linear(3, 1), config, 0.1, 10)


def trained(made, steps):
    for _ in range(steps):
        made.backward(made(torch.rand(4, 3)).pow(2).mean())
        made.step()
        made.advance()
    return made.model.weight.tolist(), made.learning_rate


def save(config, made, step, **options):
    save_checkpoint(config.output_dir, step, {"kl": 0.5}, {"actor": made},
                    **{"keep": 2, "rank": 0, "barrier": lambda: None} | options)


def test_a_loop_goes_on_from_its_checkpoint_bit_by_bit(config):
    made = engine(config)
    trained(made, 3)
    save(config, made, 3)
    straight = trained(made, 4)
    again = engine(config)
    assert load_checkpoint(config.output_dir, {"actor": again}, 0) == {"kl": 0.5, "step": 3}
    assert trained(again, 4) == straight


def test_without_a_checkpoint_there_is_nothing_to_go_on_from(config):
    assert load_checkpoint(config.output_dir, {}, 0) is None


def test_the_newest_checkpoints_stay_by_number_not_by_name(config):
    for step in (8, 9, 10, 11):
        save(config, engine(config), step)
    assert sorted(p.name for p in Path(config.output_dir).iterdir()) == ["checkpoint-10", "checkpoint-11"]


def test_a_checkpoint_that_fails_half_way_leaves_the_one_before(config, monkeypatch):
    made = engine(config)
    save(config, made, 5)

    def full(engine, folder):
        (Path(folder) / "state-0.safetensors").write_bytes(b"half")
        raise FULL
    monkeypatch.setattr("rlhfkit.saving.save_state", full)
    with pytest.raises(OSError, match="No space left"):
        save(config, made, 10)
    assert load_checkpoint(config.output_dir, {"actor": engine(config)}, 0)["step"] == 5


def test_a_run_that_starts_again_from_the_beginning_saves_over_its_old_checkpoints(config):
    """resume=False may be set on the same run; renaming onto a folder that is there was an OSError."""
    save(config, engine(config), 5)
    save(config, engine(config), 5)
    assert newest_checkpoint(config.output_dir, "state.pt").name == "checkpoint-5"
