"""from_pretrained under a parallel plan of transformers: each rank loads its part, and says what the whole says."""

import pytest
import rank_checks
import rank_pool
import transformers

# five experts: one rank has more
SMALL = {"num_experts": 5, "num_local_experts": 5, "hidden_size": 128, "moe_intermediate_size": 256,
         "num_key_value_heads": 4}  # fmt: skip
BARE = {"num_local_experts": 5, "num_experts": 5}
NEW = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 21)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Folder of a checkpoint: (family, format or None for float); made once."""
    made = {}

    def folder(name, fmt=None):
        if (name, fmt) not in made:
            made[name, fmt] = str(tmp_path_factory.mktemp(name))
            rank_checks.saved(made[name, fmt], name, fmt, **(SMALL if name == "qwen3_moe" else BARE))
        return made[name, fmt]

    return folder


def check(answers, fmt, dense, share):
    for a in answers:
        assert "refused" not in a, a["refused"]
        assert a["out"] < (0.08 if fmt == "fp8" else 1e-5) and a["compiled"] < 1e-6
        assert ("ParallelQuantizedLinear" in a["kinds"]) == dense
        assert a["share"] <= share * 1.02
        assert "experts holds one rank's part of its weights" in a["save"]


@pytest.mark.parametrize(("plan", "fmt"), [
    ("tp", "bf16"), ("tp", "fp8"), ("tp", "mxfp4"), ("tp", "int4_g128"), ("ep", "bf16"), ("ep", "fp8"),
])  # fmt: skip
def test_loads_a_part(checkpoint, plan, fmt):
    given = {"tp_plan": "auto"} if plan == "tp" else {"ep": True}
    answers = rank_pool.run(2, "rank_checks", "loads", checkpoint("qwen3_moe"), "qwen3_moe", fmt, given)
    dense = fmt != "bf16" and (plan == "tp" or NEW)  # before, an expert parallel plan says nothing of dense modules
    check(answers, fmt, dense, 0.5 if plan == "tp" else 0.6)


@pytest.mark.parametrize("plan", ["tp", "ep"])
def test_loads_a_part_of_a_quantized_checkpoint(checkpoint, plan):
    given = {"tp_plan": "auto"} if plan == "tp" else {"ep": True}
    path = checkpoint("qwen3_moe", "mxfp4")
    answers = rank_pool.run(2, "rank_checks", "loads", path, "qwen3_moe", "mxfp4", given, True)
    check(answers, "mxfp4", plan == "tp" or NEW, 0.5 if plan == "tp" else 0.6)


def test_biases_and_transposed_experts(checkpoint):
    answers = rank_pool.run(2, "rank_checks", "loads", checkpoint("gpt_oss"), "gpt_oss", "mxfp4", {"ep": True})
    check(answers, "mxfp4", False, 0.6)


def test_four_ranks(checkpoint):
    path = checkpoint("qwen3_moe")
    answers = rank_pool.run(4, "rank_checks", "loads", path, "qwen3_moe", "int4_g128", {"tp_plan": "auto"})
    check(answers, "int4_g128", True, 0.26)  # groups of 128 are cut in two


def test_refused_on_every_rank(checkpoint):
    """Heads that ranks cannot share, before anything is read."""
    answers = rank_pool.run(
        3, "rank_checks", "loads", checkpoint("qwen3_moe"), "qwen3_moe", "int8", {"tp_plan": "auto"}
    )
    assert all("num_attention_heads is 4: 3 ranks cannot share them equally" in a["refused"] for a in answers)


def test_only_own_experts_are_read(checkpoint):
    """Five experts over two ranks, of two layers and three matrices each."""
    reads = rank_pool.run(2, "rank_checks", "experts_read", checkpoint("qwen3_moe"))
    assert reads == [3 * 3 * 2, 2 * 3 * 2]


def test_codes_are_cut_as_they_come(checkpoint):
    (first, whole), (second, _) = rank_pool.run(2, "rank_checks", "codes_as_loaded", checkpoint("qwen3_moe", "mxfp4"))
    assert (first, second) == (whole * 3 // 5, whole * 2 // 5)
