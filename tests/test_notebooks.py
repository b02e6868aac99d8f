"""The rules that the notebooks keep, the parameter files that go with them, and the script that runs them."""
import ast
import dataclasses
import importlib.util
import json
import re
import shutil
import subprocess
import sys

import nbformat
import papermill
import pytest
import yaml
from conftest import PROJECT
from papermill.exceptions import PapermillExecutionError

import rlhfkit as rk

FOLDER = PROJECT / "notebooks"
NAMES = ["00_tour", "01_data", "02_pretrain", "03_sft", "04_reward", "05_ppo", "06_dpo", "07_evaluate", "08_benchmark"]
STAGES = {"02_pretrain": rk.Pretrain, "03_sft": rk.SFT, "04_reward": rk.Reward, "05_ppo": rk.PPO, "06_dpo": rk.DPO}
NOTEBOOK_ONLY = {"num_processes", "hostfile", "tiny_path", "family", "vocab_path", "ppo_path", "judged_path",
                 "judged_prompts", "answers_per_prompt", "max_new_tokens", "temperature"}         # no field of a config
KERNELSPEC = {"name": "python3", "display_name": "Python 3", "language": "python"}
ABSOLUTE = re.compile(r"""(?:^|[\s"'(=>])(/(?:home|root|tmp|usr|opt|work|mnt|data|Users|private|var)/[^\s"']*)""")
RECIPES = sorted((FOLDER / "parameters").glob("*.yaml"))
every_notebook = pytest.mark.parametrize("name", NAMES)


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def parameters(name):
    return papermill.inspect_notebook(str(FOLDER / f"{name}.ipynb"))


def outputs(notebook):
    return [output for cell in code(notebook) for output in cell.outputs]


def test_there_is_one_notebook_a_stage_and_no_other():
    assert [path.stem for path in sorted(FOLDER.glob("*.ipynb"))] == NAMES


@every_notebook
def test_the_first_code_cell_holds_the_parameters_one_a_line_and_papermill_understands_each(name):
    cells = code(read(name))
    assert [i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", [])] == [0]
    nodes = ast.parse(cells[0].source).body
    assert all(isinstance(node, ast.AnnAssign) for node in nodes)
    for node in nodes:
        assert node.annotation.id == type(ast.literal_eval(node.value)).__name__, f"{node.target.id} is of another type"
    assert [node.target.id for node in nodes] == list(parameters(name))


@every_notebook
def test_the_second_code_cell_stops_on_unknown_parameters_and_prints_the_versions(name):
    source = code(read(name))[1].source
    assert "rk.check_parameters(globals())" in source and "rk.versions()" in source


@every_notebook
def test_cells_are_short_and_define_nothing_but_values(name):
    for cell in code(read(name)):
        tagged = "parameters" in cell.metadata.get("tags", [])
        assert tagged or len(cell.source.splitlines()) <= 12, cell.source
        assert not re.search(r"^\s*[!%]", cell.source, re.MULTILINE), cell.source
        kinds = (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)
        assert not any(isinstance(node, kinds) for node in ast.walk(ast.parse(cell.source))), cell.source


@every_notebook
def test_a_notebook_imports_the_kit_and_the_standard_library_alone(name):
    nodes = [node for cell in code(read(name)) for node in ast.walk(ast.parse(cell.source))]
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert not {m.partition(".")[0] for m in modules} - set(sys.stdlib_module_names) - {"rlhfkit"}


@every_notebook
def test_outputs_are_committed_whole_in_order_and_without_errors(name):
    notebook = read(name)
    counts = [cell.execution_count for cell in code(notebook)]
    assert counts == list(range(1, len(counts) + 1)), "outputs are refreshed by `make notebooks`, from top to bottom"
    assert any(cell.outputs for cell in code(notebook))
    assert not [output for output in outputs(notebook) if output.output_type == "error"]


@every_notebook
def test_a_notebook_keeps_nothing_of_the_machine_that_ran_it(name):
    notebook = read(name)
    assert notebook.metadata == {"kernelspec": KERNELSPEC}
    assert all(set(cell.metadata) <= {"tags"} for cell in notebook.cells)
    texts = [part.get(key, "") for output in outputs(notebook) for part in (output, output.get("data", {}))
             for key in ("text", "text/plain", "text/html")]
    for text in [*texts, *(cell.source for cell in notebook.cells)]:
        assert not ABSOLUTE.findall(text) and "\r" not in text
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 500_000


@every_notebook
def test_everything_is_written_below_runs(name):
    for parameter in parameters(name).values():
        if parameter["name"] == "output_dir":
            assert ast.literal_eval(parameter["default"]).startswith("../runs/tiny/")


@pytest.mark.parametrize("name", STAGES)
def test_a_stages_parameters_are_fields_of_its_config(name):
    fields = {field.name for field in dataclasses.fields(STAGES[name])}
    assert set(parameters(name)) - fields - NOTEBOOK_ONLY == set()


def test_there_are_recipes_for_real_models():
    assert RECIPES, "notebooks/parameters holds no YAML file"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_name_and_type_in_a_recipe_is_one_of_its_notebooks_parameters(path):
    name = next(name for name in NAMES if path.stem.endswith("-" + name[3:]))
    known, given = parameters(name), yaml.safe_load(path.read_text(encoding="utf-8"))
    assert set(given) <= set(known)
    for key, value in given.items():
        assert type(value).__name__ == known[key]["inferred_type_name"], f"{key}: {value!r} (for YAML 1e-5 is text)"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_that_counts_epochs_is_not_stopped_by_the_notebooks_own_number_of_steps(path):
    """The tiny runs' max_steps would win: the recipes for reward models and DPO once trained a few hundred steps only."""
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert "num_epochs" not in given or given["max_steps"] == 0


def test_one_e_minus_five_in_yaml_is_a_string_and_the_error_says_what_to_write():
    given = yaml.safe_load("learning_rate: 1e-5")
    with pytest.raises(TypeError, match=r"learning_rate is the string '1e-5'.*in a YAML parameter file write 1\.0e-5"):
        rk.SFT(model_path="m", data_path="d", output_dir="o", **given)


# A notebook of three cells, as papermill and the script see ours.
def stub(path, parameters, *cells):
    first = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    cells = [first, *map(nbformat.v4.new_code_cell, cells)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": KERNELSPEC}), path)


def test_a_misspelt_parameter_stops_the_run(tmp_path):
    given, made = tmp_path / "a.ipynb", tmp_path / "b.ipynb"
    stub(given, "learning_rate: float = 1e-5  # step size", "import rlhfkit as rk\nrk.check_parameters(globals())")
    with pytest.raises(PapermillExecutionError, match="no parameter 'learning_rte'; did you mean 'learning_rate'"):
        papermill.execute_notebook(given, made, {"learning_rte": 1e-4}, progress_bar=False)
    papermill.execute_notebook(given, made, {"learning_rate": 1e-4}, progress_bar=False)


RESULT = """import json, os
os.makedirs(output_dir, exist_ok=True)
metrics = dict(eval_loss_before=6.5, eval_loss=3.25, seconds=7.4)
from tqdm.std import tqdm
_ = list(tqdm(range(3)))
print(os.path.abspath(output_dir), file=open(output_dir + "/where.txt", "w"))
_ = json.dump(dict(stage="pretrain", metrics=metrics), open(output_dir + "/result.json", "w"))"""
ROWS = """import os
os.makedirs(output_dir + "/sft", exist_ok=True)
_ = open(output_dir + "/sft/train.jsonl", "w").write("{}\\n" * 12)
print(os.path.abspath(output_dir))"""


@pytest.fixture
def project(tmp_path):
    folder = tmp_path / "notebooks"
    folder.mkdir()
    shutil.copy(FOLDER / "run.py", folder)
    stub(folder / "01_data.ipynb", 'output_dir: str = "../runs/tiny/data"  # gets the records\nraw_dir: str = ""\n'
         'vocab_path: str = ""\npair_sources: str = "couplets"', ROWS)
    stub(folder / "02_pretrain.ipynb", 'output_dir: str = "../runs/tiny/pretrain"  # the run', RESULT)
    return tmp_path


@pytest.fixture(scope="module")
def script_module():
    spec = importlib.util.spec_from_file_location("run_notebooks", FOLDER / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def script(project, *words):
    command = [sys.executable, project / "notebooks/run.py", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_demo_runs_the_notebooks_in_order_and_closes_with_a_table_that_is_the_same_the_second_time(project):
    first = script(project, "demo")
    assert first.returncode == 0, first.stderr
    lines = first.stdout.splitlines()
    assert re.fullmatch(r"01_data\s+\d+ s  records to train on 12", lines[0])
    assert re.fullmatch(r"02_pretrain\s+\d+ s  held-out loss 6\.500 → 3\.250", lines[1])
    assert lines[-1].split() == "02_pretrain held-out loss 6.500 3.250 – – 7 runs/demo/02_pretrain.ipynb".split()
    assert (project / "runs/demo/pretrain/where.txt").read_text().strip() == str(project / "runs/demo/pretrain")
    assert (project / "runs/demo/02_pretrain.ipynb").is_file() and not (project / "runs/tiny").exists()
    assert script(project, "demo").stdout.splitlines()[-1] == lines[-1]
    stub(project / "notebooks/02_pretrain.ipynb", 'output_dir: str = "../runs/tiny/pretrain"\nseed: int = 1', RESULT)
    assert "made with other parameters or data: it is made anew" in script(project, "demo").stdout


def test_a_failing_notebook_ends_the_demo_and_says_where_to_look(project):
    stub(project / "notebooks/02_pretrain.ipynb", 'output_dir: str = "../runs/tiny/pretrain"', "print(1)",
         "raise ValueError('no rows')")
    done = script(project, "demo")
    assert done.returncode == 1
    assert "`raise ValueError('no rows')`: ValueError: no rows" in done.stdout
    assert "runs/demo/02_pretrain.ipynb" in done.stdout and (project / "runs/demo/02_pretrain.ipynb").is_file()


def test_a_parameter_that_a_notebook_lacks_is_an_error_before_anything_runs(project):
    done = script(project, "demo", "--data", str(project))
    assert done.returncode == 1 and "02_pretrain.ipynb has no parameter" in done.stderr
    assert not (project / "runs").exists()


def test_a_folder_that_no_demo_made_is_left_alone(project):
    (project / "runs/demo").mkdir(parents=True)
    (project / "runs/demo/mine.txt").write_text("kept")
    done = script(project, "demo")
    assert done.returncode == 1 and "no demo made" in done.stderr
    assert (project / "runs/demo/mine.txt").read_text() == "kept"


def test_refreshing_stores_outputs_without_what_changes_from_run_to_run(project):
    done = script(project, "refresh")
    assert done.returncode == 0, done.stderr
    notebook = nbformat.read(project / "notebooks/01_data.ipynb", as_version=4)
    assert [cell.execution_count for cell in notebook.cells] == [1, 2]
    assert notebook.metadata == {"kernelspec": KERNELSPEC} and notebook.cells[1].metadata == {}
    assert notebook.cells[1].outputs[0].text == "../runs/tiny/data\n"
    assert nbformat.read(project / "notebooks/02_pretrain.ipynb", as_version=4).cells[1].outputs == []
    assert json.loads((project / "runs/tiny/pretrain/result.json").read_text())["stage"] == "pretrain"


def test_the_table_has_the_judges_scores_where_there_are_some_and_a_dash_where_not(script_module, tmp_path):
    ppo = dict(stage="ppo", metrics=dict(eval_score_before=-0.5, eval_score=1.25, gold_before=0.4, gold=0.75, seconds=12.0))
    for name, text in (("ppo/result.json", json.dumps(ppo)), ("sweep/table.csv", "batch_size,tokens_per_second\n4,900.5\n8,\n"),
                       ("evaluate/table.csv", "task,metric,sft,ppo\ncouplets,gold,0.41,0.77\nocnli,accuracy,0.3,0.3\n")):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text, encoding="utf-8")
    given = dict(baseline="sft", candidate="ppo")
    rows = [script_module.summary(name, given | {"output_dir": str(tmp_path / name)}, 3.0) | {"look at": "n"}
            for name in ("ppo", "evaluate", "sweep")]
    assert rows[0]["line"] == "gold score 0.400 → 0.750, reward score -0.500 → 1.250"
    assert [line.split()[-7:] for line in script_module.table(rows).splitlines()[1:]] == [
        "score -0.500 1.250 0.400 0.750 12 n".split(), "ppo – – 0.410 0.770 3 n".split(), "run – 900 – – 3 n".split()]


def test_the_demos_parameters_all_exist_in_the_notebooks(script_module):
    plan = script_module.planned("demo-data", data=str(FOLDER), vocab=str(FOLDER / "run.py"))
    assert list(plan) == NAMES[1:] and set(script_module.DATA) <= set(plan)
    assert plan["01_data"]["pair_sources"] == "" and plan["02_pretrain"]["vocab_path"].endswith("run.py")
    assert all("runs/tiny" not in str(value) for values in plan.values() for value in values.values())
