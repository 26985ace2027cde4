"""Serve a GGUF by llama.cpp on 127.0.0.1: `serve.py FILE NUM_SLOTS CONTEXT NUM_THREADS`.

Prints the address once it answers, and ends when standard input does, which is when whoever
started it is gone.
"""

from __future__ import annotations

import sys

import xllamacpp


def main(path: str, num_slots: str, context: str, num_threads: str) -> None:
    """Serve until standard input ends."""
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.model_alias = {"exported"}
    params.n_parallel = int(num_slots)
    params.n_ctx = int(num_slots) * int(context)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(num_threads)
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
