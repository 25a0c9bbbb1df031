"""Tests of before_wait.py: what stands before the wait on any way is found, and to which argument it belongs."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.server.kernels.before_wait import Before, argument_places, before_wait_in

HEAD = """
.global .align 1 .b8 _str[2] = {95, 0};
.visible .entry some_kernel(
\t.param .u64 .ptr .global .align 1 some_kernel_param_0,
\t.param .u64 .ptr .global .align 1 some_kernel_param_1,
\t.param .align 64 .b8 some_kernel_param_2[128],
\t.param .u32 some_kernel_param_3,
\t.param .u64 .ptr .global .align 1 some_kernel_param_4
)
.reqntid 128
{
\t.reg .b64 %rd<9>;
\tld.param.b64 %rd1, [some_kernel_param_0];
\tld.param.b64 %rd2, [some_kernel_param_1];
\tmov.b64 %rd3, some_kernel_param_2;
\tcvta.param.u64 %rd4, %rd3;
\tld.param.b32 %r1, [some_kernel_param_3];
\tld.param.b64 %rd8, [some_kernel_param_4];
\tmad.wide.s32 %rd5, %r1, 4, %rd2; // a comment, with [ %rd1 ]
"""
PLACES = {0: "x", 1: "weight", 2: "tiles", 3: "size"}
COPY = (
    "@%p1 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd4, {%r2, %r3}], [%r4];"
)


def before(*lines: str) -> Before:
    text = "\n".join(lines)
    return before_wait_in(f"{HEAD}{text}\n\tret;\n}}\n\t.section .debug_abbrev {{ }}", PLACES)


def test_reads_belong_to_arguments() -> None:
    """Through sums, descriptions for the copy engine and predicates; near memory and what comes after the wait do not count."""
    assert before(
        "@%p1 ld.global.v4.b32 { %r5, %r6, %r7, %r8 }, [ %rd5 + 16 ];",
        COPY,
        "ld.shared.b32 %r9, [%r3];",
        "st.shared.b32 [%r3], %r9;",
        "griddepcontrol.wait;",
        "ld.global.b32 %r9, [%rd1];",
        "st.global.b32 [%rd1], %r9;",
    ) == Before(Counter(weight=1, tiles=1), Counter())


def test_what_must_not_stand_there_is_found() -> None:
    """A read of what the kernel before writes, a store, an atomic, and scratch."""
    found = before(
        "add.s64 %rd6, %rd1, 128;",
        "ld.global.b32 %r9, [%rd6];",
        "st.global.b32 [%rd6+4], %r9;",
        "atom.global.gpu.acq_rel.add.s32 %r10, [%rd8], 1;",
        "griddepcontrol.wait;",
    )
    assert found == Before(Counter(x=1), Counter(x=1, scratch=1))


def test_memory_of_any_kind_may_be_global() -> None:
    """A load that names no memory counts, and one whose address is made of no argument is not overlooked."""
    assert before("ld.b32 %r9, [%rd1];", "ld.global.b32 %r9, [%rd7];", "griddepcontrol.wait;").reads == Counter(
        x=1, unknown=1
    )


def test_what_was_loaded_is_no_address_of_its_own() -> None:
    """A place that a table tells is in what it is added to."""
    found = before(
        "ld.global.b64 %rd6, [%rd1];",
        "shl.b64 %rd6, %rd6, 1;",
        "add.s64 %rd7, %rd2, %rd6;",
        "ld.global.b32 %r9, [%rd7];",
        "griddepcontrol.wait;",
    )
    assert found.reads == Counter(x=1, weight=1)


def test_every_way_is_followed() -> None:
    """Where one way waits and another does not, what the other does counts, wherever it stands, and once in a loop."""
    found = before(
        "@%p1 bra $L__BB0_2;",
        "griddepcontrol.wait;",
        "ld.global.b32 %r9, [%rd1];",
        "bra.uni $L__BB0_3;",
        "$L__BB0_2:",
        "ld.global.b32 %r9, [%rd2];",
        "@%p2 bra $L__BB0_2;",
        "griddepcontrol.wait;",
        "$L__BB0_3:",
        "st.global.b32 [%rd1], %r9;",
    )
    assert found == Before(Counter(weight=1), Counter())
    never = before("@%p1 bra $L__BB0_2;", "griddepcontrol.wait;", "$L__BB0_2:", "st.global.b32 [%rd1], %r9;")
    assert never == Before(Counter(), Counter(x=1))


def test_ways_that_cannot_be_followed_are_refused() -> None:
    """A jump by a table, or a call."""
    with pytest.raises(AssertionError, match="not followed"):
        before("brx.idx %r1, $L__table;", "griddepcontrol.wait;")


def test_places_of_arguments() -> None:
    """Constants have none, and a tensor's description comes with two numbers for each dimension."""
    signature = {
        "out": "*fp16",
        "bias": "constexpr",
        "x": "tensordesc<fp16[64,64],NVMMASharedLayout(...)>",
        "num_tokens": "i32",
    }
    assert argument_places(signature) == {0: "out", 1: "x", 6: "num_tokens"}
