"""Turn a training checkpoint of a GPT-J (or a layer-sharded model folder) into a plain Hugging Face folder, to load, publish or serve.

    python convert_to_hf_gptj.py --ckpt-path model_checkpoints/my-run --save-path my-gptj

More: docs/converters.md.
"""

import sys

try:
    from converters.to_hf import main
except KeyboardInterrupt:
    print("stopped", file=sys.stderr)
    raise SystemExit(130) from None
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"error: {sys.executable} lacks the package {missing.name}. Run `make setup`, then `source .venv/bin/activate`, and try again"
    ) from None

if __name__ == "__main__":
    sys.exit(main("gptj"))
