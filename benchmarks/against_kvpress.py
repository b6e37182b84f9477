"""Our caches and NVIDIA kvpress's methods on the same weights, tokens and questions, at the same bytes.

    python benchmarks/against_kvpress.py FOLDER [--text FILE_OR_NAME ...] [--seed 0] [--out FILE]      ours
    PEERS_PYTHON benchmarks/kvpress_peers.py FOLDER/work-0.json FOLDER/peers-0.json                    theirs, per text
    python benchmarks/against_kvpress.py FOLDER ... --out FILE                                         both, one table

FOLDER keeps what is expensive: what both sides are asked (work-N.json) and their answers. What is equal: the weights
(dequantized from one file, float32), the token ids, the questions, the shares of the bytes that a full bfloat16 cache of
context and following tokens takes. What is not, all in the peers' favour: they compress once and keep what comes later
uncharged, ours pays for it inside its budget; their entries are float32 charged as bfloat16; positions and scores are
charged to ours only; AdaKV and KVzip are charged for live entries, though kvpress frees none.
"""

import argparse
import json
import pathlib

import numpy as np
from common import questions, record

import infer
from infer.evaluate import evaluate, metrics
from infer.evaluate.material import draw_contexts, draw_excerpts, encode_question
from infer.evaluate.tasks import encode_context
from infer.texts import load_text

SHARES = (0.5, 0.25, 0.125, 0.0625)
TASKS = ["passkey", "magic"]
OURS = ("auto", "h2o", "kvzip", "rotated-3", "mikv", "scissorhands", "recency", "random")


def main():
    """Asks our side, reads the peers' answers where they are, writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--text", nargs="+", default=["wikitext2-test", "state-of-the-union"])
    parser.add_argument("--caches", default=",".join(OURS))
    parser.add_argument("--context", type=int, default=1900)
    parser.add_argument("--excerpts", type=int, default=3, help="of each text")
    parser.add_argument("--contexts", type=int, default=5, help="of each text, 8 questions each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    arguments.folder.mkdir(exist_ok=True)
    lm, sides, samples = infer.load("smollm2"), [], questions(arguments.contexts)
    for number, name in enumerate(arguments.text):
        text = load_text(name)
        work = arguments.folder / f"work-{number}.json"
        work.write_text(json.dumps(ask(lm, text, arguments)))
        mine = arguments.folder / f"ours-{number}.json"
        known = json.loads(mine.read_text()) if mine.exists() else []
        todo = [c for c in arguments.caches.split(",") if c not in {row["cache"] for row in known}]
        if todo:
            known += evaluate(
                lm, text=text, caches=todo, budgets=[f"{share:.2%}" for share in SHARES], tasks=TASKS,
                context=arguments.context, next_tokens=128, excerpts=arguments.excerpts, samples=samples,
                seeds=[arguments.seed], progress=lambda done, total, what: print(f"{done}/{total} {what}", flush=True),
            )  # fmt: skip
            mine.write_text(json.dumps(known))
        theirs = arguments.folder / f"peers-{number}.json"
        sides.append((known, json.loads(theirs.read_text()) if theirs.exists() else []))
    names = " ".join(pathlib.Path(name).name for name in arguments.text)
    record(
        arguments.out,
        title="Against kvpress 0.5.5 on SmolLM2-135M: KL(full || compressed) in nats and right answers [95 %], at shares of the"
        f" bytes of a full bfloat16 cache; {arguments.context} tokens, compressed before the question is known",
        command=f"python benchmarks/against_kvpress.py FOLDER --text {names} --excerpts {arguments.excerpts} --contexts"
        f" {arguments.contexts} --seed {arguments.seed}",
        rows=table([side for side in sides if side[1]] or sides),
        peers=versions(sides),
    )


def versions(sides) -> dict[str, dict[str, str]]:
    """What the peers say they ran on."""
    notes = [row["note"] for _, peers in sides for row in peers if row["method"] == "full"]
    return {"peers": dict(part.split(" ", 1) for part in notes[0].split(", "))} if notes else {}


def ask(lm, text, arguments) -> dict:
    """What `evaluate` asks, as ids for the peers."""
    tokens = draw_excerpts(lm, text, arguments.context + 129, arguments.excerpts, arguments.seed).tolist()
    contexts = draw_contexts(lm, text, TASKS, arguments.context, questions(arguments.contexts), None, arguments.seed)
    asked = [[encode_question(lm.tokenizer, question) for question in one.questions] for one in contexts]
    prompts = [encode_context(lm.tokenizer, one.context) for one in contexts]
    reserve = max([128, *(len(q.ask) + len(q.answer) for group in asked for q in group)])
    return {
        "excerpts": [{"context": row[: arguments.context], "next": row[arguments.context : -1]} for row in tokens],
        "contexts": [
            {
                "prompt": list(prompt),
                "span": len(prompt) + reserve,
                "questions": [{"task": q.task, "ask": q.ask, "answer": q.answer} for q in group],
            }
            for prompt, group in zip(prompts, asked, strict=True)
        ],
        "shares": list(SHARES),
    }


def table(sides) -> list[dict]:
    """A line per method, over all texts that both sides have read: KL and right answers at each share; least KL first."""
    lines = {}
    for ours, peers in sides:
        for row in ours:
            add(lines, f"jaxkv {row['cache']}", row["budget"] if row["cache"] != "full" else "full", row["share"], row)
        for row in peers:
            share = "full" if row["method"] == "full" else "own" if row["share"] is None else f"{row['share']:.2%}"
            add(lines, row["method"], share, row["bytes_share"], row)
    columns = [f"{share:.2%}" for share in SHARES]
    least = lambda shares: min(np.mean(cell["kl"]) for cell in shares.values())
    rows = []
    for method, shares in sorted(lines.items(), key=lambda item: least(item[1])):
        row = {"method": method}
        for column in columns:
            row[f"{float(column[:-1]):g}%"] = show(shares[column]) if column in shares else ""
        other = next((cell for name, cell in shares.items() if name not in columns), None)
        row["at its own size"] = f"{np.mean(other['bytes']):.0%}: {show(other)}" if other else ""
        rows.append(row)
    return rows


def add(lines, method, share, size, row):
    """One measurement into the cell of its method and share."""
    cell = lines.setdefault(method, {}).setdefault(share, {"bytes": [], "kl": [], "right": 0, "asked": 0})
    cell["bytes"].append(size)
    cell["kl"].append(row["kl_mean"])
    for task in TASKS:
        asked = row["asked"][task]
        cell["right"] += row["right"][task] if "right" in row else round(row["accuracy"][task] * asked)
        cell["asked"] += asked


def show(cell) -> str:
    """KL in nats, right answers, and their 95 % interval."""
    low, high = metrics.wilson(cell["right"], cell["asked"])
    return f"{np.mean(cell['kl']):.4f}; {cell['right']} of {cell['asked']} [{low:.0%}-{high:.0%}]"


if __name__ == "__main__":
    main()
