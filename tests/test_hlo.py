"""The collectives read from a program's text: written by hand, and compiled here."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from experiments.hlo import Collective, collectives

# As a CPU's: a loop of 5 passes, in it a branch, in one branch a loop of 3; a sum of two arrays.
NESTED = """
HloModule jit_step, is_scheduled=true, num_partitions=8

StackFrames
1 {file_location_id=1 parent_frame_id=1}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%inner (a: (s32[], f32[4])) -> (s32[], f32[4]) {
  %b = f32[4]{0} all-reduce(%a), channel_id=1, replica_groups={{0,1}}, to_apply=%add
  ROOT %t = (s32[], f32[4]{0}) tuple(%i, %b)
}

%never (a: (s32[], f32[4])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%left (a: f32[4]) -> f32[4] {
  %w = (s32[], f32[4]{0}) while(%t), condition=%never, body=%inner, metadata={op_name="while"}, \
backend_config={"known_trip_count":{"n":"3"},"dynamic_variables":[]}
  ROOT %r = f32[4]{0} get-tuple-element(%w), index=1
}

%right (a: f32[4]) -> f32[4] {
  ROOT %g = f32[32]{0} all-gather(%a), channel_id=2, dimensions={0}
}

%outer (a: (s32[], f32[4])) -> (s32[], f32[4]) {
  %c = f32[4]{0} conditional(%i, %a, %a), branch_computations={%left, %right}
  ROOT %t.1 = (s32[], f32[4]{0}) tuple(%i, %c)
}

%until (a: f32[2]) -> f32[2] {
  ROOT %m = pred[3]{0} all-reduce(%a), channel_id=3, to_apply=%add
}

ENTRY %main_spmd (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0), sharding={devices=[8]<=[8]}
  %w.1 = (s32[], f32[4]{0}) while(%p), condition=%never, body=%outer, \
backend_config={"known_trip_count":{"n":"5"}}
  %w.2 = f32[2]{0} while(%p), condition=%never, body=%until
  %both = (f32[4]{0}, /*index=1*/u32[2,3]{1,0}) all-reduce(%p, %q), to_apply=%add
  ROOT %out = f32[4]{0} add(%p, %p), metadata={op_name="an all-to-all(x) of f32[9]"}
}
"""

# As a TPU's: tiled layouts, asynchronous pairs, a collective within a fusion.
ASYNCHRONOUS = """
HloModule jit_step

%fused (p: f32[64]) -> f32[8] {
  %all = f32[64]{0:T(128)S(1)} all-reduce(%p), to_apply=%add
  ROOT %own = f32[8]{0:T(128)} dynamic-slice(%all, %i), dynamic_slice_sizes={8}
}

%wrapped (p: f32[64]) -> f32[8] {
  ROOT %rs = f32[8]{0} reduce-scatter(%p), dimensions={0}, to_apply=%add
}

ENTRY main (p: bf16[8,128]) -> bf16[64,128] {
  %p = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %ag-start = (bf16[8,128]{1,0:T(8,128)(2,1)}, bf16[64,128]{1,0:T(8,128)(2,1)}) \
all-gather-start(%p), channel_id=1, dimensions={0}
  %cp-start = (pred[16]{0:T(512)(128)(4,1)}, pred[16]{0:T(512)(128)(4,1)}, u32[]{:S(2)}, \
u32[]{:S(2)}) collective-permute-start(%q), source_target_pairs={{0,1},{1,0}}
  %rs-start = ((f32[64]{0}), f32[8]{0}) async-start(%q), calls=%wrapped
  %ag-done = bf16[64,128]{1,0:T(8,128)(2,1)} all-gather-done(%ag-start)
  %cp-done = pred[16]{0:T(512)(128)(4,1)} collective-permute-done(%cp-start)
  %rs-done = f32[8]{0} async-done(%rs-start)
  ROOT %f = f32[8]{0:T(128)} fusion(%q), kind=kCustom, calls=%fused
}
"""

# As a TPU's with sharded parameters: a gather in pieces, two of them in a loop of 4 passes in which
# an operand goes round, and a sum of which each device keeps a part.
IN_PIECES = """
HloModule jit_step

%fused_computation.1 (p: bf16[8,16]) -> bf16[64,16] {
  ROOT %all-gather.1 = bf16[64,16]{1,0:T(8,128)} all-gather(%p), channel_id=7, dimensions={0}
}

%async_collective_fusion.2 (p: bf16[8,16]) -> bf16[64,16] {
  ROOT %all-gather.2 = bf16[64,16]{1,0:T(8,128)} all-gather(%p), channel_id=7, dimensions={0}
}

%fused_computation.3 (p: bf16[8,16]) -> bf16[64,16] {
  ROOT %all-gather.3 = bf16[64,16]{1,0:T(8,128)} all-gather(%p), channel_id=7, dimensions={0}
}

%all-reduce-scatter.4 (input: f32[16], input.1: bf16[32,8]) -> (f32[2], bf16[4,8]) {
  %input = f32[16]{0} parameter(0)
  %all = (f32[16]{0}, bf16[32,8]{1,0}) all-reduce(%input, %input.1), channel_id=8, to_apply=%add
  ROOT %kept = (f32[2]{0}, bf16[4,8]{1,0}) tuple(%one, %two)
}

%wide.windowed_dot_general_body_ag.1.sunk (a: (s32[], f32[4])) -> (s32[], f32[4]) {
  %f.2 = bf16[64,16]{1,0:T(8,128)} fusion(%a), kind=kCustom, calls=%async_collective_fusion.2
  %c = f32[4]{0} collective-permute(%a), channel_id=9, source_target_pairs={{0,1},{1,0}}
  ROOT %t = (s32[], f32[4]{0}) tuple(%i, %c)
}

%wide.windowed_dot_general_cond_ag.1 (a: (s32[], f32[4])) -> pred[] {
  %constant.5 = u32[]{:T(128)} constant(4), metadata={op_name="constant(9)"}
  ROOT %less = pred[]{:T(512)} compare(%i, %constant.5), direction=LT
}

ENTRY main (p: bf16[8,16]) -> f32[2] {
  %f.1 = bf16[64,16]{1,0:T(8,128)} fusion(%p), kind=kCustom, calls=%fused_computation.1
  %w = (s32[], f32[4]{0}) while(%t), condition=%wide.windowed_dot_general_cond_ag.1, \
body=%wide.windowed_dot_general_body_ag.1.sunk
  %f.3 = bf16[64,16]{1,0:T(8,128)} fusion(%p), kind=kCustom, calls=%fused_computation.3
  %other = bf16[64,16]{1,0:T(8,128)} all-gather(%p), channel_id=10, dimensions={0}
  ROOT %f.4 = (f32[2]{0}, bf16[4,8]{1,0}) fusion(%p), kind=kCustom, calls=%all-reduce-scatter.4
}
"""


def in_main(operation):
    return f"ENTRY %main (p: f32[]) -> f32[] {{\n  ROOT %r = {operation}\n}}\n"


def test_loops_branches_and_tuples():
    """Bytes: 5 * 3 * 16 and 3 and 16 + 24 of sums, 5 * 128 gathered."""
    assert collectives(NESTED) == {
        "all-reduce": Collective(5 * 3 + 1 + 1, 5 * 3 * 16 + 3 + 40),
        "all-gather": Collective(5, 5 * 128),
    }


def test_pairs_count_once_and_by_what_they_end_with():
    assert collectives(ASYNCHRONOUS) == {
        "all-reduce": Collective(1, 64 * 4),
        "all-gather": Collective(1, 64 * 128 * 2),
        "reduce-scatter": Collective(1, 8 * 4),
        "collective-permute": Collective(1, 16),
    }


def test_pieces_count_once_rounds_as_often_as_they_go_and_parts_of_sums_as_parts():
    """Two gathers of 2048 bytes, four passes of 16, and parts of 8 and 64 bytes."""
    assert collectives(IN_PIECES) == {
        "all-gather": Collective(2, 2 * 2048),
        "collective-permute": Collective(4, 4 * 16),
        "reduce-scatter": Collective(1, 8 + 64),
    }


@pytest.mark.parametrize(
    ("result", "size"),
    [
        ("pred[3,5]{1,0}", 15),
        ("bf16[3]", 6),
        ("u32[]", 4),
        ("s4[5]{0:E(4)}", 3),
        ("f8e4m3fn[7]", 7),
        ("c64[2]", 16),
        ("f64[0,4]", 0),
        ("s32[<=6,2]", 48),
        ("((f32[2]{0}, s8[3]{0}), token[])", 11),
    ],
)
def test_bytes_of_a_type(result, size):
    text = in_main(f"{result} all-to-all(%p), dimensions={{0}}")
    assert collectives(text) == {"all-to-all": Collective(1, size)}


@pytest.mark.parametrize("kind", ["ragged-all-to-all", "collective-broadcast"])
def test_kinds_are_not_taken_for_one_another(kind):
    assert collectives(in_main(f"s8[6]{{0}} {kind}(%p)")) == {kind: Collective(1, 6)}
    assert collectives(in_main(f"s8[6]{{0}} add(%{kind}.1, %p)")) == {}


def test_a_program_compiled_here():
    """20 elements on each device; the bytes follow from what is called with them."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    rows = PartitionSpec("x")
    specs = {"mesh": mesh, "in_specs": rows, "out_specs": rows, "check_vma": False}

    @partial(jax.shard_map, **specs)
    def communicate(x):
        summed = lax.fori_loop(0, 3, lambda i, y: lax.psum(jnp.sin(y), "x"), x)
        gathered = lax.all_gather(x.astype(jnp.int16), "x")
        scattered = lax.psum_scatter(jnp.outer(jnp.arange(1.0, 9.0), x), "x")
        sent = lax.ppermute(x > 0, "x", [(i, (i + 1) % 8) for i in range(8)])
        swapped = lax.all_to_all(
            jnp.outer(jnp.arange(8, dtype=jnp.int8), x.astype(jnp.int8)), "x", 0, 0
        )
        return summed, gathered, scattered, sent, swapped

    compiled = jax.jit(communicate).lower(np.ones(8 * 20, np.float32)).compile()
    assert collectives(compiled.as_text()) == {
        "all-reduce": Collective(3, 3 * 20 * 4),
        "all-gather": Collective(1, 8 * 20 * 2),
        "reduce-scatter": Collective(1, 20 * 4),
        "all-to-all": Collective(1, 8 * 20),
        "collective-permute": Collective(1, 20),
    }


def test_what_is_no_compiled_program_is_refused():
    lowered = jax.jit(jnp.sin).lower(1.0).as_text()
    with pytest.raises(
        ValueError, match="text has 0 entry computations and must have 1: give what"
    ):
        collectives(lowered)
    with pytest.raises(ValueError, match="text has 2 entry"):
        collectives(in_main("f32[] add(%p, %p)") * 2)
