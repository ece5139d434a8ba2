"""Tasks of EleutherAI's lm-evaluation-harness, around a model that is loaded already.

The harness (https://github.com/EleutherAI/lm-evaluation-harness) is the extra ``lm-eval``; it is imported when a task
of it is asked for.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from typing import Any

from huggingface_hub import HfApi, constants
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import ConfigError
from .assets import HUB_TIMEOUT, AssetError
from .config import HarnessConfig
from .records import HarnessScore
from .tasks import TASKS

FILE_LOADERS = ("json", "csv", "parquet", "text", "arrow", "pandas", "imagefolder")


class Harness:
    """The harness' tasks that an experiment names, with their data, ready before any weights are loaded.

    Args:
        config: which tasks.

    Raises:
        AssetError: if the harness is not installed.
        ConfigError: if a task is not known, or its data cannot be had.
    """

    def __init__(self, config: HarnessConfig) -> None:
        try:
            self._lm_eval: Any = importlib.import_module("lm_eval")
            tasks: Any = importlib.import_module("lm_eval.tasks")
            self._models: Any = importlib.import_module("lm_eval.models.huggingface")
        except ImportError as error:
            raise AssetError(
                f'lm_eval.tasks: {list(config.tasks)} need lm-evaluation-harness: pip install "modelopt-lite[lm-eval]" '
                f"({error})"
            ) from error
        self._config = config
        self._manager = tasks.TaskManager(
            include_path=None if config.include_path is None else str(config.include_path), include_defaults=False
        )
        if any(name not in self._manager.all_tasks for name in config.tasks):
            self._manager = tasks.TaskManager(
                include_path=None if config.include_path is None else str(config.include_path)
            )
        self._check_names()
        self._check_network()
        try:
            self._manager.load(list(config.tasks))
        except Exception as error:  # whatever the harness and its readers of data raise
            reason = str(error).strip().partition("\n")[0]
            raise ConfigError(
                f"lm_eval.tasks: {list(config.tasks)} cannot be loaded; {type(error).__name__}: {reason}"
            ) from error

    def _check_names(self) -> None:
        for i, name in enumerate(self._config.tasks):
            if name not in self._manager.all_tasks:
                where = "" if self._config.include_path is None else f" or in {self._config.include_path}"
                raise ConfigError(
                    f"lm_eval.tasks.{i}: {name!r} is not allowed; must be a task, group or tag of "
                    f"lm-evaluation-harness {self._lm_eval.__version__}{where}; generated tasks are {', '.join(TASKS)}"
                )

    def _check_network(self) -> None:
        """Refuse tasks whose data is on the hub if the hub does not answer; its client would try for minutes."""
        if constants.HF_HUB_OFFLINE:  # then what is not in the cache is refused at once
            return
        remote = {name: path for name, path in self._datasets() if path not in FILE_LOADERS and not os.path.isdir(path)}
        if not remote:
            return
        name, path = next(iter(remote.items()))
        try:
            HfApi().dataset_info(path, timeout=HUB_TIMEOUT)
        except Exception as error:  # which errors there are depends on the version of its HTTP client
            if getattr(error, "response", None) is None:
                raise ConfigError(
                    f"lm_eval.tasks: {name!r} is not allowed; it needs the dataset {path} from {constants.ENDPOINT}, "
                    "which does not answer. Tasks in a folder of your own (include_path) work offline; data that is "
                    "in the cache is used with HF_HUB_OFFLINE=1"
                ) from error

    def _datasets(self) -> Iterator[tuple[str, str]]:
        """Yield the tasks that are named, groups and tags taken apart, with the paths of their datasets."""
        index = self._manager.task_index
        waiting, seen = list(self._config.tasks), set()
        while waiting:
            name = waiting.pop()
            if name in seen:
                continue
            seen.add(name)
            entry = index.get(name)
            content = (entry.cfg or {}) if entry is not None else {}
            inside = content.get("task")
            if isinstance(inside, list):
                waiting += [part if isinstance(part, str) else part.get("task") for part in inside]
            elif "dataset_path" in content:
                yield name, content["dataset_path"]
            else:
                waiting += [other for other, found in index.items() if name in (found.tags or ())]

    def evaluate(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, variant: str, seed: int
    ) -> tuple[list[HarnessScore], dict[str, list[Any]]]:
        """Evaluate a model as it is now.

        Args:
            model: the model.
            tokenizer: its tokenizer.
            name: the model's name, for the records.
            variant: the variant's name, for the records.
            seed: of the examples in prompts.

        Returns:
            The scores, and the samples by task.
        """
        wrapped = self._models.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=self._config.batch_size)
        found = self._lm_eval.simple_evaluate(
            model=wrapped,
            tasks=list(self._config.tasks),
            task_manager=self._manager,
            num_fewshot=self._config.num_fewshot,
            limit=self._config.limit,
            bootstrap_iters=1000,
            random_seed=seed,
            fewshot_random_seed=seed,
        )
        scores = []
        for task, metrics in found["results"].items():
            better = found.get("higher_is_better", {}).get(task, {})
            count = found.get("n-samples", {}).get(task, {}).get("effective", 0)
            for key, value in metrics.items():
                metric, _, rest = key.partition(",")
                if metric.endswith("_stderr") or not isinstance(value, int | float) or not rest:
                    continue
                stderr = metrics.get(f"{metric}_stderr,{rest}")
                scores.append(
                    HarnessScore(
                        model=name,
                        variant=variant,
                        task=task,
                        metric=key,
                        value=float(value),
                        stderr=float(stderr) if isinstance(stderr, int | float) else None,
                        samples=count,
                        higher_is_better=better.get(metric),
                    )
                )
        return scores, found.get("samples", {})
