"""Bytes counted from a compiled module's text, on one written by hand."""

from mixcon_jax.planning.hlo import Loop, array_bytes, kernels, largest, loops, totals

MODULE = """
HloModule hand, is_scheduled=true

%sliced (p0: f32[8,100], p1: s32[]) -> f32[1,100] {
  %p0 = f32[8,100]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %part = f32[1,100]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,100}
  ROOT %twice = f32[1,100]{1,0} add(%part, %part)
}

%updated (q0: f32[8,100], q1: f32[1,100], q2: s32[]) -> f32[8,100] {
  %q0 = f32[8,100]{1,0} parameter(0)
  %q1 = f32[1,100]{1,0} parameter(1)
  %q2 = s32[] parameter(2)
  %none = s32[] constant(0)
  ROOT %put = f32[8,100]{1,0} dynamic-update-slice(%q0, %q1, %q2, %none)
}

%body (carry: (s32[], f32[8,100])) -> (s32[], f32[8,100]) {
  %carry = (s32[], f32[8,100]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %x = f32[8,100]{1,0} get-tuple-element(%carry), index=1
  %fusion.1 = f32[1,100]{1,0} fusion(%x, %i), kind=kLoop, calls=%sliced
  %fusion.2 = f32[8,100]{1,0} fusion(%x, %fusion.1, %i), kind=kLoop, calls=%updated
  ROOT %next = (s32[], f32[8,100]{1,0}) tuple(%i, %fusion.2)
}

ENTRY %main (a: f32[8,100], b: bf16[4,/*index=1*/50]) -> (s32[], f32[8,100]) {
  %a = f32[8,100]{1,0} parameter(0)
  %b = bf16[4,50]{1,0} parameter(1)
  %start = s32[] constant(0)
  %kernel = (f32[8,100]{1,0}, pred[3]{0}) custom-call(%a, %b), custom_call_target="mosaic_gpu_v2"
  %first = f32[8,100]{1,0} get-tuple-element(%kernel), index=0
  %init = (s32[], f32[8,100]{1,0}) tuple(%start, %first)
  ROOT %loop = (s32[], f32[8,100]{1,0}) while(%init), body=%body, backend_config={"known_trip_count":{"n":"8"}}
}
"""


def test_shapes():
    assert array_bytes('(f32[2,3]{1,0}, bf16[5]{0}, s32[], pred[7])') == 24 + 10 + 4 + 7


def test_loops_slices_updates_in_place_and_custom_calls():
    call, sliced, updated = kernels(MODULE)
    assert (call.kind, call.count, call.bytes) == ('mosaic_gpu_v2', 1, 3200 + 400 + 3200 + 3)
    assert (sliced.count, sliced.bytes) == (8, 400 + 4 + 400)  # a row in, a row out, the index
    assert (updated.count, updated.bytes) == (8, 400 + 4 + 400)


CONVERTED = """
HloModule hand, is_scheduled=true

%converted (p0: f32[8,100], p1: s32[]) -> bf16[1,100] {
  %p0 = f32[8,100]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %narrow = bf16[8,100]{1,0} convert(%p0)
  ROOT %part = bf16[1,100]{1,0} dynamic-slice(%narrow, %p1, %zero), dynamic_slice_sizes={1,100}
}

ENTRY %main (a: f32[8,100], i: s32[]) -> bf16[1,100] {
  %a = f32[8,100]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %fusion = bf16[1,100]{1,0} fusion(%a, %i), kind=kLoop, calls=%converted
}
"""


def test_a_slice_of_what_is_converted_reads_the_type_that_lies_in_memory():
    (fusion,) = kernels(CONVERTED)
    assert (fusion.bytes, fusion.float32) == (400 + 4 + 200, 400)


def test_largest_array():
    assert largest(MODULE) == 800
    assert largest('%x = (pred[2,3]{1,0}, bf16[4,5,6]{2,1,0}) custom-call(), backend_config={"f32[9,9,9]"}') == 120


PRODUCTS = """
HloModule hand, is_scheduled=true

%gemm (p0: bf16[4,6], p1: bf16[6,8]) -> f32[4,8] {
  %p0 = bf16[4,6]{1,0} parameter(0)
  %p1 = bf16[6,8]{1,0} parameter(1)
  ROOT %dot.1 = f32[4,8]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%condition (carry: (s32[], f32[4,8])) -> pred[] {
  %carry = (s32[], f32[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  ROOT %less = pred[] compare(%i, %i), direction=LT
}

%body (carry: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %carry = (s32[], f32[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %x = f32[4,8]{1,0} get-tuple-element(%carry), index=1
  %y = f32[4,8]{1,0} negate(%x)
  ROOT %next = (s32[], f32[4,8]{1,0}) tuple(%i, %y)
}

ENTRY %main (a: bf16[4,6], b: bf16[6,8]) -> (s32[], f32[4,8]) {
  %a = bf16[4,6]{1,0} parameter(0)
  %b = bf16[6,8]{1,0} parameter(1)
  %start = s32[] constant(0)
  %gemm_fusion = f32[4,8]{1,0} fusion(%a, %b), kind=kCustom, calls=%gemm
  %gemm_call = (f32[4,8]{1,0}, s8[64]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", backend_config={"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}
  %init = (s32[], f32[4,8]{1,0}) tuple(%start, %gemm_fusion)
  ROOT %loop = (s32[], f32[4,8]{1,0}) while(%init), condition=%condition, body=%body, metadata={op_name="jit(f)/while"}
}
"""  # noqa: E501


def test_products_float32_and_loops_of_unknown_rounds():
    """Two and a half rounds in the mean, so three and a half conditions."""
    fusion, call, negated, condition = kernels(PRODUCTS, rounds=2.5)
    assert fusion.flops == call.flops == 2 * 4 * 6 * 8
    assert call.bytes == fusion.bytes, 'what cuBLAS works in is not moved'
    assert (fusion.bytes, fusion.float32) == (48 + 96 + 128, 128)
    assert (negated.count, negated.float32, negated.flops) == (2, 256, 0)
    assert condition.count == 4
    assert loops(PRODUCTS) == [Loop('loop', 'jit(f)/while', 1, None)]
    assert [loop.rounds for loop in loops(MODULE)] == [8]


CALLED = """
HloModule hand, is_scheduled=true

%dynamic-slice-fusion (p0: f32[8,100], p1: s32[], p2: f32[100]) -> (f32[100], s32[4]) {
  %p0 = f32[8,100]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %part = f32[1,100]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,100}
  %row = f32[100]{0} bitcast(%part)
  %p2 = f32[100]{0} parameter(2)
  ROOT %call = (f32[100]{0}, s32[4]{0}) custom-call(%row, %p2), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(f)/scan_forward/mpmd_map" stack_frame_id=7}
}

%product (q0: f32[4,6], q1: f32[6,8]) -> (f32[4,8], s8[64]) {
  %q0 = f32[4,6]{1,0} parameter(0)
  %q1 = f32[6,8]{1,0} parameter(1)
  %gemm = (f32[4,8]{1,0}, s8[64]{0}) custom-call(%q0, %q1), custom_call_target="__cublas$lt$matmul", backend_config={"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}
  %y = f32[4,8]{1,0} get-tuple-element(%gemm), index=0
  %room = s8[64]{0} get-tuple-element(%gemm), index=1
  ROOT %both = (f32[4,8]{1,0}, s8[64]{0}) tuple(%y, %room)
}

ENTRY %main (a: f32[8,100], i: s32[], b: f32[100], c: f32[4,6], d: f32[6,8]) -> (f32[100], s32[4]) {
  %a = f32[8,100]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %b = f32[100]{0} parameter(2)
  %c = f32[4,6]{1,0} parameter(3)
  %d = f32[6,8]{1,0} parameter(4)
  %gemm_fusion = (f32[4,8]{1,0}, s8[64]{0}) fusion(%c, %d), kind=kCustom, calls=%product
  ROOT %fusion = (f32[100]{0}, s32[4]{0}) fusion(%a, %i, %b), kind=kCustom, calls=%dynamic-slice-fusion
}
"""  # noqa: E501


def test_a_call_in_a_fusion_that_slices_for_it_is_that_call():
    """Its bytes are a row's and not all rows'; of a product, without what cuBLAS works in."""
    product, kernel = kernels(CALLED)
    assert (kernel.kind, kernel.operation) == ('mosaic_gpu_v2', 'jit(f)/scan_forward/mpmd_map')
    assert kernel.bytes == 400 + 4 + 400 + 400 + 16
    assert (product.kind, product.flops, product.bytes) == ('__cublas$lt$matmul', 2 * 4 * 6 * 8, 4 * (24 + 48 + 32))
    assert totals([product, kernel]) == {
        'kernels': 2, 'bytes': product.bytes + kernel.bytes, 'float32': 4 * (24 + 48 + 32) + 1200, 'flops': 384,
    }  # fmt: skip
