"""vLLM as an engine: in an environment of its own, run as a child process, asked over HTTP."""
