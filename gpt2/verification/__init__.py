"""Compare the engines part by part: PyTorch, NumPy, plain Python, and, if installed, transformers and tiktoken."""

from gpt2.verification.checks import Check, Outcome, Status
from gpt2.verification.verify import verify

__all__ = ["Check", "Outcome", "Status", "verify"]
