"""GGUF files to Hugging Face folders: container, metadata, config, tensors, tokenizer."""
