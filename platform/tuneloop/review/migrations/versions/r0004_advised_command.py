"""The command of an advice, which tells whether it was followed."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add the column `command`; what was advised before has none."""
    op.add_column("advice", sa.Column("command", sa.Text))
