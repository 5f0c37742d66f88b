"""The command `ftb-llm`: one small module per group of commands, each imported without torch, vllm, ray or transformers."""
