"""RCMHA's comparison (arXiv 2308.03429) on tiny Shakespeare: MHA, MDHA, RMHA and RCMHA at equal steps.

    python benchmarks/attention_arms.py [--text FILE_OR_NAME] [--seeds 3] [--steps 800] [--out FILE]
    python benchmarks/attention_arms.py --setting paper --seeds 1 --steps 4000 [--out FILE]

All arms have the same sizes, MLP and optimizer; they differ in attention alone. In the setting "equal" all see the same 64
characters. "paper" has the sizes, the rate and the segments of the released code: 2 characters behind a memory of 32, which
models with learned positions cannot have; these see 2 characters, and their rows show no more than that. The tables of
distances are as long as what is seen, where the released code has 8,192 rows for each head and layer.

A character of this text is a byte. The paper's accuracy is a running mean over all steps since the start, of training and
validation together; beside the clean one, ours is that over all training steps.
"""

import argparse
import pathlib

from arms import compare
from common import record
from quality import command

from train.config import Compute, Data, Model, Optimizer, Rcmha, Recipe, Schedule

ABSOLUTE = ("MHA", "MDHA")
EQUAL = dict(hidden_size=128, intermediate_size=256, num_layers=4, num_heads=8)
PAPER = EQUAL | {"num_layers": 6}


def model(name: str, size: dict, seen: int) -> Model:
    """The arm's model, which sees so many tokens."""
    own = {
        "MHA": dict(learned_positions=seen),
        "MDHA": dict(learned_positions=seen, attention="rcmha", rcmha=Rcmha(relative="none", convolution="heads")),
        "RMHA": dict(attention="rcmha", rcmha=Rcmha(convolution="none")),
        "RCMHA": dict(attention="rcmha"),
        "rotary": dict(rope="default"),
    }[name]
    return Model(
        **size, **{"rope": "none"} | own, max_positions=seen, activation="relu", mlp_gate=False, tie_embeddings=False
    )


def recipe(name: str, given) -> Recipe:
    """The arm's recipe, of the setting that was asked for."""
    shared = dict(
        data=Data(train=(given.text,), tokenizer="characters"), steps=given.steps, out="unused",
        compute=Compute(remat="none"),
    )  # fmt: skip
    if given.setting == "equal":
        return Recipe(
            model=model(name, EQUAL, given.sequence), optimizer=Optimizer(learning_rate=2e-3, b2=0.99),
            schedule=Schedule(name="cosine", warmup=min(100, given.steps // 4)), batch=given.batch,
            sequence=given.sequence, **shared,
        )  # fmt: skip
    memory = 0 if name in ABSOLUTE else 32
    warmup = min(2000, given.steps // 4)
    return Recipe(
        model=model(name, PAPER, 2 + memory), batch=32, sequence=2, memory=memory,
        optimizer=Optimizer(learning_rate=128**-0.5 * 2000**-0.5, weight_decay=0.0, b2=0.999),
        schedule=Schedule(name="inverse_sqrt", warmup=warmup), **shared,
    )  # fmt: skip


def main():
    """Trains the arms and writes the table after each seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=("equal", "paper"), default="equal")
    parser.add_argument(
        "--arms", default="MHA,MDHA,RMHA,RCMHA", help="also rotary: MHA with RoPE; the first is the base"
    )
    parser.add_argument("--text", default="tinyshakespeare", help="a name of infer.texts, or a UTF-8 file")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=16, help="of the setting 'equal'")
    parser.add_argument("--sequence", type=int, default=64, help="of the setting 'equal'")
    parser.add_argument("--block", type=int, default=50, help="steps of an arm before the next one's turn")
    parser.add_argument("--out", type=pathlib.Path)
    given = parser.parse_args()
    names = given.arms.split(",")
    where = {
        "equal": f"{given.batch} rows of {given.sequence} characters",
        "paper": "32 rows of 2 characters, behind a memory of 32 where positions are relative",
    }[given.setting]
    write = lambda rows: record(
        given.out,
        title=f"Attention arms on {pathlib.Path(given.text).name}: {given.steps} steps of {where}; mean over seeds [lowest,"
        " highest]",
        command=command(parser, given, "attention_arms.py"),
        rows=rows,
    )
    compare({name: recipe(name, given) for name in names}, seeds=given.seeds, block=given.block, write=write)


if __name__ == "__main__":
    main()
