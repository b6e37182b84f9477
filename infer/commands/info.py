"""`jaxkv info`: what a model is, what its cache costs, and which kernels would run."""

import importlib.metadata
import json


def add_options(sub):
    """Declares the options."""
    sub.add_argument("--json", action="store_true")
    sub.add_argument("--kernels", action="store_true", help="instead: which kernel runs on which platform, and why not")


def run(arguments) -> int:
    """Runs the subcommand. Returns: the exit code."""
    import jax

    from infer.kernel_table import kernel_rows, kernels_here, table
    from jaxkv.cache.budgets import format_bytes, plan
    from jaxkv.checkpoints import read_config
    from jaxkv.decoder import init_params
    from jaxkv.presets import PRESETS

    config = read_config(arguments.model, revision=arguments.revision, token=arguments.token, offline=arguments.offline)
    if arguments.kernels:
        rows = kernel_rows(config, arguments.dtype)
        print(json.dumps({"model": arguments.model, "kernels": rows}) if arguments.json else table(rows))
        return 0
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    parameters = sum(x.size for x in jax.tree.leaves(shapes))
    costs = {name: plan(config, name, None, lengths=[1000], dtype=arguments.dtype).bytes_per_row for name in PRESETS}
    facts = {
        "model": arguments.model,
        "model_type": config.model_type,
        "attention": config.attention,
        "parameters": parameters,
        "layers": config.num_layers,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocabulary": config.vocab_size,
        "window": config.max_positions,
        "cache_bytes_per_1000_tokens": costs,
        "device": f"{jax.devices()[0].platform}: {jax.devices()[0].device_kind}",
        "versions": {name: importlib.metadata.version(name) for name in ("jaxkv", "jax", "jaxlib", "flax", "numpy")},
        "implementations": kernels_here(config, arguments.dtype),
    }
    if arguments.json:
        print(json.dumps(facts))
        return 0
    for name, value in facts.items():
        if name == "cache_bytes_per_1000_tokens":
            print("cache bytes per 1,000 tokens, all counted:")
            for cache, size in value.items():
                print(f"  {cache:24} {size:12,}  ({format_bytes(size)})")
        elif isinstance(value, dict):
            print(f"{name:12} " + ", ".join(f"{k} {v}" for k, v in value.items()))
        else:
            print(f"{name:12} {value:,}" if isinstance(value, int) else f"{name:12} {value}")
    return 0
