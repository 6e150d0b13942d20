"""Answer the requests of lm-evaluation-harness: likelihoods of continuations, of whole texts, and generated texts.

Equal requests are answered once, and requests with the same context read it once. Nothing is truncated. Answers go to a
journal, so that a killed evaluation goes on. Imports nothing of the harness; `lm_eval.py` is the adapter.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fam_jax.config import UserError
from fam_jax.data.token_weights import TokenWeights
from fam_jax.data.vocabulary import bos_ids, check_ids, first_input
from fam_jax.evaluation.answering import Answering, HowToAnswer
from fam_jax.evaluation.documents import Documents
from fam_jax.evaluation.item import CHOOSE, GENERATE, Answered, Item, Likelihood
from fam_jax.evaluation.joining import Joiner
from fam_jax.evaluation.journal import Journal
from fam_jax.evaluation.reading import Cost
from fam_jax.evaluation.run import make_setting
from fam_jax.evaluation.text import document_scores
from fam_jax.generation.sampling import GREEDY, Sampling
from fam_jax.generation.streaming import NotFiniteError
from fam_jax.generation.text import TextModel
from fam_jax.generation.tokenize import check_unicode, encode_pieces

# Tokens to generate where a request does not say how many, as in the harness.
MAX_TOKENS = 256
# Names that requests have for it; the first one counts.
_MAX_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SETTINGS = {*_MAX_TOKENS, "until", "do_sample", "temperature", "top_k", "top_p"}
# Continuations of one context that are an item, so that answers are in the journal soon.
CHOICES_OF_AN_ITEM = 64
# The answer to a request for no text at all.
NOTHING = Likelihood(0.0, 0, 0, greedy=True)


class Generation(NamedTuple):
    """How a text is generated."""

    max_tokens: int
    stop: tuple[str, ...]
    sampling: Sampling = GREEDY


class Answer(NamedTuple):
    """The answer to a request."""

    # A Likelihood, or a text.
    value: Any
    # What the request is a part of, for counts of tokens; None: nothing had to be read.
    item: Answered | None


# Called with a request and its answer, as soon as it is known.
OnAnswer = Callable[[Any, Any], None]


def read_generation(settings: Mapping[str, Any], max_tokens: int = MAX_TOKENS) -> Generation:
    """Return how a request wants its text.

    Args:
      settings: `generation_kwargs` of a task: until, do_sample, temperature, top_k, top_p, max_gen_toks.
      max_tokens: if the request does not say how many.

    Raises:
      UserError: a setting is unknown or out of range.
    """
    unknown = [name for name, value in settings.items() if name not in _SETTINGS and value is not None]
    if unknown:
        raise UserError(
            f"generation_kwargs.{unknown[0]}: is not supported; leave it out, or the task that sets it "
            f"(supported: {', '.join(sorted(_SETTINGS))})"
        )
    until = settings.get("until") or ()
    stop = tuple(dict.fromkeys(text for text in ([until] if isinstance(until, str) else until) if text))
    wanted = [settings[name] for name in _MAX_TOKENS if settings.get(name) is not None]
    count = int(wanted[0]) if wanted else max_tokens
    if count < 1:
        raise UserError(f"generation_kwargs.max_gen_toks: must be at least 1, got {count}")
    samples, temperature = settings.get("do_sample"), settings.get("temperature")
    if temperature is None:
        temperature = 1.0 if samples else 0.0
    if samples is False or float(temperature) == 0:
        return Generation(count, stop)
    top_p = settings.get("top_p")
    sampling = Sampling(
        float(temperature), int(settings.get("top_k") or 0), 1.0 if top_p is None else float(top_p)
    )
    return Generation(count, stop, sampling)


class Requests:
    """Answers requests with a model. `cost` and `longest` (tokens) say what it took since :meth:`write_to`."""

    def __init__(
        self,
        model: TextModel,
        *,
        batch_size: int,
        chunk_blocks: int,
        seed: int = 0,
        on_progress: Callable[[int, int], None] | None = None,
    ):
        """Take a model and how to run it.

        Args:
          model: with its vocabulary.
          batch_size: contexts, or texts, that are read together.
          chunk_blocks: most blocks of each to read at one time.
          seed: of what is sampled.
          on_progress: called with the answers that are known, and all, in items.

        Raises:
          ConfigError: data.add_bos is set, but the vocabulary has no start token.
        """
        vocabulary, data = model.vocabulary, model.config.data
        begin = bos_ids(vocabulary, data)
        self._model, self._seed, self._on_progress = model, seed, on_progress
        self._batch_size, self._chunk_blocks = batch_size, chunk_blocks
        self._first = first_input(vocabulary, data)
        self._joiner = Joiner(vocabulary, model.config.model.vocab_size, begin, self._first, keep_blanks=True)
        # A chat template may spell the start token, which every text begins with anyway.
        named = getattr(vocabulary, "named_tokens", None) or TokenWeights(vocabulary).named
        self._spelled = named.get("bos_token", "") if begin else ""
        self.write_to(Journal(None, {}), "")

    def take_spelled_tokens(self) -> None:
        """Take special tokens that contexts spell for those tokens from now on, as chat templates spell them."""
        self._joiner.encode_by(self._model.encode_spelled)

    def write_to(self, journal: Journal, task: str) -> None:
        """Find answers in a journal under the name of a task, and write new ones there."""
        self._journal, self._task = journal, task
        self.cost, self.longest = Cost(), 0

    def loglikelihoods(
        self, pairs: Sequence[tuple[str, str]], on_answer: OnAnswer | None = None
    ) -> dict[tuple[str, str], Answer]:
        """Return how likely continuations are behind their contexts.

        Args:
          pairs: contexts and continuations. An empty context is the start token, or the end token if there is none.
          on_answer: called with every distinct pair and its :class:`Likelihood`.

        Raises:
          UserError: a text has a token that the model has no embedding for, or is not valid Unicode.
        """
        found = {pair: Answer(NOTHING, None) for pair in pairs if not pair[1]}
        continuations: dict[str, list[str]] = {}
        for context, continuation in dict.fromkeys(pairs):
            if continuation:
                continuations.setdefault(context, []).append(continuation)
        items, contexts = [], {}
        for context, choices in continuations.items():
            for begin in range(0, len(choices), CHOICES_OF_AN_ITEM):
                part = tuple(choices[begin : begin + CHOICES_OF_AN_ITEM])
                item = Item(request_name("pair", context, *part), CHOOSE, self._once(context), choices=part)
                items.append(item)
                contexts[item.id] = context
        how = HowToAnswer(self._batch_size, self._chunk_blocks)
        for each in self._answers(items, functools.partial(self._run, how=how)):
            for continuation, likelihood in zip(each.item.choices, each.likelihoods, strict=True):
                found[contexts[each.item.id], continuation] = Answer(likelihood, each)
                if on_answer is not None:
                    on_answer((contexts[each.item.id], continuation), likelihood)
        return found

    def rolling(self, texts: Sequence[str], on_answer: OnAnswer | None = None) -> dict[str, Answer]:
        """Return how likely whole texts are behind the start token, or the end token if there is none.

        Every token is predicted from all tokens before it: there are no windows.

        Args:
          texts: of any length.
          on_answer: called with every distinct text and its :class:`Likelihood`.

        Raises:
          UserError: as :meth:`loglikelihoods`.
        """
        found = {text: Answer(NOTHING, None) for text in texts if not self._once(text)}
        items = [
            Item(request_name("rolling", text), CHOOSE, choices=(text,))
            for text in dict.fromkeys(texts)
            if text not in found
        ]
        for each in self._answers(items, self._measure):
            text, likelihood = each.item.choices[0], each.likelihoods[0]
            found[text] = Answer(likelihood, each)
            if on_answer is not None:
                on_answer(text, likelihood)
        return found

    def generated(
        self, requests: Sequence[tuple[str, Generation, int]], on_answer: OnAnswer | None = None
    ) -> dict[tuple[str, Generation, int], Answer]:
        """Return generated texts.

        Args:
          requests: contexts, how their texts are generated, and numbers, which tell apart requests that are otherwise
            equal and have samples of their own.
          on_answer: called with every distinct request and its text.

        Raises:
          UserError: as :meth:`loglikelihoods`, or the model's logits are not finite.
        """
        found: dict[tuple[str, Generation, int], Answer] = {}
        members: dict[Generation, dict[str, tuple[str, Generation, int]]] = {}
        for request in dict.fromkeys(requests):
            context, generation, number = request
            name = request_name("text", context, repr(generation), str(number))
            members.setdefault(generation, {})[name] = request
        for generation, named in members.items():
            how = HowToAnswer(
                self._batch_size, self._chunk_blocks, *generation[:2], generation.sampling, self._seed
            )
            items = [Item(name, GENERATE, self._once(request[0])) for name, request in named.items()]
            for each in self._answers(items, functools.partial(self._run, how=how)):
                request = named[each.item.id]
                found[request] = Answer(each.text, each)
                if on_answer is not None:
                    on_answer(request, each.text)
        return found

    def _answers(
        self, items: Sequence[Item], run: Callable[[list[Item]], Iterable[list[Answered]]]
    ) -> Iterator[Answered]:
        """Yield the answers that the journal has, and then those that `run` gives."""
        left, done = [], 0
        for item in items:
            known = self._journal.find(self._task, item)
            if known is None:
                left.append(item)
            else:
                done += 1
                yield known
        for answers in run(left) if left else ():
            self._journal.add(self._task, answers)
            done += len(answers)
            if self._on_progress is not None:
                self._on_progress(done, len(items))
            yield from answers

    def _run(self, items: list[Item], how: HowToAnswer) -> Iterator[list[Answered]]:
        answering = Answering(self._model.streamer, self._joiner, how, self._model.end_ids)
        for answers in answering.run(items):
            self.longest = max(self.longest, *(each.tokens_read for each in answers))
            yield answers
        self.cost.needed += answering.cost.needed
        self.cost.paid += answering.cost.paid

    def _measure(self, items: list[Item]) -> Iterator[list[Answered]]:
        """Measure whole texts, those of similar length together, the longest first."""
        from fam_jax.data.interface import Example

        rows = min(self._batch_size, len(items))
        setting = make_setting(self._model.config)
        evaluate = dataclasses.replace(setting.evaluate, batch_size=rows, chunk_blocks=self._chunk_blocks)
        items = sorted(items, key=lambda item: -len(item.choices[0]))
        for begin in range(0, len(items), rows):
            batch = items[begin : begin + rows]
            ids = [self._encoded(self._once(item.choices[0])) for item in batch]
            examples = [Example(each, np.ones(len(each), np.float32), 0) for each in ids]
            filled = examples + [examples[-1]] * (rows - len(batch))  # another size would be another program
            documents = Documents(filled, self._joiner.vocabulary, self._first)
            scores = document_scores(self._model.streamer, documents, setting._replace(evaluate=evaluate))
            answers = []
            for item, score in zip(batch, scores, strict=False):
                count, text = len(score.nats), item.choices[0]
                total = -float(np.sum(score.nats, dtype=np.float64))
                if math.isnan(total):
                    raise NotFiniteError(f"{text[:40]!r}: {NotFiniteError.reason(count)}")
                likelihood = Likelihood(
                    total, count, len(text.strip().encode()), greedy=bool(score.correct.all())
                )
                answers.append(Answered(item, (likelihood,), tokens_read=count, tokens_expected=count))
            self.longest = max(self.longest, *map(len, ids))
            self.cost.needed += sum(map(len, ids))
            self.cost.paid += rows * max(map(len, ids))
            yield answers

    def _encoded(self, text: str) -> np.ndarray:
        """Return the ids (n,) of a text, without a start token."""
        check_unicode(text, "a text")
        ids = [token for piece in encode_pieces(self._joiner.encode, [text]) for token in piece]
        check_ids(ids, self._joiner.vocabulary, self._model.config.model.vocab_size)
        return np.asarray(ids, np.int32)

    def _once(self, text: str) -> str:
        """Return a text without the start token that it spells, if the model gets one anyway."""
        return text.removeprefix(self._spelled)


def request_name(*parts: str) -> str:
    """Return the id of an item: it changes with any of its texts."""
    return hashlib.blake2b(repr(parts).encode(errors="surrogatepass"), digest_size=16).hexdigest()
