"""Selective temperatures (SSA, arXiv 2411.12892) against plain attention at equal steps: a small language model on WikiText-2,
a layer that has to find the signal among ever more noise, and one that has to point at the neighbours of a node.

    python benchmarks/ssa_arms.py [--task language] [--text FILE_OR_NAME] [--seeds 3] [--steps 800] [--out FILE]
    python benchmarks/ssa_arms.py --task denoising [--seeds 3] [--steps 800] [--out FILE]
    python benchmarks/ssa_arms.py --task graph [--seeds 3] [--steps 2000] [--out FILE]

All arms have the same sizes, rotary positions and optimizer, which was not tuned for any of them. The language model is trained
on WikiText-2's validation part (1.1 MB) and judged on its test part. The paper's gains are small, so small models may show
none; the interval over seeds is beside every figure.

Denoising: of n tokens 4 are a vector plus noise and the others noise, as a mark in each says; the last one is asked for the
vector. Layers of one attention learn this from sequences of 64 tokens, at every token, and are asked at up to 1,024: softmax
dilutes with n, which position temperatures are meant to make up for.

Graph: of 64 nodes, 8 each lead to 1, 2, ... 8 others, all equally likely. The tokens are all nodes in random order and then the
one where a walk stands; attention of one head, with fewer channels than nodes, says where it goes. "L1" is the distance between
rows of the learned and the true transition matrix, at most 2; "rank correlation" is Spearman's, of a node's inverse temperature
and the number of its neighbours: who has few should have a sharp row. All who are asked stand at one position, so that a
temperature by position is one factor more. Values play no part, so the arm with theirs is left out.
"""

import argparse
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from arms import compare, shown
from common import record
from quality import command

from jaxkv.attention import ATTENTION
from jaxkv.config import SsaConfig
from jaxkv.types import Place
from train.config import Compute, Data, Model, Optimizer, Recipe, Schedule, decoder_config

ARMS = {
    "plain": {},
    "position": dict(attention="ssa", ssa=SsaConfig(queries="position", values="none")),
    "token": dict(attention="ssa", ssa=SsaConfig(queries="token", values="none")),
    "position and token": dict(attention="ssa", ssa=SsaConfig(values="none")),
    "values too": dict(attention="ssa"),
}
NODES, DEGREES, EMBEDDED, HEAD = 64, 8, 32, 16
SIGNALS, NOISE, CHANNELS, TRAINED = 4, 0.5, 14, 64
LENGTHS = (64, 256, 1024)
STEPS = {"language": 800, "denoising": 800, "graph": 2000}
TEST = jax.random.key(10**6)  # no seed of training


def recipe(arm: str, given) -> Recipe:
    """A language model with the arm's attention."""
    return Recipe(
        model=Model(
            hidden_size=128, intermediate_size=352, num_layers=4, num_heads=4, max_positions=given.sequence, **ARMS[arm]
        ),
        data=Data(train=(given.text,), validation=(given.validation,), tokenizer="bpe:1024"), compute=Compute(remat="none"),
        optimizer=Optimizer(learning_rate=2e-3, b2=0.99), schedule=Schedule(warmup=min(100, given.steps // 4)),
        steps=given.steps, batch=given.batch, sequence=given.sequence, out="unused",
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("rows", "length"))
def draw(key, rows: int, length: int):
    """tokens [B, T, 2 + C]: mark, 1, content; the vector [B, C]; how many signals there were up to each token [B, T]."""
    vector, noise, order = jax.random.split(key, 3)
    s = jax.random.normal(vector, (rows, CHANNELS))
    lot = jax.random.uniform(order, (rows, length))
    signal = lot >= jax.lax.top_k(lot, SIGNALS)[0][:, -1:]
    e = jax.random.normal(noise, (rows, length, CHANNELS))
    content = jnp.where(signal[..., None], s[:, None] + NOISE * e, e)
    mark = jnp.where(signal, 1.0, -1.0)
    return jnp.concatenate([jnp.stack([mark, jnp.ones_like(mark)], -1), content], -1), s, jnp.cumsum(signal, axis=1)


def layer(module, x, place, asking: int):
    """What the last `asking` tokens of x [B, T, D] get, [B, asking, D]; all logits in memory."""
    projected, length = module.project(x, place), x.shape[1]
    logits = (
        jnp.einsum("btnh,bsnh->bnts", projected.queries[0][:, -asking:], projected.keys) * module.config.query_scale
    )
    seen = jnp.tri(length, dtype=bool)[-asking:]
    p = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf))
    return module.output(jnp.einsum("bnts,bsnh->btnh", p, projected.values))


def place_of(x) -> Place:
    """Positions from 0, and nothing to turn."""
    at = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
    none = jnp.zeros((*x.shape[:2], 1))
    return Place(at, (none + 1, none), ((none + 1, none),))


def denoise(arm: str, seed: int, steps: int) -> dict[int, float]:
    """Mean squared error per channel at each of LENGTHS, of a layer that was trained so many steps."""
    size = 2 + CHANNELS
    model = Model(
        hidden_size=size, intermediate_size=size, num_layers=1, num_heads=2, head_dim=size, max_positions=max(LENGTHS),
        rope="none", **ARMS[arm],
    )  # fmt: skip
    config = decoder_config(model, 2)
    module, first = ATTENTION[config.attention](config), jax.random.key(seed)
    x, *_ = draw(first, 1, TRAINED)
    params = module.init(first, x, place_of(x), 2, method=layer)
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

    def error(params, drawn, asking):
        x, s, signals = drawn
        found = module.apply(params, x, place_of(x), asking, method=layer)[..., 2:]
        told = (signals[:, -asking:] > 0)[..., None]
        return jnp.sum(jnp.where(told, jnp.square(found - s[:, None]), 0.0)) / (told.sum() * CHANNELS)

    @jax.jit
    def step(params, state, drawn):
        gradients = jax.grad(error)(params, drawn, TRAINED)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for number in range(steps):
        params, state = step(params, state, draw(jax.random.fold_in(first, number), 32, TRAINED))
    test = jax.jit(error, static_argnums=2)
    return {n: float(test(params, draw(TEST, 512, n), 1)) for n in LENGTHS}


def without_learning(sequences: int = 512) -> dict[str, dict[int, float]]:
    """Errors of what needs no training; of 512, on the same sequences as the arms."""
    found = {"Bayes": {}, "mean of the signals": {}, "mean of all tokens": {}}
    for n in LENGTHS:
        x, s, _ = draw(TEST, sequences, n)
        signals = jnp.where(x[..., :1] > 0, x[..., 2:], 0.0).sum(axis=1) / SIGNALS
        guesses = signals * SIGNALS / (SIGNALS + NOISE**2), signals, x[..., 2:].mean(axis=1)
        for name, guess in zip(found, guesses, strict=True):
            found[name][n] = float(jnp.square(guess - s).mean())
    return found


def denoising(given, names, write) -> None:
    """All arms under each seed, and the table after it."""
    errors = {name: [] for name in names}
    for seed in range(given.seeds):
        for name in names:
            errors[name].append(denoise(name, seed, given.steps))
        fixed = [
            {"arm": name} | {f"error at {n}": f"{e:.4f}" for n, e in x.items()}
            for name, x in without_learning().items()
        ]
        learned = [
            {"arm": name, "seeds": len(x)} | {f"error at {n}": shown([one[n] for one in x], ".4f") for n in LENGTHS}
            for name, x in errors.items()
        ]
        write(fixed + learned)


def draw_graph(key):
    """Transition matrix [NODES, NODES] and how many neighbours each node has [NODES], none of them itself."""
    degrees = jnp.arange(NODES) % DEGREES + 1
    lot = jnp.where(jnp.eye(NODES, dtype=bool), -1.0, jax.random.uniform(key, (NODES, NODES)))
    ranks = jnp.argsort(jnp.argsort(-lot, axis=1), axis=1)
    return jnp.where(ranks < degrees[:, None], 1.0 / degrees[:, None].astype(jnp.float32), 0.0), degrees


def pointed(module, x, place):
    """What the last token's query gives to each token before it, [B, T - 1], in logs; and its inverse temperature [B]."""
    projected, length = module.project(x, place), x.shape[1]
    logits = jnp.einsum("bnh,bsnh->bs", projected.queries[0][:, -1], projected.keys[:, :-1])
    owner = getattr(module, "queries_temperature", None)
    tau = jnp.ones(x.shape[:2]) if owner is None else owner(x, module.split(x)[0], place.positions)[..., 0]
    return jax.nn.log_softmax(logits * module.config.query_scale), tau[:, length - 1]


def walk(arm: str, seed: int, steps: int) -> tuple[float, float | None]:
    """L1 of the transition matrix that a layer learned in so many steps; rank correlation of temperatures and degrees."""
    model = Model(
        hidden_size=EMBEDDED, intermediate_size=EMBEDDED, num_layers=1, num_heads=1, head_dim=HEAD,
        max_positions=NODES + 1, rope="none", **ARMS[arm],
    )  # fmt: skip
    config = decoder_config(model, 2)
    graph, embed, start, first = jax.random.split(jax.random.key(seed), 4)
    (matrix, degrees), module = draw_graph(graph), ATTENTION[config.attention](config)
    table = jax.random.normal(embed, (NODES, EMBEDDED))

    def at(table, nodes, order):
        x = table[jnp.concatenate([order, nodes[:, None]], axis=1)]
        return x, place_of(x)

    def orders(key, rows):
        return jax.vmap(lambda k: jax.random.permutation(k, NODES))(jax.random.split(key, rows))

    def loss(trained, nodes, following, order):
        log_p, _ = module.apply(trained["layer"], *at(trained["table"], nodes, order), method=pointed)
        return -jnp.where(order == following[:, None], log_p, 0.0).sum() / len(nodes)

    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

    @jax.jit
    def step(trained, state, key):
        where, whither, order = jax.random.split(key, 3)
        nodes = jax.random.randint(where, (128,), 0, NODES)
        following = jax.random.categorical(whither, jnp.log(matrix[nodes]))
        gradients = jax.grad(loss)(trained, nodes, following, orders(order, 128))
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(trained, updates), state

    everyone, plain = jnp.arange(NODES), jnp.tile(jnp.arange(NODES), (NODES, 1))
    trained = {"table": table, "layer": module.init(start, *at(table, everyone, plain), method=pointed)}
    state = optimizer.init(trained)
    for number in range(steps):
        trained, state = step(trained, state, jax.random.fold_in(first, number))
    log_p, tau = module.apply(trained["layer"], *at(trained["table"], everyone, plain), method=pointed)
    distance = float(jnp.abs(jnp.exp(log_p) - matrix).sum(axis=1).mean())
    return distance, rank_correlation(np.asarray(tau), np.asarray(degrees)) if float(jnp.ptp(tau)) > 1e-6 else None


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's: Pearson's of the ranks, equals sharing theirs."""
    ranks = [np.searchsorted(np.sort(x), x) + np.searchsorted(np.sort(x), x, side="right") for x in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def walking(given, names, write) -> None:
    """All arms under each seed, which is another graph, and the table after it."""
    found = {name: [] for name in names}
    for seed in range(given.seeds):
        for name in names:
            found[name].append(walk(name, seed, given.steps))
        write([
            {"arm": name, "seeds": len(x), "L1": shown([one for one, _ in x], ".4f"),
             "rank correlation": shown([two for _, two in x], ".2f") if x[0][1] is not None else "one temperature"}
            for name, x in found.items()
        ])  # fmt: skip


def main():
    """Trains the arms and writes the table after each seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=STEPS, default="language")
    parser.add_argument("--arms", help=f"of {', '.join(ARMS)}; all, but for the graph 'values too'")
    parser.add_argument("--text", default="wikitext2-valid", help="a name of infer.texts, or a UTF-8 file")
    parser.add_argument("--validation", default="wikitext2-test", help="another one")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help=str(STEPS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--sequence", type=int, default=128)
    parser.add_argument("--block", type=int, default=50, help="steps of an arm before the next one's turn")
    parser.add_argument("--out", type=pathlib.Path)
    given = parser.parse_args()
    said = command(parser, given, "ssa_arms.py")
    given.steps = STEPS[given.task] if given.steps is None else given.steps
    usual = [name for name in ARMS if given.task != "graph" or name != "values too"]
    names = given.arms.split(",") if given.arms else usual
    title = {
        "language": f"Selective temperatures on {pathlib.Path(given.validation).name}: {given.steps} steps of"
        f" {given.batch} rows of {given.sequence} tokens",
        "denoising": f"Selective temperatures, {SIGNALS} signals among noise: {given.steps} steps at {TRAINED} tokens",
        "graph": f"Selective temperatures, neighbours of {NODES} nodes of a graph: {given.steps} steps of 128 walks",
    }[given.task]
    write = lambda rows: record(
        given.out,
        title=f"{title}; mean over seeds [lowest, highest]",
        command=said,
        rows=rows,
    )
    if given.task == "language":
        compare({name: recipe(name, given) for name in names}, seeds=given.seeds, block=given.block, write=write)
    else:
        {"denoising": denoising, "graph": walking}[given.task](given, names, write)


if __name__ == "__main__":
    main()
