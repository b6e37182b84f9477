"""The table of cache policies: one file and one line each (CONTRIBUTING.md shows how to add one).

The command line, the contract tests, the benchmarks and the README read this table.
"""

import dataclasses

from jaxkv.policies.base import Policy
from jaxkv.policies.expected import ExpectedAttention
from jaxkv.policies.full import Full
from jaxkv.policies.h2o import H2O
from jaxkv.policies.keydiff import KeyDiff
from jaxkv.policies.knorm import KeyNorm
from jaxkv.policies.kvzip import KVzip
from jaxkv.policies.random import Random
from jaxkv.policies.recency import Recency
from jaxkv.policies.replay import Replay
from jaxkv.policies.scissorhands import Scissorhands, ScissorhandsReference
from jaxkv.policies.snapkv import SnapKV
from jaxkv.policies.tova import TOVA

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy
    for policy in (
        Full, Recency, Random, Scissorhands, ScissorhandsReference, H2O, SnapKV, TOVA, KeyNorm, KeyDiff, ExpectedAttention,
        KVzip, Replay,
    )
}  # fmt: skip


def make_policy(spec: str | Policy, **options) -> Policy:
    """A policy by name, with its own options; a policy is returned as it is.

    Raises: ValueError for a name that is not in the table or an option the policy does not have.
    """
    if isinstance(spec, str) and spec not in POLICIES:
        raise ValueError(f"unknown cache policy {spec!r}; known: {', '.join(POLICIES)}")
    policy = spec if isinstance(spec, Policy) else POLICIES[spec]()
    known = {field.name for field in dataclasses.fields(policy)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(
            f"policy {policy.name!r} has no option {', '.join(unknown)}; it has: {', '.join(sorted(known))}"
        )
    return dataclasses.replace(policy, **options) if options else policy
