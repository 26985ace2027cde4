"""Advice that was given, so that it can be held against what came of it."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Create the table `advice`."""
    op.create_table(
        "advice",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
        sa.Column("evaluation", sa.Text, nullable=False),
        sa.Column("title", sa.Text, nullable=False),
        sa.Column("basis", sa.Text, nullable=False),
        sa.Column("gain", sa.Text, nullable=False),
        sa.Column("created_at", sa.Text, nullable=False),
        sa.Column("uid", sa.Text, nullable=False, unique=True),
    )
    if op.get_bind().dialect.name == "sqlite":
        for event in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER advice_no_{event.lower()} BEFORE {event} ON advice "
                "BEGIN SELECT RAISE(ABORT, 'advice is append-only'); END"
            )
    else:
        op.execute(
            "CREATE TRIGGER advice_is_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON advice "
            "FOR EACH STATEMENT EXECUTE FUNCTION review_is_append_only()"
        )
