"""The models: plain nn.Modules with Hugging Face parameter names that know nothing of ranks."""
