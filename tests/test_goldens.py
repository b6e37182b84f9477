"""The decoder against transformers' golden files, published sizes by shape, and RoPE against float64 formulas."""

import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances

from jaxkv import decoder
from jaxkv.cache import decode, empty_state, extend, forward
from jaxkv.cache.budgets import plan, tree_bytes
from jaxkv.checkpoints import open_checkpoint
from jaxkv.checkpoints.huggingface_config import parse_config
from jaxkv.config import RopeConfig
from jaxkv.policies import Full
from jaxkv.rope import angles, make_rotary, rotate

GOLDENS = pathlib.Path(__file__).parent / "goldens"
CASES = sorted(path.parent.name for path in GOLDENS.glob("*/golden.npz"))


def test_all_families_have_a_golden():
    assert len(CASES) >= 20 and {name.split("-")[0] for name in CASES} >= {
        "gemma2", "gemma3", "llama", "llama2", "llama3", "mistral", "phi3", "qwen2", "qwen3", "smollm2",
    }  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_golden(case):
    """Logits of 2 x 90 tokens, and 24 greedy tokens through the cache and the jitted decode step."""
    model = open_checkpoint(GOLDENS / case, dtype="float32")
    golden = np.load(GOLDENS / case / "golden.npz")
    config, params = model.config, model.params
    hidden = forward(params, jnp.asarray(golden["tokens"]), config=config)
    logits = decoder.logits(params, hidden, config=config)
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=tolerances.GOLDEN_LOGITS)

    total = len(golden["prompt"]) + len(golden["greedy"])
    planned = plan(config, Full(), None, lengths=[total], dtype="float32")
    state = empty_state(config, planned.spec, limits=planned.limits, lengths=[total])
    hidden, state = extend(params, jnp.asarray(golden["prompt"], jnp.int32)[None], state, config=config)

    @functools.partial(jax.jit, donate_argnums=1)
    def step(token, state):
        hidden, state = decode(params, token, state, config=config, valid=jnp.ones(1, bool))
        return jnp.argmax(decoder.logits(params, hidden, config=config), axis=-1).astype(jnp.int32), state

    token = jnp.argmax(decoder.logits(params, hidden[:, -1], config=config), axis=-1).astype(jnp.int32)
    greedy = [int(token[0])]
    while len(greedy) < len(golden["greedy"]):
        token, state = step(token, state)
        greedy.append(int(token[0]))
    assert greedy == golden["greedy"].tolist()


LLAMA3_SCALING = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
GEMMA2 = {
    "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1,
    "final_logit_softcapping": 30.0, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
    "initializer_range": 0.02, "max_position_embeddings": 8192, "pad_token_id": 0, "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0, "sliding_window": 4096, "sliding_window_size": 4096, "torch_dtype": "float32",
    "transformers_version": "4.42.0.dev0", "use_cache": True, "vocab_size": 256000,
}  # fmt: skip
PHI3 = {
    "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "bos_token_id": 1, "embd_pdrop": 0.0,
    "eos_token_id": 32000, "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096, "pad_token_id": 32000, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "rope_theta": 10000.0, "sliding_window": 2047, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "vocab_size": 32064,
}  # fmt: skip
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "attention_dropout": 0.0,
    "bos_token_id": 151643, "eos_token_id": 151643, "hidden_act": "silu", "initializer_range": 0.02,
    "max_position_embeddings": 131072, "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "use_sliding_window": False, "vocab_size": 152064,
}  # fmt: skip
PUBLISHED = {  # the fields of config.json on the Hub, the number of parameters, cache bytes per token in bfloat16
    "Llama-2-7B": (
        {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 4096,
            "intermediate_size": 11008, "max_position_embeddings": 4096, "num_attention_heads": 32,
            "num_hidden_layers": 32, "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
            "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16", "vocab_size": 32000,
        },
        6_738_415_616,
        524_288,
    ),
    "Mistral-7B": (  # v0.1
        {
            "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu", "hidden_size": 4096,
            "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
            "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
            "sliding_window": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 32000,
        },
        7_241_732_096,
        131_072,
    ),
    "Qwen2-7B": (
        QWEN2 | {
            "hidden_size": 3584, "intermediate_size": 18944, "max_window_layers": 28, "num_attention_heads": 28,
            "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
        },
        7_615_616_512,
        57_344,
    ),
    "Qwen2-72B": (
        QWEN2 | {
            "hidden_size": 8192, "intermediate_size": 29568, "max_window_layers": 80, "num_attention_heads": 64,
            "num_hidden_layers": 80, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        },
        72_706_203_648,
        327_680,
    ),
    "Gemma-2-9B": (
        GEMMA2 | {
            "head_dim": 256, "hidden_size": 3584, "intermediate_size": 14336, "num_attention_heads": 16,
            "num_hidden_layers": 42, "num_key_value_heads": 8, "query_pre_attn_scalar": 256,
        },
        9_241_705_984,
        344_064,
    ),
    "Gemma-2-27B": (
        GEMMA2 | {
            "head_dim": 128, "hidden_size": 4608, "intermediate_size": 36864, "num_attention_heads": 32,
            "num_hidden_layers": 46, "num_key_value_heads": 16, "query_pre_attn_scalar": 144,
        },
        27_227_128_320,
        376_832,
    ),
    "Phi-3-mini": (  # 4k
        PHI3 | {
            "hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 32, "num_hidden_layers": 32,
            "num_key_value_heads": 32,
        },
        3_821_079_552,
        393_216,
    ),
    "Phi-3-medium": (  # 4k
        PHI3 | {
            "attention_bias": False, "hidden_size": 5120, "intermediate_size": 17920, "num_attention_heads": 40,
            "num_hidden_layers": 40, "num_key_value_heads": 10,
        },
        13_960_238_080,
        204_800,
    ),
    "Llama-3-8B": (
        {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "hidden_act": "silu",
            "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 8192, "num_attention_heads": 32,
            "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_scaling": None,
            "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 128256,
        },
        8_030_261_248,
        131_072,
    ),
    "Llama-3.1-70B": (
        {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "mlp_bias": False,
            "hidden_act": "silu", "hidden_size": 8192, "intermediate_size": 28672, "max_position_embeddings": 131072,
            "num_attention_heads": 64, "num_hidden_layers": 80, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
            "rope_scaling": LLAMA3_SCALING, "rope_theta": 500000.0, "tie_word_embeddings": False, "vocab_size": 128256,
        },
        70_553_706_496,
        327_680,
    ),
    "Qwen3-8B": (
        {
            "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "head_dim": 128,
            "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 12288, "max_position_embeddings": 40960,
            "max_window_layers": 36, "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
            "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936,
        },
        8_190_735_360,
        147_456,
    ),
    "Gemma-3-27B": (
        {
            "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "head_dim": 128, "hidden_size": 5376,
            "intermediate_size": 21504, "num_attention_heads": 32, "num_hidden_layers": 62, "num_key_value_heads": 16,
            "query_pre_attn_scalar": 168, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024, "max_position_embeddings": 131072, "vocab_size": 262208,
        },
        27_009_346_304,
        507_904,
    ),
}  # fmt: skip


QUICK = {"Llama-3-8B", "Gemma-3-27B"}  # of the rest, some take seconds to trace


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in PUBLISHED])
def test_published_sizes(name):
    """Nothing is allocated: parameters, a state and both paths, by shape."""
    fields, parameters, per_token = PUBLISHED[name]
    config = parse_config(fields)
    params = jax.eval_shape(lambda: decoder.init_params(config, jax.random.key(0), dtype=jnp.bfloat16))
    assert tree_bytes(params) == 2 * parameters
    planned = plan(config, Full(), None, lengths=[4096], dtype="bfloat16")
    seen = [min(4096, kind.window or 4096) for kind in config.layers]
    assert planned.limits[:, 0, 0].tolist() == seen
    stored = [tier for layer in planned.spec for tier in layer.tiers]
    assert all(tier.scheme == ("bf16", "bf16") for tier in stored)
    assert [tier.slots for tier in stored] == [-(-count // 256) * 256 for count in seen]
    entry = 2 * 2 * config.num_kv_heads * config.head_dim
    assert config.num_layers * entry == per_token

    def start():
        return empty_state(config, planned.spec, limits=planned.limits, lengths=np.array([4096]))

    state = jax.eval_shape(start)
    slots = sum(tier.slots for tier in stored)
    assert slots * entry < tree_bytes(state) < 1.05 * slots * entry

    run = functools.partial(decode, config=config, valid=np.ones(1, bool))
    hidden, after = jax.eval_shape(run, params, jax.ShapeDtypeStruct((1,), jnp.int32), state)
    assert hidden.shape == (1, config.hidden_size) and hidden.dtype == jnp.bfloat16
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    logits = jax.eval_shape(functools.partial(decoder.logits, config=config), params, hidden)
    assert logits.shape == (1, config.vocab_size) and logits.dtype == jnp.float32


def test_one_prompt_of_a_published_size():
    config = parse_config(PUBLISHED["Llama-3-8B"][0])
    params = jax.eval_shape(lambda: decoder.init_params(config, jax.random.key(0), dtype=jnp.bfloat16))
    tokens = jax.ShapeDtypeStruct((2, 2048), jnp.int32)
    hidden = jax.eval_shape(functools.partial(forward, config=config), params, tokens)
    assert hidden.shape == (2, 2048, 4096) and hidden.dtype == jnp.bfloat16


# RoPE


def frequencies(rope, length=1):
    rotary = make_rotary(rope, jnp.asarray([length], jnp.int32))
    return np.asarray(rotary.frequencies[0], np.float64), float(rotary.scale[0])


def test_rotation_by_hand():
    rope = RopeConfig(kind="default", theta=100.0, rotary_dim=4)
    found, scale = frequencies(rope)
    np.testing.assert_allclose(found, [1.0, 0.1], rtol=tolerances.ROPE)
    assert scale == 1.0
    cos, sin = angles(make_rotary(rope, jnp.ones(1, jnp.int32)), jnp.asarray([[0, 2]], jnp.int32))
    x = jnp.asarray([[[[1.0, 1.0, 0.0, 0.0, 7.0]], [[1.0, 1.0, 0.0, 0.0, 7.0]]]])  # [B, T, heads, H], channel 4 stays
    y = np.asarray(rotate(x, cos, sin))[0, :, 0]
    assert (y[0] == np.asarray(x)[0, 0, 0]).all()
    expected = [math.cos(2), math.cos(0.2), math.sin(2), math.sin(0.2), 7.0]  # channel 0 pairs with 2, 1 with 3
    np.testing.assert_allclose(y[1], expected, rtol=0, atol=tolerances.ROTATION)


def test_rotation_depends_on_the_distance_only_and_adds_up():
    rotary = make_rotary(RopeConfig(kind="default", theta=1e4, rotary_dim=8), jnp.ones(1, jnp.int32))
    turn = lambda x, position: rotate(x, *angles(rotary, jnp.asarray([[position]], jnp.int32)))
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 1, 8)), jnp.float32) / 3 for _ in range(2))
    product = lambda a, b: float((turn(q, a) * turn(k, b)).sum())
    assert product(9, 4) == pytest.approx(product(5, 0), abs=tolerances.ROTATION)
    np.testing.assert_allclose(turn(turn(k, 4), 3), turn(k, 7), rtol=0, atol=tolerances.ROTATION)
    np.testing.assert_array_equal(turn(k, 0), k)


def test_linear_and_llama3():
    base = 1e4 ** -(np.arange(8) / 8)
    found, _ = frequencies(RopeConfig(kind="linear", theta=1e4, rotary_dim=16, factor=4.0))
    np.testing.assert_allclose(found, base / 4, rtol=tolerances.ROPE)
    rope = RopeConfig(
        kind="llama3", theta=1e4, rotary_dim=16, factor=8.0, original_max_positions=32, low_freq_factor=1.0,
        high_freq_factor=4.0,
    )  # fmt: skip
    expected = []
    for frequency in base:  # as the published checkpoints define it
        wavelength = 2 * math.pi / frequency
        smooth = (32 / wavelength - 1.0) / (4.0 - 1.0)
        if wavelength < 32 / 4.0:
            expected.append(frequency)
        elif wavelength > 32 / 1.0:
            expected.append(frequency / 8)
        else:
            expected.append((1 - smooth) * frequency / 8 + smooth * frequency)
    np.testing.assert_allclose(frequencies(rope)[0], expected, rtol=tolerances.ROPE)


def test_frequencies_that_depend_on_length_switch_where_they_should():
    half = (1.0, 2.0, 3.0, 4.0)
    rope = RopeConfig(
        kind="longrope", theta=1e4, rotary_dim=8, factor=4.0, original_max_positions=64, short_factor=half,
        long_factor=tuple(5 * x for x in half),
    )  # fmt: skip
    base = 1e4 ** -(np.arange(4) / 4)
    for length, stretch in ((1, 1), (64, 1), (65, 5), (256, 5)):
        found, scale = frequencies(rope, length)
        np.testing.assert_allclose(found, base / (stretch * np.array(half)), rtol=tolerances.ROPE)
        np.testing.assert_allclose(scale, math.sqrt(1 + math.log(4) / math.log(64)), rtol=tolerances.ROPE_SCALE)
    rope = RopeConfig(kind="dynamic", theta=1e4, rotary_dim=8, factor=3.0, original_max_positions=64)
    for length in (1, 64):
        np.testing.assert_allclose(frequencies(rope, length)[0], base, rtol=tolerances.ROPE)
    theta = 1e4 * (3.0 * 128 / 64 - 2.0) ** (8 / 6)
    np.testing.assert_allclose(frequencies(rope, 128)[0], theta ** -(np.arange(4) / 4), rtol=tolerances.ROPE_DYNAMIC)
    assert rope.depends_on_length
    rows = make_rotary(rope, jnp.asarray([64, 128], jnp.int32)).frequencies  # each row has its own
    np.testing.assert_array_equal(rows[1], make_rotary(rope, jnp.asarray([128], jnp.int32)).frequencies[0])
    assert (np.asarray(rows[0][1:]) > np.asarray(rows[1][1:])).all()


def test_yarn_ramp():
    rope = RopeConfig(
        kind="yarn", theta=1e4, rotary_dim=16, factor=4.0, original_max_positions=2048, beta_fast=32.0, beta_slow=1.0,
        truncate=True,
    )  # fmt: skip
    base = 1e4 ** -(np.arange(8) / 8)
    found, scale = frequencies(rope)
    turns = 2048 * base / (2 * math.pi)  # over the original length
    np.testing.assert_allclose(found[turns > 32], base[turns > 32], rtol=tolerances.ROPE)  # fast ones stay
    low, high = math.floor(16 * math.log(2048 / (32 * 2 * math.pi)) / (2 * math.log(1e4))), 6
    ramp = np.clip((np.arange(8) - low) / (high - low), 0, 1)
    np.testing.assert_allclose(found, base / 4 * ramp + base * (1 - ramp), rtol=tolerances.ROPE)
    np.testing.assert_allclose(found[6:], base[6:] / 4, rtol=tolerances.ROPE)  # slow ones are interpolated
    np.testing.assert_allclose(scale, 0.1 * math.log(4) + 1, rtol=tolerances.ROPE_SCALE)
