"""Whether what a run compiles came from a cache of compiled code, as the caches themselves count it."""

import os
from collections import Counter

from edgebench.device import BACKEND

if BACKEND == "jax":
    import jax
elif BACKEND == "torch":
    import torch

JAX_EVENTS = {"/jax/compilation_cache/cache_hits": "hits", "/jax/compilation_cache/cache_misses": "misses"}
_jax_counts: Counter = Counter()  # JAX reports to listeners, and keeps no count itself


def _count(event: str, **_) -> None:
    if event in JAX_EVENTS:
        _jax_counts[JAX_EVENTS[event]] += 1


if BACKEND == "jax":
    jax.monitoring.register_event_listener(_count)


def _counts() -> Counter:
    """Hits and misses of this process so far."""
    if BACKEND == "jax":
        return Counter(_jax_counts)
    counts = torch._dynamo.utils.counters["inductor"] if BACKEND == "torch" else {}
    return Counter(hits=counts.get("fxgraph_cache_hit", 0), misses=counts.get("fxgraph_cache_miss", 0))


def _is_on() -> bool:
    if BACKEND == "jax":
        return bool(jax.config.jax_enable_compilation_cache and jax.config.jax_compilation_cache_dir)
    return os.environ.get("TORCHINDUCTOR_FORCE_DISABLE_CACHES") != "1"


class CompileCache:
    """What the backend's cache gave from now on."""

    def __init__(self) -> None:
        self._before = _counts()

    def describe(self, is_compiled: bool) -> dict:
        """The section `what/compile_cache`: its state, hits and misses.

        none: there is no cache, as on TensorFlow, or nothing is compiled; off: it is turned off; cold: no hit; warm: no
        miss; partly warm: both.
        """
        hits, misses = (_counts()[name] - self._before[name] for name in ("hits", "misses"))
        if BACKEND == "tensorflow" or not is_compiled:
            state = "none"
        elif not _is_on():
            state = "off"
        elif hits and misses:
            state = "partly warm"
        else:
            state = "warm" if hits else "cold"
        return {"state": state, "hits": hits, "misses": misses}
