"""WHICH ADAPTERS FIT A PROMPT: the encoder, an adapter's vector, the search."""
