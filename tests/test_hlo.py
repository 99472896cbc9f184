"""What the readers of optimised HLO texts find in them."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

from benchmarks.aot import check, flops, hlo, targets
from eqxldm.models import multiply_adds

from helpers import small_dit

# A loop of three rounds in each of which a loop of two runs, a fusion inside that moves data, and
# a branch. The inner counter goes in steps of two from two to below six.
NESTED = """
HloModule nested, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (g: f32[8,4]) -> f32[2,4] {
  %g = f32[8,4]{1,0:T(8,128)} parameter(0)
  %ar = f32[8,4]{1,0:T(8,128)} all-reduce(%g), channel_id=7, replica_groups={{0,1,2,3}}, to_apply=%sum
  ROOT %part = f32[2,4]{1,0} slice(%ar), slice={[0:2], [0:4]}
}

%piece.1 (p1: bf16[2,4]) -> bf16[8,4] {
  %p1 = bf16[2,4]{1,0} parameter(0)
  ROOT %ag.1 = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} all-gather(%p1), channel_id=9, replica_groups=mesh['x'=1,'y'=4] {'y'}, dimensions={0}, frontend_attributes={chain_id="3"}, backend_config={"window_config":{"estimated_cycles":"99"}}
}

%piece.2 (p2: bf16[2,4]) -> bf16[8,4] {
  %p2 = bf16[2,4]{1,0} parameter(0)
  ROOT %ag.2 = bf16[8,4]{1,0} all-gather(%p2), channel_id=9, replica_groups=mesh['x'=1,'y'=4] {'y'}, dimensions={0}, frontend_attributes={chain_id="3"}
}

%inner_body (q: (u32[], bf16[2,4])) -> (u32[], bf16[2,4]) {
  %q = (u32[]{:T(128)}, bf16[2,4]{1,0}) parameter(0)
  %qi = u32[]{:T(128)} get-tuple-element(%q), index=0
  %qx = bf16[2,4]{1,0} get-tuple-element(%q), index=1
  %two = u32[]{:T(128)} constant(2)
  %qc = u32[]{:T(128)} copy(%qi)
  %qn = u32[]{:T(128)} add(%two, %qc)
  %start = (bf16[2,4]{1,0}, bf16[2,4]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%qx), channel_id=4, source_target_pairs={{0,1},{1,0}}
  %done = bf16[2,4]{1,0} collective-permute-done(%start)
  %later = bf16[8,4]{1,0} fusion(%done), kind=kOutput, calls=%piece.2, backend_config={"window_config":{"estimated_cycles":"5"}}
  ROOT %qt = (u32[]{:T(128)}, bf16[2,4]{1,0}) tuple(%qn, %done)
}

%inner_cond (r: (u32[], bf16[2,4])) -> pred[] {
  %r = (u32[], bf16[2,4]{1,0}) parameter(0)
  %six = u32[] constant(6)
  %ri = u32[] get-tuple-element(%r), index=0
  ROOT %less = pred[] compare(%ri, %six), direction=LT
}

%then (t: f32[2,4]) -> f32[2,4] {
  %t = f32[2,4]{1,0} parameter(0)
  ROOT %tn = f32[2,4]{1,0} negate(%t), backend_config={"window_config":{"estimated_cycles":"1000"}}
}

%else (e: f32[2,4]) -> f32[2,4] {
  ROOT %e = f32[2,4]{1,0} parameter(0)
}

%outer_body (b.1: (s32[], bf16[2,4], f32[8,4])) -> (s32[], bf16[2,4], f32[8,4]) {
  %b.1 = (s32[], bf16[2,4]{1,0}, /*index=2*/f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%b.1), index=0
  %x = bf16[2,4]{1,0} get-tuple-element(%b.1), index=1
  %w = f32[8,4]{1,0} get-tuple-element(%b.1), index=2
  %first = bf16[8,4]{1,0} fusion(%x), kind=kCustom, calls=%piece.1, metadata={op_name="jit(f)/dot_general"}, backend_config={"window_config":{"estimated_cycles":"100"}}
  %small = f32[2,4]{1,0} fusion(%w), kind=kCustom, calls=%all-reduce-scatter.1
  %flag = pred[] constant(true)
  %cond = f32[2,4]{1,0} conditional(%flag, %small, %small), true_computation=%then, false_computation=%else
  %begin = u32[] constant(2)
  %tuple.1 = (u32[], bf16[2,4]{1,0}) tuple(%begin, %x)
  %while.1 = (u32[], bf16[2,4]{1,0}) while(%tuple.1), condition=%inner_cond, body=%inner_body
  %y = bf16[2,4]{1,0} get-tuple-element(%while.1), index=1
  %one = s32[] constant(1)
  %n = s32[] add(%i, %one)
  ROOT %out = (s32[], bf16[2,4]{1,0}, f32[8,4]{1,0}) tuple(%n, %y, %w)
}

%outer_cond (c.1: (s32[], bf16[2,4], f32[8,4])) -> pred[] {
  %c.1 = (s32[], bf16[2,4]{1,0}, f32[8,4]{1,0}) parameter(0)
  ROOT %unread = pred[] custom-call(%c.1), custom_call_target="opaque"
}

ENTRY %main (p: (s32[], bf16[2,4], f32[8,4])) -> (s32[], bf16[2,4], f32[8,4]) {
  %p = (s32[], bf16[2,4]{1,0}, f32[8,4]{1,0}) parameter(0)
  %copy = (s32[], bf16[2,4]{1,0}, f32[8,4]{1,0}) copy(%p), backend_config={"window_config":{"estimated_cycles":"7"}}
  ROOT %while.2 = (s32[], bf16[2,4]{1,0}, f32[8,4]{1,0}) while(%copy), condition=%outer_cond, body=%outer_body, backend_config={"known_trip_count":{"n":"3"}}
}
"""  # noqa: E501


@pytest.fixture(scope="module")
def nested():
    return hlo.parse(NESTED)


def test_trip_counts_are_the_compilers_or_read_off_the_counter(nested):
    loops = {i.name: (i, where) for i, where, _ in hlo.walk(nested) if i.opcode == "while"}
    counts = {name: hlo.trip_count(nested, where, i) for name, (i, where) in loops.items()}
    assert counts == {"while.2": 3, "while.1": 2}
    assert hlo.unknown_loops(nested) == []


def test_a_loop_of_unknown_length_is_named_and_counts_once():
    module = hlo.parse(NESTED.replace('"known_trip_count":{"n":"3"}', ""))
    assert hlo.unknown_loops(module) == ["while.2"]
    assert hlo.cycles(module) == 7 + 100 + 1000 + 2 * 5


@pytest.mark.parametrize(
    ("change", "count"),
    [
        (("constant(6)", "constant(7)"), 3),
        (("direction=LT", "direction=LE"), 3),
        (("constant(6)", "constant(2)"), 0),
        (("add(%two, %qc)", "multiply(%two, %qc)"), None),
    ],
)
def test_the_counter_is_read_as_it_is_written(change, count):
    module = hlo.parse(NESTED.replace(*change))
    loop = next(i for i, _, _ in hlo.walk(module) if i.name == "while.1")
    assert hlo.trip_count(module, "outer_body", loop) == count


def test_cycles_multiply_through_nested_loops_and_a_fusion_has_only_its_own(nested):
    assert hlo.cycles(nested) == 7 + 3 * (100 + 1000 + 2 * 5)
    assert hlo.cycles_by_operation(nested)["jit(f)/dot_general"] == 300


def test_collectives_count_once_with_whole_bytes_and_rounds(nested):
    found = {c.kind: c for c in hlo.collectives(nested)}
    assert len(found) == len(hlo.collectives(nested)) == 3
    # The two pieces of one gather: it runs as often as the piece outside the inner loop.
    assert (found["all-gather"].bytes, found["all-gather"].group) == (3 * 64, 4)
    assert (found["collective-permute"].times, found["collective-permute"].bytes) == (6, 6 * 16)
    assert (found["reduce-scatter"].bytes, found["reduce-scatter"].group) == (3 * 128, 4)
    assert hlo.bytes_by_kind(list(found.values()))["reduce-scatter"] == 384
    assert hlo.sent_bytes(list(found.values())) == 3 * 48 + 96 + 3 * 96


def test_asynchronous_collectives_count_where_they_start():
    text = """
ENTRY %main (p: f32[4]) -> f32[8] {
  %p = f32[4]{0} parameter(0)
  %ag = (f32[4]{0}, f32[8]{0}) all-gather-start(%p), replica_groups=[4,2]<=[8], dimensions={0}
  %whole = f32[8]{0} all-gather-done(%ag)
  %ar = (f32[4]{0}, f32[8]{0}) all-reduce-start(%p, %whole), replica_groups={{0,1}}, to_apply=%add
  %sums = (f32[4]{0}, f32[8]{0}) all-reduce-done(%ar)
  %rs = f32[2]{0} reduce-scatter(%p), replica_groups={{0,1},{2,3}}, dimensions={0}
  %start = ((f32[8]{0}), f32[4]{0}) reduce-scatter-start(%whole), replica_groups={{0,1}}
  ROOT %part = f32[4]{0} reduce-scatter-done(%start)
}
"""
    found = [(c.kind, c.bytes, c.group) for c in hlo.collectives(hlo.parse(text))]
    scatters = [("reduce-scatter", 16, 2), ("reduce-scatter", 32, 2)]
    assert found == [("all-gather", 32, 2), ("all-reduce", 48, 2), *scatters]


@pytest.mark.parametrize(
    "groups, size",
    [
        ("mesh['a'=1,'b'=4,'c'=4], device_ids=([4,4]T(1,0)) {'b'}", 4),
        ("mesh['a'=4,'b'=2] {'a','b'}", 8),
        ("[2,8]<=[4,4]T(1,0)", 8),
        ("{{0,1,2},{3,4,5}}", 3),
    ],
)
def test_groups_are_read_as_they_are_written(groups, size):
    text = hlo.EXAMPLE.replace("replica_groups=[1,4]<=[4]", f"replica_groups={groups}")
    assert [c.group for c in hlo.collectives(hlo.parse(text))] == [size]


def test_of_what_another_core_runs_collectives_count_and_cycles_do_not():
    text = """
%gather (p.1: f32[2]) -> f32[8] {
  %p.1 = f32[2]{0} parameter(0)
  ROOT %ag = f32[8]{0} all-gather(%p.1), replica_groups=[1,4]<=[4], dimensions={0}, backend_config={"estimated_cycles":"9"}
}, execution_thread="sparsecore"

ENTRY %main (p: f32[2]) -> f32[8] {
  %p = f32[2]{0} parameter(0)
  %start = ((f32[2]{0}), f32[8]{0}) call-start(%p), async_execution_thread="sparsecore", to_apply=%gather
  ROOT %done = f32[8]{0} call-done(%start)
}
"""  # noqa: E501
    module = hlo.parse(text)
    found = [(c.kind, c.bytes, c.times) for c in hlo.collectives(module)]
    assert found == [("all-gather", 32, 1)]
    assert hlo.cycles(module) == 0  # of the core that computes


def test_groups_in_another_notation_are_not_counted_as_none():
    text = hlo.EXAMPLE.replace("replica_groups=[1,4]<=[4]", "replica_groups=all")
    with pytest.raises(ValueError, match="groups are not understood"):
        hlo.collectives(hlo.parse(text))


def test_a_parameter_gathered_outside_its_block_is_found():
    def gathers(dims, times):
        return [hlo.Collective("all-gather", (hlo.Array("f32", dims),), times, 4, "", "")]

    stacked, others = [(6, 32, 16), (6, 32)], [(16, 16)]
    whole = lambda dims, times: len(hlo.gathered_whole(gathers(dims, times), stacked, others))
    assert whole((6, 32, 16), 1) == 1  # all blocks at once
    assert whole((192, 16), 1) == 1  # however it is laid out
    assert whole((1, 16, 32), 1) == 1  # one block's, once
    assert whole((1, 32, 16), 6) == 0  # one block's in each block
    assert whole((16, 16), 1) == 0  # another layer's
    assert hlo.gathered_whole(gathers((16, 16), 1), [(6, 16, 16)], others) == []


def test_a_text_that_is_no_module_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("ModuleNotFoundError")


def test_a_compiled_scan_reads_as_it_was_written():
    def f(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    x, w = jnp.ones((4, 8)), jnp.ones((5, 8, 8))
    module = hlo.parse(jax.jit(f).lower(x, w).compile().as_text())
    products = [n for i, _, n in hlo.walk(module) if i.opcode in ("dot", "custom-call")]
    assert 5 in products
    assert hlo.unknown_loops(module) == []


def test_counted_flops_are_those_of_the_model():
    dit = small_dit(mlp_ratio=4.0, width=64, num_heads=2, depth=2)
    x, t, label = jnp.zeros((3, 4, 8)), jnp.array(0.5), jnp.array(1)
    params, static = eqx.partition(dit, eqx.is_array)
    program = jax.make_jaxpr(lambda p: eqx.combine(p, static)(x, t, label))(params)
    norms = 2 * dit.config.depth * 8 * 64  # counted by the convention, no product
    assert flops.count_flops(program) == 2 * (multiply_adds(dit) - norms)


def test_a_strided_convolution_and_its_gradients_count_alike():
    def conv(x, w):
        return jax.lax.conv_general_dilated(x, w, (2, 2), "SAME")

    x, w = jnp.ones((2, 3, 8, 8)), jnp.ones((5, 3, 2, 2))
    forward = flops.count_flops(jax.make_jaxpr(conv)(x, w))
    assert forward == 2 * (2 * 5 * 4 * 4) * (3 * 2 * 2)
    backward = jax.make_jaxpr(jax.grad(lambda x, w: jnp.sum(conv(x, w)), argnums=(0, 1)))(x, w)
    assert flops.count_flops(backward) == 3 * forward


ROW = dict(
    name="a", mesh={"fsdp": 8}, options={"batch": 8}, argument_bytes=1, temporary_bytes=1,
    peak_bytes=100, memory_bytes=1000, sent_bytes=10, collectives={"all-gather": 10**9}, flops=1e12,
    compile_seconds=1.0, cycles=10**6, mfu=0.5, unknown_loops=0, gathered_whole=[],
    involuntary=0, cudnn_attention=False,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(memory_bytes=99), "needs"),
        (dict(involuntary=2), "2 involuntary"),
        (dict(gathered_whole=["w"]), "outside its block: w"),
        (dict(peak_bytes=111), "memory grew by 11 %"),
        (dict(sent_bytes=12), "traffic grew by 20 %"),
        (dict(error="Ran out of memory"), "Ran out"),
        (dict(unknown_loops=1), "unknown length"),
        (dict(options=dict(attention="cudnn")), "not cuDNN"),
    ],
)
def test_each_fault_has_its_line(change, reason):
    before = dict(peak_bytes=100, sent_bytes=10)
    assert check.reasons(ROW, before) == []
    found = check.reasons(ROW | change, before)
    assert len(found) == 1 and reason in found[0] and found[0].startswith("a:")


def test_ten_percent_more_memory_is_no_fault():
    assert check.reasons(ROW | dict(peak_bytes=110), dict(peak_bytes=100)) == []


def test_every_row_has_the_columns_of_the_header():
    for platform in ("tpu", "gpu"):
        columns = check.header(platform).splitlines()[0].count("|")
        assert check.line(platform, ROW | dict(name="DiT v5e:2x4 fsdp=8")).count("|") == columns


def test_cases_have_their_own_names_and_meshes_that_divide_their_batches():
    for cases in (targets.TPU, targets.GPU):
        assert len({case.name for case in cases}) == len(cases)
        for case in cases:
            shared = case.mesh.get("data", 1) * case.mesh.get("fsdp", 1)
            assert case.options["batch"] % shared == 0, case.name
    assert set(targets.SHORT) <= {case.name for case in targets.TPU}
