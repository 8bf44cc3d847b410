"""The table that estimators take: its columns, its blocks, and its columns of tokens."""
