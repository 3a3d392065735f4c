"""Run as a script, where moe_ops is not imported: loads each folder and prints, as JSON, what came of it.

    python plain_load.py FOLDER ...
"""

import json
import os
import sys
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import transformers

transformers.logging.set_verbosity_error()
warnings.simplefilter("ignore")


def outcome(path):
    with open(os.path.join(path, "config.json")) as f:
        (name,) = json.load(f)["architectures"]
    try:
        getattr(transformers, name).from_pretrained(path)
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    return "loaded"


if __name__ == "__main__":
    found = {path: outcome(path) for path in sys.argv[1:]}
    assert "moe_ops" not in sys.modules
    print(json.dumps(found))
