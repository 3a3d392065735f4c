"""Run as a script: loads a checkpoint quantized and prints, as JSON, how much memory that took at its highest.

    python peak_memory.py PATH FORMAT DEVICE

On a GPU: what torch has allocated there. On the CPU: anonymous memory of the process, sampled; pages of the files that
are read are the system's, and not counted. Both above what there was before. Prints also the bytes of the model.
"""

import json
import os
import sys
import threading
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def anonymous():
    """Bytes of this process that no file backs."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("RssAnon"))


class Peak(threading.Thread):
    def __init__(self):
        super().__init__(daemon=True)
        self.highest, self.stop = anonymous(), False

    def run(self):
        while not self.stop:
            self.highest = max(self.highest, anonymous())
            time.sleep(0.001)


def main(path, format, device):
    import torch
    import transformers

    import moe_ops

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()

    def load(name):
        config = None if format == "none" else moe_ops.MoeOpsConfig(format)
        return transformers.AutoModelForCausalLM.from_pretrained(
            os.path.join(path, name), dtype=torch.bfloat16, quantization_config=config, device_map=device
        )

    load("small")  # so that imports, caches and threads are there before it counts
    before, peak = anonymous(), Peak()
    if device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    peak.start()
    model = load("big")
    peak.stop = True
    peak.join()
    highest = peak.highest if device == "cpu" else torch.cuda.max_memory_allocated()
    stored = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    return {"peak": highest - before, "stored": stored, "quantized": hasattr(model, "hf_quantizer")}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
