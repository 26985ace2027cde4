"""Verdicts on pairs of answers; a database from before there were migrations has them already."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_ON_SQLITE = """
CREATE TRIGGER IF NOT EXISTS verdicts_are_not_edited BEFORE UPDATE ON verdicts
    BEGIN SELECT RAISE(ABORT, 'verdicts are append-only'); END;
CREATE TRIGGER IF NOT EXISTS verdicts_are_not_deleted BEFORE DELETE ON verdicts
    BEGIN SELECT RAISE(ABORT, 'verdicts are append-only'); END
"""
_ON_POSTGRESQL = """
CREATE FUNCTION review_is_append_only() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN RAISE EXCEPTION '% is append-only', TG_TABLE_NAME; END $$
"""
_GUARD = """
CREATE TRIGGER verdicts_are_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON verdicts
    FOR EACH STATEMENT EXECUTE FUNCTION review_is_append_only()
"""


def upgrade() -> None:
    """Create the table `verdicts`."""
    choices = "choice IN ('left', 'right', 'tie', 'both_bad')"
    op.create_table(
        "verdicts",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
        sa.Column("evaluation", sa.Text, nullable=False),
        sa.Column("example_id", sa.Text, nullable=False),
        sa.Column("arm_left", sa.Text, nullable=False),
        sa.Column("arm_right", sa.Text, nullable=False),
        sa.Column("choice", sa.Text, sa.CheckConstraint(choices), nullable=False),
        sa.Column("reviewer", sa.Text, nullable=False),
        sa.Column("comment", sa.Text, nullable=False, server_default=""),
        sa.Column("created_at", sa.Text, nullable=False),
        if_not_exists=True,
    )
    op.create_index(
        "verdicts_by_evaluation",
        "verdicts",
        ["evaluation", "reviewer", "example_id"],
        if_not_exists=True,
    )
    if op.get_bind().dialect.name == "sqlite":
        first, second = _ON_SQLITE.split("END;\n")
        op.execute(f"{first}END")
        op.execute(second)
    else:
        op.execute(_ON_POSTGRESQL)
        op.execute(_GUARD)
