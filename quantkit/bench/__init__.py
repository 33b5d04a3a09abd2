"""Load on an OpenAI-compatible server, and what its clients see of it. Knows nothing of models: it could be any server."""
