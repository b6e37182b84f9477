"""Options that several subcommands share, and what becomes of them."""

from infer.console import Bar, Refused, check_utf8, keep_compiled, note, whole


def running_options(sub):
    """Of subcommands that run a model."""
    sub.add_argument("--adapter", help="folder of LoRA adapters to add to the model")
    sub.add_argument(
        "--kernels", help="what reads the cache: xla, tpu, gpu or interpret; not given: as the platform chooses"
    )


def generation_options(sub):
    """Of subcommands that generate."""
    from jaxkv.presets import PRESETS

    sub.add_argument("--cache", default="full", help=f"one of: {', '.join(PRESETS)}")
    sub.add_argument("--budget", help="tokens per kv head and layer (512), bytes (64MiB) or a share (20%%)")
    sub.add_argument("--max-new-tokens", type=whole(1), default=128)
    sub.add_argument("--temperature", type=float, default=0.0, help="0 = greedy")
    sub.add_argument("--top-k", type=whole(0), default=0, help="0 = off")
    sub.add_argument("--top-p", type=float, default=1.0)
    sub.add_argument("--min-p", type=float, default=0.0)
    sub.add_argument("--repetition-penalty", type=float, default=1.0)
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--stop", action="append", help="text that ends the completion; may be given several times")
    sub.add_argument("--streaming", action="store_true", help="allow positions past the model's window")


def load(arguments, *, text: bool = True):
    """The model. text: refuse one without a tokenizer."""
    import infer

    if arguments.compilation_cache:
        keep_compiled(arguments)
    with Bar(arguments, "loading", "B") as bar:
        lm = infer.load(
            arguments.model, dtype=arguments.dtype, revision=arguments.revision, token=arguments.token,
            offline=arguments.offline, progress=bar, adapter=arguments.adapter,
            kernels=arguments.kernels,
        )  # fmt: skip
    if text and lm.tokenizer is None:
        raise Refused(f"{arguments.model} has no tokenizer.json; without one only --jsonl with token ids works")
    if lm.generation.ignored:
        note(arguments, f"not applied, though the model suggests it: {', '.join(lm.generation.ignored)}")
    return lm


def sampling(arguments):
    """What the options say of sampling."""
    from infer.sampling import Sampling

    return Sampling(
        temperature=arguments.temperature, top_k=arguments.top_k, top_p=arguments.top_p, min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty, seed=arguments.seed,
    )  # fmt: skip


def options(arguments) -> dict:
    """For `LanguageModel.generate` and `stream`."""
    return dict(
        max_new_tokens=arguments.max_new_tokens, cache=arguments.cache, budget=arguments.budget,
        sampling=sampling(arguments), stop=arguments.stop, streaming=arguments.streaming,
    )  # fmt: skip


def check_early(arguments):
    """What can be refused before a model is loaded."""
    from jaxkv.cache.budgets import parse_budget
    from jaxkv.presets import make_preset

    make_preset(arguments.cache)
    parse_budget(arguments.budget)
    sampling(arguments)
    for text in arguments.stop or ():
        if not check_utf8(text, "--stop"):
            raise Refused("--stop is empty; give at least one character")
