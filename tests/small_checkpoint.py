"""A checkpoint that the examples' tests run: one layer, four experts, no tokenizer; bytes in, bytes out."""

import torch

HIDDEN, HEADS, KV_HEADS, HEAD = 64, 2, 1, 32
EXPERTS, INTERMEDIATE = 4, 32
WORDS = "In the beginning was the Word. "


def save(path):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=256, hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, head_dim=HEAD, num_experts=EXPERTS, num_experts_per_tok=2,
        moe_intermediate_size=INTERMEDIATE, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


def sizes():
    """{format: bytes of experts and linear layers with their scales}, by hand."""
    experts = EXPERTS * 3 * HIDDEN * INTERMEDIATE
    linear = HIDDEN * HEAD * (HEADS + 2 * KV_HEADS) + HEADS * HEAD * HIDDEN
    channels = EXPERTS * (2 * INTERMEDIATE + HIDDEN) + HEAD * (HEADS + 2 * KV_HEADS) + HIDDEN
    return {"bf16": 2 * (experts + linear), "fp8": experts + linear + 4 * channels,
            "mxfp4/mxfp4": (experts + linear) * 17 // 32}  # fmt: skip
