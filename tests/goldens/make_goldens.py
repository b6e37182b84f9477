"""Writes the golden files: tiny random checkpoints with the logits and greedy tokens of transformers.

    python make_goldens.py --out tests/goldens [--cases llama2 gemma3 ...]
    python make_goldens.py --out tests/goldens --smollm2 MODEL.gguf --novel pride_and_prejudice.txt

Tests only read what this writes, so they need neither torch nor transformers. README.md tells what each file holds
and with which versions it was made. Every case proves itself before it is written: each parameter and each feature of
the configuration that the case is about must change the logits, what must not matter must not, the greedy tokens of
the cached run must equal those of full forwards, and no greedy step may be a near tie.
"""

import argparse
import copy
import json
import pathlib
import shutil
import tempfile

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import logging

from golden_cases import CASES, EOS, LENGTH, TINY, Case

BATCH, NEW_TOKENS = 2, 24
MATTERS = 1e-3  # smallest change of some logit that counts as an influence
MIN_MARGIN = 0.02  # smallest top-2 logit margin accepted in a greedy run of a tiny model
MIN_DISTINCT = 8  # a greedy run of fewer distinct tokens is a loop, and tests little


def patched(config: dict, patch: dict) -> dict:
    """`config` with `patch` over it; inside rope_parameters a None removes a key."""
    result = config | patch
    if "rope_parameters" in patch:
        merged = config["rope_parameters"] | patch["rope_parameters"]
        result["rope_parameters"] = {key: value for key, value in merged.items() if value is not None}
    return result


def build(config: dict, weights: dict | None = None):
    """A fresh float32 model with eager attention (fresh: transformers keeps rope state between calls)."""
    hf_config = AutoConfig.for_model(**copy.deepcopy(TINY | config))
    model = AutoModelForCausalLM.from_config(hf_config, attn_implementation="eager", dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    if weights is not None:
        model.load_state_dict(weights)
    return model


def is_norm(name: str) -> bool:
    return "norm" in name


def norm_identity(model) -> float:
    """The stored weight that makes a norm the identity: Gemma multiplies by (1 + weight)."""
    return 0.0 if model.config.model_type.startswith("gemma") else 1.0


@torch.no_grad()
def randomise(model, seed: int, dtype: torch.dtype) -> None:
    """Fills all parameters with values exact in `dtype`, so that each influences the logits."""
    generator = torch.Generator().manual_seed(seed)
    gemma = model.config.model_type.startswith("gemma")
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if is_norm(name):
            value = norm_identity(model) + 0.3 * noise + (0.5 if gemma else 0.0)
        elif name.endswith("bias"):
            value = 0.5 * noise
        elif "embed_tokens" in name:
            value = (0.15 if gemma else 0.4) * noise  # a stronger residual stream repeats the last token
        else:
            gain = 2.0 if any(part in name for part in ("q_proj", "k_proj", "qkv_proj", "lm_head")) else 1.3
            value = gain * noise / parameter.shape[1] ** 0.5
        parameter.copy_(value.to(dtype))


@torch.no_grad()
def logits_of(model, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens, use_cache=False).logits


def fix_frequencies(model, length: int) -> bool:
    """Fixes length-dependent rope frequencies to those for `length` at all positions; whether there were any."""
    rotary = model.model.rotary_emb
    if rotary.rope_type not in ("dynamic", "longrope"):
        return False
    rotary.inv_freq, rotary.attention_scaling = ROPE_INIT_FUNCTIONS[rotary.rope_type](model.config, seq_len=length)
    rotary.rope_type = "default"  # transformers' update of the frequencies in the forward looks at this
    if hasattr(model.config, "original_max_position_embeddings"):
        model.config.original_max_position_embeddings = 10**6  # Phi-3's generate drops its cache past this length
    return True


@torch.no_grad()
def greedy_of(model, prompt: torch.Tensor) -> tuple[np.ndarray, float]:
    """NEW_TOKENS greedy tokens of `generate` with its cache, equal to those of full forwards, and the least margin."""
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),  # else generate hides the pad tokens of a random prompt
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        use_cache=True,
        return_dict_in_generate=True,
        output_logits=True,
    )
    tokens = output.sequences
    top = torch.cat(output.logits).topk(2).values
    uncached = logits_of(model, tokens)[0, prompt.shape[1] - 1 : -1].argmax(-1)
    margin = float((top[:, 0] - top[:, 1]).min())
    if margin > MIN_MARGIN and not torch.equal(uncached, tokens[0, prompt.shape[1] :]):
        raise RuntimeError("the cached greedy run differs from the run of full forwards")
    return uncached.numpy().astype(np.int32), margin


@torch.no_grad()
def prove(case: Case, model, tokens: torch.Tensor, logits: torch.Tensor) -> None:
    """Raises unless all that must influence the logits does, and what must not does not."""

    def change(other) -> float:
        return float((logits_of(other, tokens) - logits).abs().max())

    weights = model.state_dict()
    for name, parameter in model.named_parameters():
        kept = parameter.clone()
        parameter.fill_(norm_identity(model) if is_norm(name) else 0.0)
        if change(build(case.config, weights)) <= MATTERS:
            raise RuntimeError(f"{name} has no influence")
        parameter.copy_(kept)
    for patch in case.matters:
        if change(build(patched(case.config, patch), weights)) <= MATTERS:
            raise RuntimeError(f"{patch} has no influence")
    for patch in case.ignored:
        if change(build(patched(case.config, patch), weights)) != 0.0:
            raise RuntimeError(f"{patch} should have no influence")


def old_style(config: dict, old: dict) -> dict:
    """config.json as transformers before 5 wrote it; keys that `old` maps to None did not exist."""
    new = ("rope_parameters", "dtype", "_sliding_window_pattern", "ignore_keys_at_rope_validation")
    kept = {key: value for key, value in config.items() if key not in (*new, "use_bidirectional_attention")}
    merged = kept | old | {"torch_dtype": config["dtype"], "transformers_version": "4.50.0"}
    return {key: merged[key] for key in sorted(merged) if not (key in old and old[key] is None)}


def check_loading(folder: pathlib.Path, config_name: str, tokens: torch.Tensor, logits: torch.Tensor) -> None:
    """Raises unless transformers, loading `folder` with that configuration file, gives exactly these logits."""
    with tempfile.TemporaryDirectory() as copied:
        for file in folder.glob("model*"):
            shutil.copy(file, copied)
        shutil.copy(folder / config_name, pathlib.Path(copied) / "config.json")
        model = AutoModelForCausalLM.from_pretrained(copied, dtype=torch.float32, attn_implementation="eager").eval()
    if not torch.equal(logits_of(model, tokens), logits):
        raise RuntimeError(f"{folder.name}/{config_name} loads as another model")


def write_case(name: str, case: Case, folder: pathlib.Path) -> None:
    """Searches the first seed whose greedy run is clear, proves the case and writes its folder."""
    for seed in range(500):
        model = build(case.config)
        randomise(model, seed, case.dtype)
        weights = copy.deepcopy(model.state_dict())
        generator = torch.Generator().manual_seed(1000 + seed)
        tokens = torch.randint(TINY["vocab_size"], (BATCH, LENGTH), generator=generator)
        prompt = torch.randint(TINY["vocab_size"], (1, case.prompt), generator=generator)
        runner = build(case.config, weights)
        fixed = fix_frequencies(runner, case.prompt + NEW_TOKENS)
        greedy, margin = greedy_of(runner, prompt)
        if margin > MIN_MARGIN and len(set(greedy)) >= MIN_DISTINCT and EOS not in greedy:
            break
    else:
        raise RuntimeError(f"{name}: no seed gives a clear greedy run")
    logits = logits_of(model, tokens)
    prove(case, build(case.config, weights), tokens, logits)

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model.to(case.dtype).save_pretrained(folder, max_shard_size=case.max_shard_size)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if case.old is not None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.old.json").write_text(json.dumps(old_style(config, case.old), indent=2) + "\n")
    for config_name in sorted(file.name for file in folder.glob("config*.json")):
        check_loading(folder, config_name, tokens, logits)
    rule = "frequencies fixed for the whole length, prompt + new tokens" if fixed else "model.generate"
    arrays = {
        "tokens": tokens.numpy().astype(np.int32),
        "logits": logits.numpy(),
        "prompt": prompt[0].numpy().astype(np.int32),
        "greedy": greedy,
        "margin": np.float32(margin),
        "greedy_rule": np.array(rule),
    }
    np.savez_compressed(folder / "golden.npz", **arrays)
    print(f"{name:20} seed {seed:3}  margin {margin:.4f}  largest logit {logits.abs().max():.2f}  {rule}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the goldens")
    parser.add_argument("--cases", nargs="*", choices=list(CASES), help="tiny cases to write (default: all)")
    parser.add_argument("--smollm2", type=pathlib.Path, help="SmolLM2-135M-Instruct GGUF: write smollm2.npz instead")
    parser.add_argument("--novel", type=pathlib.Path, help="text of the long prompt of smollm2.npz")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    if options.smollm2 is not None:
        if options.novel is None:
            parser.error("--smollm2 needs --novel, the text of its long prompt")
        from smollm2_golden import write_smollm2

        write_smollm2(options.smollm2, options.novel, options.out / "smollm2.npz")
        return
    for name in options.cases or CASES:
        write_case(name, CASES[name], options.out / name)


if __name__ == "__main__":
    main()
