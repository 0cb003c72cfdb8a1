"""WHAT ADAPTERS EXIST: pulling, admission, the SQL tables, the vector index."""
