"""The engines of other packages, each used as its documentation describes. A package is imported when its engine is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gpt2.benchmark.engine import Place, Prompts
from gpt2.benchmark.results import LeftOutError
from gpt2.benchmark.subject import Subject
from gpt_encoder.tokenizer import GPT2Tokenizer


class TransformersEngine:
    """transformers' GPT2LMHeadModel and its `generate`."""

    name = "transformers"

    @staticmethod
    def prepare(subject: Subject, dtype: str) -> Path:
        """The subject's folder, unchanged."""
        if dtype == "int8":
            raise LeftOutError("has no int8 format of its own")
        return subject.folder

    def __init__(self, path: Path, subject: Subject, dtype: str, place: Place) -> None:
        import torch

        torch.set_num_threads(place.threads)
        self.dtype = dtype
        self._model = load_transformers(path, getattr(torch, dtype)).to(place.device)
        config = self._model.generation_config
        config.pad_token_id, config.eos_token_id, config.bos_token_id = 0, None, None  # nothing ends a text
        config.do_sample = False

    def generate(self, prompts: Prompts, n_new: int) -> list[list[int]]:
        """One call for all prompts, padded on the left."""
        import torch

        longest = max(map(len, prompts))
        input_ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with torch.inference_mode():
            device = self._model.device
            ids = self._model.generate(input_ids.to(device), attention_mask=mask.to(device), max_new_tokens=n_new)
        rows: list[list[int]] = ids[:, longest:].tolist()
        return rows

    def close(self) -> None:
        """Free the memory of the model."""
        del self._model


def load_transformers(folder: Path, dtype: Any) -> Any:
    """The GPT2LMHeadModel of transformers for that folder, in eval mode. Prints nothing."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=dtype).eval()


class CTranslate2Engine:
    """CTranslate2's Generator. With int8, activations between the matrix products stay in float32."""

    name = "ctranslate2"

    @staticmethod
    def prepare(subject: Subject, dtype: str) -> Path:
        """The subject, converted by CTranslate2's own converter."""
        import ctranslate2
        from ctranslate2.converters import TransformersConverter

        known = ctranslate2.get_supported_compute_types("cpu")
        if dtype not in known:
            raise LeftOutError(f"does not support {dtype} on this processor, only {', '.join(sorted(known))}")
        folder = subject.work / f"ctranslate2-{dtype}"
        if not folder.exists():
            import transformers

            transformers.logging.disable_progress_bar()
            TransformersConverter(str(subject.folder)).convert(str(folder), quantization=dtype)
        return folder

    def __init__(self, path: Path, subject: Subject, dtype: str, place: Place) -> None:
        import ctranslate2

        self.dtype = dtype
        self._generator = ctranslate2.Generator(
            str(path), device="cpu", compute_type=dtype, inter_threads=1, intra_threads=place.threads
        )
        self._tokens = subject.token_strings

    def generate(self, prompts: Prompts, n_new: int) -> list[list[int]]:
        """One call for all prompts; no token ends a text."""
        results = self._generator.generate_batch(
            [[self._tokens[token] for token in prompt] for prompt in prompts],
            max_length=n_new, include_prompt_in_result=False, beam_size=1, sampling_topk=1, end_token=[],
        )  # fmt: skip
        return [list(result.sequences_ids[0]) for result in results]

    def close(self) -> None:
        """Free the memory of the model."""
        self._generator.unload_model()


class LlamaEngine:
    """llama.cpp through llama-cpp-python. Its int8 is q8_0: one scale per block of 32 weights."""

    name = "llama-cpp-python"

    @staticmethod
    def prepare(subject: Subject, dtype: str) -> Path:
        """The subject as a GGUF file."""
        from gpt2.formats.gguf import write_gguf
        from gpt2.pretrained import load_model

        tokenizer = subject.tokenizer
        if not isinstance(tokenizer, GPT2Tokenizer):
            raise LeftOutError("supports only byte-pair tokenizers")
        path = subject.work / f"{dtype}.gguf"
        if not path.exists():
            write_gguf(load_model(subject.folder), tokenizer, path, dtype)
        return path

    def __init__(self, path: Path, subject: Subject, dtype: str, place: Place) -> None:
        import llama_cpp

        # With float32 weights the cache is float32 too; otherwise it is float16, llama.cpp's default.
        cache = llama_cpp.GGML_TYPE_F32 if dtype == "float32" else llama_cpp.GGML_TYPE_F16
        self.dtype = dtype
        self._llama = llama_cpp.Llama(
            str(path), n_ctx=subject.config.n_positions, n_threads=place.threads,
            n_threads_batch=place.threads, type_k=cache, type_v=cache, verbose=False,
        )  # fmt: skip

    def generate(self, prompts: Prompts, n_new: int) -> list[list[int]]:
        """Continue one prompt after another, because llama-cpp-python has no call for several prompts."""
        return [self._continue(list(prompt), n_new) for prompt in prompts]

    def _continue(self, prompt: list[int], n_new: int) -> list[int]:
        self._llama.reset()  # otherwise the prompt of the last call would still be in the cache
        tokens = self._llama.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0)
        return [int(next(tokens)) for _ in range(n_new)]

    def close(self) -> None:
        """Free the memory of the model."""
        self._llama.close()
