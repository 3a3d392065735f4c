"""load_tuning: what a file may say, which products it serves, and that nothing is kept that was decided before."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import moe_ops
from moe_ops.kernels import tuning
from moe_ops.kernels.configs import Config, Kind, choose
from moe_ops.kernels.tuning import Product

ROOT = Path(__file__).resolve().parent.parent
KIND = Kind("fp8", gated=True)
PRODUCT = Product(90, KIND, 128, 768, 2048, 64)
TILES = Config(32, 64, 128, 4, 3, swap=True, parts=2)


@pytest.fixture(autouse=True)
def nothing_tuned():
    tuning.forget()
    yield
    tuning.forget()


def file(path, entries, top=None):
    path.write_text(json.dumps({"moe_ops_tuning": 1, "provenance": {}, "entries": entries} | (top or {})))
    return path


def entry(product=PRODUCT, config=TILES, **other):
    return asdict(product) | {"config": asdict(config)} | other


def asked(product=PRODUCT, **other):
    p = replace(product, **other)
    return tuning.tuned(p.kind, p.arch, p.experts, p.rows, p.channels, p.k)


def test_what_is_written_is_read(tmp_path):
    entries = {PRODUCT: TILES, replace(PRODUCT, rows=8, kind=Kind("bf16", 4, True)): Config(16, 64, 128, 4, 3)}
    text = tuning.written(entries, {"device": "one"}, {PRODUCT: {"us": 1.5}})
    (tmp_path / "t.json").write_text(text)
    assert tuning.read(tmp_path / "t.json") == entries
    content = json.loads(text)
    assert content["provenance"] == {"device": "one"} and content["entries"][0]["us"] == 1.5


def test_a_product_of_the_same_kind_and_size_is_served(tmp_path):
    assert asked() is None
    assert moe_ops.tuning.load_tuning(file(tmp_path / "t.json", [entry()])) == 1
    assert asked() == TILES
    for other in ({"arch": 100}, {"kind": Kind("fp8")}, {"experts": 64}, {"channels": 1536}, {"k": 4096}):
        assert asked(**other) is None


@pytest.mark.parametrize(
    ("rows", "found"), [(3, None), (4, 8), (8, 8), (11, 8), (16, 8), (23, 32), (64, 32), (65, None), (10**6, None)]
)
def test_the_nearest_number_of_rows_counts(tmp_path, rows, found):
    configs = {8: TILES, 32: replace(TILES, stages=4)}
    entries = [entry(replace(PRODUCT, rows=r), config) for r, config in configs.items()]
    moe_ops.tuning.load_tuning(file(tmp_path / "t.json", entries))
    assert asked(rows=rows) == configs.get(found)


def test_the_last_file_counts(tmp_path):
    other = replace(TILES, warps=8)
    moe_ops.tuning.load_tuning(file(tmp_path / "a.json", [entry(), entry(replace(PRODUCT, k=4096))]))
    moe_ops.tuning.load_tuning(file(tmp_path / "b.json", [entry(config=other)]))
    assert asked() == other and asked(k=4096) == TILES


BAD = {
    "version": (lambda e: {"moe_ops_tuning": 2}, "got version 2"),
    "entries": (lambda e: {"entries": {}}, "must be"),
    "no object": (lambda e: {"entries": [e, 3]}, "entry 1: must be an object"),
    "twice": (lambda e: {"entries": [e, e]}, "entry 1: an earlier one"),
    "size": (lambda e: {"entries": [e | {"k": 0}]}, "k must be a positive integer, got 0"),
    "kind": (lambda e: {"entries": [e | {"kind": {"mma": "fp8"}}]}, "kind must have exactly mma, decoded"),
    "field": (lambda e: {"entries": [e | {"config": e["config"] | {"wide": 1}}]}, "config must have exactly block_m"),
    "type": (lambda e: {"entries": [e | {"config": e["config"] | {"warps": 4.0}}]}, "warps must be int, got 4.0"),
    "tile": (lambda e: {"entries": [e | {"config": e["config"] | {"block_n": 48}}]}, "block_n must be one of 16, 32"),
    "short": (lambda e: {"entries": [e | {"config": e["config"] | {"short": 32}}]}, "less than block_m 32, got 32"),
    "words": (lambda e: {"entries": [entry(replace(PRODUCT, kind=Kind("bf16", 4)), replace(TILES, block_k=64))]},
              "block_k must be one of 128, got 64"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_and_nothing_changes(tmp_path, name):
    change, message = BAD[name]
    path = file(tmp_path / "t.json", [entry()], change(entry()))
    with pytest.raises(ValueError, match=message) as caught:
        moe_ops.tuning.load_tuning(path)
    assert "t.json" in str(caught.value) and asked() is None


def test_no_file_and_no_json_are_said(tmp_path):
    with pytest.raises(ValueError, match=r"none\.json.* cannot be read"):
        moe_ops.tuning.load_tuning(tmp_path / "none.json")
    (tmp_path / "t.json").write_text("{")
    with pytest.raises(ValueError, match=r"t\.json.* is no JSON"):
        moe_ops.tuning.load_tuning(tmp_path / "t.json")


def test_a_product_asks_here_first():
    """A batch-invariant one does not: it has one configuration for any number of rows."""
    from moe_ops.backends import triton_plan as plan
    from moe_ops.backends.base import Rows, Weight
    from moe_ops.formats import FORMATS, quantize_weight

    fmt, rows = FORMATS["fp8"], 64
    q = quantize_weight(fmt.weight, torch.empty(8, 256, 512, device="meta"))
    x = plan.Prepared(torch.empty(rows, 512, dtype=torch.float8_e4m3fn, device="meta"), None, torch.empty(rows, 1))
    numerics = plan.plan_of(fmt, torch.bfloat16, True, 512, 90)

    def product(**options):
        w = Weight(q.qdata, q.scale)
        return plan.Product(x, w, Rows(None), None, fmt, numerics, torch.bfloat16, True, **options)

    ruled, invariant = product().config(90, rows), product(invariant=True).config(90, rows)
    other = replace(ruled, stages=ruled.stages + 1, parts=4)
    tuning.add({Product(90, product().kind, 8, 256, 512, rows): other})
    assert product().config(90, rows) == other and product().config(90, 3 * rows) == product().config(90, 3 * rows)
    assert product(invariant=True).config(90, rows) == invariant and ruled != other


def test_what_was_decided_is_forgotten(tmp_path):
    """Repeated calls, and code that a compiler's cache holds."""
    import moe_ops.lowering
    from moe_ops.backends import repeat
    from moe_ops.lowering import cache

    with torch.compiler.config.patch(cache_key_tag="mine"):
        moe_ops.lowering.register()
        before = torch.compiler.config.cache_key_tag
        repeat._known[("a call",)] = repeat._SEEN
        moe_ops.tuning.load_tuning(file(tmp_path / "t.json", [entry()]))
        after = torch.compiler.config.cache_key_tag
        assert not repeat._known and before != after == f"mine|{cache.salt()}"
        moe_ops.tuning.load_tuning(file(tmp_path / "t.json", [entry()]))
        assert torch.compiler.config.cache_key_tag == after
        moe_ops.tuning.load_tuning(file(tmp_path / "t.json", [entry(config=replace(TILES, stages=4))]))
        assert torch.compiler.config.cache_key_tag not in (before, after)


def test_the_environment_names_files(tmp_path, monkeypatch):
    """Read by whoever chooses, or says what was chosen by."""
    from moe_ops.backends import triton_plan
    from moe_ops.lowering import cache

    assert triton_plan.from_environment is cache.tuning.from_environment is tuning.from_environment
    paths = file(tmp_path / "a.json", [entry()]), file(tmp_path / "b.json", [entry(replace(PRODUCT, k=4096))])
    monkeypatch.setenv("MOE_OPS_TUNING", os.pathsep.join(map(str, paths)))
    before = cache.salt()  # once in a process, and that was before
    monkeypatch.setattr(tuning, "from_environment", tuning.from_environment.__wrapped__)
    assert asked() is None and cache.salt() != before
    assert asked() == asked(k=4096) == TILES
    monkeypatch.setenv("MOE_OPS_TUNING", str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match=r"none\.json.* cannot be read"):
        cache.salt()


# ---- examples/benchmark.py --tune


@pytest.mark.kernels
@pytest.mark.skipif(torch.cuda.is_available(), reason="runs in the interpreter")
def test_tuning_a_shape(tmp_path):
    """Interpreted: every candidate computes the same; the file holds the fastest, and is used."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")
        import _bench_tune as tiles
        import benchmark

    fake = [Config(16, 32, 32, 4, 2), Config(16, 64, 32, 4, 2), Config(16, 64, 48, 4, 2)]  # the last cannot be built
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "candidates", lambda job: iter(fake))
        times = iter([5.0, 3.0, 4.0, 1.0] * 2)
        patch.setattr(tiles.Replay, "time", lambda self, seconds: next(times))
        out, every = tmp_path / "tiles.json", tmp_path / "every.json"
        shape = ["--shapes", "2x1x64x32", "--formats", "fp8/bf16", "--tokens", "2"]
        assert benchmark.main(["--device", "cpu", *shape, "--tune", str(out), "--json", str(every)]) == 0
    found, listed = tuning.read(out), json.loads(out.read_text())
    assert {(p.channels, p.k, p.rows, p.experts) for p in found} == {(32, 64, 2, 2), (64, 32, 2, 2)}
    assert set(found.values()) == {fake[0]}
    assert [(e["us"], e["rule_us"], e["candidates"]) for e in listed["entries"]] == [(3.0, 5.0, 4)] * 2
    assert {"device", "torch", "triton", "date"} <= set(listed["provenance"])
    assert [("error" in row) for row in json.loads(every.read_text())] == [False, False, False, True] * 2
    assert moe_ops.tuning.load_tuning(out) == 2
    for p in found:
        assert choose(p.kind, p.arch, 1.0, 2, p.channels, p.k) != fake[0]  # the rule is another
        assert asked(p) == fake[0]
