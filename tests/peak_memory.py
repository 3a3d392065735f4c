"""Run as a script: loads a checkpoint quantized and prints, as JSON, how much memory that took at its highest.

    python peak_memory.py PATH FORMAT

On the CPU: anonymous memory of the process (pages of the files that are read are the system's, not counted) above what
it had before, sampled. Prints also the bytes of the model that came out.
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


def main(path, format):
    import torch
    import transformers

    import moe_ops

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    load = transformers.AutoModelForCausalLM.from_pretrained
    # Once with what is small, so that imports, caches and threads are there before it counts.
    load(os.path.join(path, "small"), dtype=torch.bfloat16, quantization_config=moe_ops.MoeOpsConfig("fp8"))
    before, peak = anonymous(), Peak()
    peak.start()
    config = None if format == "none" else moe_ops.MoeOpsConfig(format)
    model = load(os.path.join(path, "big"), dtype=torch.bfloat16, quantization_config=config)
    peak.stop = True
    peak.join()
    stored = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    return {"peak": peak.highest - before, "stored": stored, "quantized": hasattr(model, "hf_quantizer")}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
