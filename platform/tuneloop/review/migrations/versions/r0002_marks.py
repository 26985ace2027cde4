"""Marks on rows; and what is stored twice, after a lost connection, is kept once."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Create the table `marks` and give verdicts a `uid`; those of before have none."""
    op.add_column("verdicts", sa.Column("uid", sa.Text))
    op.create_index("verdicts_once", "verdicts", ["uid"], unique=True)
    kinds = "kind IN ('bad_reference', 'bad_row', 'fine', 'accept', 'more_like_this', 'note')"
    op.create_table(
        "marks",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
        sa.Column("uid", sa.Text, nullable=False, unique=True),
        sa.Column("kind", sa.Text, sa.CheckConstraint(kinds), nullable=False),
        sa.Column("row_id", sa.Text, nullable=False),
        sa.Column("dataset", sa.Text, nullable=False),
        sa.Column("reviewer", sa.Text, nullable=False),
        sa.Column("answer", sa.Text, nullable=False),
        sa.Column("note", sa.Text, nullable=False),
        sa.Column("evaluation", sa.Text, nullable=False),
        sa.Column("created_at", sa.Text, nullable=False),
    )
    op.create_index("marks_by_row", "marks", ["row_id"])
    if op.get_bind().dialect.name == "sqlite":
        for event in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER marks_no_{event.lower()} BEFORE {event} ON marks "
                "BEGIN SELECT RAISE(ABORT, 'marks are append-only'); END"
            )
    else:
        op.execute(
            "CREATE TRIGGER marks_are_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON marks "
            "FOR EACH STATEMENT EXECUTE FUNCTION review_is_append_only()"
        )
