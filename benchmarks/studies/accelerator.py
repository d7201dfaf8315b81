"""Dense attention, a trained window and learned roles at the same KV, on a GPU (``benchmarks.accelerator``).

    python -m benchmarks.accelerator --study=benchmarks/studies/accelerator.py --input=… --validation_input=…

The model and the recipe of ``configs/small_25m.py``; ``benchmarks.accelerator`` sets the corpus and the steps. With
``benchmarks.study`` it is a study of the config's own steps and corpus.
"""

CONFIG = "configs/small_25m.py"
COMMON = {
    "model.dtype": "bfloat16",  # Hopper's kernels take no float32
    "train.eval_every": 0,
    "train.progress": False,
    "train.step_breakdown": False,
    "checkpoint.save_every": 1_000_000,
    "eval.num_contexts": 256,
    "eval.batch_size": 32,
}
ARMS = {
    "dense": {"model.layer_types": "dense"},
    "trained window of 51": {"model.layer_types": "sliding", "model.sliding_window": 51},  # 9.9 % of the KV
    "nats at 10 % with windows 12 and 46 and 184": {"nats.windows": (12, 46, 184), "nats.kv_budget": 0.1},
}
REFERENCE = "trained window of 51"
