"""What an evaluation says: findings, the report, and what the dashboard shows."""
