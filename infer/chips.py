"""Chips that programs can be compiled for without them: what a topology's name means, and what datasheets say."""

import dataclasses
import importlib.util
import os
import re

import jax

# Set before libtpu is loaded: it asks no metadata server for a machine that is not there, shares its lock file, and is quiet.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """hbm_gib, bandwidth (GB/s, 10**9 bytes): of a whole chip, from its datasheet. devices: that one chip is to JAX."""

    hbm_gib: int
    bandwidth: int
    devices: int = 1

    @property
    def hbm(self) -> int:
        """Bytes of memory of one device."""
        return self.hbm_gib * 2**30 // self.devices

    @property
    def bytes_per_second(self) -> float:
        """That one device can read at most."""
        return self.bandwidth * 1e9 / self.devices


# Source: docs.cloud.google.com/tpu/docs, the pages v4, v5e, v5p, v6e and tpu7x, their tables of key chip specifications.
CHIPS = {
    "v4": Chip(32, 1200, devices=2),
    "v5e": Chip(16, 819),
    "v5p": Chip(95, 2765),
    "v6e": Chip(32, 1638),
    "tpu7x": Chip(192, 7380, devices=2),
}
COMPARED = ("v5e", "v5p", "v6e", "tpu7x")
EXAMPLES = (
    "v4:2x2x1 v5e:1x1 v5e:1x2 v5e:2x2 v5e:2x4 v5e:4x4 v5p:2x2x1 v5p:2x2x2 v6e:1x1 v6e:2x2 v6e:2x4 v6e:4x4 tpu7x:2x2x1"
)
ACCEPTED = f"accepted: {', '.join(EXAMPLES.split())}, and other shapes of {', '.join(CHIPS)} that libtpu knows"


class TopologyError(ValueError):
    """A topology cannot be compiled for; the message says what was given and what is accepted, or what to install."""


def parse_topology(name: str) -> str:
    """The generation of chip of a topology such as 'v5e:2x4'.

    Raises: TopologyError for a name that is not of that form, and for a GPU's.
    """
    match = re.fullmatch(r"([a-z0-9]+):([1-9][0-9]*(?:x[1-9][0-9]*)*)", name)
    if match and re.fullmatch(r"[abhg]b?[0-9]{2,3}|cuda|gpu", match[1]):
        if not any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)):
            raise TopologyError(
                f"topology {name!r} is a GPU's, which needs JAX's CUDA plugin, and that is not installed: pip install"
                f" 'jaxkv[cuda]'; {ACCEPTED}"
            )
        raise TopologyError(f"topology {name!r} is a GPU's, and plans are made for TPUs only; {ACCEPTED}")
    if match is None or match[1] not in CHIPS:
        raise TopologyError(f"unknown topology {name!r}; {ACCEPTED}")
    return match[1]


def find_devices(name: str) -> list:
    """The devices of a topology, which are described and not there.

    Raises: TopologyError without libtpu, for an unknown name, and for a shape that libtpu refuses.
    """
    from jax.experimental import topologies

    parse_topology(name)
    if importlib.util.find_spec("libtpu") is None and not os.environ.get("TPU_LIBRARY_PATH"):
        raise TopologyError(
            "compiling for a TPU needs its compiler, the package libtpu, and that is not installed: pip install libtpu"
            " (no TPU is needed)"
        )
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except jax.errors.JaxRuntimeError as error:
        raise TopologyError(f"libtpu refuses topology {name!r}: {str(error).splitlines()[0]}; {ACCEPTED}") from error
