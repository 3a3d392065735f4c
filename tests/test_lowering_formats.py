"""Every format, forward and backward: all of it is generated, and the products fit into registers and shared memory."""

import pytest
import torch
from fake_gpu import empty, extern_calls, fake_gpu, generated, launches
from lowering_cases import OPS, VERSION, assert_they_fit, built_templates, experts_weights, flat, matrix, some_experts
from torch._functorch.aot_autograd import aot_function, make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._subclasses.fake_tensor import FakeTensorMode

import moe_ops.lowering
from moe_ops.backends import triton, triton_supports, triton_wgrad
from moe_ops.backends.triton_plan import group_of, plan_of
from moe_ops.formats import FORMATS
from moe_ops.lowering import decompositions, product

moe_ops.lowering.register()
E, H, WIDTH, A = 128, 2048, 768, 8


def covering(arch, *what):
    """One format for each kind of product: the first that there is."""
    found = {}
    for name, fmt in FORMATS.items():
        plan = plan_of(fmt, torch.bfloat16, fmt.activation is not None, H, arch)
        kind = {"mma": plan.mma, "decoded": plan.decoded, "along_k": bool(group_of(fmt.weight)) and not plan.fold,
                "scale": fmt.weight.scale_dtype, "codec": fmt.activation is not None}  # fmt: skip
        found.setdefault(tuple(kind[w] for w in what), name)
    return list(found.values())


FORWARD = [(90, 8, name) for name in FORMATS]
FORWARD += [(90, 2048, name) for name in covering(90, "mma", "decoded", "along_k")]
FORWARD += [(100, 2048, name) for name in covering(100, "mma")]
FORWARD += [(100, 8, name) for name in covering(100, "mma", "decoded")]
SIX_BITS = [name for name, fmt in FORMATS.items() if fmt.weight.element.bits == 6]
STRICT = VERSION == (2, 13)  # what spills was found with it
SPILLS = {(100, 8, name): "16 bytes of stack in down's product" for name in SIX_BITS}  # 2.13: to be looked into


def kept_whole(arch, tokens, name):
    """The one product that Inductor calls instead of generating it: of the tallest tiles with three accumulators, of
    which the generated kernel spills (lowering/product.py, _spills)."""
    fmt = FORMATS[name]
    blocks = fmt.weight.element.bits == 8 and group_of(fmt.weight) == 128
    return arch == 90 and tokens == 2048 and blocks


# Kernels of few tokens are compiled for one format of each kind; test_aot.py compiles the tiles for all of them.
COMPILED = {*covering(90, "mma", "decoded", "along_k", "scale", "codec")}


@pytest.mark.parametrize("arch,tokens,name", [
    pytest.param(*case, marks=pytest.mark.xfail(strict=STRICT, reason=SPILLS[case])) if case in SPILLS else case
    for case in FORWARD])
def test_experts(arch, tokens, name):
    with fake_gpu(arch):
        source = generated(*some_experts(tokens, name, E, H, WIDTH, A))
        if (arch, tokens) != (90, 8) or name in COMPILED:
            assert_they_fit(built_templates(source))
    of_ours = [call for call in extern_calls(source) if "moe_ops" in call]
    whole = kept_whole(arch, tokens, name)
    assert of_ours == ["torch.ops.moe_ops._product.default"] * whole  # which is up's: it alone has a gate
    assert sum("_tem_" in kernel for kernel in launches(source)) == 2 - whole


# ---- backward

BACKWARD = covering(90, "mma", "decoded", "scale")


def experts_backward(name, tokens=64, e=32, h=512, i=256, top_k=4):
    def fn(grad, x, ids, weights, tensors):
        need = [True] * 4 + [False] * 2
        return OPS.experts_backward(grad, x, ids, weights, *tensors, *[None] * 4, need, format=name)

    return flat(fn, lambda: [empty(tokens, h), empty(tokens, h), empty(tokens, top_k, dtype=torch.int64),
                             empty(tokens, top_k), experts_weights(name, e, h, i, bias=True)])  # fmt: skip


def kinds(source):
    return [kernel.split("_")[1] for kernel in launches(source)]


@pytest.mark.parametrize("arch,name", [(90, n) for n in BACKWARD] + [(100, n) for n in covering(100, "mma")])
def test_experts_backward(arch, name):
    """Up again, and both products back, the router's weights from the first; nothing but sums over rows is ATen's."""
    with fake_gpu(arch):
        source = generated(*experts_backward(name))
        assert_they_fit(built_templates(source))
    assert not any("moe_ops" in call for call in extern_calls(source))
    assert kinds(source).count("tem") == 3
    assert "_sort_kernel_0" in launches(source) and set(kinds(source)) <= {"sort", "per", "red", "poi", "tem"}


def test_experts_backward_of_many_rows():
    """Products whose weights are dequantized first, and the gradient of the gate, are calls of ours."""
    with fake_gpu(90):
        source = generated(*experts_backward("mxfp4", tokens=4096))
        assert_they_fit(built_templates(source))
    called = [call.split(".")[3] for call in extern_calls(source) if "moe_ops" in call]
    assert called == ["_product", "_activation_grad", "_product"]
    assert kinds(source).count("tem") == 1  # gate and up again


@pytest.mark.parametrize("name", ["fp8", "mxfp8", "mxfp4"])
def test_experts_backward_of_weights(name):
    """The gradients of both weights are calls of the op; where gradients are codes, so is what quantizes W^T."""
    grad_format = name if name != "mxfp4" else None
    tokens, e, h, i, top_k = 64, 32, 512, 256, 4

    def fn(grad, x, ids, weights, up, down, tensors):
        args = (*tensors, *[None] * 2, up, down, [True] * 6)
        return OPS.experts_backward(grad, x, ids, weights, *args, format=name, grad_format=grad_format)

    with fake_gpu(90):
        source = generated(*flat(fn, lambda: [
            empty(tokens, h), empty(tokens, h), empty(tokens, top_k, dtype=torch.int64), empty(tokens, top_k),
            empty(e, 2 * i, h), empty(e, h, i), experts_weights(name, e, h, i, bias=True)]))  # fmt: skip
        assert_they_fit(built_templates(source))
    called = [call.split(".")[3] for call in extern_calls(source) if "moe_ops" in call]
    assert called == ["grouped_wgrad"] * 2 if grad_format is None else sorted(called) == [
        "grouped_wgrad", "grouped_wgrad", "quantize_weight", "quantize_weight"]  # fmt: skip
    assert kinds(source).count("tem") == 3


@pytest.mark.parametrize("name", BACKWARD)
def test_linear_backward(name):
    """One product, and what makes its order of columns."""
    n, k = 768, 512

    def fn(grad, weights):
        return OPS.linear_backward(grad, None, *weights, None, None, name, None, [True, False])[0]

    with fake_gpu(90):
        source = generated(*flat(fn, lambda: [empty(16, n), matrix(name, n, k)]))
        assert_they_fit(built_templates(source))
    assert not extern_calls(source) and kinds(source) == ["tem"]


# ---- a whole training step


def training_step(fn, make_inputs):
    """Code of the forward and of the backward graph of fn(*inputs), a loss.

    AOTAutograd makes them on the CPU, where ops stay whole: without a GPU torch's engine differentiates nothing on it.
    """
    graphs = []

    def keep(graph, inputs):
        graphs.append((graph, [(t.shape, t.dtype) for t in inputs]))
        return make_boxed_func(graph.forward)

    with FakeTensorMode():
        made = [(t.shape, t.dtype, t.requires_grad) for t in make_inputs()]
        inputs = [torch.empty(shape, dtype=dtype).requires_grad_(grad) for shape, dtype, grad in made]
        aot_function(fn, keep, keep, min_cut_rematerialization_partition)(*inputs).backward()
    assert len(graphs) == 2 and all(t.grad is not None for t in inputs if t.requires_grad)
    for graph, op in zip(graphs, (OPS.experts.default, OPS.experts_backward.default)):
        assert sum(node.target == op for node in graph[0].graph.nodes) == 1
    for graph, _ in graphs:
        for node in graph.graph.nodes:
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": torch.device("cuda")}
        graph.recompile()
    return [generated(graph, lambda made=made: [torch.empty(shape, dtype=dt, device="cuda") for shape, dt in made])
            for graph, made in graphs]  # fmt: skip


@pytest.mark.parametrize("arch,name", [(90, "fp8"), (90, "mxfp4"), (100, "mxfp8")])
def test_a_training_step(arch, name):
    """Frozen quantized experts between a trained router and a trained projection."""
    e, h, i, top_k, t = 32, 512, 256, 4, 64

    def loss(x, router, projection, up_bias, down_bias, *tensors):
        given = iter(tensors)
        weights = [next(given) if there else None for there in present]
        hidden = x @ projection
        chosen, ids = torch.topk(torch.softmax((hidden @ router.T).float(), -1), top_k, -1)
        return (x + OPS.experts(hidden, ids, chosen.to(x.dtype), *weights[:8], up_bias, down_bias, format=name)).sum()

    present = []

    def inputs():
        weights = experts_weights(name, e, h, i)
        present[:] = [w is not None for w in weights]
        trained = [empty(t, h), empty(e, h), empty(h, h), empty(e, 2 * i), empty(e, h)]
        return [p.requires_grad_() for p in trained] + [w for w in weights if w is not None]

    with fake_gpu(arch):
        forward, backward = training_step(loss, inputs)
        for source in (forward, backward):
            assert_they_fit(built_templates(source))
    for source in (forward, backward):
        assert not any("moe_ops" in call for call in extern_calls(source))
    assert kinds(forward).count("tem") == 2 and kinds(backward).count("tem") >= 3


@pytest.mark.parametrize("name", ["bf16", "fp8", "mxfp4"])
def test_a_training_graph_multiplies_once(name, monkeypatch):
    """What the backward of the op would compute again is found in the forward, and saved: gate and up of all rows.

    Gradients are traced as on a GPU, but of tensors on the CPU (see `training_step`).
    """
    e, h, i, top_k, t = 32, 512, 256, 4, 8192
    for module in (decompositions, product, triton, triton_wgrad):
        if hasattr(module, "arch_of"):
            monkeypatch.setattr(module, "arch_of", lambda device: 90)
    monkeypatch.setattr(decompositions, "opens", lambda *a: True)
    monkeypatch.setattr(triton_supports, "interpreted", lambda: True)  # then it runs on CPUs
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph.graph)
        return make_boxed_func(graph.forward)

    def loss(x, weights, ids, *tensors):
        given = iter(tensors)
        stored = [next(given) if there else None for there in present]
        return OPS.experts(x, ids, weights, *stored, format=name).sum()

    with FakeTensorMode():
        stored = [None if w is None else torch.empty(w.shape, dtype=w.dtype) for w in experts_weights(name, e, h, i)]
        present = [w is not None for w in stored]
        x, weights = (torch.empty(t, n, dtype=torch.bfloat16).requires_grad_() for n in (h, top_k))
        ids = torch.empty(t, top_k, dtype=torch.int64)
        opened, partition = decompositions.DECOMPOSITIONS, min_cut_rematerialization_partition
        aot_function(loss, keep, keep, partition, decompositions=opened)(
            x, weights, ids, *(w for w in stored if w is not None)).backward()  # fmt: skip
    forward, backward = ([n for n in graph.nodes if n.target == OPS._product.default] for graph in graphs)
    saved = [n for n in graphs[0].output_node().args[0] if n in forward]
    assert [n.kwargs["transpose"] for n in forward + backward] == [False, False, True, True]
    assert [tuple(n.meta["val"].shape) for n in saved] == [(t * top_k, 2 * i)]
