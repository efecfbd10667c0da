"""Cut a Hugging Face GPT-NeoX into the layer-sharded model folder that the trainer's ranks load their own layers from.

    python convert_from_hf_gptneox.py --model-name EleutherAI/gpt-neox-20b --save-dir pretrained

More: docs/converters.md.
"""

import sys

try:
    from converters.from_hf import main
except KeyboardInterrupt:
    print("stopped", file=sys.stderr)
    raise SystemExit(130) from None
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"error: {sys.executable} lacks the package {missing.name}. Run `make setup`, then `source .venv/bin/activate`, and try again"
    ) from None

if __name__ == "__main__":
    sys.exit(main("gptneox"))
