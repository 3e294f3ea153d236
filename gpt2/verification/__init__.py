"""Engine against engine, part by part: PyTorch, NumPy, pure Python and, where they are installed, those of others."""

from gpt2.verification.checks import Check, Outcome, Status
from gpt2.verification.verify import verify

__all__ = ["Check", "Outcome", "Status", "verify"]
