"""MultimodalVectorizer, and how it reads, parses and encodes the columns of a table."""

from sklembed.vectorizer.vectorizer import MultimodalVectorizer

__all__ = ["MultimodalVectorizer"]
