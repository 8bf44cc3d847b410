"""The table that estimators take: its columns, blocks and token columns."""
