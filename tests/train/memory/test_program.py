"""What is read from a program's text, compared with counts made by hand."""

import importlib.util

import pytest
from paths import ROOT

from train.memory.hlo import read
from train.memory.program import LAUNCH, count

BANDWIDTH, PEAK = 1e9, 1e12

TEXT = """\
HloModule jit_step, is_scheduled=true

%read_row (p: f32[8,128], at: s32[]) -> f32[1,128] {
  %p = f32[8,128]{1,0} parameter(0)
  %at = s32[] parameter(1)
  %zero = s32[] constant(0)
  %row = f32[1,128]{1,0} dynamic-slice(%p, %at, %zero), dynamic_slice_sizes={1,128}
  ROOT %twice = f32[1,128]{1,0} add(%row, %row)
}

%write_row (p.1: f32[8,128], row.1: bf16[1,128], at.1: s32[]) -> f32[8,128] {
  %p.1 = f32[8,128]{1,0} parameter(0)
  %row.1 = bf16[1,128]{1,0} parameter(1)
  %at.1 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  %wide = f32[1,128]{1,0} convert(%row.1)
  ROOT %written = f32[8,128]{1,0} dynamic-update-slice(%p.1, %wide, %at.1, %zero.1)
}

%body (state: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %state = (s32[], f32[8,128]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[8,128]{1,0} get-tuple-element(%state), index=1
  %row.2 = f32[1,128]{1,0} fusion(%x, %i), kind=kLoop, calls=%read_row
  %narrow = bf16[1,128]{1,0} convert(%row.2)
  %x.1 = f32[8,128]{1,0} fusion(%x, %narrow, %i), kind=kLoop, calls=%write_row
  %sum = f32[8,128]{1,0} all-reduce(%x.1), replica_groups={{0,1}}, to_apply=%add
  ROOT %next = (s32[], f32[8,128]{1,0}) tuple(%i, %sum)
}

%condition (state.1: (s32[], f32[8,128])) -> pred[] {
  %state.1 = (s32[], f32[8,128]{1,0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

%refresh (old: f32[128,128]) -> f32[128,128] {
  %old = f32[128,128]{1,0} parameter(0)
  ROOT %new = f32[128,128]{1,0} negate(%old)
}

%keep (same: f32[128,128]) -> f32[128,128] {
  ROOT %same = f32[128,128]{1,0} parameter(0)
}

ENTRY %main (a: f32[8,128], b: f32[128,128], due: pred[]) -> (f32[8,128], f32[128,128]) {
  %a = f32[8,128]{1,0} parameter(0)
  %b = f32[128,128]{1,0} parameter(1)
  %due = pred[] parameter(2)
  %start = s32[] constant(0)
  %product = f32[8,128]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %first = (s32[], f32[8,128]{1,0}) tuple(%start, %product)
  %loop = (s32[], f32[8,128]{1,0}) while(%first), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"8"}}
  %out = f32[8,128]{1,0} get-tuple-element(%loop), index=1
  %basis = f32[128,128]{1,0} conditional(%due, %b, %b), true_computation=%refresh, \
false_computation=%keep
  %wide.1 = ((f32[8,128]{1,0}), f32[16,128]{1,0}) all-gather-start(%out), dimensions={0}
  ROOT %end = (f32[8,128]{1,0}, f32[128,128]{1,0}) tuple(%out, %basis)
}
"""
A, B, ROW = 4 * 8 * 128, 4 * 128 * 128, 4 * 128
LOOP = {
    "read a row": ROW + 4 + ROW,
    "convert": ROW + ROW / 2,
    "write it": ROW / 2 + ROW,  # where it is written, a number, is left out
    "all-reduce": 2 * A,
}
GATHER = A + (A + 2 * A)


def test_a_program_is_counted_as_by_hand():
    found = count(TEXT, BANDWIDTH, PEAK)
    assert found.kernels == 1 + 8 * len(LOOP) + 1
    assert found.bytes_moved == (A + B + A) + 8 * sum(LOOP.values()) + GATHER
    assert found.products_flops == 2 * 8 * 128 * 128
    assert found.collectives == {"all-reduce": (8, 8 * A), "all-gather": (1, 2 * A)}
    rows = 8 * 3 * LAUNCH  # the gap is longer than the bytes take
    assert found.floor_seconds == pytest.approx(
        (A + B + A) / BANDWIDTH + rows + 8 * 2 * A / BANDWIDTH + GATHER / BANDWIDTH
    )


def test_the_dearer_branch_of_a_conditional_is_a_refresh():
    step, refresh = (count(TEXT, BANDWIDTH, PEAK, branch) for branch in (min, max))
    assert refresh.bytes_moved - step.bytes_moved == 2 * B
    assert refresh.kernels == step.kernels + 1


def test_a_product_takes_the_time_of_its_flops():
    slow = count(TEXT, 1e18, 1e6)
    assert slow.floor_seconds == pytest.approx(2 * 8 * 128 * 128 / 1e6 + 33 * LAUNCH)


@pytest.mark.parametrize(
    ("call", "flops"),
    [
        (
            '(bf16[2,8,256,64]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k, %k), custom_call_target="'
            '__cudnn$fmhaSoftmax"',
            4 * 2 * 8 * 256 * 256 * 64,
        ),
        (
            '(bf16[2,8,256,64]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k, %k), custom_call_target="'
            '__cudnn$fmhaSoftmaxBackward", backend_config={"bmm1_grad_gemm1": 1}',
            10 * 2 * 8 * 256 * 256 * 64,
        ),
        (
            '(f32[32,16]{1,0}, s8[99]{0}) custom-call(%x, %y), custom_call_target="__cublas$gemm"',
            2 * 32 * 48 * 16,
        ),
        ('f32[32,48]{1,0} custom-call(%x, %y), custom_call_target="other"', 0),
        (
            '(u8[1536]{0}, f32[96]{0}) custom-call(%codes, %x, %y), custom_call_target="triton", '
            'metadata={op_name="jit(f)/product_added/pallas_call"}',
            2 * 1536 * 48,
        ),
    ],
    ids=["attention", "its-gradient", "gemm", "other", "own-kernel"],
)
def test_the_products_of_libraries_are_counted(call, flops):
    text = f"""
ENTRY %main (q: bf16[2,8,256,64], x: f32[32,48]) -> () {{
  %q = bf16[2,8,256,64]{{3,2,1,0}} parameter(0)
  %k = bf16[2,8,256,64]{{3,2,1,0}} parameter(1)
  %x = f32[32,48]{{1,0}} parameter(2)
  %y = f32[48,16]{{1,0}} parameter(3)
  %codes = u8[1536]{{0}} parameter(4)
  ROOT %call = {call}
}}
"""
    assert count(text, BANDWIDTH, PEAK).products_flops == pytest.approx(flops)


def test_packed_numbers_are_half_a_byte():
    text = "\nENTRY %main (x: s4[10]) -> s4[10] {\n  %x = s4[10]{0} parameter(0)\n"
    found = count(text + "  ROOT %y = s4[10]{0} copy(%x)\n}\n", BANDWIDTH, PEAK)
    assert found.bytes_moved == 10


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        read("module @jit_step {}")


def test_the_outside_check_counts_the_same():
    """`hlo_traffic.py`, with which others check the figures; see `tests/gpu_programs` as well."""
    file = ROOT.parent / "shared/tools/hlo_traffic.py"
    if not file.is_file():
        pytest.skip(f"no {file}")
    spec = importlib.util.spec_from_file_location("hlo_traffic", file)
    assert spec is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    traffic = tool.Traffic(TEXT, BANDWIDTH, PEAK)
    moved, kernels = traffic.run()
    found = count(TEXT, BANDWIDTH, PEAK)
    assert (found.bytes_moved, found.kernels) == (moved, kernels)
    assert found.products_flops == traffic.flops
    assert found.floor_seconds == pytest.approx(traffic.seconds)
