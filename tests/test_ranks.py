"""Models whose ranks hold parts of them: on 2 and 4 ranks they say what the whole says."""

import pytest
import rank_pool
import tiny_models

from moe_ops.formats import FORMATS

DIMS = [{"ep": 2}, {"tp": 2}, {"ep": 4}, {"tp": 4}, {"ep": 2, "tp": 2}, {"dp": 2, "ep": 2}, {"dp": 2, "tp": 2}]
ids = lambda dims: " ".join(f"{k}{v}" for k, v in dims.items())  # noqa: E731


def run(dims, name, *args, **kwargs):
    size = 1
    for n in dims.values():
        size *= n
    return rank_pool.run(size, "rank_checks", name, dims, *args, **kwargs)


def blocks(fmt):
    """Whether the scales of activations are those of the whole: none, of groups, or one for all."""
    codec = FORMATS[fmt].activation
    return codec is None or codec.block == (0, 0) or bool(codec.block[1] and not codec.global_scale)


@pytest.mark.parametrize("fmt", ["bf16", "fp8", "mxfp4", "int4_g128", "fp8_tensor", "fp8_block", "nvfp4/bf16", "int8"])
@pytest.mark.parametrize("dims", DIMS[:5], ids=ids)
def test_experts_agree(dims, fmt):
    answers = run(dims, "experts_agree", "biases", fmt)
    exact = "tp" not in dims or (blocks(fmt) and "@" not in answers[0]["format"]) or FORMATS[fmt].activation is None
    for a in answers:
        if exact:
            assert max(a["out"], a["x"], a["weights"]) < 2e-6
        else:  # a scale per token and rank: rounded anew, no worse than in the whole
            assert a["part's rounding"] < 1.1 * a["rounding"] + 1e-6 and a["out"] < 0.1
    assert len({a["sent"] for a in answers}) == 1  # bit for bit the same on every rank: the next router is
    columns = {1: 1, 2: 2 / 3, 4: 1 / 3}[dims.get("tp", 1)]  # of three blocks of 128, at the most
    assert max(a["share"] for a in answers) <= -(-5 // dims.get("ep", 1)) / 5 * columns * 1.02  # scales


@pytest.mark.parametrize(
    "kind", ["transposed", "interleaved", "clamped, interleaved by its gate", "no gate", "own gate"]
)
@pytest.mark.parametrize("dims", [{"ep": 2}, {"tp": 2}], ids=ids)
def test_every_layout(dims, kind):
    for a in run(dims, "experts_agree", kind, "mxfp4"):
        assert max(a["out"], a["x"], a["weights"]) < 2e-6


def test_norm_after_experts_needs_whole_experts():
    for a in run({"ep": 2}, "experts_agree", "post norm", "int8"):
        assert max(a["out"], a["x"], a["weights"]) < 2e-6


@pytest.mark.parametrize("fmt", ["bf16", "fp8", "fp8_tensor"])
@pytest.mark.parametrize("dims", [{"ep": 2}, {"ep": 4}, {"ep": 2, "tp": 2}], ids=ids)
def test_tokens_of_their_own(dims, fmt):
    for a in run(dims, "experts_agree", "plain", fmt, "sharded"):
        assert a["out"] < (2e-6 if fmt != "fp8" or "tp" not in dims else 0.05)
        assert a["x"] < (2e-6 if fmt != "fp8" or "tp" not in dims else 0.05)


@pytest.mark.parametrize("fmt", ["bf16", "fp8", "mxfp4", "int4_g128", "fp8_tensor"])
@pytest.mark.parametrize("dims", DIMS, ids=ids)
def test_models_agree(dims, fmt):
    answers = run(dims, "model_agrees", fmt)
    for a in answers:
        assert a["out"] < (0.1 if fmt == "fp8" else 1e-5)
        assert {"lm_head", "embed", "attention.o", "mlp.down", "split", "block.experts"} <= set(a["kinds"])
        assert a["share"] < 1.25 / dims.get("ep", 1) / dims.get("tp", 1) + 0.12  # what is whole: router, shared MLP


@pytest.mark.parametrize(("dims", "tokens", "want"), [
    ({"ep": 2}, "replicated", ["all_reduce"]),
    ({"tp": 2}, "replicated", ["all_reduce"]),
    ({"ep": 2, "tp": 2}, "sharded", ["all_gather"] * 3 + ["all_reduce", "reduce_scatter"]),
])  # fmt: skip
def test_one_graph(dims, tokens, want):
    """Not a break, and as many collectives as there have to be."""
    for a in run(dims, "compiles", "fp8", tokens, None):
        assert a["graphs"] == 1 and a["out"] < 1e-6
        found = [name for name in a["collectives"] if "wait" not in name]
        assert len(found) == len(want) and all(w in name for w, name in zip(want, found, strict=True)), found


def test_compiled_by_inductor():
    for a in run({"ep": 2}, "compiles", "fp8", "replicated", "inductor"):
        assert a["compiled"] < 1e-5


REFUSALS = {
    "no such dimension": ({"ep": 1, "rows": 2}, {}, "dimension 'rows' of the mesh is not one of dp, ep, tp"),
    "nothing to share": ({"dp": 2}, {}, "the mesh has no dimension 'ep' or 'tp'"),
    "too many ranks": ({"ep": 4}, {}, "block.experts: 3 in units of 1 cannot be split over 4 ranks"),
    "heads": ({"tp": 4}, {}, "attention.q: 128 features in heads of 64 cannot be cut in 4 equal parts"),
    "tokens": ({"ep": 2}, {"tokens": "some"}, "tokens is one of replicated, sharded, got 'some'"),
    "dense": ({"ep": 2}, {"dense": "rows"}, "dense='rows'"),
    "dense along its own tokens": ({"ep": 2}, {"dense": "ep", "tokens": "sharded"}, "with the same tokens"),
    "no plan": ({"ep": 2}, {"dense": "ep", "plan": {}}, "has no tp_plan that says how"),
    "a style": ({"ep": 2}, {"plan": {"mlp.up": "diagonal"}}, "mlp.up: 'diagonal' in the tp_plan is not known here"),
    "no Linear": ({"ep": 2}, {"plan": {"block": "colwise"}}, "block is 'colwise' in the tp_plan, and no Linear"),
    "a parameter": ({"ep": 2}, {"plan": {"lm_head.weight": "colwise"}}, "of single parameters only vectors are cut"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused_on_every_rank_before_anything_is_changed(case):
    dims, kwargs, said = REFUSALS[case]
    for text in run(dims, "refusal", kwargs):
        assert text is not None and said in text, text


FAMILIES = {  # one of each structure, and what only some have: shared experts, MLA, sinks, identities, rows on input
    "aria": "int8", "dbrx": "fp8", "deepseek_v3": "mxfp4", "gpt_oss": "mxfp4", "hy_v4": "fp8_block",
    "llama4": "fp8", "longcat_flash": "int8", "muse_spark": "fp8", "nemotron_h": "mxfp4/bf16", "step3p7": "bf16",
    "switch_transformers": "mxfp6_e2m3", "granitemoe_swa": "fp8_tensor", "qwen3_5_moe": "mxfp8",
}  # fmt: skip


@pytest.mark.parametrize("dims", [{"ep": 2}, {"tp": 2}], ids=ids)
@pytest.mark.parametrize("name", [n for n in FAMILIES if n in tiny_models.INSTALLED])
def test_families_agree(name, dims):
    for a in run(dims, "family_agrees", name, FAMILIES[name]):
        if name == "muse_spark" and "tp" in dims:
            assert "post_expert_norm needs whole outputs of experts" in a["refused"]
            continue
        rounded = FAMILIES[name] in ("fp8", "mxfp8", "fp8_block")  # scales of what a rank sees: these models are narrow
        assert a["out"] < (0.08 if rounded else 1e-5), a["out"]
        assert any("Experts" in kind or "Modul" in kind or "MoE" in kind for kind in a["kinds"]), a["kinds"]


@pytest.mark.parametrize("fmt", ["bf16", "fp8", "mxfp4", "int4_g128"])
@pytest.mark.parametrize("dims", [{"ep": 2}, {"tp": 2}, {"ep": 2, "tp": 2}], ids=ids)
def test_generation_agrees(dims, fmt):
    """With a static cache, which holds the heads of the rank; the first model of its kind compiled as one graph."""
    for a in run(dims, "generates", fmt, fmt == "fp8" and dims == {"tp": 2}):
        if len(dims) > 1:
            assert "num_key_value_heads is 2: 4 ranks cannot share them equally" in a["refused"]
            continue
        assert a["heads"] == 1 and (a["same"] or fmt == "fp8")
        assert a["out"] < (0.1 if fmt == "fp8" else 1e-5)
