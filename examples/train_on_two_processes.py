"""Train one model on two processes, which share the rows of each batch. The losses are those of one process.

Shows `join_processes`: each process computes the gradient of its rows, and the processes average their gradients. On CPUs
they communicate with gloo, on GPUs with NCCL and one GPU per process.

    torchrun --nproc_per_node 2 examples/train_on_two_processes.py    # 10 seconds on two cores
    python examples/train_on_two_processes.py                         # the same losses from one process

Install the package first: `pip install -e .` in the repository. `torchrun -m gpt2 train` does the same, and
`--sharding fsdp` there also splits the model.
"""

import argparse
import json
from pathlib import Path

import torch

from gpt2 import GPT2
from gpt2.training import Trainer, prepare
from gpt2.training.distributed import join_processes
from gpt_config import GPT2Config, TrainingConfig


def main() -> None:
    parser = argparse.ArgumentParser(description="Train one model on the processes that torchrun started.")
    parser.add_argument("--out", type=Path, default=Path("shared_run"), help="folder for data and model")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()

    with join_processes("cpu") as processes:
        # The first process makes the data. The others wait, and then open the same files.
        text = args.out / "numbers.txt"
        if processes.is_first:
            text.parent.mkdir(parents=True, exist_ok=True)
            text.write_text("".join(f"{n} and {n + 1} make {2 * n + 1}.\n" for n in range(2000)), encoding="utf-8")
            prepare([text], args.out / "data", tokenizer="char", workers=1)
        processes.wait()
        data = prepare([text], args.out / "data", tokenizer="char", workers=1)

        torch.manual_seed(0)  # the same initial weights in every process
        model = GPT2(GPT2Config(vocab_size=data.tokenizer.vocab_size, n_positions=32, n_layer=2, n_head=2, n_embd=32))
        model.set_dropout(0.0)  # each process would drop other activations, so the losses would differ from those of one
        # batch_size counts the rows of all processes together: 8 each if there are two.
        config = TrainingConfig(
            context=32, batch_size=16, max_steps=args.steps, warmup_steps=10, learning_rate=3e-3, log_interval=10,
            eval_interval=args.steps, eval_batches=4, sample_tokens=0, precision="float32",
        )  # fmt: skip
        result = Trainer(model, data, config, args.out, processes=processes, is_quiet=True).train()

        if processes.is_first:  # every process has the same result; one prints it
            print(f"processes: {processes.world_size}, rows per process: {config.batch_size // processes.world_size}")
            for line in (args.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
                figures = json.loads(line)
                if "loss" in figures:
                    print(f"step {figures['step']:3}: loss {figures['loss']:.4f}")
            print(f"validation loss: {result.best_loss:.4f}")


if __name__ == "__main__":
    main()
