"""One measurement of one contender, as a process of its own; prints a JSON object. Called by speed.py."""

import json
import pathlib
import statistics
import sys
import time

from common import versions

STEPS, REPEATS = 16, 5


def export(folder, case):
    """Writes the dequantized float32 weights for the peers: a transformers directory and a float32 GGUF."""
    import gguf
    import numpy as np

    from jaxkv.checkpoints import open_checkpoint, save
    from jaxkv.checkpoints.named import find_named

    checkpoint = open_checkpoint("smollm2", dtype="float32")
    save(pathlib.Path(folder) / "hf", checkpoint.config, checkpoint.params, tokenizer=checkpoint.tokenizer)
    reader = gguf.GGUFReader(find_named("smollm2"))
    writer = gguf.GGUFWriter(pathlib.Path(folder) / "f32.gguf", "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        value = field.contents()
        if kind == gguf.GGUFValueType.ARRAY:
            writer.add_array(field.name, value)
        else:
            writer.add_key_value(field.name, value, kind)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {}


def bandwidth(folder, case):
    """Read bandwidth: the sum of 2 GB on all threads."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones((512, 1024, 1024), jnp.float32)
    total = jax.jit(lambda x: x.sum())
    total(x).block_until_ready()
    return {"GB/s": x.nbytes / min(_times(lambda: total(x).block_until_ready())) / 1e9}


def jaxkv(folder, case):
    """The jitted prefill and decode loop that `generate` runs."""

    import infer
    from infer import generate as generation
    from infer.prefill import new_state, read
    from infer.sampling import Sampling
    from jaxkv.cache.budgets import tree_bytes

    lm = infer.load("smollm2")
    total = case["context"] + 8 + STEPS * (REPEATS + 1)
    policy = "recency" if case["budget"] else "full"
    planned = lm.plan(policy, case["budget"], lengths=[total])
    ids = [[(7 * i) % 40000 + 100 for i in range(case["context"])]]
    prefill = []
    for _ in range(3 if case["context"] <= 2048 else 1):
        state = new_state(lm.config, planned, [total])
        started = time.perf_counter()
        hidden, state = read(lm.params, ids, state, config=lm.config)
        hidden.block_until_ready()
        prefill.append(case["context"] / (time.perf_counter() - started))
    generation.BLOCK = STEPS
    stops = generation.Request(samplings=[Sampling()], max_new_tokens=[total], stops=_no_stops(lm))
    pieces = generation.run(lm.params, hidden, state, stops, config=lm.config, prompts=ids)
    next(pieces), next(pieces)  # the first token; the block that compiles
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        next(pieces)
        times.append((time.perf_counter() - started) / STEPS)
    weights = tree_bytes(lm.params)
    read_once = int(weights + planned.bytes_per_row)
    return {"decode": 1 / statistics.median(times), "prefill": max(prefill), "bytes_per_token": read_once}


def _no_stops(lm):
    from infer.stops import build_stops

    return build_stops([], [], set(), lm.config.vocab_size)


def transformers(folder, case):
    """SDPA, the better of the dynamic and the static cache."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_pretrained(pathlib.Path(folder) / "hf", dtype=torch.float32)
    ids = torch.tensor([[(7 * i) % 40000 + 100 for i in range(case["context"])]])
    best, prefill = 0.0, 0.0
    with torch.inference_mode():
        for kind in ("dynamic", "static"):
            total = case["context"] + STEPS * (REPEATS + 2)
            cache = DynamicCache() if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=total)
            for chunk in ids.split(2048, dim=1):
                started = time.perf_counter()
                out = model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
                if chunk.shape[1] == case["context"]:
                    prefill = max(prefill, case["context"] / (time.perf_counter() - started))
            token, times = out.logits[:, -1:].argmax(-1), []
            for repeat in range(REPEATS + 1):
                started = time.perf_counter()
                for _ in range(STEPS):
                    token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
                if repeat:
                    times.append((time.perf_counter() - started) / STEPS)
            best = max(best, 1 / statistics.median(times))
    return {"decode": best, "prefill": prefill}


def llama_cpp(folder, case):
    """llama.cpp on the float32 weights, KV in float16, flash attention."""
    from llama_cpp import Llama

    model = Llama(
        str(pathlib.Path(folder) / "f32.gguf"), n_ctx=case["context"] + 256, n_batch=512, n_threads=2,
        n_threads_batch=2, flash_attn=True, verbose=False,
    )  # fmt: skip
    ids = [(7 * i) % 40000 + 100 for i in range(case["context"])]
    started = time.perf_counter()
    model.eval(ids)
    prefill = case["context"] / (time.perf_counter() - started)
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        for _ in range(STEPS):
            model.eval([model.sample(temp=0.0)])
        times.append((time.perf_counter() - started) / STEPS)
    return {"decode": 1 / statistics.median(times), "prefill": prefill}


def _times(run):
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return times


if __name__ == "__main__":
    what, folder, case = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    table = {
        "export": export,
        "bandwidth": bandwidth,
        "jaxkv": jaxkv,
        "transformers": transformers,
        "llama.cpp": llama_cpp,
    }
    print(json.dumps(versions() if what.endswith("versions") else table[what](folder, case)))
