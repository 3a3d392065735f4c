"""The parts of the graph as they are, without Inductor: backend "inductor", its products run by the eager kernel."""

import pytest
import torch
from kernel_cases import CUDA, DEVICE, DTYPE, FACTORS, OPS, gradients, product_case, there, tile, varied
from oracle import Layer, assert_as_good, fit, inputs, takes_static
from oracle import experts as definition

import moe_ops.lowering.parts  # noqa: F401
from moe_ops.formats import FORMATS
from moe_ops.lowering.parts import Parts

pytestmark = pytest.mark.kernels
KINDS = [
    {"activation": "swiglu_oai", "interleaved": True}, {"on_input": True, "static": True},
    {"activation": "relu2", "gated": False}, {"activation": "gelu", "bias": False, "static": True},
]  # fmt: skip
CASES = [(name, i % len(KINDS), "parts" if i % 3 else "large") for i, name in enumerate(FORMATS)]


@pytest.mark.parametrize("name,kind,shape", CASES)
def test_experts(name, kind, shape):
    """Forward and gradients, with ids that no expert has."""
    options = dict(KINDS[kind])
    on_input, static = options.pop("on_input", False), options.pop("static", False)
    static = static and takes_static(FORMATS[name].activation)
    layer = Layer(name, 4, *fit(name, 72, 40), dtype=DTYPE, static=static, **options)
    x, ids, weights = inputs(6, layer.hidden, 2, 4, DTYPE)
    call = {"router_weight_on_input": on_input, **layer.options(), "backend": "inductor"}
    run = lambda a, b: OPS.experts(a, ids.to(DEVICE), b, *layer.tensors(DEVICE), **call)  # noqa: E731
    launched = []
    with tile(shape), pytest.MonkeyPatch.context() as patch:
        launch = Parts.launch
        patch.setattr(Parts, "launch", staticmethod(lambda p, c: launched.append(c.parts) or launch(p, c)))
        got = gradients(run, x.to(DEVICE), weights.to(DEVICE))
    assert len(launched) >= 5 and (max(launched) > 1) == (shape == "parts")

    def wanted(work, nudge=0.0):
        exact = work == torch.float64
        leaves = (t.double() if exact else t for t in (x, weights))
        return gradients(
            lambda a, b: definition(layer, a, ids, b, work, on_input=on_input, stored=DTYPE, nudge=nudge), *leaves
        )

    truth, plain = wanted(torch.float64), wanted(DTYPE)
    for i, what in enumerate(("out", "x", "weights")):
        nudged = lambda nudge, i=i: wanted(torch.float64, nudge)[i].double()  # noqa: E731
        # Of router weights: a sum over I of sums over H, where plain torch has one over H of what it has anyway.
        assert_as_good(got[i], truth[i].double(), plain[i], what, 2.0 * 2**0.5 if what == "weights" else 2.0, nudged)


@pytest.mark.parametrize("name", FORMATS)
def test_linear(name):
    """One expert, no offsets; some of its products in parts."""
    (k,), g = fit(name, 136), torch.Generator().manual_seed(0)
    q = FORMATS[name].weight.quantize(varied(80, k, g=g) / k**0.5)
    x, bias = varied(9, k, g=g), torch.randn(80, generator=g).to(DTYPE)
    tensors = {"weight": q.qdata, "weight_scale": q.scale, "weight_global_scale": q.global_scale, "bias": bias}

    def run(backend, device, dtype):
        args = {n: t.to(dtype) if t is not None and t.dtype == DTYPE else t for n, t in there(tensors, device).items()}
        return gradients(lambda x: OPS.linear(x, **args, format=name, backend=backend), x.to(device, dtype))

    with tile("parts" if name in list(FORMATS)[::2] else "large"):
        found = run("inductor", DEVICE, DTYPE)
    for got, plain, truth in zip(found, run("reference", "cpu", DTYPE), run("reference", "cpu", torch.float32)):
        assert_as_good(got, truth.double(), plain)


CODES = [f for f in FORMATS if FORMATS[f].activation is not None]


@pytest.mark.parametrize("name,index,x", [
    (name, FACTORS["index"][i % 3], "static_rows" if i % 4 == 3 else "codes") for i, name in enumerate(CODES)])
def test_grouped_mm(name, index, x):
    """Codes that the graph did not make itself, rows read and written by index."""
    weight, _, activation = name.partition("/")
    activation = activation or name
    case = {"weight": weight, "activation": activation, "gate": "interleaved" if index == "read" else "two",
            "bias": True, "even_k": False, "rows": "many", "index": index, "x": x, "dtype": DTYPE}  # fmt: skip
    tensors, options = product_case(case)
    with tile("parts" if index == "write" else "large"):
        got = OPS.grouped_mm(**there(tensors), **options, backend="inductor").cpu()
    reference = OPS.grouped_mm(**tensors, **options, backend="reference")
    wide = {k: t.float() if t is not None and t.dtype == DTYPE else t for k, t in tensors.items()}
    truth = OPS.grouped_mm(**wide, **options | {"out_dtype": torch.float32}, backend="reference")
    assert_as_good(got, truth.double(), reference if not CUDA else reference.bfloat16())


def test_the_name_is_not_for_users():
    import moe_ops

    with pytest.raises(ValueError, match="unknown backend 'inductor'"), moe_ops.use_backend("inductor"):
        pass
