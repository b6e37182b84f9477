"""SmolLM2-135M fine-tuned on a text of your own, by adapters of rank 8 on all attention kernels.

    python -m train finetune_smollm2 --data.train book.txt

Hardware, time, loss: not measured; they depend on the text. All parameters instead of adapters: --lora.rank 0
--optimizer.learning_rate 2e-5.
"""

from train.config import Compute, Data, Evaluation, Lora, Model, Optimizer, Recipe, Schedule

RECIPE = Recipe(
    model=Model(base="smollm2"),
    data=Data(train=("book.txt",)),
    optimizer=Optimizer(learning_rate=3e-4, weight_decay=0.0),
    schedule=Schedule(name="cosine", warmup=20),
    lora=Lora(rank=8, alpha=16.0),
    compute=Compute(loss_tokens=512),
    steps=200,
    batch=4,
    sequence=512,
    evaluation=Evaluation(every=50, batches=4, prompt="The ", tokens=48, cache="h2o", budget="25%"),
    out="runs/finetune",
)
