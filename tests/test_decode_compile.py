"""The TPU kernel of `decode_attention` through the compiler of TPU, on any machine: every case of `decode_cases`.

Nothing but the kernels may read what tiers store: no copy, no conversion, no dequantized tier.
"""

import pytest
from decode_cases import CASES
from tpu_compile import TOPOLOGIES, compile_for_tpu, stored_reads

SCORES, NONE, XLA = (f"decode_programs:{name}" for name in ("with_scores", "without_scores", "in_xla"))
TURNS = [(name, TOPOLOGIES[number % len(TOPOLOGIES)]) for number, name in enumerate(CASES)]  # one chip for each case
CONTROL = (XLA, next(name for name in CASES if "8192.int8" in name), TOPOLOGIES[0])


def check(found):
    for job, compiled in found.items():
        assert compiled.error is None, f"{job}: {compiled.error}"
        assert compiled.read == (), job
        tiers = CASES[job[1]].tiers
        assert compiled.kernels == sum(tier.slots > 1 or tier.scheme != "f32" for tier in tiers), job
        assert compiled.peak >= compiled.arguments > 0


@pytest.mark.slow
def test_every_case_compiles(compilers_python):
    """Each for one chip; and by XLA, which does read what is stored, and is seen to."""
    found = compile_for_tpu(compilers_python, [CONTROL, *((SCORES, name, chip) for name, chip in TURNS)])
    control = found.pop(CONTROL)
    assert control.error is None and control.kernels == 0 and control.read
    check(found)


@pytest.mark.exhaustive
def test_every_case_compiles_for_every_chip(compilers_python):
    turns = set(TURNS)
    left = [(SCORES, name, chip) for name in CASES for chip in TOPOLOGIES if (name, chip) not in turns]
    check(compile_for_tpu(compilers_python, [*left, *((NONE, name, chip) for name, chip in TURNS)]))


HLO = """HloModule jit_f

ENTRY %main.1 (a.1: u8[8,256], b.1: u16[256], c.1: f32[8]) -> f32[8] {
  %a.1 = u8[8,256]{1,0:T(8,128)(4,1)} parameter(0)
  %b.1 = u16[256]{0:T(256)} parameter(1)
  %c.1 = f32[8]{0:T(128)} parameter(2)
  %start = (u8[8,256]{1,0:T(8,128)(4,1)S(1)}, u8[8,256]{1,0:T(8,128)(4,1)}, u32[]{:S(2)}) copy-start(%a.1)
  %done = u8[8,256]{1,0:T(8,128)(4,1)S(1)} copy-done(%start)
  %other = u16[1,256]{1,0:T(2,128)(2,1)} bitcast(%b.1)
  %turned = (u8[8,256]{0,1:T(8,128)(4,1)S(1)}, u8[8,256]{1,0:T(8,128)(4,1)}, u32[]{:S(2)}) copy-start(%a.1)
  %wide = f32[1,256]{1,0:T(1,128)} fusion(%c.1, %other), kind=kLoop
  %copied = u8[8,256]{0,1:T(8,128)(4,1)} copy(%done)
  ROOT %out = f32[8]{0:T(128)} custom-call(%done, %other, %c.1), custom_call_target="tpu_custom_call"
}
"""


def test_what_counts_as_reading():
    """Not the kernel, another name, or the way to fast memory; but a change of layout on that way, a fusion, a copy."""
    names = lambda parameters: [line.split()[0] for line in stored_reads(HLO, parameters)]
    assert names({0, 1}) == ["%turned", "%wide", "%copied"] and names({1}) == ["%wide"] and names(set()) == []


@pytest.mark.slow
def test_a_compiler_that_dies_takes_one_case_with_it(compilers_python):
    jobs = [("tpu_compile_failures:raises", "a", "v5e:2x2"), ("tpu_compile_failures:dies", "b", "v5e:2x2")]
    found = compile_for_tpu(compilers_python, [*jobs, ("tpu_compile_failures:raises", "c", "v5e:2x2")])
    errors = [compiled.error for compiled in found.values()]
    assert errors[::2] == ["RuntimeError: case a", "RuntimeError: case c"]
    assert errors[1] == "the compiler's process ended with 3: dying"
