"""MultimodalVectorizer, and how it reads, parses and encodes the columns of a table."""

from sklembed.vectorizer.vectorizer import (
    MultimodalVectorizer,
    default_table_vectorizer,
)

__all__ = ["MultimodalVectorizer", "default_table_vectorizer"]
