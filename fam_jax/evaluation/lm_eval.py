"""A model for lm-evaluation-harness: its contexts are read once, without a maximum length.

    import lm_eval
    from fam_jax.evaluation.lm_eval import HarnessLM

    found = lm_eval.simple_evaluate(model=HarnessLM.restore("runs/text"), tasks=["hellaswag"], bootstrap_iters=0)

Importing this module needs the package lm_eval (`pip install fam-jax[lm-eval]`), and makes the model known to the
harness as "fam_jax". `launch.evaluate --tasks=lm_eval:TASK` runs tasks of the harness beside those of fam_jax.
"""

import dataclasses
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from fam_jax.checkpoint import vocabulary_digest
from fam_jax.config import MeshConfig, UserError
from fam_jax.data.records import RowError
from fam_jax.data.tokenizer_folder import CHAT_TEMPLATE
from fam_jax.evaluation.harness import MAX_TOKENS, Answer, Requests, read_generation
from fam_jax.evaluation.item import Answered
from fam_jax.evaluation.journal import Journal
from fam_jax.generation.text import TextModel
from fam_jax.sharding import make_mesh

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise UserError(
        "lm_eval: lm-evaluation-harness is not installed, or not whole; install fam-jax[lm-eval], or leave out tasks "
        "that begin with lm_eval:"
    ) from error


__all__ = ["HarnessLM", "TaskManager", "simple_evaluate"]


@register_model("fam_jax")
class HarnessLM(LM):
    """A model of fam_jax that answers the requests of the harness.

    In a job of several processes, all of them make the same requests and get all answers: `world_size` is 1.
    """

    def __init__(
        self,
        model: TextModel,
        *,
        batch_size: int | None = None,
        chunk_blocks: int | None = None,
        max_gen_toks: int = MAX_TOKENS,
        seed: int = 0,
        on_progress: Callable[[int, int], None] | None = None,
    ):
        """Take a model and how to run it.

        Args:
          model: with its vocabulary.
          batch_size: contexts that are read together; None: evaluate.batch_size of the run.
          chunk_blocks: most blocks of each to read at one time; None: evaluate.chunk_blocks of the run.
          max_gen_toks: tokens to generate if a task does not say how many.
          seed: of texts that a task samples; equal requests have samples of their own.
          on_progress: called with the contexts whose requests are answered, and all.
        """
        super().__init__()
        evaluate = model.config.evaluate
        self.model, self._max_tokens = model, max_gen_toks
        self.requests = Requests(
            model,
            batch_size=batch_size or evaluate.batch_size,
            chunk_blocks=chunk_blocks or evaluate.chunk_blocks,
            seed=seed,
            on_progress=on_progress,
        )
        self._template: Any = None
        self._read: dict[str, dict[str, Answered]] = {}

    @classmethod
    def restore(
        cls,
        checkpoint: str | os.PathLike[str],
        *,
        step: int | None = None,
        mesh: MeshConfig | None = None,
        imports: Sequence[str] = (),
        **how: Any,
    ) -> "HarnessLM":
        """Load the model of a run, divided over all devices; `how` goes to the constructor.

        Raises:
          UserError: the checkpoint cannot be read.
        """
        model = TextModel.restore(checkpoint, step, make_mesh(mesh or MeshConfig()), imports=imports)
        return cls(model, **how)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> "HarnessLM":
        """Load the model that `model_args` of the harness names, such as checkpoint=runs/text,step=100.

        Raises:
          UserError: they name no checkpoint, an argument is unknown, or the checkpoint cannot be read.
        """
        given = {**(additional_config or {}), **arg_dict}
        # The harness passes them to every model; the devices are those of JAX.
        found = {
            name: value
            for name, value in given.items()
            if value is not None and name not in ("device", "max_batch_size")
        }
        known = ("checkpoint", "step", "batch_size", "chunk_blocks", "max_gen_toks", "seed")
        for name in found:
            if name not in known:
                raise UserError(f"model_args: {name} is unknown; use {', '.join(known)}")
        if "checkpoint" not in found:
            raise UserError("model_args: names no checkpoint; give checkpoint=RUN")
        checkpoint = found.pop("checkpoint")
        try:
            numbers: dict[str, Any] = {name: int(value) for name, value in found.items()}
        except ValueError as error:
            raise UserError(f"model_args: {error}; give whole numbers") from error
        return cls.restore(checkpoint, **numbers)

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: Mapping[str, Any] | None = None
    ) -> "HarnessLM":
        """Load the model that `--model_args` of the harness names; errors are those of `create_from_arg_obj`."""
        parts = [part.partition("=") for part in arg_string.split(",") if part]
        return cls.create_from_arg_obj({name: value for name, _, value in parts}, additional_config)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return log probability of each continuation, and whether greedy decoding gives it (a tie counts as not)."""
        pairs = [(str(context), str(continuation)) for context, continuation in _arguments(requests)]

        def keep(pair: Any, likelihood: Any) -> None:
            self.cache_hook.add_partial("loglikelihood", pair, (likelihood.sum, likelihood.greedy))

        found = self.requests.loglikelihoods(pairs, keep)
        self._count(requests, [found[pair] for pair in pairs])
        return [(found[pair].value.sum, found[pair].value.greedy) for pair in pairs]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log probability of each text, every token predicted from all tokens before it."""
        texts = [str(text) for (text,) in _arguments(requests)]

        def keep(text: Any, likelihood: Any) -> None:
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), likelihood.sum)

        found = self.requests.rolling(texts, keep)
        self._count(requests, [found[text] for text in texts])
        return [found[text].value.sum for text in texts]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the text generated behind each context, up to a stop string, an end token or the largest number.

        Raises:
          UserError: a task sets something unknown in `generation_kwargs`.
        """
        asked, settings, seen = [], {}, Counter[Hashable]()
        for context, given in _arguments(requests):
            generation = read_generation(given, self._max_tokens)
            # Equal requests are repetitions, which differ only if they are sampled.
            number = seen[context, generation] if generation.sampling.temperature else 0
            seen[context, generation] += 1
            asked.append((str(context), generation, number))
            settings[asked[-1]] = given

        def keep(request: Any, text: Any) -> None:
            if not request[1].sampling.temperature:
                self.cache_hook.add_partial("generate_until", (request[0], settings[request]), text)

        found = self.requests.generated(asked, keep)
        self._count(requests, [found[request] for request in asked])
        return [found[request].value for request in asked]

    def write_to(self, journal: Journal, task: str) -> None:
        """Reuse the answers in a journal, add new ones under the name of a task, and reset the counts."""
        self.requests.write_to(journal, task)
        self._read = {}

    def read_for(self, task: str) -> list[Answered]:
        """Return what was answered for a task of the harness since :meth:`write_to`; each context once."""
        return [*self._read.get(task, {}).values()]

    def _count(self, requests: Sequence[Any], answers: Sequence[Answer]) -> None:
        for request, answer in zip(requests, answers, strict=True):
            if answer.item is not None:
                items = self._read.setdefault(str(getattr(request, "task_name", "")), {})
                items[answer.item.item.id] = answer.item

    @property
    def tokenizer_name(self) -> str:
        """Return a name of vocabulary and chat template, for the harness' cache of requests."""
        config = self.model.config
        vocabulary = vocabulary_digest(dataclasses.asdict(config)) or config.data.vocabulary
        template = self.chat_template(True) or ""
        name = config.data.vocabulary.rpartition("/")[2]
        return f"{name}-{hashlib.sha256(repr((vocabulary, template)).encode()).hexdigest()[:16]}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the source of the tokenizer's chat template; None if it has none, or none is asked for."""
        from fam_jax.data.chat import find_template

        data = self.model.config.data
        found = find_template(data.vocabulary, data.chat_template) if chat_template else None
        return None if found is None else found[0]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a chat as a prompt; without a generation prompt, its last message goes on.

        Raises:
          UserError: the tokenizer has no chat template, or the template rejects the chat.
        """
        if self._template is None:
            from fam_jax.data.instructions import chat_template  # imports TensorFlow

            self._template = chat_template(self.model.config.data, self.model.vocabulary)
        if self._template is None:
            raise UserError(
                f"the vocabulary {self.model.config.data.vocabulary!r} has no chat template beside it; put one there "
                f"as {CHAT_TEMPLATE}, or do not ask by chat"
            )
        self.requests.take_spelled_tokens()
        try:
            return self._template.prompt(chat_history, answer=add_generation_prompt)
        except RowError as error:  # its advice is for training data
            reason = str(error).rpartition("; ")[0]
            raise UserError(f"{reason}; leave the task out, or do not ask by chat") from error


def _arguments(requests: Sequence[Any]) -> list[tuple[Any, ...]]:
    return [request.args for request in requests]
