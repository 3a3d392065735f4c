"""Run as a script: how much memory a process takes at its highest, in a training step of frozen experts.

    python step_memory.py FORMAT...

Prints, as JSON, by format: bytes stored; of the step above what was there before it, all that torch and its libraries
take included (peak_memory.py says how it is measured); and what the weights would take in float32.
"""

import json
import sys

from peak_memory import Peak, anonymous

EXPERTS, HIDDEN, INTERMEDIATE, TOKENS, TOP_K = 24, 512, 512, 64, 2


def main(formats):
    import torch

    import moe_ops

    torch.set_num_threads(1)
    up = torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN).bfloat16()
    down = torch.randn(EXPERTS, HIDDEN, INTERMEDIATE).bfloat16()
    x, ids = torch.randn(TOKENS, HIDDEN).bfloat16(), torch.rand(TOKENS, EXPERTS).argsort(-1)[:, :TOP_K]

    def step(layer):
        rows, weights = x.clone().requires_grad_(), torch.rand(TOKENS, TOP_K, requires_grad=True)
        layer(rows, ids, weights).float().square().sum().backward()
        assert rows.grad is not None and weights.grad is not None

    found = {}
    for name in formats:
        layer = moe_ops.QuantizedExperts.from_float(up, down, name)
        step(layer)  # libraries and their caches are there before it counts
        before, peak = anonymous(), Peak()
        peak.start()
        for _ in range(3):
            step(layer)
        peak.stop = True
        peak.join()
        floats = 4 * (up.numel() + down.numel())
        found[name] = {"stored": layer.bytes_stored(), "peak": peak.highest - before, "floats": floats}
    return found


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:])))
