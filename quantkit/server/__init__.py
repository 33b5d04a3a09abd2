"""An OpenAI-compatible server around the engine: HTTP in, one thread that steps the engine, streams out.

Imports the runtime, data and errors only."""
