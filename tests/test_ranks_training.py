"""FSDP2 over quantized models and low-precision training, checkpoints across numbers of ranks, and ranks that die."""

from pathlib import Path

import pytest
import rank_pool
import torch

NO_INTEGERS = tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 13)


def run(size, name, *args):
    return rank_pool.run(size, "rank_training", name, *args)


@pytest.mark.parametrize(("fmt", "trained"), [
    ("int8", False), ("fp8", False), ("mxfp4", False), ("fp8_tensor", False), ("nvfp4/bf16", False), ("fp8", True),
    ("mxfp8", True),
])  # fmt: skip
def test_losses_under_fsdp(fmt, trained):
    """Frozen codes are sharded as they are; masters are what optimizers see."""
    integers = not trained and fmt in ("int8", "mxfp4", "nvfp4/bf16")
    coupled = fmt == "fp8_tensor" or trained  # one scale for many tokens, of which ranks have a part each
    for a in run(2, "trains", fmt, trained):
        assert a["got"] == pytest.approx(a["want"], rel=0.1 if coupled else 2e-4)
        assert a["want"][-1] < a["want"][0]
        whole = integers and NO_INTEGERS
        assert ("Parameter" in a["codes"]) == whole and "DTensor" in a["codes"] and a["frozen"] != trained


@pytest.mark.parametrize(("fmt", "trained", "before", "after"), [
    ("fp8", False, 4, 2), ("mxfp4", False, 2, 4), ("nvfp4/bf16", False, 4, 2), ("fp8", True, 4, 2), ("fp8", True, 2, 4),
])  # fmt: skip
def test_checkpoint_across_numbers_of_ranks(tmp_path, fmt, trained, before, after):
    path = str(tmp_path / "checkpoint")
    want, losses = run(before, "saves", fmt, trained, path)[0]
    for got, again, other in run(after, "loads", fmt, trained, path):
        assert got == want != other
        assert again == pytest.approx(losses, rel=1e-4)


def test_lora_under_fsdp():
    pytest.importorskip("peft")
    for got, want in run(2, "lora", "mxfp4"):
        assert got == pytest.approx(want, rel=1e-5) and want[-1] < want[0]


@pytest.fixture
def short():
    """Ranks of which one will be killed; collectives give up after five seconds."""
    pools = []

    def make(size):
        pools.append(rank_pool.Pool(size, timeout=5))
        return pools[-1]

    yield make
    for pool in pools:
        pool.stop()


@pytest.mark.parametrize(("size", "name"), [(4, "runs_parallel"), (2, "trains"), (2, "saves")])
def test_a_rank_that_dies(short, tmp_path, size, name):
    """All others are told within the collective's time, and no checkpoint is left that looks whole."""
    path = tmp_path / "checkpoint"
    args = {"trains": ("int8", False), "saves": ("int8", False, str(path))}.get(name, ())
    pool = short(size)
    pool.send("rank_training", "dies", size - 1, name, *args)
    answers = pool.receive(25)
    assert "died" in answers[-1][1]
    for result, problem in answers[:-1]:
        assert problem is None and isinstance(result, str), (result, problem)
        assert any(word in result.lower() for word in ("gloo", "connection", "timed out", "timeout", "peer")), result
    assert not (Path(path) / ".metadata").exists()


def test_a_part_is_not_loaded_as_another(tmp_path):
    """Its own rank's file was taken before; that of another rank, and of another number of ranks, is refused."""
    for said in run(2, "of_a_rank", str(tmp_path), True):
        assert "mlp.experts is ep=" in said and "in what is loaded" in said
    for said in run(4, "of_a_rank", str(tmp_path), False):
        assert "of 4, tp=0 of 1 here" in said
