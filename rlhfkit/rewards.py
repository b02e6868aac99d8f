"""What scores an answer: reward models, an ensemble of them, or a Python function; and where models that only score are kept.

A reward model must have the actor's vocabulary: the ids that were sampled are scored, not a text encoded again (the 2023 kit decoded, encoded
again and scored other ids). For a model of another tokenizer give a reward_function that calls `rk.score`.
"""
import importlib
from contextlib import contextmanager

import torch

from rlhfkit.engine import device
from rlhfkit.families import DTYPES, load_tokenizer
from rlhfkit.models.value import load_reward_model, score
from rlhfkit.rl import ensemble, moments

ROWS = 64                   # answers scored at once


class Rewards:
    """The reward models of `reward_path`, combined by `ensemble`, plus the reward function. Of several each is centred on its mean over the
    first answers that it scores (`offsets`): a pair loss leaves every model an offset of its own, which would decide the minimum."""

    def __init__(self, config, tokenizer):
        self.rule, self.host = config.ensemble, config.frozen_on == "host"
        self.models = [self._load(path.strip(), config, tokenizer) for path in config.reward_path.split(",") if path.strip()]
        self.offsets = []
        self.function = load_function(config.reward_function) if config.reward_function else None

    def __call__(self, ids, mask, texts):
        """ids, mask (B, T), texts B pairs (prompt, answer) -> (scores (B,) float32, spread (B,): standard deviation over the reward models,
        0 for one). Raises ValueError for a wrong count and for scores that are no finite numbers."""
        total = spread = torch.zeros(len(ids), device=ids.device)
        if self.models:
            with torch.no_grad(), placed(self.models, self.host):
                scores = torch.stack([torch.cat([score(m, i, k) for i, k in zip(ids.split(ROWS), mask.split(ROWS))]) for m in self.models])
            if len(scores) > 1:
                self.offsets = self.offsets or [float(moments(row, torch.ones_like(row))[0]) for row in scores]
                scores = scores - torch.tensor(self.offsets, device=ids.device)[:, None]
            total, spread = ensemble(scores, self.rule), scores.std(0, unbiased=False)
        if self.function:
            total = total + torch.tensor(self._called(texts), device=ids.device)
        if not bool(torch.isfinite(total).all()):
            at = int((~torch.isfinite(total)).nonzero()[0])
            raise ValueError(f"the score of {texts[at]} is {float(total[at])}; scores must be finite numbers: look at the reward model "
                             "(rk.score) or at what the reward function does with this answer")
        return total, spread

    def _called(self, texts):
        try:
            given = self.function([p for p, _ in texts], [a for _, a in texts])
        except Exception as error:
            raise RuntimeError(f"the reward function failed on {len(texts)} answers, the first of them {texts[0]}: "
                               f"{type(error).__name__}: {error}; it is called with a list of prompts and a list of answers") from error
        if not hasattr(given, "__len__") or len(given) != len(texts):
            count = len(given) if hasattr(given, "__len__") else f"a {type(given).__name__}, not a list of"
            raise ValueError(f"the reward function gave {count} scores for {len(texts)} answers; it must give one for each")
        try:
            return [float(x) for x in given]
        except (TypeError, ValueError) as error:
            raise ValueError(f"the reward function gave scores that are no numbers ({error}); it must give a float for each answer") from error

    @staticmethod
    def _load(path, config, tokenizer):
        if load_tokenizer(path).get_vocab() != tokenizer.get_vocab():
            raise ValueError(f"the reward model in {path} has another vocabulary than the actor in {config.model_path}; "
                             "train one on the actor's tokenizer, or give a reward_function that scores texts")
        model = load_reward_model(path, dtype=DTYPES[config.dtype]).requires_grad_(False)
        return model if config.frozen_on == "host" else model.to(device())


class AdapterOff:
    """A model with LoRA as it was before: the reference beside the actor, the reward model beside its critic, without a second copy."""

    def __init__(self, model, peft):
        self.model, self.peft = model, peft

    def __call__(self, *args, **kwargs):
        with self.peft.disable_adapter():
            return self.model(*args, **kwargs)


@contextmanager
def placed(models, from_host):
    """Frozen models on the device for a while; from_host: their weights are kept in host memory and only lent."""
    lent = []
    if from_host:
        for model in models:
            if isinstance(model, torch.nn.Module):
                lent += [(t, t.data) for t in (*model.parameters(), *model.buffers())]
    for tensor, data in lent:
        tensor.data = data.to(device())
    try:
        yield
    finally:
        for tensor, data in lent:
            tensor.data = data


def load_function(path):
    """`package.module:function` -> the function."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"reward_function is {path!r}, which cannot be imported ({error}); write package.module:function, and start "
                         "Python where that package is found") from error
