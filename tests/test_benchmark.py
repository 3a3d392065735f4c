"""examples/benchmark.py: floors against published ones, the references, and a dry run of the script on a CPU."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("tqdm")
ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))

import _bench_peers as peers  # noqa: E402
import _bench_table as table  # noqa: E402
import _bench_timing as timing  # noqa: E402
import benchmark  # noqa: E402

from moe_ops.formats import FORMATS  # noqa: E402

CPU = torch.device("cpu")
TINY = peers.SHAPES["tiny"]
ANCHORS = json.loads(table.ANCHORS.read_text())
CEILINGS = timing.Ceilings(
    **{k: v for k, v in ANCHORS["ceilings"].items() if k != "stream_us"},
    stream_us={float(mb): us for mb, us in ANCHORS["ceilings"]["stream_us"].items()},
)


def run_script(*args: str) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(EXAMPLES / "benchmark.py"), *args]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def floors(shape: str, tokens: int, touched: float, bytes_per_weight: float, tflops: float) -> timing.Floors:
    s = peers.SHAPES[shape]
    per_expert = s.hidden * s.intermediate * bytes_per_weight * touched
    flop = 6 * tokens * s.top_k * s.hidden * s.intermediate
    return timing.layer_floors((2 * per_expert, per_expert), 4 * tokens * s.hidden, flop, tflops, CEILINGS)


@pytest.mark.parametrize(
    ("shape", "tokens", "touched", "bytes_per_weight", "roofline", "stream", "bound"),
    [  # published floors, us
        ("A", 1, 8, 2, 16.2, 20.6, "memory"),
        ("A", 128, 128, 2, 259.8, 269.9, "memory"),
        ("A", 8192, 128, 2, 761.5, 761.5, "compute"),
        ("B", 1, 2, 2, 151.4, 158.8, "memory"),
        ("C", 512, 32, 2, 343.5, 355.0, "memory"),
        ("D", 2048, 256, 2, 618.3, 626.3, "memory"),
        ("A", 1, 8, 1, 8.1, 12.4, "memory"),
        ("A", 2048, 128, 1, 133.4, 136.6, "memory"),
        ("B", 2048, 8, 1, 909.3, 909.3, "compute"),
        ("C", 1, 4, 1, 21.4, 25.9, "memory"),
        ("D", 2048, 256, 1, 315.5, 315.5, "memory"),  # reads of the weights alone take less than the roofline
        ("D", 8192, 256, 1, 454.7, 454.7, "compute"),
    ],
)
def test_floors(shape, tokens, touched, bytes_per_weight, roofline, stream, bound):
    tflops = CEILINGS.bf16_tflops if bytes_per_weight == 2 else CEILINGS.fp8_tflops
    got = floors(shape, tokens, touched, bytes_per_weight, tflops)
    assert got.bound == bound
    assert got.roofline == pytest.approx(roofline, abs=0.15, rel=5e-4)  # published values and their table are rounded
    assert got.stream == pytest.approx(stream, abs=0.15, rel=5e-4)  # published values and their table are rounded


def test_fp8_weights_with_bf16_activations_use_the_bf16_peak():
    assert floors("A", 2048, 128, 1, CEILINGS.bf16_tflops).roofline == pytest.approx(190.4, abs=0.1)


def test_multiples_of_the_shipped_peers_are_their_times_over_these_floors():
    for (name, shape, tokens), shipped in table.shipped_peers().items():
        s = peers.SHAPES[shape]
        if tokens > 1 and tokens * s.top_k < 8 * s.experts:
            continue  # how many experts were touched depends on the routing
        touched = s.top_k if tokens == 1 else s.experts
        fmt = FORMATS[name]
        tflops = CEILINGS.bf16_tflops if fmt.activation is None else CEILINGS.fp8_tflops
        size = fmt.weight.element.bits / 8  # bytes per weight
        if fmt.weight.block and fmt.weight.block[0] == 1 and fmt.weight.block[1]:
            size += fmt.weight.scale_dtype.itemsize / fmt.weight.block[1]
        got = floors(shape, tokens, touched, size, tflops)
        assert shipped.us / got.roofline == pytest.approx(shipped.roofline, rel=0.01), (name, shape, tokens)
        assert shipped.us / got.stream == pytest.approx(shipped.stream, rel=0.01), (name, shape, tokens)


def test_stream_time_is_linear_between_sizes_and_beyond_the_last():
    measured = {2.0: 2.0, 4.0: 3.0, 8.0: 4.0}
    assert timing.stream_time(1e6, measured) == 2.0
    assert timing.stream_time(3e6, measured) == pytest.approx(2.5)
    assert timing.stream_time(8e6, measured) == pytest.approx(4.0)
    assert timing.stream_time(16e6, measured) == pytest.approx(6.0)


@pytest.mark.parametrize("tokens", [1, 8, 32, 33, 512, 513])
def test_sets_are_rotated_and_disjoint_at_one_token(tokens):
    sets = peers.random_sets(TINY, tokens, CPU)
    assert len(sets) == {1: 4, 8: 8, 32: 8, 33: 4, 512: 4, 513: 2}[tokens]
    x, ids, topk_weights = sets[0]
    assert x.shape == (tokens, TINY.hidden)
    assert ids.shape == topk_weights.shape == (tokens, TINY.top_k)
    assert torch.equal(topk_weights, topk_weights.bfloat16().float())
    assert torch.allclose(topk_weights.sum(-1), torch.ones(tokens), atol=0.01)
    if tokens == 1:
        assert torch.cat([s[1] for s in sets]).unique().numel() == TINY.experts


def test_reference_layer_is_the_double_loop():
    weights = peers.quantized_weights(peers.random_floats(TINY, CPU), "bf16")
    x, ids, topk_weights = peers.random_sets(TINY, 3, CPU)[0]
    want = torch.zeros(3, TINY.hidden)
    for t in range(3):
        for a in range(TINY.top_k):
            w1, w2 = weights.gate_up.qdata[ids[t, a]].float(), weights.down.qdata[ids[t, a]].float()
            gate, up = w1[: TINY.intermediate] @ x[t].float(), w1[TINY.intermediate :] @ x[t].float()
            want[t] += topk_weights[t, a] * (w2 @ (gate * torch.sigmoid(gate) * up))
    assert torch.allclose(peers.reference_layer(weights, x, ids, topk_weights), want, rtol=1e-5, atol=1e-6)


def test_scaled_grouped_mm_layer_given_the_product(monkeypatch):
    """The peer's routing and scales, with the product that only CUDA has written out."""

    def product(x, w, scale, w_scale, offs, out_dtype, use_fast_accum):
        expert = torch.searchsorted(offs, torch.arange(len(x)), right=True)  # of each row
        y = (x.float()[:, None] @ w.float()[expert])[:, 0] * scale[:, None] * w_scale[expert]
        return y.to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_grouped_mm", product)
    weights = peers.quantized_weights(peers.random_floats(TINY, CPU), "fp8")
    inputs = peers.random_sets(TINY, 8, CPU)[0]
    y = peers.scaled_grouped_mm(weights)(*inputs)
    assert 0 < peers.relative_error(y, peers.reference_layer(weights, *inputs)) < 0.08


@pytest.mark.parametrize("build", [peers.hf_grouped_mm, peers.hf_batched_mm])
def test_transformers_peers(build):
    pytest.importorskip("transformers")
    weights = peers.quantized_weights(peers.random_floats(TINY, CPU), "bf16")
    inputs = peers.random_sets(TINY, 8, CPU)[0]
    y = build(weights)(*inputs)
    assert 0 < peers.relative_error(y, peers.reference_layer(weights, *inputs)) < 0.01


def test_an_element_that_no_kernel_writes_is_seen():
    outputs = [torch.zeros(4, 8), torch.zeros(4, 8)]

    def forgetful(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        out[:, 1:] = x[:, 1:]
        return out

    sets = [(torch.randn(4, 8), out) for out in outputs]
    assert math.isnan(benchmark.measure(forgetful, sets, sets[-1][0])["error"])


def cell(error: float = 0.001, us: float = 20.0) -> table.Cell:
    floor = timing.Floors(roofline=10, stream=16, bound="memory")
    return table.Cell("fp8", "A", 1, 8, floor, 0.01, {"op": {"us": us, "error": error}})


def test_only_correct_layers_count():
    assert cell().wrong() == []
    assert cell(error=0.02).wrong() == ["op"]
    assert cell(error=math.nan).wrong() == ["op"]
    failed = cell()
    failed.layers["op"] = {"failed": "out of memory"}
    assert failed.wrong() == ["op"]
    peered = cell()
    peered.layers |= {"hfG": {"us": 1.0, "error": math.nan}, "hfB": {"us": 30.0, "error": 0.001}}
    assert peered.best_peer() == (30.0, "hfB")


def test_ratios_compare_multiples_of_the_floor():
    shipped = table.Shipped(us=30, roofline=4.0, stream=2.5, peer="a kernel")
    got = table.ratios(cell(), shipped)
    assert got == pytest.approx({"stream": 20 / 16 / 2.5, "roofline": 20 / 10 / 4, "us": 20 / 30})
    slow = cell(us=80.0)
    lines = table.summary_lines([cell(), slow], {("fp8", "A", 1): shipped}, "op")
    assert "worst 2.00 at fp8 A M=1, geometric mean 1.00 over 2 cells" in lines[0]
    assert lines[-1] == "op: 1 cells beyond 1.5: fp8 A M=1 2.00"


def test_read_kernel_reads_every_element():
    pytest.importorskip("triton")
    script = (
        f"import sys; sys.path.insert(0, {str(EXAMPLES)!r})\n"
        "import torch\n"
        "from _bench_read import CONFIGS, read_once\n"
        "x = torch.randint(-2**31, 2**31 - 1, (70_001,), dtype=torch.int32)\n"
        "for config in CONFIGS:\n"
        "    sink = torch.zeros(64, dtype=torch.int32)\n"
        "    read_once(x, sink, config)\n"
        "    assert sink.sum(dtype=torch.int32) == x.sum(dtype=torch.int32), config\n"
    )
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_dry_run(tmp_path):
    report = tmp_path / "report.json"
    done = run_script(
        "--device", "cpu", "--shapes", "tiny", "--tokens", "1", "8", "--peer-modes", "--json", str(report)
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "DRY RUN on a CPU" in done.stdout
    got = json.loads(report.read_text())
    cells = {(c["format"], c["tokens"]): c for c in got["cells"]}
    assert set(cells) == {(f, m) for f in ("bf16", "fp8", "fp8_block", "fp8/bf16") for m in (1, 8)}
    for c in cells.values():
        assert c["layers"]["op"]["us"] > 0
        assert c["layers"]["op"]["error"] < c["tolerance"]
        assert c["floors"]["stream"] >= c["floors"]["roofline"] > 0
    assert "tSG fp8 tiny M=1,8: NotImplementedError" in done.stdout  # a peer that cannot run costs one line


def test_precompile_and_budget():
    done = run_script(
        "--device", "cpu", "--shapes", "tiny", "--formats", "fp8", "--tokens", "1", "8", "--no-peers",
        "--precompile", "1", "--budget-seconds", "0",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "compiled in 1 processes" in done.stdout
    assert "precompile tiny fp8" not in done.stderr  # the job did not raise
    assert "not run, 0 s were over: moe_ops fp8 tiny M=1,8" in done.stdout


def test_unknown_format_is_one_line():
    done = run_script("--device", "cpu", "--shapes", "tiny", "--formats", "fp7")
    assert done.returncode == 2
    assert "unknown format 'fp7'" in done.stderr.splitlines()[-1]


def timed(us, tokens=8, name="fp8", shape="A", **layers):
    floors = timing.Floors(roofline=50.0, stream=60.0, bound="memory")
    return table.Cell(name, shape, tokens, 50.0, floors, 0.1, {"op": {"us": us, "error": 0.01}} | layers)


def test_markdown_names_the_best_peer_and_the_losses():
    shipped = table.shipped_peers()[("fp8", "A", 8)]
    even = shipped.stream * 60.0
    quick = {"hf": {"us": even / 2, "error": 0.01}, "bad": {"us": 1.0, "error": 0.5}}
    cells = [timed(even), timed(even * 1.03), timed(even, **quick), timed(even, name="mxfp8")]
    cells.append(timed(1.0, op={"failed": "x"}))
    text = table.markdown(cells, "one GPU", CEILINGS)
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| fp8") or line.startswith("| mxfp8")]
    assert [row[-1].strip(" |") for row in rows] == ["1.00", "**1.03**", "**2.00**", "", ""]
    assert [row[5].strip(" |") for row in rows[:4]] == [shipped.peer, shipped.peer, "hf (this run)", "-"]
    assert f"fp8 {(1.03 * 2) ** (-1 / 3):.2f} x" in text and "the spread, 2: fp8 A M=8 1.03, fp8 A M=8 2.00." in text
    assert rows[0][3:5] == [f"{even:.1f}", f"{shipped.stream:.2f}"] and "wrong or failed" in rows[4][3]


@pytest.mark.parametrize("name", ["128x8x2048x768", "A"])
def test_a_shape_is_listed_or_spelled_out(name):
    got, a = peers.shape_of(name), peers.SHAPES["A"]
    assert (got.experts, got.top_k, got.hidden, got.intermediate) == (a.experts, a.top_k, a.hidden, a.intermediate)


@pytest.mark.parametrize("name", ["E", "128x8x2048", "128x8x2048x0", "axbxcxd"])
def test_other_shapes_are_refused(name, capsys):
    with pytest.raises(SystemExit):
        benchmark.parse_args(["--device", "cpu", "--shapes", name])
    assert "EXPERTSxTOP_KxHIDDENxINTERMEDIATE" in capsys.readouterr().err
