"""Make the checkpoints of this folder with TensorFlow. Written with tensorflow-cpu 2.21.0 and numpy 2.4.6.

    python make.py whole; python make.py partitioned

`model-7` has the variables of OpenAI's GPT-2 code, and those that TensorFlow's Adam adds, as in a fine-tuned model.
`partitioned/model-7` has the same numbers in parts, and in two data files.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

LAYERS, WIDTH, HEADS, CONTEXT, VOCABULARY = 1, 12, 2, 16, 300


def shapes() -> dict[str, tuple[int, ...]]:
    """The shape of each variable, by its name in OpenAI's code."""
    norm = {"ln_1": (WIDTH,), "ln_2": (WIDTH,)}
    matrices = {
        "attn/c_attn": (WIDTH, 3 * WIDTH), "attn/c_proj": (WIDTH, WIDTH),
        "mlp/c_fc": (WIDTH, 4 * WIDTH), "mlp/c_proj": (4 * WIDTH, WIDTH),
    }  # fmt: skip
    found: dict[str, tuple[int, ...]] = {"model/wte": (VOCABULARY, WIDTH), "model/wpe": (CONTEXT, WIDTH)}
    for layer in range(LAYERS):
        for name, shape in norm.items():
            found |= {f"model/h{layer}/{name}/{part}": shape for part in "gb"}
        for name, (inputs, outputs) in matrices.items():
            found |= {f"model/h{layer}/{name}/w": (1, inputs, outputs), f"model/h{layer}/{name}/b": (outputs,)}
    return found | {f"model/ln_f/{part}": (WIDTH,) for part in "gb"}


def numbers(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The values of a variable: exact in float32, and others for each name."""
    steps = np.arange(np.prod(shape), dtype=np.int64) * 7919 + sum(name.encode()) * 31
    return ((steps % 1009 - 504) / 2048).astype(np.float32).reshape(shape)


def whole() -> None:
    """Write model-7.index, model-7.data-00000-of-00001 and checkpoint."""
    import tensorflow.compat.v1 as tf

    tf.disable_eager_execution()
    variables = [tf.get_variable(name, initializer=numbers(name, shape)) for name, shape in shapes().items()]
    with tf.variable_scope("", use_resource=False):
        extra = [tf.get_variable("beta1_power", initializer=0.9), tf.get_variable("global_step", initializer=7)]
        for slot in ("Adam", "Adam_1"):
            name = f"model/ln_f/g/{slot}"
            extra.append(tf.get_variable(name, initializer=numbers(name, (WIDTH,))))
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        tf.train.Saver([*variables, *extra]).save(session, "./model", global_step=7, write_meta_graph=False)


def partitioned() -> None:
    """Write partitioned/model-7.index and two data files: each variable is on one of two devices, in up to three parts."""
    import tensorflow.compat.v1 as tf

    tf.disable_eager_execution()

    for number, (name, shape) in enumerate(shapes().items()):

        def part(shape: list[int], dtype: Any = None, partition_info: Any = None, *, name: str = name) -> Any:
            places = zip(partition_info.var_offset, shape, strict=True)
            return tf.constant(numbers(name, shapes()[name])[tuple(slice(first, first + n) for first, n in places)])

        scope, leaf = name.rsplit("/", 1)
        axis = len(shape) - 1 if number % 2 else len(shape) // 3  # of a matrix (1, inputs, outputs): inputs or outputs
        partitioner = tf.fixed_size_partitioner(2 + number % 2, axis=axis)
        with tf.device(f"/cpu:{number % 2}"), tf.variable_scope(scope, partitioner=partitioner, reuse=tf.AUTO_REUSE):
            tf.get_variable(leaf, shape, initializer=part)
    with tf.Session(config=tf.ConfigProto(device_count={"CPU": 2})) as session:
        session.run(tf.global_variables_initializer())
        saver = tf.train.Saver(sharded=True)
        saver.save(session, "./partitioned/model", global_step=7, write_meta_graph=False, write_state=False)


if __name__ == "__main__":
    os.chdir(Path(__file__).parent)
    {"whole": whole, "partitioned": partitioned}[sys.argv[1]]()
