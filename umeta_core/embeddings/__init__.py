"""Embeddings learned without labels, one file each, with one interface (`base.Embedding`)."""
