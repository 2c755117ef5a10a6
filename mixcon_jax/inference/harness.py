"""A run as a model of lm-evaluation-harness: its tasks, such as HellaSwag or LAMBADA, straight from a checkpoint.

``lm_eval`` (EleutherAI, Gao et al., 2021) brings the tasks and their metrics, and asks three things of a model, which
are here; ``tasks`` brings both together.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mixcon_jax.errors import UserError
from mixcon_jax.inference.generate import Sampling, generate
from mixcon_jax.inference.likelihood import Ending, Likelihood, likelihoods, longest_first, rounded_up
from mixcon_jax.inference.load import TrainedModel

NEW_TOKENS = 256  # that are generated at most where a task says no number
NUMBERS = ('max_gen_toks', 'max_new_tokens', 'max_tokens', 'max_completion_tokens')  # by which it may say one
Say = Callable[[str], None]


class Answers:
    """What a trained model answers to lm_eval's three kinds of requests, each of which has its ``args``.

    Every text begins a document, with the token that ends one, as in training. Of a context that does not fit the last
    tokens are taken.

    Args:
      trained: the model.
      batch_size: rows at a time.
      max_length: tokens that are read at most, the one that begins a document included.
      say: takes a line from time to time.
    """

    def __init__(self, trained: TrainedModel, batch_size: int, max_length: int, say: Say = lambda line: None) -> None:
        self._trained, self._words = trained, trained.tokenizer
        self._batch_size, self._max_length, self._say = batch_size, max_length, say

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Likelihood]:
        """Of each ``(context, continuation)``, the continuation's log-probability and whether it is the greedy one."""
        return self._likelihoods([self._ending(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of each ``(text,)``, its log-probability: each token's from as many before it as fit, in few windows."""
        texts = [self._encode(request.args[0]) for request in requests]
        parts = [list(windows([self._words.eot_id, *tokens], self._max_length)) for tokens in texts]
        found = iter(self._likelihoods([window for part in parts for window in part]))
        return [sum(next(found).log for _ in part) for part in parts]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Of each ``(context, options)``, what follows up to the first of the texts ``until``, without it."""
        answers = [''] * len(requests)
        asked: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            asked.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        for options, group in asked.items():
            for rows, texts in self._continued([requests[i].args[0] for i in group], json.loads(options)):
                for row, text in zip(rows, texts, strict=True):
                    answers[group[row]] = text
        return answers

    def _ending(self, context: str, continuation: str) -> Ending:
        """Spaces at a context's end go to what continues it, which begins with them in training."""
        kept = context.rstrip()
        whole, before = self._encode(context + continuation), self._encode(kept)
        scored = max(len(whole) - len(before), 1 if whole else 0)
        if scored > self._max_length:
            raise UserError(f'a continuation has {scored} tokens, more than --max-length {self._max_length}')
        return Ending([self._words.eot_id, *whole][-self._max_length - 1 :], scored)

    def _encode(self, text: str) -> list[int]:
        return self._words.encode(text.encode(errors='replace').decode())  # of JSON, which may hold half a character

    def _likelihoods(self, endings: Sequence[Ending]) -> list[Likelihood]:
        tell = lambda count: self._say(f'{count:,} of {len(endings):,} texts scored')
        return likelihoods(self._trained.model, endings, self._batch_size, self._trained.place, tell)

    def _continued(self, contexts: Sequence[str], options: Mapping[str, Any]) -> Iterator[tuple[list[int], list[str]]]:
        """Batches of contexts, by their places, and what follows each."""
        most = int(next((options[name] for name in NUMBERS if options.get(name)), NEW_TOKENS))
        stops = options.get('until') or []
        stops = [stops] if isinstance(stops, str) else list(stops)
        room = self._max_length - most
        if room < 1:
            raise UserError(
                f'the task generates {most} tokens, which leave no room for its questions in the {self._max_length}'
                ' that are read; give a larger --max-length'
            )
        eot = self._words.eot_id
        prompts = [[eot, *self._encode(context)[-(room - 1) :]] if room > 1 else [eot] for context in contexts]
        done = 0
        for rows in longest_first(prompts, self._batch_size):
            filled = [prompts[i] for i in rows] + [[eot]] * (self._batch_size - len(rows))
            yield rows, self._texts(filled, rows, most, _sampling(options), stops)
            done += len(rows)
            self._say(f'{done:,} of {len(prompts):,} texts continued')

    def _texts(
        self, prompts: list[list[int]], seeds: Sequence[int], most: int, sampling: Sampling, stops: Sequence[str]
    ) -> list[str]:
        """What follows each of the first prompts, drawn by their seeds; those without one fill the batch."""
        words, trained, count = self._words, self._trained, len(seeds)
        seeds = [*seeds, *[0] * (len(prompts) - count)]
        texts, streams = [''] * len(prompts), [words.stream(after=prompt[1:]) for prompt in prompts]
        live = [row < count for row in range(len(prompts))]
        length = rounded_up(max(map(len, prompts)))
        steps = generate(trained.model, prompts, most, sampling, seeds, words.vocab_size, trained.place, length)
        for tokens in steps:
            for row, token in enumerate(tokens.tolist()):
                if live[row] and token < 0:
                    raise UserError('scores of the next token are not finite: nothing can be drawn by these weights')
                live[row] = live[row] and token != words.eot_id
                if live[row]:
                    texts[row] += streams[row].push(token)
                    live[row] = not any(stop and stop in texts[row] for stop in stops)
            if not any(live):
                break
        texts = [text + stream.flush() for text, stream in zip(texts, streams, strict=True)][:count]
        return [min((text.split(stop)[0] for stop in stops if stop), key=len, default=text) for text in texts]


def windows(tokens: Sequence[int], most: int) -> Iterator[Ending]:
    """Cuts tokens into windows of at most ``most`` that are read, by which each token but the first is scored once.

    The last window begins so early that it is full; the others begin with one token that the one before has scored.
    """
    for start in range(1, len(tokens), most):
        end = min(start + most, len(tokens))
        yield Ending(tokens[max(0, end - most - 1) : end], end - start)


def _sampling(options: Mapping[str, Any]) -> Sampling:
    """Greedy, unless a task wants samples."""
    given = {name: options[name] for name in ('temperature', 'top_k', 'top_p') if options.get(name) is not None}
    if not options.get('do_sample', float(given.get('temperature', 0)) > 0):
        return Sampling(temperature=0)
    top_k = max(0, int(given.get('top_k', 0)))  # elsewhere -1 is all, too
    return Sampling(float(given.get('temperature', 1)), top_k, float(given.get('top_p', 1)))
