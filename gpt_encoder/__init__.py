"""Tokenizers: text to token ids and back, with byte-level BPE and its training. Floor 2.

Needs `regex`. NumPy is used for long texts if it is installed, torch only for `return_tensors="pt"`. It knows no model.
"""

from gpt_encoder.bpe_trainer import train_bpe
from gpt_encoder.char_tokenizer import CharTokenizer
from gpt_encoder.interface import EOT_TOKEN, Tokenizer
from gpt_encoder.stream_decoder import StreamDecoder
from gpt_encoder.tokenizer import GPT2Tokenizer, load_tokenizer

__all__ = [
    "EOT_TOKEN",
    "CharTokenizer",
    "GPT2Tokenizer",
    "StreamDecoder",
    "Tokenizer",
    "load_tokenizer",
    "train_bpe",
]
