"""A small character model of tiny Shakespeare, for a laptop.

    python -m train shakespeare

Hardware, time, loss: not measured. The text (1.1 MB) is fetched once, by name, and checked.
"""

from train.config import Data, Evaluation, Model, Optimizer, Recipe, Schedule

RECIPE = Recipe(
    model=Model(
        hidden_size=128, intermediate_size=352, num_layers=4, num_heads=4, max_positions=512,
    ),
    data=Data(train=("tinyshakespeare",), tokenizer="characters"),
    optimizer=Optimizer(learning_rate=3e-3, b2=0.99),
    schedule=Schedule(name="cosine", warmup=100),
    steps=2000,
    batch=32,
    sequence=128,
    evaluation=Evaluation(every=250, batches=20, prompt="ROMEO:", tokens=128, cache="h2o", budget="64"),
    out="runs/shakespeare",
)  # fmt: skip
