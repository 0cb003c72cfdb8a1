"""The hub over HTTP, in the form of OpenAI's interface."""
