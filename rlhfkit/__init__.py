"""rlhfkit: raw corpora → tokenizer → pre-training → SFT → reward model → PPO or DPO → evaluation → benchmark, cell by cell.

The public names are below; each is imported when it is first used, so `import rlhfkit` is quick and needs no torch.
"""
import warnings
from importlib import import_module

warnings.filterwarnings("ignore", message="IProgress not found")     # tqdm, in a kernel without ipywidgets

_HOME = {
    "records": "Record Answer write_records split pairs",
    "formats": "read_records stream_records",
    "sources": "build",
    "corpus": "build_corpus",
    "duplicates": "contamination",
    "samples.couplets": "gold applies",
    "tokenizers.pangu": "patch_jieba unpatch_jieba",
    "families": "Family FAMILIES family_of load_tokenizer load_model",
    "miniature": "tiny",
    "rows": "show read_data documents pack text_rows sft_rows reward_rows pair_rows prompt_rows",
    "configs": "Pretrain SFT Reward PPO DPO Result check_parameters",
    "saving": "versions",
    "rollout": "generate judged_records rollouts",
    "launcher": "launch attach stop WorkerError",
    "health": "doctor",
    "overoptimisation": "stop_point hindsight",
    "memory": "will_it_fit",
    "tasks": "Task TASKS",
    "evaluation": "evaluate tabulate perplexity compare win_rate report_card score leaderboard samples_table write_page",
    "bench": "sweep time_steps",
    "plots": "plot_history plot_margins plot_scores plot_memory plot_rows plot_lengths plot_answers",
    "plots_rl": "plot_rollout plot_phases plot_frontier plot_ablation",
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names.split()}
__all__ = sorted(_MODULE_OF)


def __getattr__(name):
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'rlhfkit' has no attribute {name!r}; public names: {', '.join(__all__)}")
    return getattr(import_module(f"rlhfkit.{_MODULE_OF[name]}"), name)


def __dir__():
    return __all__
