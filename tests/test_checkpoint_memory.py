"""Loading takes host memory for the model plus about one tensor, measured in a process of its own."""

import json
import pathlib
import subprocess
import sys

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file
from test_gguf import TENSORS

from jaxkv.checkpoints.huggingface_config import parse_config
from jaxkv.checkpoints.layout import huggingface_names, leaves

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = {  # every matrix has 2,048 x 1,024 float32 = 8 MiB: 7 in each of 2 layers, the embedding and the head
    "model_type": "llama", "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 2, "vocab_size": 2048,
    "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 128,
}  # fmt: skip
TENSOR, COUNT, SLACK = 8 * 2**20, 16, 12 * 2**20

# Loads a small model, so that all code is in memory, then the large one, while a thread watches the resident set.
MEASURE = """
import gc, os, pathlib, sys, threading, time
from jaxkv.checkpoints import layout, open_checkpoint

def resident():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def watch():
    global peak
    while not stop.is_set():
        peak = max(peak, resident())
        time.sleep(0.0005)

def all_first(wanted, read, **rest):
    whole = {name: read(name, 0, shape[0]) for leaf in wanted for name, shape in leaf.sources}
    return assemble(wanted, lambda name, first, end: whole[name][first:end], **rest)

small, large, how = sys.argv[1:]
assemble = layout.assemble
if how == "all first":
    layout.assemble = all_first
open_checkpoint(small, dtype="float32")
gc.collect()
peak, stop = 0, threading.Event()
idle = resident()
watcher = threading.Thread(target=watch)
watcher.start()
checkpoint = open_checkpoint(large, dtype="float32")
stop.set()
watcher.join()
print(max(peak, resident()) - idle)
"""


def tensors():
    """Names and arrays of the model: zeros, which are read from the file like anything else."""
    config = parse_config(CONFIG)
    for leaf in leaves(config, huggingface_names(config)):
        for name, shape in leaf.sources:
            yield name, np.zeros(shape, np.float32)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    (folder / "safetensors").mkdir()
    (folder / "safetensors" / "config.json").write_text(json.dumps(CONFIG))
    save_file(dict(tensors()), folder / "safetensors" / "model.safetensors")
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(1024)
    writer.add_block_count(2)
    writer.add_feed_forward_length(2048)
    writer.add_head_count(16)
    writer.add_head_count_kv(16)
    writer.add_key_length(128)
    writer.add_value_length(128)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("llama")
    tokens = ["<unk>", "<s>", "</s>", *(f"<{n}>" for n in range(3, 2048))]
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 2048)
    writer.add_token_types([3] * 2048)
    for name, array in tensors():
        name = name.replace("post_attention_layernorm", "ffn_norm")
        for theirs, ours in TENSORS.items():
            name = name.replace(theirs, ours)
        if array.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


def peak(files: pathlib.Path, form: str, how: str) -> int:
    """Most bytes over those of the idle process while the model is loaded."""
    small = ROOT / "tests" / "goldens" / "llama2"
    command = [sys.executable, "-c", MEASURE, str(small), str(files / form), how]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, timeout=120)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("form", ["safetensors", "model.gguf"])
def test_peak_memory_of_loading(files, form):
    limit = (COUNT + 2) * TENSOR + SLACK
    found = peak(files, form, "one by one")
    assert COUNT * TENSOR < found < limit, f"{found / TENSOR:.2f} tensors"
    found = peak(files, form, "all first")
    assert found > limit, f"{found / TENSOR:.2f} tensors: this measurement would not notice"
