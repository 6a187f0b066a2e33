"""umeta: unsupervised meta-learning, rebuilt and reproduced."""

__version__ = "0.1.0"
