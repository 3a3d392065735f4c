"""torch.library.opcheck on every op: schema, fake, autograd registration, AOT dispatch with dynamic shapes."""

import pytest
import torch
from oracle import Layer, fit, inputs, takes_static

import moe_ops.lowering.divide
import moe_ops.ops  # noqa: F401
from moe_ops.formats import FORMATS

pytest.importorskip("expecttest", reason="torch.library.opcheck needs it")
OPS = torch.ops.moe_ops
ALL = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
CODECS = {f.activation.name: f.activation for f in FORMATS.values() if f.activation is not None}


def opcheck(op, args, kwargs=None):
    """test_schema compares arguments before and after by functions that fp8 has not got on the CPU."""
    tensors = [t for t in (*args, *(kwargs or {}).values()) if isinstance(t, torch.Tensor)]
    fp8 = any(t.is_floating_point() and t.element_size() == 1 for t in tensors)
    torch.library.opcheck(op, args, kwargs or {}, test_utils=ALL[1:] if fp8 else ALL)


def experts_case(name, device, grad, dtype=torch.float32, **options):
    layer = Layer(name, 3, *fit(name, 16, 24), dtype=dtype, **options)
    x, ids, weights = (t.to(device) for t in inputs(5, layer.hidden, 2, 3, dtype))
    args = layer.tensors(device)
    if grad:
        x.requires_grad_(), weights.requires_grad_(), args[8].requires_grad_(), args[9].requires_grad_()
    return (x, ids, weights, *args), layer.options()


def turns(what, options):
    """Every format, and the options in turn: a check takes a third of a second."""
    cases = [(name, options[i % len(options)]) for i, name in enumerate(FORMATS)]
    return pytest.mark.parametrize(f"name,{what}", cases, ids=str)


@turns("grad", [True, False])
def test_experts(name, grad, device):
    opcheck(OPS.experts.default, *experts_case(name, device, grad))


@pytest.mark.parametrize("options", [
    {"gated": False, "activation": "relu2"}, {"interleaved": True, "activation": "swiglu_oai"},
    {"router_weight_on_input": True}, {"static": True}, {"dtype": torch.bfloat16},
], ids=str)  # fmt: skip
def test_experts_options(options, device):
    on_input = {k: options[k] for k in ("router_weight_on_input",) if k in options}
    args, kwargs = experts_case("fp8", device, True, **{k: v for k, v in options.items() if k not in on_input})
    opcheck(OPS.experts.default, args, kwargs | on_input)


@turns("need", [[True] * 4, [True, False, False, False], [False, True, False, True], [False, False, True, False]])
def test_experts_backward(name, need, device):
    (x, *args), options = experts_case(name, device, False)
    opcheck(OPS.experts_backward.default, (torch.ones_like(x), x, *args, None, None, [*need, False, False]), options)


def product_case(name, device, grad, shards=1):
    layer = Layer(name, 3, *fit(name, 16, 24), gated=shards == 2)
    _, ids, weights = inputs(5, 1, 2, 3)
    order, offsets = OPS.sort_by_expert(ids.to(device), 3)
    args = layer.tensors(device)
    x, bias, row_weights = torch.randn(5, layer.hidden, device=device), args[8], weights.flatten().to(device)
    if grad:
        x.requires_grad_(), bias.requires_grad_(), row_weights.requires_grad_()
    return [x, args[0], offsets, args[2], args[4], None, bias, None, None, order, order, row_weights]


@turns("options", [
    {}, {"activation": "silu", "shards": 2}, {"activation": "relu2", "gated": False}, {"out_dtype": torch.bfloat16},
    {"activation": "silu", "shards": 2, "interleaved": True},
])  # fmt: skip
def test_grouped_mm(name, options, device):
    args = product_case(name, device, "out_dtype" not in options, options.get("shards", 1))
    opcheck(OPS.grouped_mm.default, tuple(args), {"format": name, "top_k": 2, **options})


@pytest.mark.parametrize("name", FORMATS)
def test_grouped_mm_transposed(name, device):
    args = product_case(name, device, False)
    options = {"format": name, "transpose": True}
    opcheck(OPS.grouped_mm.default, (torch.randn(10, args[1].shape[1], device=device), *args[1:5]), options)


@pytest.mark.parametrize("codec", CODECS)
def test_grouped_mm_of_codes(codec, device):
    """Rows come with their scales; bias and weights of rows have gradients."""
    name = next(name for name, f in FORMATS.items() if f.activation == CODECS[codec])
    args = product_case(name, device, True)
    args[0], scale, whole = OPS.quantize(args[0].detach(), None, codec)
    args[7:9] = scale, whole if CODECS[codec].global_scale else None
    opcheck(OPS.grouped_mm.default, tuple(args), {"format": name, "top_k": 2})


@turns("need", [[True] * 3, [True, False, False], [False, True, False], [False, False, True], [True, False, True]])
def test_grouped_mm_backward(name, need, device):
    args = product_case(name, device, False)
    scalars = (None, name, 1, 2, "silu", False, False, None, None, None, None, [*need, False])
    opcheck(OPS.grouped_mm_backward.default, (torch.randn(10, args[1].shape[1], device=device), *args, *scalars))


@turns("grad", [False, True, True])
def test_linear(name, grad, device):
    (k,) = fit(name, 16)
    q = FORMATS[name].weight.quantize(torch.randn(24, k))
    x, bias = torch.randn(2, 3, k, device=device), torch.randn(24, device=device)
    if grad:
        x.requires_grad_(), bias.requires_grad_()
    weight = [t if t is None else t.to(device) for t in (q.qdata, q.scale, q.global_scale, None)]
    opcheck(OPS.linear.default, (x, *weight, bias), {"format": name})
    if not grad:
        args = (torch.randn(2, 3, 24, device=device), None, *weight, None, name, None, [True, False])
        opcheck(OPS.linear_backward.default, args)


STATIC = [None, (), (2, 3, 1)]


@pytest.mark.parametrize(
    "codec,scale", [(name, s) for name, c in CODECS.items() for s in STATIC[: 3 if takes_static(c) else 1]], ids=str
)
def test_quantize(codec, scale, device):
    x = torch.randn(2, 3, 160, device=device)
    scale = None if scale is None else torch.ones(scale, device=device)
    torch.library.opcheck(OPS.quantize.default, (x, scale, codec), test_utils=ALL[1:])


def test_routing(device):
    ids = inputs(5, 1, 3, 4)[1].to(device)
    opcheck(OPS.sort_by_expert.default, (ids, 4))
    order = OPS.sort_by_expert(ids, 4)[0]
    for grad in (False, True):
        rows = torch.randn(15, 8, device=device, requires_grad=grad)
        opcheck(OPS.permute.default, (torch.randn(5, 8, device=device, requires_grad=grad), order, 3))
        opcheck(OPS.unpermute.default, (rows, order))
        opcheck(OPS.combine.default, (rows, 3))


@pytest.mark.parametrize("codec", [None, "e4m3_row", "mxfp8"])
def test_grouped_wgrad(codec, device):
    offsets, rows = torch.tensor([0, 3, 10], dtype=torch.int32, device=device), torch.arange(9, -1, -1, device=device)
    grad, x = torch.randn(10, 8, device=device), torch.randn(5, 24, device=device)
    options = {"top_k": 2, "codec": codec, "out_dtype": torch.bfloat16}
    opcheck(OPS.grouped_wgrad.default, (grad, x, offsets, None, rows.int()), options)


@pytest.mark.parametrize("name", [name for name in FORMATS if FORMATS[name].quantized and "/" not in name])
def test_quantize_weight(name, device):
    codec = FORMATS[name].weight
    opcheck(OPS.quantize_weight.default, (torch.randn(2, 16, fit(name, 40)[0], device=device), codec.name, 2), {})


@turns("need", [[True, False], [False, True], [True, True]])
def test_masters(name, need, device):
    (x, *args), options = experts_case(name, device, False)
    fmt = FORMATS[name]
    masters = [torch.randn(*t.shape[:2], fmt.weight.columns(t.shape[2]), device=device) for t in args[2:4]]
    given = masters if fmt.quantized else (None, None)
    need = [True, False, False, False, *need]
    opcheck(OPS.experts_backward.default, (torch.ones_like(x), x, *args, *given, need), options)


def test_divide(device):
    opcheck(OPS.divide.default, (torch.randn(3, 5, device=device), torch.rand(3, 1, device=device) + 0.5))


def test_every_op_is_checked():
    """But for those that only generated code calls: test_lowering_parts.py, _cpu.py and _formats.py see them."""
    checked = {"experts", "experts_backward", "grouped_mm", "grouped_mm_backward", "linear", "linear_backward",
               "quantize", "sort_by_expert", "permute", "unpermute", "combine", "divide", "grouped_wgrad",
               "quantize_weight"}  # fmt: skip
    defined = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("moe_ops::")}
    assert {name.removeprefix("moe_ops::") for name in defined} - {"_product", "_rows", "_activation_grad"} == checked


@pytest.mark.parametrize("top_k", [1, 3])
def test_fake_and_real_agree_for_no_tokens(top_k):
    from torch._subclasses.fake_tensor import FakeTensorMode

    layer = Layer("fp8", 3, 16, 24)
    x, ids, weights = inputs(0, 16, top_k, 3)
    real = OPS.experts(x, ids, weights, *layer.tensors(), **layer.options())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = OPS.experts(*(mode.from_tensor(t) for t in (x, ids, weights)), *layer.tensors(), **layer.options())
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
