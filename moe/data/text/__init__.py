"""Makes batches of text: token files, windows of documents and an exactly resumable order."""
