"""jaxkv: language models in JAX whose key/value cache has a fixed budget.

`jaxkv.cache` is the budgeted cache, `jaxkv.policies` decides what it keeps, `jaxkv.quantization` at how many bits,
`jaxkv.decoder` is the model, `jaxkv.checkpoints` reads and writes it. `infer` is what users call.
"""

__version__ = "0.1.0"
