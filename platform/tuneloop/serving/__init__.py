"""Serving: the decode engine, the OpenAI protocol and the Ray Serve application."""
