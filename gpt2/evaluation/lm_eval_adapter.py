"""This package as a model of EleutherAI's lm-evaluation-harness, registered as `gpt2-from-scratch`.

    python -m gpt2.evaluation.lm_eval_adapter --model gpt2-from-scratch --model_args pretrained=gpt2 --tasks hellaswag

runs lm_eval's own command line with this model added, because lm_eval does not search for models in other packages. To call
lm_eval from Python, import this module first. It needs lm-eval and depends on its interface; lm_eval computes the metrics.
"""

from __future__ import annotations

import json
import sys
from typing import Any

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
except ImportError as error:
    _MISSING = f"lm_eval is not installed ({error}): pip install '.[eval]'"
    raise SystemExit(f"error: {_MISSING}") if __name__ == "__main__" else ImportError(_MISSING) from None

import torch
from tqdm.auto import tqdm

from gpt2.evaluation.scoring import Request, log_likelihoods
from gpt2.evaluation.windows import windows
from gpt2.generation.batch import Batch
from gpt2.generation.loop import decode, start
from gpt2.generation.row import Row
from gpt2.pretrained import load_model
from gpt2.weights.tokenizer import load_tokenizer_for
from gpt_config.errors import GPT2Error, InputError
from gpt_config.generation_config import GenerationConfig
from gpt_encoder.interface import EOT_TOKEN
from gpt_encoder.stream_decoder import StreamDecoder

_DEFAULT_BATCH_SIZE = 8
_SAMPLING_OPTIONS = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "num_beams")


@register_model("gpt2-from-scratch")
class FromScratchLM(TemplateLM):
    """`--model_args`: pretrained (folder, shipped model or hub name), tokenizer, dtype. `batch_size` "auto" means 8."""

    def __init__(
        self,
        pretrained: str = "gpt2",
        *,
        tokenizer: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int | str | None = None,
        max_batch_size: int | str | None = None,  # lm_eval passes it for "auto"; unused, because "auto" is a fixed size here
    ) -> None:
        super().__init__()
        self._model = load_model(pretrained, device=device or "auto", dtype=dtype)
        self._tokenizer = load_tokenizer_for(self._model, tokenizer)
        self._name = tokenizer or pretrained
        is_auto = batch_size is None or str(batch_size).startswith("auto")
        self.batch_size = _DEFAULT_BATCH_SIZE if is_auto else int(batch_size or 0)
        self.max_length = self._model.config.n_positions

    @property
    def device(self) -> torch.device:
        return self._model.device

    @property
    def eot_token_id(self) -> int:
        """The token that precedes a text without context. InputError if the vocabulary has none."""
        if self._tokenizer.eot_token_id is None:
            raise InputError(
                f"the vocabulary of {self._name} has no {EOT_TOKEN}, which precedes each scored text: use another tokenizer"
            )
        return self._tokenizer.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        return self._name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of `string`. `<|endoftext|>` in it becomes the special token, as in the tokenizers that lm_eval uses."""
        return self._tokenizer.encode(string, allowed_special="all")

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """(log-probability in nats, is greedy) of each request. Equal contexts are computed once."""
        by_context: dict[tuple[int, ...], list[int]] = {}
        for place, (_, context, _continuation) in enumerate(requests):
            by_context.setdefault(tuple(context), []).append(place)
        grouped = [Request(context, [requests[place][2] for place in places]) for context, places in by_context.items()]
        with tqdm(total=len(requests), desc="Scoring", disable=disable_tqdm or None) as bar:
            scores = log_likelihoods(self._model, grouped, batch_size=self.batch_size, progress=bar.update)
        answers: dict[int, tuple[float, bool]] = {}
        for places, group in zip(by_context.values(), scores, strict=True):
            for place, score in zip(places, group, strict=True):
                answers[place] = (score.log_prob, score.is_greedy)
                if requests[place][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[place][0], answers[place])
        return [answers[place] for place in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text after `<|endoftext|>`, in nats, over windows of all positions."""
        parts, n_parts = [], []
        for request in requests:
            ids = [self.eot_token_id, *self.tok_encode(request.args[0])]
            found = [
                (None, window.ids[: -window.n_scored], window.ids[-window.n_scored :])
                for window in windows(ids, self.max_length, self.max_length)
            ]
            parts += found
            n_parts.append(len(found))
        scores = iter(self._loglikelihood_tokens(parts, disable_tqdm))
        totals = [sum(next(scores)[0] for _ in range(n)) for n in n_parts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each text, cut before its first stop string. Requests with equal options share batches."""
        by_options: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            by_options.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(place)
        texts: dict[int, str] = {}
        with tqdm(total=len(requests), desc="Generating", disable=disable_tqdm or None) as bar:
            for places in by_options.values():
                # Sorted by length, because a batch is padded to its longest text.
                places.sort(key=lambda place: len(requests[place].args[0]), reverse=True)
                for begin in range(0, len(places), self.batch_size):
                    batch = places[begin : begin + self.batch_size]
                    contexts, options = [requests[place].args[0] for place in batch], requests[batch[0]].args[1]
                    for place, text in zip(batch, self._generate(contexts, options), strict=True):
                        texts[place] = text
                        self.cache_hook.add_partial("generate_until", requests[place].args, text)
                    bar.update(len(batch))
        return [texts[place] for place in range(len(requests))]

    def _generate(self, contexts: list[str], options: dict[str, Any]) -> list[str]:
        options = normalize_gen_kwargs(options, min(256, max(1, self.max_length // 2)))
        stop = [text for text in handle_stop_sequences(options.pop("until", None), eos=EOT_TOKEN) if text]
        n_new = options.pop("max_gen_toks")
        if unknown := options.keys() - set(_SAMPLING_OPTIONS):
            raise InputError(
                f"unknown generation options {', '.join(sorted(unknown))}: use some of {', '.join(_SAMPLING_OPTIONS)}"
            )
        seed = int(torch.randint(1 << 31, ()))  # lm_eval has seeded torch
        config = GenerationConfig(max_new_tokens=n_new, seed=seed, **options)
        # The prompt is cut so that the new tokens fit. If they alone fill all positions, the window slides instead.
        room = self.max_length - n_new if self.max_length > n_new else self.max_length
        prompts = [(self.tok_encode(context) or [self.eot_token_id])[-room:] for context in contexts]
        rows = start(self._model, prompts, config)
        for number, row in enumerate(rows):
            row.index = number  # equal prompts in one batch must not draw the same random numbers
        streams = {id(row): _Stream(self, stop) for row in rows}
        for advanced in decode(Batch(self._model, vocab_size=self._tokenizer.vocab_size), rows):
            for row in advanced:
                streams[id(row)].read(row)
        return [streams[id(row)].text for row in rows]


class _Stream:
    """The text of one row while it grows. A stop string in it ends the row."""

    def __init__(self, lm: FromScratchLM, stop: list[str]) -> None:
        self._decoder, self._stop = StreamDecoder(lm._tokenizer), stop
        self._n_read, self.text = 0, ""
        self._eot = lm._tokenizer.eot_token_id

    def read(self, row: Row) -> None:
        for token in row.ids[self._n_read :]:
            self._n_read += 1
            if token != self._eot:
                self.text += self._decoder.push(token)
        if row.finish_reason:
            self.text += self._decoder.flush()
        if any(text in self.text for text in self._stop):
            row.finish_reason = "stop"
            self.text = postprocess_generated_text(self.text, self._stop, None)


def main() -> None:
    """Run lm_eval's command line with this model registered. An error raised by this package is printed as one line."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except GPT2Error as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
