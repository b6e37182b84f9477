"""The budgeted key/value cache: pure functions on a state.

state = empty_state(config, plan.spec, lengths=lengths, **plan.sizes())
hidden, state = extend(params, tokens, state, config=config, valid=valid)     # prompt, or any number of tokens
hidden, state = decode(params, token, state, config=config, valid=running)    # one token, inside a jitted loop
"""

from jaxkv.cache.attend import attend_decode, attend_extend, make_context, store
from jaxkv.cache.compress import compress
from jaxkv.cache.edit import concat, drop
from jaxkv.cache.extend import decode, extend, forward
from jaxkv.cache.files import StateFileError, fingerprint, pack_state, unpack_state
from jaxkv.cache.insert import insert
from jaxkv.cache.state import empty_state, live_count, live_slots, tier_keys, tier_values

__all__ = [
    "StateFileError",
    "attend_decode",
    "attend_extend",
    "compress",
    "concat",
    "decode",
    "drop",
    "empty_state",
    "extend",
    "fingerprint",
    "forward",
    "insert",
    "live_count",
    "live_slots",
    "make_context",
    "pack_state",
    "store",
    "tier_keys",
    "tier_values",
    "unpack_state",
]
