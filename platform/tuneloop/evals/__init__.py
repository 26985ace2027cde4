"""Scoring models over HTTP: metrics, error tags, paired comparison, the report."""
