"""How models write calls of tools, and how what they wrote is read. Pure: neither a model nor a tokenizer is needed."""
