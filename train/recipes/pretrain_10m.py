"""A decoder of 10 million parameters from scratch, on one accelerator in bfloat16, over any text files.

    python -m train pretrain_10m --data.train texts.jsonl

Hardware, time, loss: not measured. On CPU use --compute.dtype float32.
"""

from train.config import Compute, Data, Evaluation, Model, Optimizer, Recipe, Schedule

RECIPE = Recipe(
    model=Model(
        hidden_size=320, intermediate_size=864, num_layers=6, num_heads=5, max_positions=1024,
    ),
    data=Data(train=("wikitext2-valid",), tokenizer="bpe:8192"),
    optimizer=Optimizer(learning_rate=1e-3),
    schedule=Schedule(name="wsd", warmup=200, decay=1000, end=0.0),
    compute=Compute(dtype="bfloat16"),
    steps=5000,
    batch=64,
    sequence=512,
    z_loss=1e-4,
    evaluation=Evaluation(every=500, tokens=64, cache="h2o", budget="25%"),
    out="runs/pretrain-10m",
)  # fmt: skip
