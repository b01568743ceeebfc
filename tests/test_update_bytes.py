"""The bytes that an update moves: by hand, by the compiler's count, and sparse over dense."""

import jax
import jax.numpy as jnp
import pytest

import sparseopt_jax as sx
from experiments.benchmarks import measuring, update_bytes
from experiments.hlo import bytes_moved
from sparseopt_jax.tpu_layouts import least_padded

# As a TPU's: an array fetched into vector memory (S(1)), two slices of another one, a loop that
# does not run, a fusion that reads both and the loop's result, a copy, and the way back. As a
# CPU's: a call of a loop, here with a sum beside it.
TEXT = """
HloModule jit_step, is_scheduled=true

%body (t: (f32[8], pred[])) -> (f32[8], pred[]) {
  %inside = f32[8]{0} copy(%x)
}

%called (u: (f32[8], pred[])) -> (f32[8], pred[]) {
  %u = (f32[8]{0}, pred[]) parameter(0)
  %e = f32[8]{0} get-tuple-element(%u), index=0
  %doubled = f32[8]{0} add(%e, %e)
  ROOT %again = (f32[8]{0}, pred[]) while(%u), condition=%cond, body=%body
}

ENTRY %main (a: f32[8,4], b: f32[6,2], m: pred[32]) -> (f32[8,4], f32[8]) {
  %a = f32[8,4]{1,0:T(8,128)} parameter(0)
  %b = f32[6,2]{1,0} parameter(1)
  %m = pred[32]{0} parameter(2)
  %fetch = (f32[8,4]{1,0:T(8,128)S(1)}, f32[8,4]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%a)
  %fetched = f32[8,4]{1,0:T(8,128)S(1)} copy-done(%fetch)
  %low = ((f32[6,2]{1,0}), f32[3,2]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%b), slice={[0:3], [0:2]}
  %high = ((f32[6,2]{1,0}), f32[3,2]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%b), slice={[3:6], [0:2]}
  %low.1 = f32[3,2]{1,0:S(1)} slice-done(%low)
  %t = (f32[8]{0}, pred[]) tuple(%c, %p)
  %loop = (f32[8]{0}, pred[]) while(%t), condition=%cond, body=%body
  %call = (f32[8]{0}, pred[]) call(%loop), to_apply=%called, frontend_attributes={small="true"}
  %r = f32[8]{0} get-tuple-element(%loop), index=0
  %sum = f32[8,4]{1,0:S(1)} fusion(%fetched, %m, %r), kind=kLoop, calls=%fused
  %back = (f32[8,4]{1,0}, f32[8,4]{1,0:S(1)}, u32[]{:S(2)}) copy-start(%sum)
  %out = f32[8,4]{1,0} copy-done(%back)
  %twice = f32[8]{0} copy(%r)
  ROOT %both = (f32[8,4]{1,0}, f32[8]{0}) tuple(%out, %twice)
}
"""


def test_bytes_by_hand():
    assert bytes_moved(TEXT) == {
        "copy-start": 128 + 128,  # a read, the sum written
        "slice-start": 2 * 24,
        "fusion": 32 + 32,  # m, and the loop's result; the rest is in vector memory
        "copy": 32 + 32,
        "add": 3 * 32,
    }


def test_what_is_no_program():
    with pytest.raises(ValueError, match="entry"):
        bytes_moved("module @jit_step {}")


SHAPES = {
    "conv1": (1, 1, 256, 64), "conv2": (3, 3, 64, 64), "conv3": (1, 1, 64, 256), "head": (256, 100)
}  # fmt: skip


def compiled(name):
    params = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in SHAPES.items()}
    return update_bytes.compile_update(update_bytes.PROGRAMS[name], params)


@pytest.mark.parametrize("name", ["dense", "static"])
def test_without_loops_it_is_the_compilers_count(name):
    program = compiled(name)
    counted = program.cost_analysis()["bytes accessed"]
    assert sum(bytes_moved(program.as_text()).values()) == pytest.approx(counted, rel=1e-4)


def test_between_updates_rigl_moves_what_static_masks_do():
    """No copy of a parameter, a slot or a mask, and no further pass over one: not 1 % more."""
    static, rigl = (bytes_moved(compiled(name).as_text()) for name in ("static", "rigl"))
    weights = sum(measuring.size(jax.ShapeDtypeStruct(s, jnp.bool_)) for s in SHAPES.values())
    assert rigl["copy"] - static["copy"] < weights / 100
    assert sum(rigl.values()) < 1.001 * sum(static.values())


def test_the_state_of_resnet50():
    """The update moves at most 1.075 of the dense bytes; arrays: a byte and a count a kernel."""
    params = measuring.resnet50_params()
    dense, sparse = (
        update_bytes.compile_update(topology, params).cost_analysis()["bytes accessed"]
        for topology in (None, sx.Static())
    )
    # Each of five or more passes over the weights takes 102 MB, reading a byte a weight 25 MB.
    assert 5 * measuring.size(params) <= dense
    assert dense < sparse <= 1.075 * dense
    dense_state, state = (
        jax.eval_shape(measuring.optimizer(topology).init, params)
        for topology in (None, update_bytes.PROGRAMS["rigl"])
    )
    added = len(jax.tree.leaves(state)) - len(jax.tree.leaves(dense_state))
    assert added == 2 * 54 + 3  # step, key, step of the last change


def test_the_order_of_axes_that_pads_least():
    """As the compiler gives it for a v5e: read off its programs' entries."""
    seen = {
        (2048, 1000): (1, 0), (1, 1, 256, 64): (0, 1, 3, 2), (7, 7, 3, 64): (0, 2, 1, 3),
        (3, 3, 64, 64): (0, 1, 2, 3), (1, 1, 64, 256): (0, 1, 2, 3), (64,): (0,), (): (),
    }  # fmt: skip
    assert {shape: least_padded(shape) for shape in seen} == seen
