"""What the papers of our caches claim, tried on SmolLM2-135M under several seeds, with random eviction and recency beside.

    python benchmarks/claims.py [--text FILE_OR_NAME] [--seeds 3] [--contexts 3] [--out FILE]

A verdict is for this model, these texts and these questions, by a rule that is written in the table: the papers measured larger
models on other tasks. Questions are asked after the context is compressed, which is harder than what most papers did.
"""

import dataclasses

from common import record
from quality import command, evaluated, options

from infer.evaluate.report import answered
from jaxkv.presets import PRESETS, tiers


def kept_by_mikv(name, scheme):
    """MiKV with all tokens kept: a fifth in bfloat16, the rest in `scheme`."""
    parts = tiers((0.2, "bf16"), (0.8, *scheme), residual=0)
    return dataclasses.replace(PRESETS["mikv"], name=name, parts=parts)


INT4 = kept_by_mikv("mikv, the rest in int4", ("balanced-int4", "int4"))
INT2 = kept_by_mikv("mikv, the rest in int2", ("balanced-int2", "int2"))
PLAIN2 = kept_by_mikv("the same without balancer", ("int2", "int2"))
EVERYTHING = "tokens"  # a budget of all tokens: nothing is evicted


@dataclasses.dataclass(frozen=True)
class Claim:
    """says: the claim. rule: what this script takes for it. holds: (row of this cache, row of the full cache) -> bool."""

    says: str
    source: str
    cache: object
    budget: str
    rule: str
    holds: object


def right(row):
    """How many questions were answered right."""
    return answered(row)[0]


def no_loss(row, full):
    """Perplexity within 1 % under every seed."""
    pairs = zip(row["by_seed"]["perplexity"], full["by_seed"]["perplexity"], strict=True)
    return all(mine <= 1.01 * whole for mine, whole in pairs)


SCISSORHANDS, MIKV = "Scissorhands, arXiv 2305.17118", "MiKV, arXiv 2402.18096"
LOSS = "perplexity within 1 % of the full cache's, under every seed"
CLAIMS = (
    Claim("5 times smaller without loss", SCISSORHANDS, "scissorhands", "20%", LOSS, no_loss),
    Claim("20 times smaller with 4 bits", SCISSORHANDS, "scissorhands-4bit", "5%", LOSS, no_loss),
    Claim(
        "eviction to 20 % loses retrieval", MIKV, "h2o", "20%", "at most a quarter of the full cache's answers",
        lambda row, full: right(row) <= 0.25 * right(full),
    ),
    Claim(
        "keeping the rest in 4 bits restores it", MIKV, INT4, EVERYTHING, "at least 97 % of the full cache's answers",
        lambda row, full: right(row) >= 0.97 * right(full),
    ),
    Claim(
        "keeping it in 2 bits restores most", MIKV, INT2, EVERYTHING, "at least 75 % of the full cache's answers",
        lambda row, full: right(row) >= 0.75 * right(full),
    ),
    Claim(
        "2 bits without the balancer are worse", MIKV, PLAIN2, EVERYTHING, "fewer answers than with it", None,
    ),
)  # fmt: skip
CONTROLS = (("recency", "20%"), ("random", "20%"), ("recency", "5%"), ("random", "5%"))


def main():
    """Evaluates the caches, each at its budget, and writes the verdicts."""
    parser = options(__doc__, text="wikitext2-test", budgets="", title="Claims of the papers", excerpts=3, contexts=3)
    given = parser.parse_args()
    budget = lambda name: str(given.context + given.next) if name == EVERYTHING else name
    wanted = [(claim.cache, budget(claim.budget)) for claim in CLAIMS] + list(CONTROLS)
    measured = {}
    for size in dict.fromkeys(size for _, size in wanted):
        caches = [cache for cache, its in wanted if its == size]
        rows = evaluated(given, ["full", *caches], [size])
        measured |= {(getattr(cache, "name", cache), size): row for cache, row in zip(caches, rows[1:], strict=True)}
        full = rows[0]
    rows = [shown(full, "the full cache", "", "", "")]
    with_balancer = measured[INT2.name, budget(EVERYTHING)]
    for claim in CLAIMS:
        row = measured[getattr(claim.cache, "name", claim.cache), budget(claim.budget)]
        holds = claim.holds(row, full) if claim.holds else right(row) < right(with_balancer)
        rows.append(shown(row, claim.says, claim.source, claim.rule, "holds" if holds else "does not hold"))
    rows += [shown(measured[name, size], "control", "", "", "") for name, size in CONTROLS]
    record(
        given.out,
        title=f"Claims of the papers, tried on SmolLM2-135M: {given.context} tokens, {given.excerpts} excerpts of"
        f" {given.text.rsplit('/', 1)[-1]}, {8 * given.contexts} questions; mean over {given.seeds} seeds [lowest, highest]",
        command=command(parser, given, "claims.py"),
        rows=rows,
    )


def shown(row, says, source, rule, verdict):
    """A line of the table."""
    low, high = row["spread"]["perplexity"]
    return {
        "claim": says, "source": source, "cache": row["cache"], "share": f"{row['share']:.1%}",
        "perplexity": f"{row['perplexity']:.2f} [{low:.2f}, {high:.2f}]",
        "right": "{} of {}".format(*answered(row)), "holds if": rule, "verdict": verdict,
    }  # fmt: skip


if __name__ == "__main__":
    main()
